"""A page on which one edits the plan and sees it drawn.

    pip install -r requirements.txt gradio==6.31.0 gradio_image_annotation==0.5.6
    python -m demo     # the toy, at http://127.0.0.1:7860, without network

A prompt becomes plans, which the judge scores before anything is drawn. The chosen plan is a canvas
of boxes and a text; a change of one changes the other. What is drawn is exactly that text. The
functions up to `build_page` do the work and know nothing about the page: they need no gradio.
"""

import functools
import importlib.util
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

import rewards
from engine import run
from gotr1 import (
    decode_images,
    image_token_count,
    load_policy,
    rollout,
    with_defaults,
)
from render_boxes import COLOURS, Box, chain_problems, draw_boxes, format_chain, parse_chain
from toy.world import COLORS, GRID, NAMES, RELATIONS, SHAPES, unknown_words

PACKAGES = "gradio==6.31.0 gradio_image_annotation==0.5.6"
SIDE = 1000  # pixels of the canvas: those of a box are then the numbers of the chain
CELL = 125  # a cell of the toy's grid, in the same numbers
MOST = 8  # plans, and pictures, at a time
WAITING = 20  # visitors in a queue; the next one is told to come back
PLANNED = re.compile(  # an object and its box, as in a sound chain
    r"<\|obj_start\|>[^<]*<\|obj_end\|>\s*<\|box_start\|>[^<]*<\|box_end\|>"
)
TOY_EXAMPLES = [
    "a red ball left of a blue cube",
    "a green cone above a purple ball",
    "a yellow cube below a cyan cone",
    "a blue ball and a red cone",
    "a purple cube right of a green ball and above a yellow cone",
]
TOY_WORDS = (
    f"The toy knows the colours {', '.join(COLORS)}, the shapes {', '.join(SHAPES)}, "
    f"and {', '.join(RELATIONS)}."
)


@dataclass
class Config:
    model: str = "toy"  # `toy`, with its newest run in out/; or a checkpoint's folder or hub id
    judge: str = ""  # scores plans and pictures: a folder or hub id of a VLM; the toy has its own
    cfg: float | None = None  # guidance; left out: 5 for Janus-Pro, 1 (none) for the toy
    max_chain: int | None = None  # most chain tokens; left out: 600 for Janus-Pro, 96 for the toy
    port: int = 7860  # of the page, which only this machine sees
    share: bool = False  # also give the page a public address, through Gradio's servers


@dataclass
class Studio:
    """What the buttons work with; one for all visitors."""

    policies: dict[str, tuple]  # name -> (model, tokenizer); the last one is the trained one
    judge: object = None
    is_toy: bool = True
    cfg: float = 1.0
    max_chain: int = 96
    # on a GPU a model has one set of buffers to sample with: one visitor at a time
    lock: threading.Lock = field(default_factory=threading.Lock)


# -------------------------------------------------------------------------------------------------
# Loading


def newest_toy_run(out: Path) -> Path | None:
    """The newest checkpoint of the toy among the runs in a folder, or None."""
    checkpoints = []
    for file in out.glob("*/config.json"):
        checkpoint = run.latest_checkpoint(file.parent)
        if checkpoint and json.loads(file.read_text()).get("model") == "toy":
            checkpoints.append(checkpoint)
    return max(checkpoints, key=lambda folder: folder.stat().st_mtime, default=None)


def load_studio(config: Config, device, out: Path = Path("out")) -> Studio:
    """Raises OSError or ValueError when a checkpoint cannot be loaded."""
    names = [config.model]
    newest = newest_toy_run(out) if config.model == "toy" else None
    if newest:
        names.append(str(newest))
    policies = {name: load_policy(name, device) for name in names}
    first_model, _ = policies[config.model]
    config = with_defaults(config, first_model)
    is_toy = image_token_count(first_model) == GRID**2
    judge = None
    if config.judge or is_toy:
        flags = rewards.JudgeConfig(judge=config.judge or "toy", hps="")
        judge, _ = rewards.load_judge(flags, device)
    return Studio(policies, judge, is_toy, config.cfg, config.max_chain)


# -------------------------------------------------------------------------------------------------
# Bad input is a ValueError of one sentence


def check_request(studio: Studio, prompt: str, seed: int | None) -> None:
    if not prompt.strip():
        raise ValueError("The prompt is empty: say what the picture should show.")
    if seed is None:
        raise ValueError("The seed is empty: give a whole number, 0 or more.")
    if studio.is_toy:
        unknown = unknown_words(prompt)
        if unknown:
            raise ValueError(f"The toy does not know {', '.join(unknown)[:200]}. {TOY_WORDS}")


def check_chain(studio: Studio, chain: str) -> None:
    problems = chain_problems(chain)
    if problems:
        raise ValueError(f"The plan cannot be drawn. {' '.join(problems)}")
    unknown = [box.name for box in parse_chain(chain) if box.name not in NAMES]
    if studio.is_toy and unknown:
        raise ValueError(f"The toy cannot draw {', '.join(unknown)[:200]}. {TOY_WORDS}")


# -------------------------------------------------------------------------------------------------
# Plan and draw


def write_plans(studio: Studio, name: str, prompt: str, count: int, seed: int):
    """(chains, their scores, place of the best): plans by the policy of that name."""
    check_request(studio, prompt, seed)
    model, tokenizer = studio.policies[name]
    with studio.lock:
        sampled = rollout(
            model,
            tokenizer,
            [prompt],
            group=count,
            seed=seed,
            max_chain=studio.max_chain,
            draw=False,
        )
        chains = sampled.chains
        scores = [{"total": 0.0}] * count
        if studio.judge:
            prompts = [prompt] * count
            scores = rewards.score(studio.judge, None, prompts, chains, [], parts=("sem", "spa"))
    totals = [sample["total"] for sample in scores]
    return chains, scores, totals.index(max(totals))


def draw_plan(studio: Studio, name: str, prompt: str, chain: str, count: int, seed: int):
    """(pictures, the same with boxes, their scores): exactly that plan, by the policy of that
    name."""
    check_request(studio, prompt, seed)
    check_chain(studio, chain)
    model, tokenizer = studio.policies[name]
    boxes = parse_chain(chain)
    with studio.lock:
        sampled = rollout(
            model,
            tokenizer,
            [prompt],
            group=count,
            cfg=studio.cfg,
            seed=seed,
            chains=[chain],
        )
        pictures = []
        for picture in decode_images(model, sampled.image_tokens):
            times = max(1, 448 // picture.width)  # the toy's pixels, large enough to be seen
            size = (times * picture.width, times * picture.height)
            pictures.append(picture.resize(size, Image.Resampling.NEAREST))
        scores = [{} for _ in pictures]
        if not studio.judge:
            return pictures, [draw_boxes(boxes, image=picture) for picture in pictures], scores
        scores, found = rewards.score_with_boxes(
            studio.judge, None, [prompt] * count, [chain] * count, pictures
        )
        marked = []
        for picture, found_boxes in zip(pictures, found, strict=True):
            marked.append(rewards.draw_matches(boxes, found_boxes, picture))
    return pictures, marked, scores


def score_text(scores: dict[str, float]) -> str:
    shown = [part for part in ("total", *rewards.PARTS) if part in scores]
    return "  ".join(f"{part} {scores[part]:.2f}" for part in shown)


# -------------------------------------------------------------------------------------------------
# Canvas and text


def to_canvas(studio: Studio, chain: str) -> dict:
    """The plan as the canvas takes it: a blank picture, the toy's with its cells, and boxes."""
    paper = Image.new("RGB", (SIDE, SIDE), "white")
    if studio.is_toy:
        pen = ImageDraw.Draw(paper)
        for edge in range(CELL, SIDE, CELL):
            pen.line((edge, 0, edge, SIDE), fill="#dddddd", width=2)
            pen.line((0, edge, SIDE, edge), fill="#dddddd", width=2)
    boxes = []
    for k, box in enumerate(parse_chain(chain)):
        hexadecimal = COLOURS[k % len(COLOURS)].removeprefix("#")
        edges = {"xmin": box.x1, "ymin": box.y1, "xmax": box.x2, "ymax": box.y2}
        boxes.append({"label": box.name, "color": tuple(bytes.fromhex(hexadecimal)), **edges})
    return {"image": paper, "boxes": boxes}


def from_canvas(canvas: dict) -> list[Box]:
    """The boxes, in whole numbers from 0 to 999. A name is only words: the chain's markers cannot
    be written in it. Raises ValueError for a box without a name."""
    boxes = []
    for drawn in canvas["boxes"]:
        name = " ".join(re.sub(r"[<|>]", " ", drawn["label"] or "").split())
        if not name:
            raise ValueError("A box has no name yet: double-click it and give it one.")
        edges = [drawn[edge] for edge in ("xmin", "ymin", "xmax", "ymax")]
        boxes.append(Box(name, *[min(max(edge, 0), 999) for edge in edges]))
    return boxes


def snapped(box: Box) -> Box:
    """The box on the toy's cells, one cell at least: the toy knows no other coordinates."""
    x1 = min(round(box.x1 / CELL), GRID - 1)
    y1 = min(round(box.y1 / CELL), GRID - 1)
    x2 = max(round(box.x2 / CELL), x1 + 1)
    y2 = max(round(box.y2 / CELL), y1 + 1)
    return Box(box.name, *[min(edge * CELL, 999) for edge in (x1, y1, x2, y2)])


def with_boxes(chain: str, boxes: list[Box], snap: bool = False) -> str:
    """The chain with these boxes in place of its own. A box that is in both stays as it is. Of the
    others, the first takes the place of the first old one, and so on. Old ones that are left over
    were deleted, with the words before them; new ones that are left over come last.

    Raises ValueError when the chain itself cannot be read."""
    written = list(PLANNED.finditer(chain))
    planned = parse_chain(chain)
    if len(written) != len(planned) or (chain_problems(chain) and "<|" in chain):
        raise ValueError("The text of the plan cannot be read: mend it, or plan again.")

    # 1) Which box is which
    new = list(boxes)
    texts = []  # of each planned box: what is to stand there, None where that is not known yet
    for match, box in zip(written, planned, strict=True):
        kept = box in new
        texts.append(match[0] if kept else None)
        if kept:
            new.remove(box)
    changed = [format_chain([snapped(box) if snap else box]) for box in new]
    for k, text in enumerate(texts):
        if text is None and changed:
            texts[k] = changed.pop(0)

    # 2) The words before each box; the words that open the chain stay, whichever box comes first
    ends = [0, *[match.end() for match in written]]
    opening = chain[: written[0].start()] if written else f"{chain.strip() or 'A'} "
    result = ""
    for k, (match, text) in enumerate(zip(written, texts, strict=True)):
        if text:
            result += (chain[ends[k] : match.start()] if result else opening) + text
    for text in changed:
        result += (" and a " if result else opening) + text
    return (result or opening.strip()) + (chain[ends[-1] :] if written else "")


# -------------------------------------------------------------------------------------------------
# The page


def build_page(studio: Studio):
    """The Gradio page."""
    import gradio as gr
    from gradio_image_annotation import image_annotator

    names = list(studio.policies)
    outputs = []  # of every handler: it returns those that change

    def guarded(handler):
        """Bad input, or a judge that is lost, changes nothing and is said in one line."""

        @functools.wraps(handler)
        def answer(*inputs, **others):
            try:
                changes = handler(*inputs, **others)
            except (OSError, ValueError, RuntimeError) as problem:
                line = " ".join(str(problem).split())[:500]
                return {message: gr.Textbox(line, visible=True)}
            return {message: gr.Textbox("", visible=False), **changes}

        return answer

    @guarded
    def on_plan(name, prompt, count, seed):
        chains, scores, best = write_plans(studio, name, prompt, count, seed)
        cells = []
        for written, sample in zip(chains, scores, strict=True):
            cells.append((draw_boxes(parse_chain(written)), score_text(sample)))
        return {
            plans: gr.Gallery(cells, selected_index=best, columns=max(4, count)),
            state: chains,
            chain: chains[best],
            canvas: to_canvas(studio, chains[best]),
        }

    @guarded
    def on_choice(chains, event: gr.SelectData):
        return {chain: chains[event.index], canvas: to_canvas(studio, chains[event.index])}

    @guarded
    def on_canvas(edited, text):
        boxes = from_canvas(edited) if edited else []
        if boxes == parse_chain(text):  # the canvas was changed by us
            return {}
        text = with_boxes(text, boxes, snap=studio.is_toy)
        if boxes == parse_chain(text):
            return {chain: text}
        return {chain: text, canvas: to_canvas(studio, text)}

    @guarded
    def on_text(text):
        check_chain(studio, text)
        return {canvas: to_canvas(studio, text)}

    @guarded
    def on_draw(name, prompt, text, count, seed):
        pictures, marked, scores = draw_plan(studio, name, prompt, text, count, seed)
        cells = [(picture, f"seed {seed}, picture {k + 1}") for k, picture in enumerate(pictures)]
        cells += zip(marked, map(score_text, scores), strict=True)
        return {gallery: gr.Gallery(cells, columns=count)}

    with gr.Blocks(title="GoT-R1", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# Plan, edit the plan, draw it\n" + (TOY_WORDS if studio.is_toy else ""))
        message = gr.Textbox(label="This did not work", visible=False, elem_id="message")
        state = gr.State([])  # of one visitor: the chains of the plans on show
        with gr.Row():
            prompt = gr.Textbox(label="Prompt", scale=4, elem_id="prompt")
            policy = gr.Radio(names, value=names[-1], label="Model", scale=2)
        if studio.is_toy:
            gr.Examples(TOY_EXAMPLES, prompt)
        with gr.Row():
            count = gr.Slider(1, MOST, 4, step=1, label="Plans", scale=3)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
            plan = gr.Button("Plan", variant="primary", elem_id="plan")
        plans = gr.Gallery(
            label="Plans with their R_sem and R_spa: the best one is chosen, click on another",
            allow_preview=False,
            interactive=False,
            elem_id="plans",
        )
        with gr.Row():
            with gr.Column(scale=3):
                canvas = image_annotator(
                    label="Plan: drag boxes and corners, double-click to rename or remove",
                    label_list=NAMES if studio.is_toy else None,
                    sources=[],
                    image_type="pil",
                    boxes_alpha=0.15,
                    show_download_button=False,
                    show_clear_button=False,
                    show_remove_button=True,
                    elem_id="canvas",
                )
            with gr.Column(scale=2):
                chain = gr.Textbox(label="The same plan as text", lines=8, elem_id="chain")
                number = gr.Slider(1, MOST, 4, step=1, label="Pictures")
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
        gallery = gr.Gallery(
            label="Pictures, planned boxes and those that the judge finds",
            interactive=False,
            elem_id="pictures",
        )
        outputs += [message, plans, state, chain, canvas, gallery]

        # The model's work stands in one queue; what follows a hand does not wait for it.
        working = {"outputs": outputs, "concurrency_id": "model", "api_visibility": "private"}
        quick = {"outputs": outputs, "show_progress": "hidden", "api_visibility": "private"}
        inputs = [policy, prompt, count, seed]
        plan.click(on_plan, inputs, show_progress_on=plans, **working)
        prompt.submit(on_plan, inputs, show_progress_on=plans, **working)
        plans.select(on_choice, [state], **quick)
        canvas.change(on_canvas, [canvas, chain], trigger_mode="always_last", **quick)
        for typed in (chain.input, chain.blur):  # what is pasted counts when the text is left
            typed(on_text, [chain], trigger_mode="always_last", **quick)
        inputs = [policy, prompt, chain, number, seed]
        draw.click(on_draw, inputs, show_progress_on=gallery, **working)
    page.queue(max_size=WAITING)
    return page


CSS = """
#message {  /* over the page: if it moved the canvas, a box would be drawn askew */
  position: fixed; top: 8px; left: 5%; width: 90%; z-index: 50; border: 2px solid #d62839;
}
#plans .fixed-height { min-height: 0; }
#canvas button[aria-label^=Rotate] { display: none; }
"""


def main(argv: list[str] | None = None) -> None:
    config = run.parse_args(Config, __doc__, argv)
    run.check_ranges(config, at_least_one="port max_chain", not_negative="cfg")
    for package in ("gradio", "gradio_image_annotation"):
        if not importlib.util.find_spec(package):
            run.fail(f"{package} is missing: pip install {PACKAGES}")
    _, _, device = run.start_processes()
    try:
        page = build_page(load_studio(config, device))
        page.launch(
            server_name="127.0.0.1",
            server_port=config.port,
            share=config.share,
            css=CSS,
            footer_links=[],
            max_file_size=1,  # byte: nobody uploads anything
        )
    except (OSError, ValueError) as problem:
        run.fail(" ".join(str(problem).split()))


if __name__ == "__main__":
    main()
