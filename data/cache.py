"""Records to image tokens on disk: the frozen picture tokenizer (VQ) sees each picture once, training sees none.

A picture is resized to the model's square, whatever its shape; boxes, relative to width and height, go with it. The
cache is a folder of safetensors, each with a block of consecutive records, and `cache.json`, which says how it was
made. Blocks are written beside and renamed, so that a kill costs one block a process; ranks share them without talking
to each other; what training needs of them is mapped, so that millions of records take little memory. Bad records are
skipped and counted by cause; more than 20 % of them stop the run.
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
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import gotr1
from data.got import BadRecord, Source, data_files, numbered, read_image, read_record, read_text
from render_boxes import draw_boxes, parse_chain

BLOCK = 1024  # consecutive records a file
MOST_BAD = 0.2  # share of the records


@dataclass
class Report:
    """How many records were read, and why some of them were skipped."""

    read: int = 0
    bad: dict[str, list] = field(default_factory=dict)  # cause -> [how many, the first one]

    @property
    def good(self) -> int:
        return self.read - sum(number for number, _ in self.bad.values())

    def add(self, cause: str, number: int, first: str) -> None:
        self.bad.setdefault(cause, [0, first])[0] += number

    def __str__(self) -> str:
        share = (self.read - self.good) / max(1, self.read)
        lines = [
            f"{number:8d} {cause:14s} first: {first}"
            for cause, (number, first) in sorted(self.bad.items())
        ]
        return "\n".join(
            [f"{self.read - self.good} of {self.read} records skipped ({share:.1%})", *lines]
        )

    def check(self) -> None:
        if self.good < (1 - MOST_BAD) * self.read or not self.read:
            raise ValueError(
                f"more than {MOST_BAD:.0%} of the records are bad; try --dry_run. {self}"
            )


# ---------------------------------------------------------------------------------------------------------------------
# The files


def fingerprint(model, tokenizer, source: Source) -> dict:
    """What the content of a cache depends on, by name. Pictures in files of their own are not looked at."""
    vq, sha = model.model.vqmodel, hashlib.sha256()
    for value in [
        *vq.encoder.parameters(),
        *vq.quant_conv.parameters(),
        vq.quantize.embedding.weight,
    ]:
        sha.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    made = {f"--{key}": value for key, value in asdict(source).items() if key != "streaming"}
    words, stats = sorted(tokenizer.get_vocab().items()), []
    if (
        source.data and Path(source.data).expanduser().exists()
    ):  # may be moved, and be named in many ways
        made["--data"] = Path(source.data).expanduser().resolve().name
        files = map(Path, data_files(source))
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    made |= {
        "picture tokenizer": sha.hexdigest()[:16],
        "image tokens": gotr1.image_token_count(model),
        "block": BLOCK,
    }
    hashes = {"data files": stats, "text tokenizer": words}
    return made | {
        key: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for key, value in hashes.items()
    }


def replace(path: Path, content: bytes, rank: int) -> None:
    """Written beside and renamed: what has the name is whole."""
    beside = path.with_name(f"{path.name}.{rank}.tmp")
    beside.write_bytes(content)
    beside.replace(path)


def claim(cache: Path, made: dict, rank: int) -> int:
    """Checks or writes `cache.json`. Returns the number of records when the cache is known to be complete, else 0."""
    path = cache / "cache.json"
    cache.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    changed = ", ".join(
        f"{key} {found.get(key)} (now {made[key]})" for key in made if found.get(key) != made[key]
    )
    if changed and any(cache.glob("tokens_*.safetensors")):
        raise ValueError(f"{cache} was made with {changed}: take another --cache, or delete it")
    if changed:
        replace(path, json.dumps(made, indent=2).encode(), rank)
    return found.get("records", 0)


def block_path(cache: Path, block: int) -> Path:
    return cache / f"tokens_{block:06d}.safetensors"


@functools.lru_cache(maxsize=4096)
def open_block(path: Path):
    """A mapped block; the file itself is closed again, so that no limit on open files is met."""
    return safetensors.safe_open(path, "numpy")


def block_report(path: Path) -> Report | None:
    """The report of a block; None when it is not there, or not whole."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return Report(**json.loads(file.metadata()["report"]))
    except (OSError, safetensors.SafetensorError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


def encode_block(pairs, model, tokenizer, source: Source, batch: int, total: Report, bar) -> bytes:
    """The file of the block with these (index, function that gets the row); counts in `total`, too."""
    config, images, here = model.config.vq_config, gotr1.image_token_count(model), Report()
    side = config.num_patches * 2 ** (len(config.channel_multiplier) - 1)
    room = model.config.text_config.max_position_embeddings - images
    device = (
        model.get_input_embeddings().weight.device
    )  # not model.device: what is not used may lie elsewhere
    tokens, texts = [torch.empty(0, images, dtype=torch.long, device=device)], []
    with ThreadPoolExecutor(8) as pool:  # PIL decodes and resizes outside the interpreter's lock
        while part := list(itertools.islice(pairs, batch)):  # the same parts on any number of ranks
            rows, chosen = [get() for _, get in part], []
            pictures = [pool.submit(read_image, row, source, side) for row in rows]
            for (index, _), row, picture in zip(part, rows, pictures, strict=True):
                here.read, total.read = here.read + 1, total.read + 1
                try:
                    image, size = picture.result()
                    texts += [
                        text.encode() for text in read_text(row, source, tokenizer, size, room)
                    ]
                    chosen.append(image)
                except BadRecord as bad:
                    here.add(bad.cause, 1, f"record {index}: {bad.detail}")
                    total.add(bad.cause, 1, f"record {index}: {bad.detail}")
            if total.read >= 100:
                total.check()
            if chosen:
                tokens.append(
                    gotr1.encode_images(model, chosen)
                )  # (chosen, I), left on the device: nobody waits
            bar.update(len(part))
    arrays = {
        "image_tokens": torch.cat(tokens)
        .cpu()
        .numpy()
        .astype("uint16" if config.num_embeddings <= 65536 else "int32"),
        "text": np.frombuffer(
            b"".join(texts), np.uint8
        ),  # prompt, chain, prompt, chain, ... of M records
        "starts": np.cumsum([0, *map(len, texts)]),  # (2 M + 1,), in bytes
    }
    return safetensors.numpy.save(arrays, {"report": json.dumps(asdict(here))})


def encode_blocks(
    rows, model, tokenizer, source: Source, cache: Path, rank=0, world=1, batch=32
) -> tuple[int, int]:
    """Writes what is missing of the blocks rank, rank + world, ...; returns the number of records of all ranks, and of
    those that were encoded here."""
    total, records = Report(), 0
    length = (
        len(range(len(rows))[: source.max_records or None]) if hasattr(rows, "__len__") else None
    )
    with tqdm(total=length, desc="pictures to tokens", unit=" records", disable=rank > 0) as bar:
        for block, pairs in itertools.groupby(
            numbered(rows, source), lambda pair: pair[0] // BLOCK
        ):
            path = block_path(cache, block)
            if block % world == rank and not block_report(path):
                replace(
                    path, encode_block(pairs, model, tokenizer, source, batch, total, bar), rank
                )
                records += block_report(path).read
            else:
                skipped = sum(1 for _ in pairs)
                records += skipped
                bar.update(skipped)
    return records, total.read


# ---------------------------------------------------------------------------------------------------------------------
# What training reads


class Prepared:
    """A complete cache: what the training loop reads, by number of the good record. Only what is asked for is read."""

    def __init__(self, cache: Path, blocks: int):
        self.paths, self.report = [block_path(cache, block) for block in range(blocks)], Report()
        reports = [block_report(path) for path in self.paths]
        self.stops = np.cumsum(
            [report.good for report in reports]
        )  # of each block, in good records
        for report in reports:
            self.report.read += report.read
            for cause, counted in report.bad.items():
                self.report.add(cause, *counted)

    def __len__(self) -> int:
        return int(self.stops[-1])

    def batch(self, indices: list[int]) -> tuple[list[str], list[str], torch.Tensor]:
        """(prompts, chains, image tokens (n, I) int64) of n records; raises IndexError."""
        prompts, chains, tokens = [], [], []
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"record {index} of {len(self)}")
            block = int(np.searchsorted(self.stops, index, side="right"))
            row, file = (
                index - int(self.stops[block - 1]) * (block > 0),
                open_block(self.paths[block]),
            )
            start, middle, stop = map(int, file.get_slice("starts")[2 * row : 2 * row + 3])
            text = file.get_slice("text")[start:stop].tobytes()
            prompts.append(text[: middle - start].decode())
            chains.append(text[middle - start :].decode())
            tokens.append(file.get_slice("image_tokens")[row : row + 1].astype(np.int64))
        return prompts, chains, torch.from_numpy(np.concatenate(tokens))


def prepare(rows, model, tokenizer, source: Source, cache, rank=0, world=1, batch=32) -> Prepared:
    """Encodes what the cache lacks, `batch` pictures at a time, each rank its share, and waits for the others.

    `rows` are dicts, as `open_rows` gives them or made in memory, or a function that returns them: it is called only
    when the cache is not complete. All ranks must see the same folder. Raises ValueError when the cache was made with
    other settings, or too many records are bad."""
    cache = Path(cache).expanduser()
    records, encoded = claim(cache, made := fingerprint(model, tokenizer, source), rank), 0
    blocks = range(-(-records // BLOCK))
    if not records or not all(block_report(block_path(cache, block)) for block in blocks):
        rows, began = rows() if callable(rows) else rows, time.time()
        records, encoded = encode_blocks(rows, model, tokenizer, source, cache, rank, world, batch)
        seconds = time.time() - began
        blocks = range(-(-records // BLOCK))
        while not all(block_report(block_path(cache, block)) for block in blocks):
            time.sleep(1)  # not a barrier: those time out when another rank has minutes more to do
        if rank == 0:
            replace(
                cache / "cache.json",
                json.dumps(made | {"records": records}, indent=2).encode(),
                rank,
            )
    prepared = Prepared(cache, len(blocks))
    prepared.report.check()
    if encoded and rank == 0:
        print(
            f"records a second: {encoded / seconds:.0f} from pictures, {reading_speed(prepared):.0f} from the cache"
        )
    return prepared


def reading_speed(prepared: Prepared, batch: int = 64) -> float:
    """Records a second of batches drawn at random."""
    rng, began = np.random.default_rng(0), time.time()
    for _ in range(16):
        prepared.batch(rng.integers(0, len(prepared), batch).tolist())
    return 16 * batch / (time.time() - began)


# ---------------------------------------------------------------------------------------------------------------------
# Looking at it


def dry_run(
    rows, model, tokenizer, source: Source, folder, count: int = 8, side: int = 384
) -> Path:
    """Prints the first `count` good records and what was wrong with those between them, and draws them into
    `folder`/data.png: the picture, its boxes, and the boxes over what is left of it after VQ. Raises ValueError."""
    records, report = [], Report()
    for index, get in itertools.islice(numbered(rows, source), 1000):
        report.read += 1
        try:
            records.append(read_record(get(), source, tokenizer))
        except BadRecord as bad:
            report.add(bad.cause, 1, f"record {index}: {bad.detail}")
        if len(records) == count:
            break
    print(report)
    if not records:
        raise ValueError(f"none of the first {report.read} records can be used")
    tokens, font = (
        gotr1.encode_images(model, [record.image for record in records]),
        ImageFont.load_default(14),
    )
    sheet = Image.new("RGB", (3 * (side + 8) + 8, len(records) * (side + 32) + 8), "white")
    for k, (record, decoded) in enumerate(
        zip(records, gotr1.decode_images(model, tokens), strict=True)
    ):
        boxes, y = parse_chain(record.chain), k * (side + 32) + 4
        lengths = (
            len(gotr1.encode_prompt(tokenizer, record.prompt)),
            len(gotr1.encode_chain(tokenizer, record.chain)),
        )
        note = "{} prompt + {} chain + {} image tokens".format(*lengths, tokens.shape[1])
        print(
            f"\n{k}: {note}, {len(boxes)} boxes\n  prompt  {record.prompt}\n  chain   {record.chain}"
        )
        ImageDraw.Draw(sheet).text(
            (8, y + 4), f"{k}: {record.prompt[:110]} ({note})", "black", font
        )
        picture, decoded = (
            image.resize((side, side), Image.Resampling.BICUBIC)
            for image in (record.image, decoded)
        )
        for column, panel in enumerate(
            (picture, draw_boxes(boxes, image=picture), draw_boxes(boxes, image=decoded))
        ):
            sheet.paste(panel, (8 + column * (side + 8), y + 24))
    path = Path(folder) / "data.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"\nwrote {path}: the picture, its boxes, its boxes over the picture after VQ")
    return path
