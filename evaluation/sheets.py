"""Stand-in for the sheets that evaluation/ is getting: prompts, plans and pictures."""

from evaluation import stats


def draw_sheet(rows, path, columns=3, side=224, title="", text_size=13):
    """Each row (prompt, note, chain, image): the plan, beside it the picture with its boxes."""
    stats.draw_plans(rows, path, side, columns)
