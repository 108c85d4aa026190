"""A folder of pictures -> chains to train on: the step before SFT.

A vision-language model answers in four steps, after the recipe of GoT's authors (GoT, section 4.1);
the wording of the questions is ours:

    prompt    the picture in one short sentence, as a user asks for it (or given with --prompts)
    caption   one dense paragraph; the prompt says what it is about
    names     the objects of the caption that have a place, in its own words and order
    boxes     where each of them is in the picture; of several boxes the largest counts

Each box is then written behind its name in the caption. Two files do not get in each other's way:

    mine.replies.ndjson   what the model said, one line per picture, written when it is said. A run
                          that is killed loses one batch. What the model was not asked about is
                          asked: a picture that has changed, another prompt, another model
    mine.jsonl            the chains, made from the replies by the filters: other filters need no
                          new replies. mine.dropped.ndjson says what was dropped, and why

    python -m data.annotate pictures --out mine.jsonl --dry_run     # look at eight of them
    python -m data.annotate pictures --out mine.jsonl
    python train_sft.py --data mine.jsonl --box_format 0..999 …
"""

import dataclasses
import functools
import hashlib
import json
import re
import textwrap
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import rewards
from data import cache as token_cache
from data.got import FOUR_NUMBERS, BadRecord, Source, read_image
from engine import checkpoints, run
from render_boxes import MARKERS, OBJ_END, OBJ_START, Box, draw_boxes, format_box, iou, parse_chain
from toy import world as toy

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
RULES = 1  # raise it when the same model gives other replies: its questions, or how they are read


@dataclass
class Config:
    pictures: str  # folder of pictures, with those in its folders
    out: str = "mine.jsonl"  # file for the chains; the other files lie beside it
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # folder or hub id of a Qwen-VL; http://…/v1; `toy`
    judge_model: str = ""  # its name on the server of http://…/v1; default: the only one there
    judge_frame: Literal["ask", "pixels", "grid"] = "ask"  # what a served model's boxes count in
    prompts: str = ""  # JSON lines {"image": path in the folder, "prompt": text}; else it is asked
    device: str = ""  # where the model is; default: the GPU if there is one
    batch: int = 16  # pictures per step; a run that is killed loses one such batch
    judge_batch: int = 0  # rows that the model takes at a time; 0: 16, or 64 on a server
    longest_side: int = 768  # pixels; larger pictures are shown to the model in this size
    max_pictures: int = 0  # only the first ones; 0: all
    min_boxes: int = 1  # a picture with fewer boxes is left out
    smallest: float = 0.01  # share of the picture below which a box is dropped
    largest: float = 0.95  # share of the picture above which a box is dropped
    same_box: float = 0.9  # IoU above which two names stand on one box: the later name is dropped
    max_chain: int = 600  # tokens; pictures with longer chains are left out
    policy: str = "deepseek-community/Janus-Pro-1B"  # whose tokenizer counts; `toy` with the toy
    follow_outside: bool = False  # read pictures whose path leaves the folder by a link, too
    dry_run: bool = False  # only eight pictures, drawn with their chains and boxes


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

MAX_TOKENS = {"prompt": 60, "caption": 300, "names": 300}  # of a reply


class Answer(NamedTuple):
    """What a reply says: text, a list of names, or a list of boxes; None if it cannot be read."""

    value: str | list | None
    reply: str = ""
    reason: str = ""  # why it cannot be read


def parse_text(reply: str) -> Answer:
    """A sentence or a paragraph, in one line.

    >>> parse_text('Caption: "A dog\\non a mat."').value
    'A dog on a mat.'
    """
    words = " ".join(reply.split())
    text = re.sub(r"^(?:caption|description|prompt|sentence):\s*", "", words, flags=re.I)
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1].strip()
    if reply.rstrip().endswith("…"):
        return Answer(None, reply, "cut off")
    if not re.search(r"[^\W\d_]", text):
        return Answer(None, reply, "no words")
    if "<|" in text or FOUR_NUMBERS.search(text):
        return Answer(None, reply, "markers or coordinates in the text")
    return Answer(text, reply)


STRING = re.compile(r'"([^"\n]*)"|\'((?:[^\'\n]|\'(?=\w))*)\'')


def parse_names(reply: str) -> Answer:
    """The strings of a JSON or Python list; of a list that was cut off, those that are whole.

    >>> parse_names('Here it is: ["red ball", \\'woman\\'s hat\\', "blue cu…').value
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
        return Answer(None, reply, "no list of names")
    return Answer(names, reply)


# An annotator is any object with these four calls, each on a batch, one Answer per row.
#   prompts(pictures)             the sentence that a user would have typed
#   captions(pictures, prompts)   the dense paragraph
#   names(captions)               the names of objects in it
#   boxes(pictures, names)        lists of Box on the 0..1000 grid for this name in this picture


class VlmAnnotator:
    """Asks a vision-language model: any `rewards.VlmJudge`, wherever it runs."""

    def __init__(self, judge: "rewards.VlmJudge"):
        self.judge = judge

    def prompts(self, pictures):
        return self.ask("prompt", [PROMPT] * len(pictures), pictures, parse_text)

    def captions(self, pictures, prompts):
        texts = [CAPTION.format(prompt=without_markers(prompt)) for prompt in prompts]
        return self.ask("caption", texts, pictures, parse_text)

    def names(self, captions):
        texts = [NAMES.format(caption=without_markers(caption)) for caption in captions]
        return self.ask("names", texts, [None] * len(texts), parse_names)

    def boxes(self, pictures, names):
        found = self.judge.ground(pictures, names)
        answers = []
        for boxes, reply in zip(found, self.judge.words["ri"], strict=True):
            answers.append(Answer(boxes, reply, "" if boxes is not None else "no boxes"))
        return answers

    def ask(self, step: str, texts: list[str], pictures: list, parse) -> list[Answer]:
        rows = []
        for text, picture in zip(texts, pictures, strict=True):
            rows.append(rewards.Question(text, picture, MAX_TOKENS[step]))
        return [parse(reply.text) for reply in self.judge.write(rows)]


def without_markers(text: str) -> str:
    """A text without what separates the turns of a chat: it must not speak for the model."""
    return rewards.CHAT_MARKERS.sub(" ", text)


class ToyAnnotator:
    """Reads the pictures of toy/world.py exactly, and says it in the toy's words."""

    def prompts(self, pictures):
        return [self.describe(picture, "a") for picture in pictures]

    def captions(self, pictures, prompts):
        return [self.describe(picture, "A") for picture in pictures]

    def names(self, captions):
        return [Answer(toy.read_text(caption)[0]) for caption in captions]

    def boxes(self, pictures, names):
        return [Answer(boxes) for boxes in toy.ToyJudge().ground(pictures, names)]

    def describe(self, picture: Image.Image, article: str) -> Answer:
        """The objects in some order, with relations that hold; of two objects, sometimes without.
        The picture itself decides what is drawn by lot."""
        found = [box for box in toy.detect(picture) if not box.name.endswith("blob")]
        if not found:
            return Answer(None, reason="no object is seen")
        rng = np.random.default_rng(zlib.crc32(picture.tobytes()))
        boxes = [found[k] for k in rng.permutation(len(found))]
        relations = []
        if len(boxes) > 2 or rng.random() < 0.6:
            for j in range(1, len(boxes)):
                holding = true_relations(boxes[0], boxes[j])
                if holding:
                    relations.append((0, str(rng.choice(holding)), j))
        names = [box.name for box in boxes]
        scene = toy.Scene(names, relations, cells=[])
        return Answer(" ".join([article, *toy.sentence(scene, names)[1:]]))


def true_relations(a: Box, b: Box) -> list[str]:
    return [words for words in toy.RELATIONS if toy.is_related(a, words, b)]


# -------------------------------------------------------------------------------------------------
# A batch of pictures, step by step


def ask_batch(annotator, pictures: list[Image.Image], prompts: list[str]) -> list[dict]:
    """What the model says about some pictures; an empty prompt is asked for.

    A row has `prompt`, `caption`, `names` and `boxes` (name -> list of corners), as far as they
    could be read, and `bad`: what could not, as [step, reason, reply]."""
    rows = []
    for prompt in prompts:
        rows.append({"prompt": prompt, "caption": "", "names": [], "boxes": {}, "bad": []})

    def enter(step: str, chosen: list[int], answers: list[Answer]) -> list[int]:
        """Writes the answers into the chosen rows; returns the rows whose answer was read."""
        read = []
        for k, answer in zip(chosen, answers, strict=True):
            if answer.value is None:
                rows[k]["bad"].append([step, answer.reason, answer.reply])
            else:
                rows[k][step] = answer.value
                read.append(k)
        return read

    lacking = [k for k, row in enumerate(rows) if not row["prompt"]]
    if lacking:
        enter("prompt", lacking, annotator.prompts([pictures[k] for k in lacking]))
    asked = [k for k, row in enumerate(rows) if row["prompt"]]
    if asked:
        told = [rows[k]["prompt"] for k in asked]
        captions = annotator.captions([pictures[k] for k in asked], told)
        asked = enter("caption", asked, captions)
    if asked:
        asked = enter("names", asked, annotator.names([rows[k]["caption"] for k in asked]))
    questions = []  # (row, name), each once
    for k in asked:
        for name, span in places(rows[k]["caption"], rows[k]["names"]):
            if span and (k, name) not in questions:
                questions.append((k, name))
    if questions:
        shown = [pictures[k] for k, _ in questions]
        answers = annotator.boxes(shown, [name for _, name in questions])
        for (k, name), answer in zip(questions, answers, strict=True):
            if answer.value is None:
                rows[k]["bad"].append([f"box of {name}", answer.reason, answer.reply])
            else:
                corners = [[round(edge, 1) for edge in box[1:]] for box in answer.value]
                rows[k]["boxes"][name] = corners
    return rows


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


# -------------------------------------------------------------------------------------------------
# The filters


@dataclass
class Result:
    """What became of a picture."""

    image: str  # its path in the folder
    prompt: str = ""
    chain: str = ""  # empty if the picture is left out
    cause: str = ""  # why it is left out, one of a few fixed words to count by
    detail: str = ""
    objects: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # (name, why dropped)
    bad: list[list[str]] = dataclasses.field(default_factory=list)  # [step, reason, reply]


def make_chain(config: Config, image: str, row: dict, tokenizer) -> Result:
    """The chain of a picture from what the model said about it, see `ask_batch`."""
    result = Result(image, row["prompt"], bad=row["bad"])
    for step in ("picture", "prompt", "caption", "names"):
        for bad_step, reason, reply in row["bad"]:
            if bad_step == step == "picture":  # not a reply: the file cannot be read
                result.cause = reason
                result.detail = reply
                return result
            if bad_step == step:
                result.cause = f"{step} cannot be read"
                result.detail = reason
                return result
    chain = row["caption"]
    boxes = choose_boxes(config, row, result)
    for (start, stop), box in sorted(boxes, reverse=True):  # from the end: earlier places stay
        name = chain[start:stop]  # as the caption writes it
        corners = [min(round(edge), 999) for edge in box[1:]]
        marked = f"{OBJ_START}{name}{OBJ_END} {format_box(*corners)}"
        chain = chain[:start] + marked + chain[stop:]
    if len(boxes) < config.min_boxes:
        result.cause = "too few boxes"
        result.detail = f"{len(boxes)} of {len(row['names'])} names have a box"
        return result
    try:
        source = Source(box_format="0..999", max_chain=config.max_chain)
        said = {"prompt": result.prompt, "chain": chain}
        result.prompt, result.chain = token_cache.texts_that_fit(said, source, tokenizer, (1, 1))
    except BadRecord as bad:
        result.cause = bad.cause
        result.detail = bad.detail
    return result


def choose_boxes(config: Config, row: dict, result: Result) -> list[tuple[tuple[int, int], Box]]:
    """((start, stop) of a name in the caption, its box) for the names that pass the filters; the
    others go into `result.objects`."""
    chosen = []
    for name, span in places(row["caption"], row["names"]):
        if span is None:
            result.objects.append((name, "name not in the caption"))
            continue
        if name not in row["boxes"]:
            result.objects.append((name, "reply cannot be read"))
            continue
        boxes = [Box(name, *corners) for corners in row["boxes"][name]]
        if not boxes:
            result.objects.append((name, "no box"))
            continue
        box = max(boxes, key=share)
        reason = ""
        is_line = round(box.x2) <= round(box.x1) or round(box.y2) <= round(box.y1)
        if is_line or share(box) < config.smallest:
            reason = "box too small"
        elif share(box) > config.largest:
            reason = "box too large"
        elif any(iou(box, other) > config.same_box for _, other in chosen):
            reason = "box of another name"
        if reason:
            result.objects.append((name, reason))
        else:
            chosen.append((span, box))
    return chosen


def share(box: Box) -> float:
    """Of the picture."""
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
        raise ValueError(
            f"{folder}: expected a folder with pictures ({' '.join(sorted(SUFFIXES))})"
        )
    return found


def read_lines(path: Path) -> list[dict]:
    """The rows of a file of JSON lines; a line that a killed run left half written is skipped."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def write_lines(path: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    run.write_whole(path, "".join(lines))


def given_prompts(path: str, images: list[str]) -> dict[str, str]:
    """Picture -> prompt, from the file of --prompts. Raises OSError and ValueError."""
    prompts = {}
    if not path:
        return prompts
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            prompts[row["image"]] = " ".join(row["prompt"].split())
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            expected = 'expected {"image": "path in the folder", "prompt": "text"}'
            raise ValueError(f"{path}, line {number}: {expected}") from problem
    unknown = sorted(prompts.keys() - set(images))
    if unknown:
        told = f"{len(unknown)} pictures that are not in the folder, first {unknown[0]}"
        raise ValueError(f"{path} names {told}")
    return prompts


def model_mark(name: str) -> str:
    """Changes when the model does: the name of a hub id, the files of a folder."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    stats = []
    for path in sorted(folder.iterdir()):
        stat = path.stat()
        stats.append((path.name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def reply_keys(config: Config, images: list[str], prompts: dict[str, str]) -> dict[str, str]:
    """Per picture what the replies about it depend on: replies with another key are not used."""
    model = model_mark(config.model)
    source = picture_source(config)
    keys = {}
    for image in images:
        picture = token_cache.picture_stat(image, source)
        shown = [config.longest_side, picture, prompts.get(image, "")]
        parts = [RULES, model, config.judge_model, config.judge_frame, *shown]
        keys[image] = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return keys


def picture_source(config: Config) -> Source:
    return Source(data=config.pictures, follow_outside=config.follow_outside)


def collect(config: Config, images: list[str], prompts: dict[str, str], load) -> list[dict]:
    """What the model says about each picture: from the file of replies, else it is asked and the
    file is continued. `load` returns the annotator."""
    path = beside(config.out, "replies")
    keys = reply_keys(config, images, prompts)
    known = {}  # key -> row
    asked_before = set()
    for row in read_lines(path):
        known[row["image"], row["key"]] = row
        asked_before.add(row["image"])
    missing = [image for image in images if (image, keys[image]) not in known]
    changed = asked_before.intersection(missing)
    if changed:
        told = "picture, prompt, model or questions have changed"
        print(f"{len(changed)} of {len(images)} pictures are asked about again: {told}")
    if missing:
        annotator = load()
        path.parent.mkdir(parents=True, exist_ok=True)
        is_torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")  # by a kill
        bad = 0
        with (
            path.open("a", encoding="utf-8") as file,
            tqdm(total=len(images), initial=len(images) - len(missing), unit=" pictures") as bar,
        ):
            if is_torn:
                file.write("\n")
            for first in range(0, len(missing), config.batch):
                batch = missing[first : first + config.batch]
                rows = read_and_ask(config, annotator, batch, prompts)
                for image, row in zip(batch, rows, strict=True):
                    row = {"image": image, "key": keys[image], **row}
                    known[image, keys[image]] = row
                    bad += len(row["bad"])
                    file.write(json.dumps(row) + "\n")
                file.flush()
                bar.set_postfix_str(f"{bad} bad replies")
                bar.update(len(batch))
    return [known[image, keys[image]] for image in images]


def beside(out: str, word: str) -> Path:
    """mine.jsonl -> mine.`word`.ndjson: a suffix that `--data FOLDER` does not take for data."""
    return Path(out).with_suffix(f".{word}.ndjson")


def read_and_ask(
    config: Config, annotator, batch: list[str], prompts: dict[str, str]
) -> list[dict]:
    """`ask_batch` for pictures in files; one that cannot be read has only `bad`."""
    source = picture_source(config)
    pictures = {}
    rows = {}
    for image in batch:
        try:
            picture, _ = read_image({"image": image}, source)
            picture.thumbnail((config.longest_side, config.longest_side))
            pictures[image] = picture
        except BadRecord as bad:
            rows[image] = {"prompt": "", "bad": [["picture", bad.cause, bad.detail]]}
    if pictures:
        told = [prompts.get(image, "") for image in pictures]
        rows |= zip(pictures, ask_batch(annotator, list(pictures.values()), told), strict=True)
    return [rows[image] for image in batch]


# -------------------------------------------------------------------------------------------------
# What is written and said


def image_root(config: Config) -> tuple[Path, bool]:
    """(folder that the paths in the data start from, whether it is the folder of the data)."""
    folder = Path(config.pictures).resolve()
    home = Path(config.out).resolve().parent
    if folder.is_relative_to(home):
        return home, True
    return folder, False


def write_results(config: Config, results: list[Result]) -> None:
    """mine.jsonl, and beside it what was dropped."""
    root, _ = image_root(config)
    good = []
    dropped = []
    for result in results:
        path = (Path(config.pictures).resolve() / result.image).relative_to(root).as_posix()
        if result.chain:
            good.append({"prompt": result.prompt, "chain": result.chain, "image": path})
        if not result.chain or result.objects or result.bad:
            row = {"image": path, "left_out": result.cause, "detail": result.detail}
            row["objects"] = [{"name": name, "reason": reason} for name, reason in result.objects]
            keys = ("step", "reason", "reply")
            row["replies"] = [dict(zip(keys, bad, strict=True)) for bad in result.bad]
            dropped.append(row)
    if good:
        write_lines(Path(config.out), good)
    write_lines(beside(config.out, "dropped"), dropped)


def summary(results: list[Result]) -> str:
    """How many chains and boxes there are, and counts of all that was dropped."""
    good = [result for result in results if result.chain]
    boxes = sum(len(parse_chain(result.chain)) for result in good)
    lines = [f"{len(good)} of {len(results)} pictures have a chain, with {boxes} boxes in all"]
    left_out = Counter(result.cause for result in results if not result.chain)
    objects = Counter()
    replies = Counter()
    for result in results:
        objects.update(reason for _, reason in result.objects)
        for step, reason, _ in result.bad:
            if step != "picture":
                replies[f"{step.split()[0]}: {reason}"] += 1
    for title, counts in [
        ("pictures left out", left_out),
        ("objects dropped", objects),
        ("replies that cannot be read", replies),
    ]:
        lines.append(f"{title}: {counts.total()}")
        for cause, number in counts.most_common():
            lines.append(f"{number:8d} {cause}")
    return "\n".join(lines)


SIDE = 384  # pixels of a panel of the sheet
GAP = 8  # between panels


def draw_sheet(config: Config, results: list[Result]) -> Path:
    """Each picture with its boxes, beside it its prompt and its chain, or why it is left out."""
    font = ImageFont.load_default(13)
    step = SIDE + GAP
    sheet = Image.new("RGB", (2 * step + 160 + GAP, len(results) * step + GAP), "white")
    source = picture_source(config)
    for k, result in enumerate(results):
        y = k * step + GAP
        lines = [result.image, *textwrap.wrap(f"prompt: {result.prompt}", 78), ""]
        lines += textwrap.wrap(result.chain, 78)
        if not result.chain:
            lines += textwrap.wrap(f"left out: {result.cause}: {result.detail}", 78)
        for name, reason in result.objects:
            lines.append(f"dropped: {name[:50]}: {reason}")
        ImageDraw.Draw(sheet).text((step + GAP, y), "\n".join(lines[:22]), "black", font)
        try:
            picture, _ = read_image({"image": result.image}, source, SIDE)
        except BadRecord:
            continue
        sheet.paste(draw_boxes(parse_chain(result.chain), image=picture), (GAP, y))
    path = Path(config.out).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


# -------------------------------------------------------------------------------------------------
# The command line


def check(config: Config) -> None:
    run.check_ranges(
        config,
        at_least_one="batch min_boxes max_chain",
        not_negative="judge_batch max_pictures smallest largest same_box",
    )
    if config.longest_side < 28:
        run.fail(f"--longest_side is {config.longest_side}: expected 28 or more")
    if not config.out.endswith(".jsonl"):
        run.fail(f"--out {config.out}: expected a name that ends in .jsonl")


def load_annotator(config: Config):
    """Raises OSError or ValueError when there is no such model, or when it cannot be asked."""
    if config.model == "toy":
        return ToyAnnotator()
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    flags = rewards.JudgeConfig(
        judge=config.model,
        judge_model=config.judge_model,
        judge_batch=config.judge_batch,
        hps="",
    )
    try:
        judge, _ = rewards.load_judge(flags, device)
    except (OSError, ValueError) as problem:
        raise ValueError(f"no model at --model {config.model}: {problem}") from problem
    return VlmAnnotator(judge)


def load_tokenizer(config: Config):
    """The tokenizer that counts --max_chain. Raises OSError or ValueError."""
    name = checkpoints.TOY if "toy" in (config.model, config.policy) else config.policy
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
    except (OSError, ValueError) as problem:
        raise ValueError(f"no tokenizer of --policy {name}: {problem}") from problem
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([marker for marker in MARKERS if marker not in known])
    return tokenizer


def annotate(config: Config) -> list[Result]:
    """All of it but the files with the chains. Raises OSError, ValueError and RuntimeError."""
    images = list_pictures(Path(config.pictures))
    prompts = given_prompts(config.prompts, images)
    most = 8 if config.dry_run else config.max_pictures
    images = images[: most or None]
    tokenizer = load_tokenizer(config)
    rows = collect(config, images, prompts, functools.partial(load_annotator, config))
    results = []
    for image, row in zip(images, rows, strict=True):
        results.append(make_chain(config, image, row, tokenizer))
    return results


def main(argv: list[str] | None = None) -> None:
    config = run.parse_args(Config, __doc__, argv)
    check(config)
    try:
        results = annotate(config)
        print(summary(results))
        if config.dry_run:
            for result in results:
                print(f"\n{result.image}: {result.prompt}\n  {result.chain or result.detail}")
            print(f"\nwrote {draw_sheet(config, results)}: look at the boxes")
            return
        write_results(config, results)
    except (OSError, ValueError, RuntimeError) as problem:
        run.fail(" ".join(str(problem).split()))  # in one line
    except KeyboardInterrupt:
        run.fail(f"stopped: the same command continues from {beside(config.out, 'replies')}")
    dropped = beside(config.out, "dropped")
    if not any(result.chain for result in results):
        run.fail(f"no picture has a chain: {dropped} says why")
    root, is_home = image_root(config)
    flags = f"--data {config.out} --box_format 0..999"
    if not is_home:
        flags += f" --image_folder {root}"
    print(f"wrote {config.out}, and {dropped}: what was dropped, and why")
    print(f"look: python train_sft.py {flags} --dry_run --out out/look")


if __name__ == "__main__":
    main()
