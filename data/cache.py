"""Pictures to image tokens on disk, once: training reads tokens and never sees a picture.

A picture is resized to the model's square, whatever its shape; boxes, relative to width and height,
go with it. The frozen picture tokenizer (VQ) turns it into tokens. Bad records are skipped and
counted by cause; more than 20 % of them stop the run.

A cache has one folder per digest of what it was made from: settings, tokenizers, sizes and times of
the data files. Whatever has changed gives another folder, so old tokens are never used. The records
are divided into blocks, one file each, which the processes take in turns:

    cache/1f0e2d3c/cache.json                  what it was made from
    cache/1f0e2d3c/tokens_000000.safetensors   the first 1024 records
    cache/1f0e2d3c/tokens_000001.safetensors   … the last file has fewer, or none

A file is renamed when it is written to its end: a killed process loses one file's records, and any
number of processes can go on. Training maps the files, so that millions of records take little
memory. (`Dataset.map` of the `datasets` library keeps results, too, but a kill loses all of them,
and those of a stream are never kept.)
"""

import hashlib
import itertools
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
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

BLOCK = 1024  # records per file
RULES = 3  # raise it when the same data gives other texts or other tokens than before
MOST_BAD = 0.2  # share of the records

# Records are counted in a Counter: cause -> how many were skipped for it, and GOOD -> how many not.
GOOD = "good"


def describe(counts: Counter) -> str:
    skipped = counts.total() - counts[GOOD]
    share = skipped / max(1, counts.total())
    text = f"{skipped} of {counts.total()} records skipped ({share:.1%})"
    causes = [f"{number} {cause}" for cause, number in sorted(counts.items()) if cause != GOOD]
    return ": ".join([text, ", ".join(causes)]) if causes else text


def raise_if_too_many_bad(counts: Counter) -> None:
    """Raises ValueError when there are too many bad records, or none at all."""
    if counts[GOOD] < (1 - MOST_BAD) * counts.total() or not counts:
        problem = f"more than {MOST_BAD:.0%} of the records are bad; try --dry_run."
        raise ValueError(f"{problem} {describe(counts)}")


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
    """All that the content of a cache depends on, by name, but for pictures in files of their own:
    see `remove_outdated`. A set of the hub is taken as unchanged."""
    facts = {f"--{name}": value for name, value in asdict(source).items() if name != "streaming"}
    if source.data and Path(source.data).expanduser().exists():
        facts["--data"] = run.file_stamps(Path(file) for file in got.data_files(source))
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


def picture_stamp(path: str, source: Source) -> list[int] | None:
    """[size in bytes, time of the last change] of the picture with this path in its row; None where
    it cannot be read."""
    try:
        facts = got.image_path(path, source).stat()
    except (BadRecord, OSError, ValueError):
        return None
    return [facts.st_size, facts.st_mtime_ns]


def begin(cache: Path, folder: Path, facts: dict) -> None:
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
    run.write_whole(folder / "cache.json", json.dumps(facts, indent=2))


def remove_outdated(folder: Path, source: Source) -> None:
    """Removes each file with a picture that is not what it was when it was encoded."""
    for path in folder.glob("tokens_*.safetensors"):
        if read_counts(path) is None:
            continue
        with safetensors.safe_open(path, "numpy") as file:
            stamps = json.loads(file.metadata()["pictures"])
        for picture, old in stamps.items():
            if picture_stamp(picture, source) != old:
                run.say(f"{picture} has changed: the pictures of {path} are encoded again")
                path.unlink()
                break


# -------------------------------------------------------------------------------------------------
# Encoding


def prepare(rows, model, tokenizer, source: Source, cache, rank=0, world=1, batch=32) -> "Prepared":
    """Encodes what the cache lacks, `batch` pictures at a time, each rank its share, and waits for
    the other ranks. All ranks must see the same folder.

    `rows` are dicts, as `open_rows` gives them or made in memory, or a function that returns them,
    which is called only when the cache is not complete. Raises ValueError when too many records are
    bad."""
    cache = Path(cache).expanduser()
    facts = made_from(model, tokenizer, source)
    folder = cache / run.digest(facts)
    if rank == 0:
        if not (folder / "cache.json").exists():
            begin(cache, folder, facts)
        remove_outdated(folder, source)
    if dist.is_initialized():
        dist.barrier()  # the others read what rank 0 has left
    if not is_complete(counts_of_blocks(folder)):
        rows = rows() if callable(rows) else rows
        encode_missing(rows, model, tokenizer, source, folder, rank, world, batch)
        while not is_complete(counts_of_blocks(folder)):
            time.sleep(1)  # not a barrier: it would time out when a rank has hours more to do
    prepared = Prepared(folder)
    run.say(f"{folder}: {describe(prepared.counts)}")
    raise_if_too_many_bad(prepared.counts)
    return prepared


def encode_missing(
    rows, model, tokenizer, source: Source, folder: Path, rank: int, world: int, batch: int
) -> None:
    """Writes every missing file whose number, counted in turns, is this rank's."""
    counts = Counter()  # of what is encoded here
    count = None  # of all records, if that is known
    if hasattr(rows, "__len__"):
        count = min(len(rows), source.max_records or len(rows))
    else:
        stream = got.numbered(rows, source)  # every rank reads all of it, and skips what others do
    with tqdm(total=count, desc="pictures to tokens", unit=" records", disable=rank > 0) as bar:
        for number in itertools.count():
            start = number * BLOCK
            if count is None:
                records = itertools.islice(stream, BLOCK)
            else:
                records = got.numbered(rows, source, start, min(start + BLOCK, count))
            path = block_path(folder, number)
            if number % world == rank and read_counts(path) is None:
                content, found = encode_block(records, model, tokenizer, source, batch, counts)
                counts += found
                if counts.total() >= 100:
                    raise_if_too_many_bad(counts)
                run.write_whole(path, content)
                read = found.total()
            elif count is None:
                read = sum(1 for _ in records)
            else:
                read = min(BLOCK, count - start)
            bar.update(read)
            if read < BLOCK:
                return


def encode_block(
    records, model, tokenizer, source: Source, batch: int, seen: Counter
) -> tuple[bytes, Counter]:
    """(content of a file, counts of its records). `records` are as `got.numbered` yields them. The
    first bad one of each cause that is not in `seen` is printed."""
    image_tokens = gotr1.image_token_count(model)
    room = model.config.text_config.max_position_embeddings - image_tokens
    counts = Counter()
    texts = []  # prompt, chain, prompt, chain, ...
    tokens = [torch.empty(0, image_tokens, dtype=torch.long)]
    stamps = {}  # of pictures in files of their own: path -> `picture_stamp`
    with ThreadPoolExecutor(8) as pool:  # PIL decodes and resizes outside the interpreter's lock
        while chunk := list(itertools.islice(records, batch)):
            reading = []
            for _, row in chunk:
                path = got.written_path(got.pick(row, source.image_field))
                if path is not None:
                    stamps[path] = picture_stamp(path, source)  # before it is read
                reading.append(pool.submit(got.read_image, row, source, picture_side(model)))
            images = []
            for (index, row), picture in zip(chunk, reading, strict=True):
                try:
                    image, size = picture.result()
                    prompt, chain = texts_that_fit(row, source, tokenizer, size, room)
                except BadRecord as bad:
                    if bad.cause not in seen | counts:
                        tqdm.write(f"record {index} is skipped: {bad}")
                    counts[bad.cause] += 1
                    continue
                counts[GOOD] += 1
                texts += [prompt.encode(), chain.encode()]
                images.append(image)
            if images:
                tokens.append(gotr1.encode_images(model, images).cpu())
    codes = model.config.vq_config.num_embeddings
    lengths = [len(text) for text in texts]
    arrays = {  # of R good records
        "image_tokens": torch.cat(tokens).numpy().astype("uint16" if codes < 2**16 else "i4"),
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "starts": np.cumsum([0, *lengths]),  # (2 R + 1,): where each text starts, in bytes
    }
    notes = {"counts": json.dumps(counts), "pictures": json.dumps(stamps)}
    return safetensors.numpy.save(arrays, notes), counts


def picture_side(model) -> int:
    """Width and height in pixels of the pictures that the model knows."""
    config = model.config.vq_config
    halvings = len(config.channel_multiplier) - 1  # of the side, inside the picture tokenizer
    return config.num_patches * 2**halvings


# -------------------------------------------------------------------------------------------------
# The files, and what training reads


def block_path(folder: Path, number: int) -> Path:
    return folder / f"tokens_{number:06d}.safetensors"


def read_counts(path: Path) -> Counter | None:
    """How many records a file is about; None when the file is not there, or cut off."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return Counter(json.loads(file.metadata()["counts"]))
    except (OSError, safetensors.SafetensorError):
        return None


def counts_of_blocks(folder: Path) -> list[Counter]:
    """`read_counts` of each file, up to the first one that is missing."""
    blocks = []
    while not is_complete(blocks):
        counts = read_counts(block_path(folder, len(blocks)))
        if counts is None:
            break
        blocks.append(counts)
    return blocks


def is_complete(blocks: list[Counter]) -> bool:
    return bool(blocks) and blocks[-1].total() < BLOCK


class Prepared:
    """A complete cache, read by the number of the good record. Only these records are read."""

    def __init__(self, folder: Path):
        self.counts = Counter()
        self.blocks = []  # mapped files; they are closed again, so no limit on open files is met
        good = []
        for number, counts in enumerate(counts_of_blocks(folder)):
            self.blocks.append(safetensors.safe_open(block_path(folder, number), "numpy"))
            self.counts += counts
            good.append(counts[GOOD])
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
    """Prints the first `count` good ones of at most 100 records, and what is wrong with those
    between them; draws them into `folder`/data.png, before and after the picture tokenizer. Raises
    ValueError when there are none."""
    cells = []
    for index, row in itertools.islice(got.numbered(rows, source), 100):
        try:
            image, size = got.read_image(row, source)
            prompt, chain = texts_that_fit(row, source, tokenizer, size)
        except BadRecord as bad:
            print(f"record {index} is skipped: {bad}")
            continue
        print(f"record {index}\n  prompt  {prompt}\n  chain   {chain}")
        decoded = gotr1.decode_images(model, gotr1.encode_images(model, [image]))[0]
        cell = {"prompt": prompt, "chain": chain}
        cells.append({**cell, "note": "the picture", "image": image})
        cells.append({**cell, "note": "after the picture tokenizer", "image": decoded})
        if len(cells) == 2 * count:
            break
    if not cells:
        raise ValueError("none of the first 100 records can be used")
    path = Path(folder) / "data.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheets.draw_sheet(cells, path, columns=2, side=320)
    print(f"wrote {path}: boxes over the pictures, before and after the picture tokenizer")
    return path
