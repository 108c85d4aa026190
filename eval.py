"""Evaluates a checkpoint on a benchmark: GenEval, GenEval 2, T2I-CompBench, or the toy.

1) Pictures: the model draws each prompt a few times, into the folders that the official programs
   expect. An interrupted run continues: it keeps pictures of the same weights. The same seed,
   prompt and sample give the same picture on any number of processes. `--images
   FOLDER` scores pictures that any model has made.
2) Scores: one per picture, with a reason in words.
3) Report: a table, computed as the official programs do, with 95 % intervals over prompts (the
   samples of a prompt are not independent); `results.json`, with all settings that change a score;
   sheets of right and wrong pictures.

    python eval.py --bench toy --model out/grpo/step_000110
    python eval.py --bench geneval --prompts evaluation_metadata.jsonl --model PATH \\
        --detector mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth
    python eval.py --bench geneval2 --prompts geneval2_data.jsonl --model PATH
    torchrun --nproc_per_node 8 eval.py --bench compbench --prompts color_val.txt --model PATH
    python eval.py --compare out/before/results.json out/after/results.json
"""

import functools
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine import run
from evaluation import sheets, stats


@dataclass
class Config:
    # What to do
    bench: Literal["toy", "geneval", "geneval2", "compbench"] = "toy"  # which prompts and scores
    model: str = ""  # `toy`, or a folder or hub id; with --images only a name in the report
    prompts: tuple[str, ...] = ()  # file of the benchmark: evaluation_metadata.jsonl, color_val.txt
    out: str = "out/eval"  # for pictures, scores, report, sheets; the same command continues there
    images: str = ""  # folder of pictures to score, in the official layout, instead of drawing
    compare: tuple[str, ...] = ()  # two files results.json: which differences are significant
    # How to draw
    samples: int = 0  # pictures per prompt; 0: the official 4 (GenEval), 1 (GenEval 2) or 10
    chain: bool = True  # write a chain first; --no_chain draws from the prompt alone
    cfg: float | None = None  # guidance; default: 5 for Janus-Pro, 1 (none) for the toy
    temperature: float = 1.0  # of chain and image tokens
    max_chain: int | None = None  # most tokens of a chain; default: 600 for Janus-Pro, toy 96
    seed: int = 0  # fixes all samples
    draw_batch: int = 32  # pictures drawn at a time
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights; auto: bfloat16 on a GPU
    # How to score: folders or hub ids
    detector: str = "facebook/mask2former-swin-small-coco-instance"  # or GenEval's official .pth
    clip: str = "openai/clip-vit-large-patch14"  # GenEval's colours (ViT-L/14)
    clip_b32: str = "openai/clip-vit-base-patch32"  # CompBench non_spatial, complex (ViT-B/32)
    blip: str = "Salesforce/blip-vqa-capfilt-large"  # CompBench color, shape, texture, complex
    gdino: str = "IDEA-Research/grounding-dino-base"  # CompBench spatial-gdino, complex-gdino
    complex_lists: tuple[str, ...] = ()  # complex_val_spatial.txt and complex_val_action.txt
    judge: str = "Qwen/Qwen3-VL-8B-Instruct"  # GenEval 2: folder, hub id, http://…/v1, or toy
    judge_model: str = ""  # its name on the server of http://…/v1; default: the only one there
    score_batch: int = 16  # pictures that a network takes at a time
    # The toy
    toy_prompts: int = 240  # held-out prompts
    toy_seeds: int = 3  # samples per prompt, each with another seed; their spread is reported


def check_config(config: Config) -> None:
    """Bad settings end the program here, in one line, before anything is loaded or written."""
    run.check_ranges(
        config,
        at_least_one="max_chain draw_batch score_batch toy_prompts toy_seeds",
        not_negative="samples cfg temperature seed",
    )
    if config.bench == "toy":
        refused = [name for name in ("images", "prompts") if getattr(config, name)]
        if not config.chain:
            refused.append("no_chain")
        if refused:
            run.fail(f"--bench toy has its own prompts and scores chains: no --{refused[0]}")
        return
    if bool(config.images) == bool(config.prompts):
        wanted = "give --prompts and --model to draw, or --images to score"
        run.fail(f"--bench {config.bench}: {wanted}")
    if config.prompts and not config.model:
        run.fail("--model is missing: a folder or hub id of the checkpoint that draws, or toy")
    if config.bench != "compbench" and len(config.prompts) > 1:
        run.fail(f"--prompts: {config.bench} has one file")


def main(argv: list[str] | None = None) -> None:
    config = run.parse_args(Config, __doc__, argv)
    check_config(config)
    try:
        if config.compare:
            compare(config)
            return
        rank, world, device = run.start_processes()
        dtype = config.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.type == "cuda" else "float32"
        if config.bench == "toy":
            run_toy(config, dtype, rank, world, device)
        else:
            run_benchmark(config, dtype, rank, world, device)
    except (OSError, ValueError) as problem:
        run.fail(" ".join(str(problem).split()))


def compare(config: Config) -> None:
    """Prints the differences between two results.json, and which of them are significant."""
    from evaluation.geneval import TAGS

    if len(config.compare) != 2:
        raise ValueError("--compare: give two files results.json")
    print(stats.compare_files(config.compare, overall=TAGS))


# -------------------------------------------------------------------------------------------------
# GenEval, GenEval 2 and T2I-CompBench


def run_benchmark(config: Config, dtype: str, rank: int, world: int, device) -> None:
    """Draws, scores and reports, with what evaluation/BENCH.py knows of its benchmark."""
    from evaluation import run as evaluation_run

    module = importlib.import_module(f"evaluation.{config.bench}")  # loads no other benchmark
    board = module.Board(config, device)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if config.images:
        folder = Path(config.images)
        pictures = board.find_pictures(folder)
    else:
        folder = out / "images"
        pictures = board.plan_pictures(folder)
    if not pictures:
        source = config.images or config.prompts[0]
        raise ValueError(f"{source} holds nothing for {config.bench} to look at")
    board.prepare(pictures)  # before drawing: fails if the pictures could not be scored

    # 1) Pictures
    if not config.images:
        config = evaluation_run.with_model_defaults(config)
        evaluation_run.generate(config, pictures, folder, dtype, rank, world, device)

    # 2) Scores
    rows = evaluation_run.score_pictures(board, pictures, folder, config.score_batch, rank, world)

    # 3) Report
    if rank > 0:
        return
    about = evaluation_run.describe(board, pictures, rows, folder)
    summary = stats.intervals(rows, board.overall)
    cells = [{**row, "image": folder / row["path"]} for row in rows]
    report(config, about, summary, rows, cells)


# -------------------------------------------------------------------------------------------------
# The toy


def run_toy(config: Config, dtype: str, rank: int, world: int, device) -> None:
    """Draws, scores and reports, with several seeds and the toy's exact judge."""
    import gotr1
    import rewards
    from engine.checkpoints import DTYPES, policy_files
    from evaluation import held_out
    from toy.world import ToyJudge, crispness, detect, follow_plans, toy_prompts

    Path(config.out).mkdir(parents=True, exist_ok=True)
    name = config.model or "toy"
    model, tokenizer = gotr1.load_policy(name, device, DTYPES[dtype])
    config = gotr1.with_defaults(config, model)
    prompts = toy_prompts(config.toy_prompts, seed=7, held_out=True)
    given_plans = follow_plans()  # drawn as they are: does the model follow a plan?
    score = functools.partial(rewards.score_with_boxes, ToyJudge(), crispness)

    # 1) and 2) Pictures and scores
    rows = []
    cells = []
    for seed in range(config.seed, config.seed + config.toy_seeds):
        drawing = held_out.Drawing(
            model,
            tokenizer,
            seed=seed,
            cfg=config.cfg,
            temperature=config.temperature,
            max_chain=config.max_chain,
            rank=rank,
            world=world,
        )
        label = f"seed {seed}"
        own = held_out.evaluate(drawing, score, prompts, label=label, exact=True)
        rest = held_out.evaluate_rest(drawing, score, prompts, given_plans, label)
        for sample in rest:
            # a single number of all prompts, so there is no interval over prompts
            sample["measures"].pop("variety: place entropy", None)
            rows.append(toy_row(sample, seed))
        for sample in own:
            prompt = sample["prompt"]
            boxes = detect(sample["image"])  # of all objects, not only the planned ones
            reason = held_out.toy_faults(prompt, boxes)
            rows.append({**toy_row(sample, seed), "reason": reason, "chain": sample["chain"]})
            group = held_out.categories(prompt)[-1]  # the most specific one
            cell = {
                "prompt": prompt,
                "group": group,
                "score": sample["measures"][f"{group}: picture right"],
                "reason": reason,
                "image": sample["image"],
                "boxes": boxes,
            }
            cells.append(cell)

    # 3) Report
    if rank > 0:
        return
    generation = {
        "model": name,
        "weights": run.digest(run.file_stamps(policy_files(name))),
        "cfg": config.cfg,
        "temperature": config.temperature,
        "max_chain": config.max_chain,
        "seed": config.seed,
        "toy_seeds": config.toy_seeds,
        "toy_prompts": config.toy_prompts,
        "dtype": dtype,
    }
    about = {"generation": generation, "scoring": {"judge": "toy (exact)"}, "notes": []}
    summary = stats.intervals(rows)
    report(config, about, summary, rows, cells)


def toy_row(sample: dict, seed: int) -> dict:
    """A row of held_out.py in the form that stats.py takes; each seed is a sample of the prompt."""
    row = {name: sample[name] for name in ("index", "prompt", "measures")}
    row["sample"] = seed
    return row


# -------------------------------------------------------------------------------------------------
# The report


def report(config: Config, about: dict, summary: dict, rows: list[dict], cells: list[dict]) -> None:
    """Writes results.json and sheets of right and wrong pictures, and prints the table.

    about: settings that change a score, in two dicts, "generation" and "scoring"; and "notes", a
        list of sentences.
    cells: what sheets.py draws; each "group" of them gets a sheet."""
    out = Path(config.out)
    names = sorted(summary, key=stats.place)
    summary = {name: summary[name] for name in names}
    results = {
        "bench": config.bench,
        "summary": summary,
        "generation": about["generation"],
        "scoring": about["scoring"],
        "notes": about["notes"],
        "rows": rows,
    }
    run.write_whole(out / "results.json", json.dumps(results))
    for group in sorted({cell["group"] for cell in cells}):
        chosen = sheets.right_and_wrong([cell for cell in cells if cell["group"] == group])
        path = out / f"sheet_{group.replace(' ', '_')}.png"
        sheets.draw_sheet(chosen, path, columns=4, side=256)
    print(stats.table(summary))
    for part in ("generation", "scoring"):
        print(f"{part}: " + ", ".join(f"{name} {value}" for name, value in about[part].items()))
    for note in about["notes"]:
        print(f"note: {note}")
    shown = f"sheets of right and wrong pictures, {out / 'sheet_*.png'}"
    print(f"wrote {out / 'results.json'} and {shown}")


if __name__ == "__main__":
    main()
