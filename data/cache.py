"""Pictures to image tokens on disk, once: training reads tokens and never sees a picture.

A picture is resized to the model's square, whatever its shape; boxes, relative to width and height,
go with it. The frozen picture tokenizer (VQ) turns it into tokens. The cache is a folder of
safetensors files, each with a block of consecutive records, and `cache.json`, which says how the
cache was made. A killed process loses the block it was making, no more. Ranks share the blocks
without talking to each other. Training maps the files, so that millions of records take little
memory. Bad records are skipped and counted by cause; more than 20 % of them stop the run.

A cache is never out of date. Made with other settings it is refused. When data files or pictures
have changed (size or time of their last change), what has changed is encoded again, and the rest is
kept: each record has a mark, a hash of what it was made from.
"""

import functools
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
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import gotr1
from data.got import (
    BadRecord,
    Record,
    Source,
    data_files,
    image_path,
    numbered,
    pick,
    read_image,
    read_prompt_and_chain,
    read_words,
    stream_files,
    written_path,
)
from engine import run
from render_boxes import draw_boxes, parse_chain

BLOCK = 1024  # consecutive records per file
RULES = 1  # raise it when the same data gives other texts or other tokens than before
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

    def skip(self, index: int, bad: BadRecord) -> None:
        self.count(bad.cause, 1, f"record {index}: {bad.detail}")

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

    def check(self) -> None:
        """Raises ValueError when there are too many bad records, or none at all."""
        if self.good < (1 - MOST_BAD) * self.read or not self.read:
            problem = f"more than {MOST_BAD:.0%} of the records are bad; try --dry_run."
            raise ValueError(f"{problem} {self}")


# -------------------------------------------------------------------------------------------------
# One record: what data/got.py reads, and whether it fits into the model's sequence


def texts_that_fit(
    row: dict, source: Source, tokenizer, size: tuple[int, int], room: float = float("inf")
) -> tuple[str, str]:
    """(prompt, chain) of a row with a picture of `size` pixels.

    `room` is what prompt and chain may take together, in tokens. Raises BadRecord."""
    for name in (source.prompt_field, source.chain_field):
        words = read_words(row, name)
        for token in gotr1.SPECIAL_TOKENS.values():
            if token in words:  # it would end the chain, or the prompt
                raise BadRecord("special token", f"{name} holds {token}")
    prompt, chain = read_prompt_and_chain(row, source, size)
    given = len(gotr1.encode_prompt(tokenizer, prompt))
    written = len(gotr1.encode_chain(tokenizer, chain))
    if written > min(source.max_chain, room - given):
        limits = "(--max_chain, or the context)"
        told = f"{written} tokens after {given} of the prompt {limits}"
        raise BadRecord("chain too long", told)
    return prompt, chain


# -------------------------------------------------------------------------------------------------
# The files


def cache_recipe(model, tokenizer, source: Source) -> dict:
    """The settings that the content of a cache depends on, by name."""
    recipe = {f"--{key}": value for key, value in asdict(source).items() if key != "streaming"}
    if is_local(source):
        # A local set may be moved, and its path written in many ways: its last part is compared.
        recipe["--data"] = Path(source.data).expanduser().resolve().name
    recipe["picture tokenizer"] = encoder_hash(model.model.vqmodel)
    recipe["image tokens"] = gotr1.image_token_count(model)
    recipe["block"] = BLOCK
    recipe["rules"] = RULES
    recipe["text tokenizer"] = short_hash(sorted(tokenizer.get_vocab().items()))
    return recipe


def is_local(source: Source) -> bool:
    # `toy` is the built-in world, even where a folder has that name.
    return source.data not in ("", "toy") and Path(source.data).expanduser().exists()


def data_mark(source: Source) -> str:
    """Changes when a local data file does. A set of the hub is taken as it was."""
    file_stats = []
    if is_local(source):
        for file in map(Path, data_files(source)):
            file_stats.append((file.name, file.stat().st_size, file.stat().st_mtime_ns))
    return short_hash(file_stats)


def picture_stat(path: str, source: Source) -> list[int] | None:
    """[size, time of the last change] of a picture in a file; None if there is none to read."""
    try:
        stat = image_path(path, source).stat()
    except (BadRecord, OSError, ValueError):
        return None
    return [stat.st_size, stat.st_mtime_ns]


def record_mark(row: dict, source: Source) -> bytes:
    """16 bytes that change when one of the fields of a record does, or its picture."""
    fields = (source.prompt_field, source.chain_field, source.coords_field)
    sha = hashlib.sha256(repr([pick(row, name) for name in fields]).encode())
    picture = pick(row, source.image_field)
    path = written_path(picture)
    if path is not None:
        sha.update(repr((path, picture_stat(path, source))).encode())
    elif isinstance(picture, Image.Image):
        sha.update(repr((picture.mode, picture.size)).encode() + picture.tobytes())
    else:
        sha.update(repr(picture).encode())
    return sha.digest()[:16]


def encoder_hash(vqmodel) -> str:
    """Of all weights that take part in turning a picture into tokens."""
    sha = hashlib.sha256()
    weights = [*vqmodel.encoder.parameters(), *vqmodel.quant_conv.parameters()]
    for weight in [*weights, vqmodel.quantize.embedding.weight]:
        # As bytes: NumPy has no bfloat16.
        sha.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def short_hash(value) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def claim(cache: Path, recipe: dict, data: str) -> None:
    """Makes the folder and its `cache.json`, or checks it. `data`: see `data_mark`.

    Raises ValueError when the blocks in it were made with another recipe."""
    cache.mkdir(parents=True, exist_ok=True)
    found = read_json(cache / "cache.json")
    changed = []
    for key, value in recipe.items():
        if found.get(key) != value:
            changed.append(f"{key} {found.get(key)} (now {value})")
    if changed and any(cache.glob("*.safetensors")):  # whole blocks, or some that were set aside
        made = f"{cache} was made with {', '.join(changed)}"
        raise ValueError(f"{made}: take another --cache, or delete it")
    if changed:
        write_json(cache / "cache.json", recipe | {"data files": data})


def set_changed_aside(cache: Path, recipe: dict, data: str, source: Source) -> None:
    """Renames each block that holds records which may have changed. It will be made anew, with what
    has not changed taken from the renamed file (see `old_entries`)."""
    found = read_json(cache / "cache.json")
    same_data = found.get("data files") == data
    blocks = sorted(cache.glob("tokens_*.safetensors"))
    changed = blocks
    if same_data:
        changed = [path for path in blocks if pictures_have_changed(path, source)]
    if changed:
        what = "pictures have" if same_data else "a data file has"
        told = f"{what} changed; in {len(changed)} of {len(blocks)} blocks"
        run.say(f"{cache}: {told} whatever differs is encoded again")
    for path in changed:
        path.replace(old_path(path))
    if not same_data:
        for end in cache.glob("file_*.json"):
            end.unlink()  # a file of the set may have other records now (see `encode_files`)
        content = recipe | {"data files": data}
        if "files" in found:  # still read apart, however many there are now
            content["files"] = len(data_files(source))
        write_json(cache / "cache.json", content)


def pictures_have_changed(path: Path, source: Source) -> bool:
    """Whether a picture in a file of its own is not what it was when the block was made."""
    if not block_report(path):
        return False  # not whole: it will be made anew in any case
    with safetensors.safe_open(path, "numpy") as file:
        pictures = json.loads(file.get_tensor("pictures").tobytes())
    return any(picture_stat(name, source) != stat for name, stat in pictures.items())


def old_path(path: Path) -> Path:
    return path.with_name(path.name.replace("tokens", "old"))


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: Path, content: dict) -> None:
    run.write_whole(path, json.dumps(content, indent=2))


def block_paths(cache: Path, records: int | list[int]) -> list[Path]:
    """The files of a cache with this many records; or with this many of each file of the set, where
    these were read apart."""
    if isinstance(records, list):
        paths = []
        for file, number in enumerate(records):
            blocks = -(-number // BLOCK)
            paths += [block_path(cache, block, file) for block in range(blocks)]
        return paths
    blocks = -(-records // BLOCK)  # rounded up
    return [block_path(cache, block) for block in range(blocks)]


def block_path(cache: Path, block: int, file: int | None = None) -> Path:
    """`file`: which file of the set the block is of, where files are read apart."""
    if file is None:
        return cache / f"tokens_{block:06d}.safetensors"
    return cache / f"tokens_{file:05d}_{block:06d}.safetensors"


@functools.lru_cache(maxsize=4096)
def open_block(path: Path):
    """A mapped block. Its file is closed again, so that no limit on open files is met."""
    return safetensors.safe_open(path, "numpy")


def block_report(path: Path) -> Report | None:
    """The report of a block; None when the file is not there, or not whole."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return Report(**json.loads(file.metadata()["report"]))
    except (OSError, safetensors.SafetensorError):
        return None


def all_whole(paths: list[Path]) -> bool:
    return all(block_report(path) for path in paths)


# -------------------------------------------------------------------------------------------------
# Encoding


def picture_side(model) -> int:
    """Width and height in pixels of the pictures that the model knows."""
    config = model.config.vq_config
    halvings = len(config.channel_multiplier) - 1  # of the side, inside the picture tokenizer
    return config.num_patches * 2**halvings


@dataclass
class Entry:
    """A good record on its way into a block."""

    prompt: bytes
    chain: bytes
    mark: bytes  # of what it was made from, see `record_mark`
    image: Image.Image | None = None  # until it is encoded
    tokens: np.ndarray | None = None  # (I,), when it is encoded


def old_entries(path: Path) -> dict[bytes, Entry]:
    """The records of a block that was set aside, by their marks; none if there is no such block."""
    if not block_report(path):
        return {}
    with safetensors.safe_open(path, "numpy") as file:
        text = file.get_tensor("text").tobytes()
        starts = file.get_tensor("starts").tolist()
        tokens = file.get_tensor("image_tokens")
        marks = file.get_tensor("marks")
    entries = {}
    for row, mark in enumerate(marks):
        start, middle, stop = starts[2 * row : 2 * row + 3]
        entries[mark.tobytes()] = Entry(
            prompt=text[start:middle],
            chain=text[middle:stop],
            mark=mark.tobytes(),
            tokens=tokens[row],
        )
    return entries


def read_part(
    part,
    kept: dict[bytes, Entry],
    tokenizer,
    source: Source,
    side: int,
    room: int,
    pool: ThreadPoolExecutor,
) -> tuple[list[Entry], dict[str, list], Report]:
    """(the good ones of a few records, pictures `side` x `side`; the files of all pictures, path ->
    `picture_stat`; the report).

    `part`: pairs of index and function that gets the row, as `numbered` yields them. `kept`: what
    need not be read again."""
    rows = [get() for _, get in part]
    files = {}
    for row in rows:
        path = written_path(pick(row, source.image_field))
        if path is not None:
            files[path] = picture_stat(path, source)  # before it is read: a later change shows
    marks = [record_mark(row, source) for row in rows]
    pictures = []
    for row, mark in zip(rows, marks, strict=True):
        known = mark in kept
        pictures.append(None if known else pool.submit(read_image, row, source, side))
    entries = []
    report = Report(read=len(part))
    for (index, _), row, mark, picture in zip(part, rows, marks, pictures, strict=True):
        if picture is None:
            entries.append(kept[mark])
            continue
        try:
            image, size = picture.result()
            prompt, chain = texts_that_fit(row, source, tokenizer, size, room)
            entries.append(Entry(prompt.encode(), chain.encode(), mark, image))
        except BadRecord as bad:
            report.skip(index, bad)
    return entries, files, report


def encode_block(
    pairs,
    kept: dict[bytes, Entry],
    model,
    tokenizer,
    source: Source,
    batch: int,
    total: Report,
    bar: tqdm,
) -> tuple[bytes, int]:
    """(content of a block's file, number of pictures that were encoded).

    `pairs` are as `numbered` yields them. Counts in `total`, too: the report on all blocks of this
    rank, which stops the run with a ValueError as soon as too many records are bad."""
    images = gotr1.image_token_count(model)
    side = picture_side(model)
    room = model.config.text_config.max_position_embeddings - images
    # Not model.device: image understanding is never used and may lie elsewhere.
    device = model.get_input_embeddings().weight.device
    report = Report()
    entries = []
    files = {}
    encoded = [torch.empty(0, images, dtype=torch.long, device=device)]
    with ThreadPoolExecutor(8) as pool:  # PIL decodes and resizes outside the interpreter's lock
        # Parts of a block, never across two: so they are the same on any number of ranks.
        while part := list(itertools.islice(pairs, batch)):
            part_entries, part_files, part_report = read_part(
                part, kept, tokenizer, source, side, room, pool
            )
            report.add(part_report)
            total.add(part_report)
            if total.read >= 100:
                total.check()
            pictures = [entry.image for entry in part_entries if entry.image]
            if pictures:
                encoded.append(gotr1.encode_images(model, pictures))  # stays on the device: no wait
            for entry in part_entries:
                entry.image = None  # frees its memory
            entries += part_entries
            files.update(part_files)
            bar.update(len(part))
    new_tokens = torch.cat(encoded).cpu().numpy()
    to_place = iter(new_tokens)
    for entry in entries:
        if entry.tokens is None:
            entry.tokens = next(to_place)
    image_tokens = np.array([entry.tokens for entry in entries], np.int64).reshape(-1, images)
    codes = model.config.vq_config.num_embeddings
    return pack_block(entries, image_tokens, codes, files, report), len(new_tokens)


def pack_block(
    entries: list[Entry], image_tokens: np.ndarray, codes: int, files: dict, report: Report
) -> bytes:
    """The safetensors file of R good records, with image tokens (R, I) below `codes`."""
    texts = []  # prompt, chain, prompt, chain, ...
    for entry in entries:
        texts += [entry.prompt, entry.chain]
    lengths = [len(text) for text in texts]
    marks = b"".join(entry.mark for entry in entries)
    arrays = {
        "image_tokens": image_tokens.astype("uint16" if codes <= 65536 else "int32"),
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "starts": np.cumsum([0, *lengths]),  # (2 R + 1,): where each text starts, in bytes
        "marks": np.frombuffer(marks, np.uint8).reshape(-1, 16),  # (R, 16)
        "pictures": np.frombuffer(json.dumps(files).encode(), np.uint8),
    }
    return safetensors.numpy.save(arrays, {"report": json.dumps(asdict(report))})


def files_apart(rows, source: Source, cache: Path, found: dict, world: int) -> int:
    """How many files of the set are read apart, each by one rank, so that every record is read
    once; 0 where all ranks read one stream, or jump to their blocks, and share the blocks.

    A cache goes on as it began, on any number of ranks: blocks are cut inside a file, or across
    files. `found` is the content of `cache.json`. Raises ValueError when `rows` cannot be read that
    way any more."""
    there = stream_files(rows)
    if "files" in found:
        if found["files"] not in (0, there):
            began = f"{cache} was begun with --streaming from {found['files']} files (now {there})"
            raise ValueError(f"{began}: give them again, or take another --cache")
        return found["files"]
    across = [*cache.glob("tokens_??????.safetensors"), *cache.glob("old_??????.safetensors")]
    if across or source.max_records or not 1 < world <= there:
        return 0
    return there


def encode_files(
    rows, files: int, model, tokenizer, source: Source, cache: Path, rank: int, world: int, batch
) -> list[int]:
    """Reads the files rank, rank + world, ... of a stream and writes what is missing of their
    blocks; waits for the other ranks. Returns the number of records in each file."""
    ends = [cache / f"file_{file:05d}.json" for file in range(files)]  # written when it was read
    for file in range(rank, files, world):
        if file_records(cache, ends[file], file) is not None:
            continue
        records = encode_blocks(
            rows.shard(num_shards=files, index=file),
            model,
            tokenizer,
            source,
            cache,
            rank=0,
            world=1,
            batch=batch,
            file=file,
            quiet=rank > 0,
        )
        write_json(ends[file], {"records": records})
    counts = []
    for file, end in enumerate(ends):
        while (records := file_records(cache, end, file)) is None:
            time.sleep(1)
        counts.append(records)
    return counts


def file_records(cache: Path, end: Path, file: int) -> int | None:
    """Records of a file of the set; None before it was read to its end and all blocks are there."""
    if not end.exists():
        return None
    records = json.loads(end.read_text())["records"]
    blocks = -(-records // BLOCK)
    whole = all_whole([block_path(cache, block, file) for block in range(blocks)])
    return records if whole else None


def encode_blocks(
    rows,
    model,
    tokenizer,
    source: Source,
    cache: Path,
    rank: int,
    world: int,
    batch: int,
    file: int | None = None,
    quiet: bool = False,
) -> int:
    """Writes what is missing of the blocks rank, rank + world, ... Returns the number of records of
    all ranks. `file`: which file of the set the rows are, where files are read apart."""
    length = None
    if hasattr(rows, "__len__"):
        length = min(len(rows), source.max_records or len(rows))
    total = Report()  # on what is encoded here
    records = 0
    encoded = 0
    began = time.time()
    with tqdm(
        total=length, desc="pictures to tokens", unit=" records", disable=rank > 0 or quiet
    ) as bar:
        for block, pairs in itertools.groupby(
            numbered(rows, source), lambda pair: pair[0] // BLOCK
        ):
            path = block_path(cache, block, file)
            if file is not None:  # what a report calls the first bad record
                pairs = ((f"{index} of file {file}", get) for index, get in pairs)
            if block % world == rank and not block_report(path):
                content, number = encode_block(
                    pairs,
                    kept=old_entries(old_path(path)),
                    model=model,
                    tokenizer=tokenizer,
                    source=source,
                    batch=batch,
                    total=total,
                    bar=bar,
                )
                run.write_whole(path, content)
                encoded += number
                records += block_report(path).read
            else:
                passed = sum(1 for _ in pairs)
                records += passed
                bar.update(passed)
    if total.read and rank == 0 and not quiet:
        kept = total.good - encoded
        if kept:
            print(f"{encoded} pictures encoded, {kept} kept as they were")
        else:
            speed = total.read / (time.time() - began)
            print(f"records per second: {speed:.0f} from pictures")
    return records


def prepare(rows, model, tokenizer, source: Source, cache, rank=0, world=1, batch=32) -> "Prepared":
    """Encodes what the cache lacks, `batch` pictures at a time, each rank its share, and waits for
    the other ranks. All ranks must see the same folder.

    `rows` are dicts, as `open_rows` gives them or made in memory, or a function that returns them,
    which is called only when the cache is not complete, or no longer up to date. Raises ValueError
    when the cache was made with other settings, or too many records are bad."""
    cache = Path(cache).expanduser()
    recipe = cache_recipe(model, tokenizer, source)
    data = data_mark(source)
    claim(cache, recipe, data)
    if rank == 0:
        set_changed_aside(cache, recipe, data, source)
    if dist.is_initialized():
        dist.barrier()  # nobody takes a block for whole that is about to be set aside
    found = read_json(cache / "cache.json")
    records = found.get("records")  # once the cache has been complete
    if not records or not all_whole(block_paths(cache, records)):
        if callable(rows):
            rows = rows()
        files = files_apart(rows, source, cache, found, world)
        if files:
            if "files" not in found:
                write_json(cache / "cache.json", recipe | {"data files": data, "files": files})
            records = encode_files(rows, files, model, tokenizer, source, cache, rank, world, batch)
        else:
            records = encode_blocks(rows, model, tokenizer, source, cache, rank, world, batch)
            while not all_whole(block_paths(cache, records)):
                time.sleep(1)  # not a barrier: it would time out when a rank has hours more to do
        if rank == 0:
            content = recipe | {"data files": data, "records": records}
            if files:
                content["files"] = files
            write_json(cache / "cache.json", content)
            for path in cache.glob("old_*.safetensors"):
                path.unlink()
    open_block.cache_clear()  # of blocks that have been made anew
    prepared = Prepared(block_paths(cache, records))
    prepared.report.check()
    return prepared


# -------------------------------------------------------------------------------------------------
# What training reads


class Prepared:
    """A complete cache, read by the number of the good record. Only what is asked for is read."""

    def __init__(self, paths: list[Path]):
        self.paths = paths  # of the blocks
        self.report = Report()
        good = []
        for path in self.paths:
            report = block_report(path)
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
            file, row = self.locate(index)
            start, middle, stop = map(int, file.get_slice("starts")[2 * row : 2 * row + 3])
            text = file.get_slice("text")[start:stop].tobytes()
            prompts.append(text[: middle - start].decode())
            chains.append(text[middle - start :].decode())
            tokens.append(file.get_slice("image_tokens")[row : row + 1].astype(np.int64))
        return prompts, chains, torch.from_numpy(np.concatenate(tokens))

    def locate(self, index: int):
        """(mapped block, place inside it) of a record."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        block = int(np.searchsorted(self.stops, index, side="right"))
        before = int(self.stops[block - 1]) if block else 0  # good records of the blocks before
        return open_block(self.paths[block]), index - before


# -------------------------------------------------------------------------------------------------
# Looking at it

GAP = 8  # pixels between the panels of the sheet
TITLE = 24  # pixels above a row of panels, for its text


def dry_run(
    rows, model, tokenizer, source: Source, folder, count: int = 8, side: int = 384
) -> Path:
    """Prints the first `count` good records, and what was wrong with those between them; draws them
    into `folder`/data.png. Raises ValueError when there are none."""
    records, report = first_records(rows, tokenizer, source, count)
    print(report)
    if not records:
        raise ValueError(f"none of the first {report.read} records can be used")
    tokens = gotr1.encode_images(model, [record.image for record in records])
    decoded = gotr1.decode_images(model, tokens)
    font = ImageFont.load_default(14)
    step = side + TITLE + GAP
    sheet = Image.new("RGB", (3 * (side + GAP) + GAP, len(records) * step + GAP), "white")
    for k, record in enumerate(records):
        note = count_tokens(record, tokenizer, images=tokens.shape[1])
        boxes = len(parse_chain(record.chain))
        print(f"\n{k}: {note}, {boxes} boxes")
        print(f"  prompt  {record.prompt}\n  chain   {record.chain}")
        y = k * step + GAP // 2
        title = f"{k}: {record.prompt[:110]} ({note})"
        ImageDraw.Draw(sheet).text((GAP, y + 4), title, "black", font)
        for column, panel in enumerate(draw_panels(record, decoded[k], side)):
            sheet.paste(panel, (GAP + column * (side + GAP), y + TITLE))
    path = Path(folder) / "data.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"\nwrote {path}: the picture, its boxes, its boxes over the picture after VQ")
    return path


def first_records(
    rows, tokenizer, source: Source, count: int, most: int = 1000
) -> tuple[list[Record], Report]:
    """The first `count` good ones of at most `most` records, pictures in their own size."""
    records = []
    report = Report()
    for index, get in itertools.islice(numbered(rows, source), most):
        report.read += 1
        row = get()
        try:
            image, size = read_image(row, source)
            prompt, chain = texts_that_fit(row, source, tokenizer, size)
            records.append(Record(prompt, chain, image))
        except BadRecord as bad:
            report.skip(index, bad)
        if len(records) == count:
            break
    return records, report


def count_tokens(record: Record, tokenizer, images: int) -> str:
    prompt = len(gotr1.encode_prompt(tokenizer, record.prompt))
    chain = len(gotr1.encode_chain(tokenizer, record.chain))
    return f"{prompt} prompt + {chain} chain + {images} image tokens"


def draw_panels(record: Record, decoded: Image.Image, side: int) -> list[Image.Image]:
    """The picture, its boxes, and the boxes over what is left of the picture after VQ."""
    boxes = parse_chain(record.chain)
    picture = record.image.resize((side, side), Image.Resampling.BICUBIC)
    decoded = decoded.resize((side, side), Image.Resampling.BICUBIC)
    return [picture, draw_boxes(boxes, image=picture), draw_boxes(boxes, image=decoded)]
