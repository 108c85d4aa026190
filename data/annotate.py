"""A folder of pictures -> chains to train on: the step before SFT.

A vision-language model answers in four steps, after the recipe of GoT's authors (GoT, section 4.1);
the wording of the questions is ours:

    prompt    the picture in one short sentence, as a user asks for it (or given with --prompts)
    caption   one dense paragraph; the prompt says what it is about
    names     the objects of the caption that have a place, in its own words and order
    boxes     where each of them is in the picture; of several boxes the largest counts

Each box is then written behind its name in the caption. Boxes that teach nothing are dropped, and
pictures without a box or with a reply that cannot be read are left out; their causes are printed.
The chains are appended to --out after every batch. The same command goes on after a kill, and asks
again about pictures that were left out, or that have changed, or their prompt; another model needs
another --out:

    python -m data.annotate pictures --out mine.jsonl --max_pictures 8
    python train_sft.py --data mine.jsonl --image_folder pictures --box_format 0..999 --dry_run …
    python -m data.annotate pictures --out mine.jsonl
"""

import json
import os
import re
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from tqdm import tqdm

import rewards
from data import cache as token_cache
from data.got import OTHER_NOTATION, BadRecord, Source, read_image, read_prompt_and_chain
from engine import run
from render_boxes import Box, format_chain, iou, parse_chain

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
RULES = 3  # raise it when the same model gives other chains: by its questions, filters or reading
SMALLEST = 0.01  # share of the picture below which a box is dropped
LARGEST = 0.95  # share of the picture above which a box is dropped
SAME_BOX = 0.9  # IoU above which two names stand on one box: the later name is dropped


@dataclass
class Config:
    pictures: str  # folder of pictures, with those in its folders
    out: str = "mine.jsonl"  # file for the chains
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # folder or hub id of a Qwen-VL; or http://…/v1
    judge_model: str = ""  # its name on the server of http://…/v1; default: the only one there
    prompts: str = ""  # JSON lines {"image": path in the folder, "prompt": text}; else written
    batch: int = 16  # pictures per step; a run that is killed loses one such batch
    longest_side: int = 768  # pixels; larger pictures are shown to the model in this size
    max_pictures: int = 0  # only the first ones: look at eight before you wait for all; 0: all
    follow_outside: bool = False  # read pictures whose path leaves the folder by a link, too


@dataclass
class Sample:
    """A picture, and what is known about it so far."""

    image: str  # its path in the folder
    prompt: str
    picture: Image.Image | None = None
    caption: str = ""
    names: list[str] = field(default_factory=list)
    boxes: dict[str, list[Box]] = field(default_factory=dict)  # name -> where the model finds it
    chain: str = ""
    left_out: str = ""  # why: one of a few fixed words to count by
    detail: str = ""
    dropped: list[str] = field(default_factory=list)  # per object without a box: why


# -------------------------------------------------------------------------------------------------
# What the model is asked, and how its replies are read

PROMPT = """\
What would somebody have typed to get this picture? One short sentence of at most twenty words: the
main objects, their colours, and how they are placed. Write this sentence and nothing else."""

CAPTION = """\
Describe this picture in one paragraph of 60 to 120 words. It was asked for with: {prompt}
Mention every object that can be seen, with its colour, material and other properties, where in the
picture it is, and what is beside, above or in front of it; then ground, light and style. Say only
what is visible. No list, no numbers for positions. Write the paragraph and nothing else."""

NAMES = """\
Here is the description of a picture: {caption}
Which objects in it could be outlined with a rectangle? Copy each of them out of the description,
letter for letter, with its adjectives and without its article, in the order in which they are
mentioned. Leave out the ground, the sky, light and style. Answer with a JSON list of strings and
nothing else: ["first object", "second object"]"""


def ask_prompt(sample: Sample) -> rewards.Question:
    return rewards.Question(PROMPT, sample.picture, max_tokens=60)


def ask_caption(sample: Sample) -> rewards.Question:
    text = CAPTION.format(prompt=without_markers(sample.prompt))
    return rewards.Question(text, sample.picture, max_tokens=300)


def ask_names(sample: Sample) -> rewards.Question:
    text = NAMES.format(caption=without_markers(sample.caption))
    return rewards.Question(text, None, max_tokens=300)


def without_markers(text: str) -> str:
    """A text without what separates the turns of a chat: it must not speak for the model."""
    return rewards.CHAT_MARKERS.sub(" ", text)


def parse_text(reply: str) -> str:
    """A sentence or a paragraph, in one line. Raises ValueError.

    >>> parse_text('Caption: "A dog\\non a mat."')
    'A dog on a mat.'
    """
    words = " ".join(reply.split())
    text = re.sub(r"^(?:caption|description|prompt|sentence):\s*", "", words, flags=re.I)
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1].strip()
    if words.endswith("…"):
        raise ValueError("cut off")
    if not re.search(r"[^\W\d_]", text):
        raise ValueError("no words")
    if re.search(r"<[|｜\w]", text) or OTHER_NOTATION.search(text):
        raise ValueError("markers or coordinates in the text")
    return text


STRING = re.compile(r'"([^"\n]*)"|\'((?:[^\'\n]|\'(?=\w))*)\'')


def parse_names(reply: str) -> list[str]:
    """The strings of a JSON or Python list; of a list that was cut off, the complete ones. Raises
    ValueError.

    >>> parse_names('Here it is: ["red ball", \\'woman\\'s hat\\', "blue cu…')
    ['red ball', "woman's hat"]
    """
    _, bracket, listed = reply.partition("[")
    listed, closing, _ = listed.rpartition("]") if "]" in listed else (listed, "", "")
    names = []
    for found in STRING.finditer(listed):
        name = " ".join((found[1] or found[2] or "").split())
        if name:
            names.append(name)
    if not bracket or not names and (listed.strip() or not closing):
        raise ValueError("no list of names")
    return names


# -------------------------------------------------------------------------------------------------
# A batch of pictures, step by step


def annotate(judge: rewards.VlmJudge, samples: list[Sample]) -> None:
    """Writes chains into the samples, or why there is none. An empty prompt is asked for."""
    answer(judge, samples, "prompt", ask_prompt, parse_text)
    answer(judge, samples, "caption", ask_caption, parse_text)
    answer(judge, samples, "names", ask_names, parse_names)
    find_boxes(judge, samples)
    for sample in samples:
        if not sample.left_out:
            write_chain(sample)


def answer(judge: rewards.VlmJudge, samples: list[Sample], step: str, ask, parse) -> None:
    """Writes the model's answers into the samples that lack this step."""
    lacking = []
    for sample in samples:
        if not sample.left_out and not getattr(sample, step):
            lacking.append(sample)
    if not lacking:
        return
    replies = judge.write([ask(sample) for sample in lacking])
    for sample, reply in zip(lacking, replies, strict=True):
        try:
            setattr(sample, step, parse(reply.text))
        except ValueError as problem:
            sample.left_out = f"{step} cannot be read"
            sample.detail = f"{problem}: {reply.text[:160]!r}"


def find_boxes(judge: rewards.VlmJudge, samples: list[Sample]) -> None:
    """Asks where each object is that the caption names, all in one call."""
    questions = []  # (sample, name)
    for sample in samples:
        if not sample.left_out:
            for name, span in places(sample.caption, list(dict.fromkeys(sample.names))):
                if span:
                    questions.append((sample, name))
    if not questions:
        return
    pictures = [sample.picture for sample, _ in questions]
    found = judge.ground(pictures, [name for _, name in questions])
    for (sample, name), boxes in zip(questions, found, strict=True):
        if boxes is not None:  # else the reply could not be read
            sample.boxes[name] = boxes


def write_chain(sample: Sample) -> None:
    """The caption with the boxes that pass the filters, each behind its name."""
    chosen = []  # ((start, stop) of the name in the caption, its box)
    for name, span in places(sample.caption, sample.names):
        reason = ""
        if span is None:
            reason = "name not in the caption"
        elif name not in sample.boxes:
            reason = "reply cannot be read"
        elif not sample.boxes[name]:
            reason = "no box"
        else:
            box = max(sample.boxes[name], key=share_of_picture)
            reason = why_dropped(box, [other for _, other in chosen])
        if reason:
            sample.dropped.append(reason)
        else:
            chosen.append((span, box))
    if not chosen:
        sample.left_out = "no box"
        sample.detail = f"none of {len(sample.names)} names has one"
        return
    chain = sample.caption
    for (start, stop), box in sorted(chosen, reverse=True):  # from the end: earlier places stay
        box = box._replace(name=chain[start:stop])  # as the caption writes it
        chain = chain[:start] + format_chain([box]) + chain[stop:]
    try:  # as training will read it
        row = {"prompt": sample.prompt, "chain": chain}
        source = Source(box_format="0..999")
        sample.prompt, sample.chain = read_prompt_and_chain(row, source, size=(1, 1))
    except BadRecord as bad:
        sample.left_out = bad.cause
        sample.detail = bad.detail


def places(caption: str, names: list[str]) -> list[tuple[str, tuple[int, int] | None]]:
    """(name, where it stands in the caption) per name; None if it is not there.

    A name stands at its first place that no other name has taken; longer names choose first.

    >>> places("A red ball, a ball", ["ball", "red ball", "cube"])
    [('ball', (14, 18)), ('red ball', (2, 10)), ('cube', None)]
    """
    spans = [None] * len(names)
    taken = set()  # positions of letters
    for k in sorted(range(len(names)), key=lambda k: -len(names[k])):
        for found in re.finditer(rf"(?<!\w){re.escape(names[k])}(?!\w)", caption, re.I):
            letters = set(range(*found.span()))
            if not letters & taken:
                spans[k] = found.span()
                taken |= letters
                break
    return list(zip(names, spans, strict=True))


def why_dropped(box: Box, others: list[Box]) -> str:
    is_line = round(box.x2) <= round(box.x1) or round(box.y2) <= round(box.y1)
    if is_line or share_of_picture(box) < SMALLEST:
        return "box too small"
    if share_of_picture(box) > LARGEST:
        return "box too large"
    if any(iou(box, other) > SAME_BOX for other in others):
        return "box of another name"
    return ""


def share_of_picture(box: Box) -> float:
    return (box.x2 - box.x1) * (box.y2 - box.y1) / 1e6


# -------------------------------------------------------------------------------------------------
# The folder, and what is known about it


def list_pictures(folder: Path) -> list[str]:
    """The paths of the pictures in the folder. Raises ValueError when there are none."""
    found = []
    if folder.is_dir():
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                found.append(path.relative_to(folder).as_posix())
    if not found:
        expected = f"expected a folder with pictures ({' '.join(sorted(SUFFIXES))})"
        raise ValueError(f"{folder}: {expected}")
    return found


def given_prompts(path: str, images: list[str]) -> dict[str, str]:
    """Picture -> prompt, from the file of --prompts. Raises OSError and ValueError."""
    prompts = {}
    if not path:
        return prompts
    # not splitlines(), which knows ten more ends of a line
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompts[record["image"]] = " ".join(record["prompt"].split())
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            expected = 'expected {"image": "path in the folder", "prompt": "text"}'
            raise ValueError(f"{path}, line {number}: {expected}") from problem
    unknown = sorted(prompts.keys() - set(images))
    if unknown:
        pictures = f"{len(unknown)} pictures that are not in the folder, first {unknown[0]}"
        raise ValueError(f"{path} names {pictures}")
    return prompts


def identify_model(config: Config) -> list:
    """What changes when the model does: its files, its revision on the hub, or what its server says
    about it. Raises OSError or ValueError where there is no such model."""
    name = config.model
    folder = Path(name).expanduser()
    if name.startswith(("http://", "https://")):
        return served_models(name)
    if folder.is_dir():
        return run.file_stamps(path for path in folder.iterdir() if path.is_file())
    # a small file; the hub's cache calls its folder by the revision
    return [name, Path(hf_hub_download(name, "config.json")).parent.name]


def served_models(url: str) -> list:
    """Name and folder of each model on a server: vLLM says both. Raises OSError or ValueError."""
    key = os.environ.get("OPENAI_API_KEY", "")
    request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        models = json.load(answer)["data"]
    return sorted([model["id"], str(model.get("root"))] for model in models)


def load_judge(config: Config) -> tuple[rewards.VlmJudge, list]:
    """(the model, see `identify_model`). Raises ValueError when there is no such model, or when it
    cannot be asked."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flags = rewards.JudgeConfig(judge=config.model, judge_model=config.judge_model, hps="")
    try:
        judge, _ = rewards.load_judge(flags, device)  # waits for a server that is still starting
        if not isinstance(judge, rewards.VlmJudge):
            raise ValueError("expected a vision-language model")
        return judge, identify_model(config)
    except (OSError, ValueError) as problem:
        raise ValueError(f"no model at --model {config.model}: {problem}") from problem


def read_samples(config: Config, images: list[str], prompts: dict[str, str]) -> list[Sample]:
    """Pictures as they are shown to the model."""
    source = Source(data=config.pictures, follow_outside=config.follow_outside)
    samples = []
    for image in images:
        sample = Sample(image, prompts.get(image, ""))
        try:
            sample.picture, _ = read_image({"image": image}, source)
            sample.picture.thumbnail((config.longest_side, config.longest_side))
        except BadRecord as bad:
            sample.left_out = bad.cause
            sample.detail = bad.detail
        samples.append(sample)
    return samples


# -------------------------------------------------------------------------------------------------
# The file of chains


def picture_keys(config: Config, images: list[str], prompts: dict[str, str]) -> dict[str, str]:
    """Per picture what its chain depends on, beside the model."""
    source = Source(data=config.pictures, follow_outside=config.follow_outside)
    keys = {}
    for image in images:
        keys[image] = run.digest([token_cache.picture_stamp(image, source), prompts.get(image, "")])
    return keys


def keep_current(path: Path, made_by: str, keys: dict[str, str]) -> set[str]:
    """Removes chains of pictures that have changed or gone; returns the pictures whose chains
    remain. Raises ValueError when the file is not of this command and model."""
    if not path.exists():
        return set()
    content = path.read_text(encoding="utf-8", errors="replace")
    *lines, _ = content.split("\n")  # what follows the last end of a line, a kill left half written
    kept = []
    done = set()
    for line in lines:
        try:
            record = json.loads(line)
            is_ours = record["made_by"] == made_by
        except (ValueError, TypeError, KeyError):
            is_ours = False
        if not is_ours:
            problem = "holds other records, or those of another model or --longest_side"
            raise ValueError(f"{path} {problem}: give another --out")
        if record["key"] == keys.get(record["image"]):
            kept.append(line + "\n")
            done.add(record["image"])
    if len(kept) < len(lines):
        print(f"{path}: {len(lines) - len(kept)} pictures or their prompts have changed")
    run.write_whole(path, "".join(kept))
    return done


def annotate_folder(config: Config) -> Counter:
    """Appends what is missing to the file. Returns how many pictures of this run have a chain, and
    why others, or objects, have none. Raises OSError, ValueError and RuntimeError."""
    images = list_pictures(Path(config.pictures))
    prompts = given_prompts(config.prompts, images)
    keys = picture_keys(config, images, prompts)
    judge, model = load_judge(config)
    made_by = run.digest([RULES, model, config.judge_model, config.longest_side])
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = keep_current(out, made_by, keys)
    images = images[: config.max_pictures or None]
    missing = [image for image in images if image not in done]
    counts = Counter()
    bar = tqdm(total=len(images), initial=len(images) - len(missing), unit=" pictures")
    with out.open("a", encoding="utf-8") as file, bar:
        for first in range(0, len(missing), config.batch):
            batch = missing[first : first + config.batch]
            samples = read_samples(config, batch, prompts)
            annotate(judge, samples)
            for sample in samples:
                counts.update(f"object dropped: {reason}" for reason in sample.dropped)
                if sample.left_out:
                    counts[f"picture left out: {sample.left_out}"] += 1
                    tqdm.write(f"{sample.image}: {sample.left_out}: {sample.detail}")
                    continue
                counts["chains"] += 1
                counts["boxes"] += len(parse_chain(sample.chain))
                record = {"prompt": sample.prompt, "chain": sample.chain, "image": sample.image}
                record |= {"key": keys[sample.image], "made_by": made_by}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))
    return counts


def main(argv: list[str] | None = None) -> None:
    config = run.parse_args(Config, __doc__, argv)
    run.check_ranges(config, at_least_one="batch longest_side", not_negative="max_pictures")
    if not config.out.endswith(".jsonl"):
        run.fail(f"--out {config.out}: expected a name that ends in .jsonl")
    try:
        counts = annotate_folder(config)
    except (OSError, ValueError, RuntimeError) as problem:
        run.fail(" ".join(str(problem).split()))  # in one line
    except KeyboardInterrupt:
        run.fail(f"stopped: the same command continues {config.out}")
    for cause, number in sorted(counts.items()):
        print(f"{number:8d} {cause}")
    if not Path(config.out).stat().st_size:
        run.fail("no picture has a chain")
    flags = f"--data {config.out} --image_folder {config.pictures} --box_format 0..999"
    print(f"look: python train_sft.py {flags} --dry_run --out out/look")


if __name__ == "__main__":
    main()
