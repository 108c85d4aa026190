"""A folder of pictures -> chains to train on: the step before SFT.

A vision-language model answers in four steps, after the recipe of GoT's authors (GoT, section 4.1);
the wording of the questions is ours:

    prompt    the picture in one short sentence, as a user asks for it (or given with --prompts)
    caption   one dense paragraph; the prompt says what it is about
    names     the objects of the caption that have a place, in its own words and order
    boxes     where each of them is in the picture; of several boxes the largest counts

Each box is then written behind its name in the caption. Two files do not get in each other's way:

    mine.replies.ndjson   what the model replied, one line per picture, written at once. A run that
                          is killed loses one batch. The model is asked again only about what has
                          changed: a picture, its prompt, or the model
    mine.jsonl            the chains, made from the replies by the filters: other filters need no
                          new replies. mine.dropped.ndjson says what was dropped, and why

    python -m data.annotate pictures --out mine.jsonl --max_pictures 8
    python train_sft.py --data mine.jsonl --box_format 0..999 --dry_run …    # look at them
    python -m data.annotate pictures --out mine.jsonl
"""

import hashlib
import json
import os
import re
import urllib.request
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from tqdm import tqdm

import rewards
from data import cache as token_cache
from data.got import OTHER_NOTATION, BadRecord, Source, read_image, read_prompt_and_chain
from engine import run
from render_boxes import Box, format_chain, iou, parse_chain
from toy import world as toy

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
RULES = 2  # raise it when the same model gives other replies: its questions, or how they are read


@dataclass
class Config:
    pictures: str  # folder of pictures, with those in its folders
    out: str = "mine.jsonl"  # file for the chains; the other files lie beside it
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # folder or hub id of a Qwen-VL; http://…/v1; `toy`
    judge_model: str = ""  # its name on the server of http://…/v1; default: the only one there
    prompts: str = ""  # JSON lines {"image": path in the folder, "prompt": text}; else written
    device: str = ""  # where the model is; default: the GPU if there is one
    batch: int = 16  # pictures per step; a run that is killed loses one such batch
    judge_batch: int = 0  # questions that the model takes at a time; 0: 16, or 64 on a server
    longest_side: int = 768  # pixels; larger pictures are shown to the model in this size
    max_pictures: int = 0  # only the first ones: look at eight before you wait for all; 0: all
    min_boxes: int = 1  # a picture with fewer boxes is left out
    smallest: float = 0.01  # share of the picture below which a box is dropped
    largest: float = 0.95  # share of the picture above which a box is dropped
    same_box: float = 0.9  # IoU above which two names stand on one box: the later name is dropped
    follow_outside: bool = False  # read pictures whose path leaves the folder by a link, too


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


class Answer(NamedTuple):
    """What a reply says: text, a list of names, or a list of boxes; None if it cannot be read."""

    value: str | list | None
    reply: str = ""
    reason: str = ""  # why it cannot be read

    def as_bad(self, step: str) -> dict:
        return {"step": step, "reason": self.reason, "reply": self.reply}


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
    if re.search(r"<[|｜\w]", text) or OTHER_NOTATION.search(text):
        return Answer(None, reply, "markers or coordinates in the text")
    return Answer(text, reply)


STRING = re.compile(r'"([^"\n]*)"|\'((?:[^\'\n]|\'(?=\w))*)\'')


def parse_names(reply: str) -> Answer:
    """The strings of a JSON or Python list; of a list that was cut off, the complete ones.

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


# An annotator is any object with these four calls, each on a batch, one Answer per entry. A record
# is a dict with `picture` (PIL) and what is known so far: `prompt`, `caption`.
#   prompts(records)          the sentence that a user would have typed
#   captions(records)         the dense paragraph
#   names(records)            the names of objects in the caption
#   boxes(pictures, names)    lists of Box on the 0..1000 grid for this name in this picture


class VlmAnnotator:
    """Asks a vision-language model: any `rewards.VlmJudge`, wherever it runs."""

    def __init__(self, judge: "rewards.VlmJudge"):
        self.judge = judge

    def prompts(self, records):
        questions = []
        for record in records:
            questions.append(rewards.Question(PROMPT, record["picture"], max_tokens=60))
        return self.ask(questions, parse_text)

    def captions(self, records):
        questions = []
        for record in records:
            text = CAPTION.format(prompt=without_markers(record["prompt"]))
            questions.append(rewards.Question(text, record["picture"], max_tokens=300))
        return self.ask(questions, parse_text)

    def names(self, records):
        questions = []
        for record in records:
            text = NAMES.format(caption=without_markers(record["caption"]))
            questions.append(rewards.Question(text, None, max_tokens=300))
        return self.ask(questions, parse_names)

    def boxes(self, pictures, names):
        if not names:
            return []
        found = self.judge.ground(pictures, names)
        answers = []
        for boxes, reply in zip(found, self.judge.words["ri"], strict=True):
            answers.append(Answer(boxes, reply, "" if boxes is not None else "no boxes"))
        return answers

    def ask(self, questions: list, parse) -> list[Answer]:
        if not questions:
            return []
        return [parse(reply.text) for reply in self.judge.write(questions)]


def without_markers(text: str) -> str:
    """A text without what separates the turns of a chat: it must not speak for the model."""
    return rewards.CHAT_MARKERS.sub(" ", text)


class ToyAnnotator:
    """Reads the pictures of toy/world.py exactly, and answers in the toy's words."""

    def prompts(self, records):
        return [self.describe(record["picture"], "a") for record in records]

    def captions(self, records):
        return [self.describe(record["picture"], "A") for record in records]

    def names(self, records):
        return [Answer(toy.read_text(record["caption"])[0]) for record in records]

    def boxes(self, pictures, names):
        return [Answer(boxes) for boxes in toy.ToyJudge().ground(pictures, names)]

    def describe(self, picture: Image.Image, article: str) -> Answer:
        """The objects in some order, with relations that hold; of two objects, sometimes without.
        The random choices are seeded by the picture itself."""
        found = [box for box in toy.detect(picture) if not box.name.endswith("blob")]
        if not found:
            return Answer(None, reason="no object is seen")
        rng = np.random.default_rng(zlib.crc32(picture.tobytes()))
        boxes = [found[k] for k in rng.permutation(len(found))]
        relations = []
        if len(boxes) > 2 or rng.random() < 0.6:
            for j in range(1, len(boxes)):
                holding = [w for w in toy.RELATIONS if toy.is_related(boxes[0], w, boxes[j])]
                if holding:
                    relations.append((0, str(rng.choice(holding)), j))
        names = [box.name for box in boxes]
        scene = toy.Scene(names, relations, cells=[])
        return Answer(" ".join([article, *toy.sentence(scene, names)[1:]]))


# -------------------------------------------------------------------------------------------------
# A batch of pictures, step by step


def ask_batch(annotator, pictures: list[Image.Image], prompts: list[str]) -> list[dict]:
    """What the model says about some pictures; an empty prompt is asked for.

    A record has `prompt`, `caption`, `names` and `boxes` (name -> list of corners), as far as they
    could be read, and `bad`: the replies that could not, each with `step`, `reason` and `reply`."""
    records = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        record = {"prompt": prompt, "caption": "", "names": [], "boxes": {}, "bad": []}
        records.append({"picture": picture, **record})

    enter(records, "prompt", annotator.prompts)
    enter(records, "caption", annotator.captions, needed="prompt")
    enter(records, "names", annotator.names, needed="caption")

    owners = []  # per question the record that it is about
    names = []
    for record in records:
        for name, span in places(record["caption"], list(dict.fromkeys(record["names"]))):
            if span:
                owners.append(record)
                names.append(name)
    answers = annotator.boxes([record["picture"] for record in owners], names)
    for record, name, answer in zip(owners, names, answers, strict=True):
        if answer.value is None:
            record["bad"].append(answer.as_bad(f"box of {name}"))
        else:
            record["boxes"][name] = [[round(edge, 1) for edge in box[1:]] for box in answer.value]
    for record in records:
        del record["picture"]
    return records


def enter(records: list[dict], step: str, ask, needed: str = "picture") -> None:
    """Asks about the records that have what is needed and lack this step; writes the answers."""
    lacking = [record for record in records if record[needed] and not record[step]]
    for record, answer in zip(lacking, ask(lacking), strict=True):
        if answer.value is None:
            record["bad"].append(answer.as_bad(step))
        else:
            record[step] = answer.value


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
    left_out: str = ""  # why: one of a few fixed words to count by
    detail: str = ""
    objects: list[dict] = field(default_factory=list)  # those that are dropped: name, reason
    replies: list[dict] = field(
        default_factory=list
    )  # those that cannot be read: step, reason, reply


def make_chain(config: Config, image: str, record: dict) -> Result:
    """The chain of a picture from what the model said about it, see `ask_batch`."""
    result = Result(image, record["prompt"], replies=record["bad"])
    for bad in record["bad"]:
        if bad["step"] == "picture":  # not a reply: the file cannot be read
            result.left_out = bad["reason"]
            result.detail = bad["reply"]
        elif bad["step"] in ("prompt", "caption", "names"):
            result.left_out = f"{bad['step']} cannot be read"
            result.detail = bad["reason"]
    if result.left_out:
        return result
    chain = record["caption"]
    boxes = choose_boxes(config, record, result)
    for (start, stop), box in sorted(boxes, reverse=True):  # from the end: earlier places stay
        box = box._replace(name=chain[start:stop])  # as the caption writes it
        chain = chain[:start] + format_chain([box]) + chain[stop:]
    if len(boxes) < config.min_boxes:
        result.left_out = "too few boxes"
        result.detail = f"{len(boxes)} of {len(record['names'])} names have a box"
        return result
    try:
        row = {"prompt": result.prompt, "chain": chain}
        source = Source(box_format="0..999")
        result.prompt, result.chain = read_prompt_and_chain(row, source, size=(1, 1))
    except BadRecord as bad:
        result.left_out = bad.cause
        result.detail = bad.detail
    return result


def choose_boxes(config: Config, record: dict, result: Result) -> list[tuple[tuple[int, int], Box]]:
    """((start, stop) of a name in the caption, its box) for the names that pass the filters; the
    others go into `result.objects`."""
    chosen = []
    for name, span in places(record["caption"], record["names"]):
        reason = ""
        if span is None:
            reason = "name not in the caption"
        elif name not in record["boxes"]:
            reason = "reply cannot be read"
        elif not record["boxes"][name]:
            reason = "no box"
        else:
            boxes = [Box(name, *corners) for corners in record["boxes"][name]]
            box = max(boxes, key=share_of_picture)
            reason = why_dropped(config, box, [other for _, other in chosen])
        if reason:
            result.objects.append({"name": name, "reason": reason})
        else:
            chosen.append((span, box))
    return chosen


def why_dropped(config: Config, box: Box, others: list[Box]) -> str:
    is_line = round(box.x2) <= round(box.x1) or round(box.y2) <= round(box.y1)
    if is_line or share_of_picture(box) < config.smallest:
        return "box too small"
    if share_of_picture(box) > config.largest:
        return "box too large"
    if any(iou(box, other) > config.same_box for other in others):
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


def read_lines(path: Path) -> list[dict]:
    """The records of JSON lines; a line that a killed run left half written is skipped."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").split(
            "\n"
        ):  # splitlines() knows ten more ends
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


def write_lines(path: Path, records: list[dict]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    run.write_whole(path, "".join(lines))


def given_prompts(path: str, images: list[str]) -> dict[str, str]:
    """Picture -> prompt, from the file of --prompts. Raises OSError and ValueError."""
    prompts = {}
    if not path:
        return prompts
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
    if name == "toy":
        return [name]
    try:
        if name.startswith(("http://", "https://")):
            return served_models(name)
        if folder.is_dir():
            return run.file_stamps(path for path in folder.iterdir() if path.is_file())
        # a small file; the hub's cache calls its folder by the revision
        return [name, Path(hf_hub_download(name, "config.json")).parent.name]
    except (OSError, ValueError) as problem:
        raise ValueError(f"no model at --model {name}: {problem}") from problem


def served_models(url: str) -> list:
    """Name and folder of each model on a server: vLLM says both. Raises OSError or ValueError."""
    key = os.environ.get("OPENAI_API_KEY", "")
    request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        models = json.load(answer)["data"]
    return sorted([model["id"], str(model.get("root"))] for model in models)


def reply_keys(config: Config, images: list[str], prompts: dict[str, str]) -> dict[str, str]:
    """Per picture what the replies about it depend on: replies with another key are not used."""
    model = [RULES, identify_model(config), config.judge_model, config.longest_side]
    source = picture_source(config)
    keys = {}
    for image in images:
        facts = [*model, token_cache.picture_stamp(image, source), prompts.get(image, "")]
        keys[image] = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return keys


def picture_source(config: Config) -> Source:
    return Source(data=config.pictures, follow_outside=config.follow_outside)


def collect(config: Config, images: list[str], prompts: dict[str, str]) -> dict[str, dict]:
    """Picture -> what the model says about it: from the file of replies, which is continued with
    what is missing. A model is loaded only if something is."""
    annotator = None
    if config.model.startswith(("http://", "https://")):
        annotator = load_annotator(config)  # which waits for a server that is still starting
    keys = reply_keys(config, images, prompts)
    path = beside(config.out, "replies")
    known = {}
    outdated = set()
    for record in read_lines(path):
        if record["key"] == keys.get(record["image"]):
            known[record["image"]] = record
        else:
            outdated.add(record["image"])
    missing = [image for image in images if image not in known]
    if not missing:
        return known
    again = outdated.intersection(missing)
    if again:
        causes = "picture, prompt, model or questions have changed"
        print(f"{len(again)} of {len(images)} pictures are asked about again: {causes}")
    annotator = annotator or load_annotator(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(images), initial=len(known), unit=" pictures")
    bad = 0
    with path.open("a", encoding="utf-8") as file, bar:
        file.write("\n")  # ends the line that a kill left half written
        for first in range(0, len(missing), config.batch):
            batch = missing[first : first + config.batch]
            for image, record in read_and_ask(config, annotator, batch, prompts).items():
                known[image] = {"image": image, "key": keys[image], **record}
                file.write(json.dumps(known[image]) + "\n")
                bad += len(record["bad"])
            file.flush()
            bar.set_postfix_str(f"{bad} bad replies")
            bar.update(len(batch))
    return known


def beside(out: str, word: str) -> Path:
    """mine.jsonl -> mine.`word`.ndjson: a suffix that `--data FOLDER` does not take for data."""
    return Path(out).with_suffix(f".{word}.ndjson")


def read_and_ask(
    config: Config, annotator, images: list[str], prompts: dict[str, str]
) -> dict[str, dict]:
    """`ask_batch` for pictures in files; one that cannot be read has only `bad`."""
    source = picture_source(config)
    records = {}
    readable = []
    pictures = []
    given = []
    for image in images:
        try:
            picture, _ = read_image({"image": image}, source)
        except BadRecord as bad:
            unreadable = Answer(None, bad.detail, bad.cause).as_bad("picture")
            records[image] = {"prompt": "", "bad": [unreadable]}
            continue
        picture.thumbnail((config.longest_side, config.longest_side))
        readable.append(image)
        pictures.append(picture)
        given.append(prompts.get(image, ""))
    records.update(zip(readable, ask_batch(annotator, pictures, given), strict=True))
    return records


# -------------------------------------------------------------------------------------------------
# What is written and printed


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
        record = asdict(result)
        path = Path(config.pictures).resolve() / result.image
        record["image"] = path.relative_to(root).as_posix()
        if result.chain:
            good.append({key: record[key] for key in ("prompt", "chain", "image")})
        if result.left_out or result.objects or result.replies:
            dropped.append(record)
    if good:
        write_lines(Path(config.out), good)
    write_lines(beside(config.out, "dropped"), dropped)


def summary(results: list[Result]) -> str:
    """How many chains and boxes there are, and counts of all that was dropped."""
    chains = [result.chain for result in results if result.chain]
    boxes = sum(len(parse_chain(chain)) for chain in chains)
    lines = [f"{len(chains)} of {len(results)} pictures have a chain, with {boxes} boxes in all"]
    counts = Counter()
    for result in results:
        if result.left_out:
            counts[f"picture left out: {result.left_out}"] += 1
        for dropped in result.objects:
            counts[f"object dropped: {dropped['reason']}"] += 1
        for bad in result.replies:
            step = bad["step"].split()[0]
            if step != "picture":
                counts[f"reply cannot be read: {step}: {bad['reason']}"] += 1
    for cause, number in sorted(counts.items()):
        lines.append(f"{number:8d} {cause}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------
# The command line


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


def annotate(config: Config) -> list[Result]:
    """All of it but the files with the chains. Raises OSError, ValueError and RuntimeError."""
    images = list_pictures(Path(config.pictures))
    prompts = given_prompts(config.prompts, images)
    images = images[: config.max_pictures or None]
    known = collect(config, images, prompts)
    return [make_chain(config, image, known[image]) for image in images]


def main(argv: list[str] | None = None) -> None:
    config = run.parse_args(Config, __doc__, argv)
    run.check_ranges(
        config,
        at_least_one="batch min_boxes",
        not_negative="judge_batch max_pictures smallest largest same_box",
    )
    if config.longest_side < 28:
        run.fail(f"--longest_side is {config.longest_side}: expected 28 or more")
    if not config.out.endswith(".jsonl"):
        run.fail(f"--out {config.out}: expected a name that ends in .jsonl")
    try:
        results = annotate(config)
        print(summary(results))
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
