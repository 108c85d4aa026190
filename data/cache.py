"""Pictures to image tokens on disk, once: training reads tokens and never sees a picture.

A picture is resized to the model's square, whatever its shape; boxes, relative to width and height,
go with it. The frozen picture tokenizer (VQ) turns it into tokens. Bad records are skipped and
counted by cause; more than 20 % of them stop the run.

A cache has one folder per digest of what it was made from: settings, tokenizers, sizes and times of
the data files. Whatever has changed gives another folder, so old tokens are never used. The records
are divided into consecutive parts, one per process at first; any number of processes can go on:

    cache/1f0e2d3c/cache.json                        what it was made from, and how many parts
    cache/1f0e2d3c/tokens_00000_000000.safetensors   part 0, its first 1024 records
    cache/1f0e2d3c/tokens_00000_000001.safetensors   … the last file of a part has fewer, or none

A file is renamed when it is written to its end: a killed process loses one file's records. Training
maps the files, so that millions of records take little memory. (`Dataset.map` of the `datasets`
library keeps results, too, but a kill loses all of them, and those of a stream are never kept.)
"""

import hashlib
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import torch.distributed as dist
from tqdm import tqdm

import gotr1
from data import got
from data.got import BadRecord, Source
from engine import run
from evaluation import sheets
from render_boxes import parse_chain

BLOCK = 1024  # records per file
RULES = 2  # raise it when the same data gives other texts or other tokens than before
MOST_BAD = 0.2  # share of the records


@dataclass
class Report:
    """How many records were read, and why some of them were skipped."""

    read: int = 0
    bad: dict[str, list] = field(default_factory=dict)  # cause -> [how many, the first one]

    @property
    def skipped(self) -> int:
        return sum(number for number, _ in self.bad.values())

    @property
    def good(self) -> int:
        return self.read - self.skipped

    def count(self, cause: str, number: int, first: str) -> None:
        self.bad.setdefault(cause, [0, first])[0] += number

    def add(self, other: "Report") -> None:
        """Counts what `other` has counted; its records come after those of this report."""
        self.read += other.read
        for cause, (number, first) in other.bad.items():
            self.count(cause, number, first)

    def __str__(self) -> str:
        share = self.skipped / max(1, self.read)
        lines = [f"{self.skipped} of {self.read} records skipped ({share:.1%})"]
        for cause, (number, first) in sorted(self.bad.items()):
            lines.append(f"{number:8d} {cause:14s} first: {first}")
        return "\n".join(lines)

    def raise_if_too_many_bad(self) -> None:
        """Raises ValueError when there are too many bad records, or none at all."""
        if self.good < (1 - MOST_BAD) * self.read or not self.read:
            problem = f"more than {MOST_BAD:.0%} of the records are bad; try --dry_run."
            raise ValueError(f"{problem} {self}")


def texts_that_fit(
    row: dict, source: Source, tokenizer, size: tuple[int, int], room: float = float("inf")
) -> tuple[str, str]:
    """(prompt, chain) of a row with a picture of `size` pixels.

    `room` is what prompt and chain may take together, in tokens. Raises BadRecord."""
    for name in (source.prompt_field, source.chain_field):
        words = got.read_words(row, name)
        for token in gotr1.SPECIAL_TOKENS.values():
            if token in words:  # it would end the chain, or the prompt
                raise BadRecord("special token", f"{name} holds {token}")
    prompt, chain = got.read_prompt_and_chain(row, source, size)
    prompt_tokens = len(gotr1.encode_prompt(tokenizer, prompt))
    chain_tokens = len(gotr1.encode_chain(tokenizer, chain))
    if chain_tokens > min(source.max_chain, room - prompt_tokens):
        limits = "(--max_chain, or the context)"
        counts = f"{chain_tokens} tokens after {prompt_tokens} of the prompt {limits}"
        raise BadRecord("chain too long", counts)
    return prompt, chain


# -------------------------------------------------------------------------------------------------
# What a cache was made from


def made_from(model, tokenizer, source: Source) -> dict:
    """All that the content of a cache depends on, by name; pictures in files of their own are
    compared one by one, see `pictures_have_changed`. A set of the hub is taken as unchanged."""
    facts = {f"--{name}": value for name, value in asdict(source).items() if name != "streaming"}
    if source.data and Path(source.data).expanduser().exists():
        # A local set may be moved, and its path written in many ways: its last part is compared.
        facts["--data"] = Path(source.data).expanduser().resolve().name
        facts["data files"] = [[Path(file).name, *stamp(file)] for file in got.data_files(source)]
    facts["picture tokenizer"] = picture_tokenizer_digest(model.model.vqmodel)
    facts["text tokenizer"] = run.digest(tokenizer.get_vocab())
    facts["image tokens"] = gotr1.image_token_count(model)
    facts["context"] = model.config.text_config.max_position_embeddings
    facts["records per file"] = BLOCK
    facts["rules"] = RULES
    return facts


def picture_tokenizer_digest(vqmodel) -> str:
    """Of all weights that take part in turning a picture into tokens."""
    sha = hashlib.sha256()
    weights = [*vqmodel.encoder.parameters(), *vqmodel.quant_conv.parameters()]
    for weight in [*weights, vqmodel.quantize.embedding.weight]:
        # As bytes: NumPy has no bfloat16.
        sha.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def stamp(path) -> list[int]:
    """[size in bytes, time of the last change] of a file. Raises OSError."""
    stat = Path(path).stat()
    return [stat.st_size, stat.st_mtime_ns]


def picture_stamp(path: str, source: Source) -> list[int] | None:
    """The `stamp` of a picture with this path in its row; None where it cannot be read."""
    try:
        return stamp(got.image_path(path, source))
    except (BadRecord, OSError, ValueError):
        return None


def pictures_have_changed(folder: Path, source: Source) -> bool:
    """Whether a picture in a file of its own is not what it was when it was encoded."""
    for path in folder.glob("tokens_*.safetensors"):
        if read_report(path):
            with safetensors.safe_open(path, "numpy") as file:
                stamps = json.loads(file.metadata()["pictures"])
            for picture, old in stamps.items():
                if picture_stamp(picture, source) != old:
                    return True
    return False


def begin(cache: Path, folder: Path, facts: dict, parts: int) -> None:
    """Makes the folder; says what has changed since the cache was last made."""
    earlier = sorted(cache.glob("*/cache.json"), key=lambda path: path.stat().st_mtime)
    if earlier:
        found = json.loads(earlier[-1].read_text())
        changed = [name for name, value in facts.items() if found.get(name) != value]
        run.say(
            f"{cache}: {', '.join(changed)} changed since {earlier[-1].parent.name} was made: "
            f"all pictures are encoded again, into {folder.name}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    run.write_whole(folder / "cache.json", json.dumps({"parts": parts, **facts}, indent=2))


# -------------------------------------------------------------------------------------------------
# Encoding


def prepare(rows, model, tokenizer, source: Source, cache, rank=0, world=1, batch=32) -> "Prepared":
    """Encodes what the cache lacks, `batch` pictures at a time, each rank its parts, and waits for
    the other ranks. All ranks must see the same folder.

    `rows` are dicts, as `open_rows` gives them or made in memory, or a function that returns them,
    which is called only when the cache is not complete. Raises ValueError when too many records are
    bad."""
    cache = Path(cache).expanduser()
    facts = made_from(model, tokenizer, source)
    folder = cache / run.digest(facts)
    if rank == 0:
        if pictures_have_changed(folder, source):
            run.say(f"{folder}: pictures have changed: all are encoded again")
            for path in folder.glob("tokens_*.safetensors"):
                path.unlink()
        if not (folder / "cache.json").exists():
            rows = rows() if callable(rows) else rows
            begin(cache, folder, facts, number_of_parts(rows, source, world))
    if dist.is_initialized():
        dist.barrier()  # the others read what rank 0 has written
    parts = read_parts(folder)
    if not all(is_complete(reports_of_part(folder, part)) for part in range(parts)):
        rows = rows() if callable(rows) else rows
        for part in range(rank, parts, world):
            encode_part(rows, part, model, tokenizer, source, folder, batch, quiet=rank > 0)
        for part in range(parts):
            while not is_complete(reports_of_part(folder, part)):
                time.sleep(1)  # not a barrier: it would time out when a rank has hours more to do
    prepared = Prepared(folder)
    prepared.report.raise_if_too_many_bad()
    return prepared


def number_of_parts(rows, source: Source, world: int) -> int:
    if hasattr(rows, "__len__"):
        return world
    if source.max_records:
        return 1  # the first records of the stream, not of each file
    return min(world, getattr(rows, "num_shards", 1))  # a stream is divided by its files


def encode_part(
    rows, part: int, model, tokenizer, source: Source, folder: Path, batch: int, quiet: bool
) -> None:
    """Writes what is missing of the files of a part."""
    reports = reports_of_part(folder, part)
    records, length = records_of_part(rows, source, part, read_parts(folder), BLOCK * len(reports))
    total = Report()  # on what is encoded here
    with tqdm(total=length, desc="pictures to tokens", unit=" records", disable=quiet) as bar:
        while not is_complete(reports):
            block = itertools.islice(records, BLOCK)
            content, report = encode_block(block, model, tokenizer, source, batch, bar)
            total.add(report)
            if total.read >= 100:
                total.raise_if_too_many_bad()
            run.write_whole(block_path(folder, part, len(reports)), content)
            reports.append(report)


def records_of_part(rows, source: Source, part: int, parts: int, skip: int):
    """(pairs of name and row without the first `skip` records, how many if that is known)."""
    start = skip
    stop = None
    length = None
    where = ""
    if hasattr(rows, "__len__"):
        count = min(len(rows), source.max_records or len(rows))
        blocks = -(-count // BLOCK)  # rounded up
        # Cut between blocks: pictures are encoded in the same batches whatever `parts` is.
        start += BLOCK * (blocks * part // parts)
        stop = min(count, BLOCK * (blocks * (part + 1) // parts))
        length = max(0, stop - start)
    elif parts > 1:
        rows = rows.shard(num_shards=parts, index=part)
        where = f" of part {part}"
    pairs = got.numbered(rows, source, start, stop)
    return ((f"record {index}{where}", row) for index, row in pairs), length


def encode_block(
    records, model, tokenizer, source: Source, batch: int, bar: tqdm
) -> tuple[bytes, Report]:
    """(content of a file, its report). `records` are as `records_of_part` yields them."""
    image_tokens = gotr1.image_token_count(model)
    room = model.config.text_config.max_position_embeddings - image_tokens
    # Not model.device: image understanding is never used and may lie elsewhere.
    device = model.get_input_embeddings().weight.device
    report = Report()
    texts = []  # prompt, chain, prompt, chain, ...
    tokens = [torch.empty(0, image_tokens, dtype=torch.long, device=device)]
    stamps = {}  # of pictures in files of their own: path -> `picture_stamp`
    with ThreadPoolExecutor(8) as pool:  # PIL decodes and resizes outside the interpreter's lock
        while chunk := list(itertools.islice(records, batch)):
            for _, row in chunk:
                path = got.written_path(got.pick(row, source.image_field))
                if path is not None:
                    stamps[path] = picture_stamp(path, source)  # before it is read
            reading = []
            for _, row in chunk:
                reading.append(pool.submit(got.read_image, row, source, picture_side(model)))
            images = []
            for (name, row), picture in zip(chunk, reading, strict=True):
                report.read += 1
                try:
                    image, size = picture.result()
                    prompt, chain = texts_that_fit(row, source, tokenizer, size, room)
                except BadRecord as bad:
                    report.count(bad.cause, 1, f"{name}: {bad.detail}")
                    continue
                texts += [prompt.encode(), chain.encode()]
                images.append(image)
            if images:
                tokens.append(gotr1.encode_images(model, images))  # stays on the device: no wait
            bar.update(len(chunk))
    codes = model.config.vq_config.num_embeddings
    lengths = [len(text) for text in texts]
    arrays = {  # of R good records
        "image_tokens": torch.cat(tokens).cpu().numpy().astype("uint16" if codes < 2**16 else "i4"),
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "starts": np.cumsum([0, *lengths]),  # (2 R + 1,): where each text starts, in bytes
    }
    notes = {"report": json.dumps(asdict(report)), "pictures": json.dumps(stamps)}
    return safetensors.numpy.save(arrays, notes), report


def picture_side(model) -> int:
    """Width and height in pixels of the pictures that the model knows."""
    config = model.config.vq_config
    halvings = len(config.channel_multiplier) - 1  # of the side, inside the picture tokenizer
    return config.num_patches * 2**halvings


# -------------------------------------------------------------------------------------------------
# The files, and what training reads


def read_parts(folder: Path) -> int:
    return json.loads((folder / "cache.json").read_text())["parts"]


def block_path(folder: Path, part: int, block: int) -> Path:
    return folder / f"tokens_{part:05d}_{block:06d}.safetensors"


def read_report(path: Path) -> Report | None:
    """The report in a file; None when the file is not there, or cut off."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return Report(**json.loads(file.metadata()["report"]))
    except (OSError, safetensors.SafetensorError):
        return None


def reports_of_part(folder: Path, part: int) -> list[Report]:
    """The reports of a part's files, up to the first one that is missing."""
    reports = []
    while not is_complete(reports):
        report = read_report(block_path(folder, part, len(reports)))
        if report is None:
            break
        reports.append(report)
    return reports


def is_complete(reports: list[Report]) -> bool:
    return bool(reports) and reports[-1].read < BLOCK


class Prepared:
    """A complete cache, read by the number of the good record. Only these records are read."""

    def __init__(self, folder: Path):
        self.report = Report()
        self.blocks = []  # mapped files; they are closed again, so no limit on open files is met
        good = []
        for part in range(read_parts(folder)):
            for block, report in enumerate(reports_of_part(folder, part)):
                path = block_path(folder, part, block)
                self.blocks.append(safetensors.safe_open(path, "numpy"))
                self.report.add(report)
                good.append(report.good)
        self.stops = np.cumsum(good)  # where each block stops, in good records

    def __len__(self) -> int:
        return int(self.stops[-1])

    def batch(self, indices: list[int]) -> tuple[list[str], list[str], torch.Tensor]:
        """(prompts, chains, image tokens (R, I) int64) of R records. Raises IndexError."""
        prompts = []
        chains = []
        tokens = []
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"record {index} of {len(self)}")
            k = int(np.searchsorted(self.stops, index, side="right"))
            block = self.blocks[k]
            place = index - (int(self.stops[k - 1]) if k else 0)  # inside the block
            starts = block.get_slice("starts")[2 * place : 2 * place + 3]
            start, middle, stop = starts.tolist()
            text = block.get_slice("text")[start:stop].tobytes()
            prompts.append(text[: middle - start].decode())
            chains.append(text[middle - start :].decode())
            tokens.append(block.get_slice("image_tokens")[place : place + 1].astype(np.int64))
        return prompts, chains, torch.from_numpy(np.concatenate(tokens))


# -------------------------------------------------------------------------------------------------
# Looking at it


def dry_run(rows, model, tokenizer, source: Source, folder, count: int = 8) -> Path:
    """Prints the first `count` good ones of at most 1000 records, and what was wrong with those
    between them; draws them into `folder`/data.png, before and after the picture tokenizer. Raises
    ValueError when there are none."""
    records = []
    report = Report()
    for index, row in itertools.islice(got.numbered(rows, source), 1000):
        report.read += 1
        try:
            image, size = got.read_image(row, source)
            prompt, chain = texts_that_fit(row, source, tokenizer, size)
            records.append(got.Record(prompt, chain, image))
        except BadRecord as bad:
            report.count(bad.cause, 1, f"record {index}: {bad.detail}")
        if len(records) == count:
            break
    print(report)
    if not records:
        raise ValueError(f"none of the first {report.read} records can be used")
    tokens = gotr1.encode_images(model, [record.image for record in records])
    cells = []
    for k, decoded in enumerate(gotr1.decode_images(model, tokens)):
        prompt, chain, image = records[k]
        prompt_tokens = len(gotr1.encode_prompt(tokenizer, prompt))
        chain_tokens = len(gotr1.encode_chain(tokenizer, chain))
        note = f"{prompt_tokens} prompt + {chain_tokens} chain + {tokens.shape[1]} image tokens"
        print(f"\n{k}: {note}, {len(parse_chain(chain))} boxes")
        print(f"  prompt  {prompt}\n  chain   {chain}")
        cells.append({"prompt": prompt, "note": note, "chain": chain, "image": image})
        note = "after the picture tokenizer"
        cells.append({"prompt": prompt, "note": note, "chain": chain, "image": decoded})
    path = Path(folder) / "data.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheets.draw_sheet(cells, path, columns=2, side=320)
    print(
        f"\nwrote {path}: boxes, and boxes over the picture, before and after the picture tokenizer"
    )
    return path
