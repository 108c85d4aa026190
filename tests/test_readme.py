"""The README against the code: its blocks run, its glossary is the log's, its files keep their caps.
pytest tests/test_readme.py"""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest

import eval as evaluation
import gotr1
import rewards
import train_grpo
import train_sft
from data import got as got_data
from engine import checkpoints

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = (train_grpo.Config, train_sft.Config, got_data.Source, evaluation.Settings, gotr1.Args, rewards.Settings,
            checkpoints.Args)  # fmt: skip
BLOCKS = re.findall(r"```python run\n(.*?)```", README, re.S)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 2


def test_pictures_exist():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_files_keep_their_caps():
    caps = re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+)(?: lines)? \|$", README, re.M)
    assert {name for name, _ in caps} == {path.name for path in ROOT.glob("*.py")}
    modules = re.search(r"py-modules = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    assert set(re.findall(r"\w+", modules)) == {name.removesuffix(".py") for name, _ in caps}
    for name, cap in caps:
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert lines <= int(cap), f"{name} has {lines} lines, the README says at most {cap}"


def test_imports_go_downwards_in_the_readmes_table():
    order = re.findall(r"^\| `(\w+)\.py` \|.*\| \d+(?: lines)? \|$", README, re.M)
    for k, name in enumerate(order):
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.M)) & set(order)
        assert imported <= set(order[k + 1 :]), (name, imported)


def test_glossary_is_what_the_log_holds(tmp_path):
    table = README.split("## What the log says")[1].split("## ")[0]
    told = [
        key
        for cell in re.findall(r"^\| (`[^|]+) \|", table, re.M)
        for key in re.findall(r"`(\w+)`", cell)
    ]
    flags = ["--steps", "1", "--batch_size", "1", "--group", "2", "--eval_prompts", "2"]
    train_grpo.main([*flags, "--out", str(tmp_path)])
    assert sorted(told) == sorted(json.loads((tmp_path / "log.jsonl").read_text()))


def test_flags_named_in_the_readme_exist():
    known = {field.name for config in SETTINGS for field in dataclasses.fields(config)}
    known |= {
        f"no_{field.name}"
        for config in SETTINGS
        for field in dataclasses.fields(config)
        if field.type is bool
    }
    named = set(re.findall(r"--(\w+)", README)) - {
        "nproc_per_node",
        "shutdown_timeout",
    }  # torchrun's own
    assert named <= known, named - known


def test_install_line_and_requirements_agree():
    """What pyproject.toml allows is what requirements.txt pins."""
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M))
    ranges = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    assert pins.keys() == ranges.keys()
    for name, lowest in ranges.items():
        assert [int(v) for v in pins[name].split(".")] >= [int(v) for v in lowest.split(".")], name


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_is_explained(settings):
    """The trailing comments are what --help shows."""
    lines = [
        line for line in inspect.getsource(settings).splitlines() if re.match(r"    \w+: ", line)
    ]
    assert {line.split(":")[0].strip() for line in lines} == set(settings.__annotations__)
    assert all("  # " in line for line in lines), [line for line in lines if "  # " not in line]
