"""Prompts of a run: the toy's, text files with one per line, or columns of parquet files."""

from pathlib import Path

from engine import run
from toy.world import toy_prompts


def join_prompts(sources: tuple[str, ...]) -> list[str]:
    """The prompts of all sources in their order, each once; says how many of each there are."""
    if sources == ("toy",):
        return read_prompts("toy", held_out=False, count=2000)
    prompts = {}  # as keys, which keep their order and are there once
    for source in sources:
        found = read_prompts(source, held_out=False, count=2000)
        before = len(prompts)
        prompts.update(dict.fromkeys(found))
        again = len(found) - (len(prompts) - before)
        run.say(f"{source}: {len(found)} prompts" + (f", {again} of them again" if again else ""))
    return list(prompts)


def read_prompts(source: str, held_out: bool, count: int) -> list[str]:
    """The prompts of one source, of held-out ones the first `count`: `toy`, the non-empty lines of
    a text file, or a column of a parquet file (`captions.parquet:TEXT`)."""
    if source == "toy":
        return toy_prompts(count, seed=7, held_out=held_out)
    path, parquet, column = source.rpartition(".parquet")
    try:
        if parquet:
            lines = read_column(path + parquet, column.removeprefix(":"))
        else:
            lines = Path(source).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as problem:  # a UnicodeDecodeError is a ValueError
        run.fail(f"cannot read prompts from {source}: {problem}")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        run.fail(f"{source} holds no prompt: expected one per line")
    return prompts[:count] if held_out else prompts


def read_column(path: str, column: str) -> list[str]:
    """The texts of a column of a parquet file, each in one line; empty where there is none. Raises
    OSError or ValueError."""
    from pyarrow import parquet, types  # which `datasets` brings

    file = parquet.ParquetFile(path)
    texts = []
    for field in file.schema_arrow:
        if types.is_string(field.type) or types.is_large_string(field.type):
            texts.append(field.name)
    if column not in texts:
        raise ValueError(f"name a column of texts behind a colon, one of {', '.join(texts)}")
    values = file.read(columns=[column])[column].to_pylist()
    return [" ".join((value or "").split()) for value in values]
