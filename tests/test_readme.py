"""README.md and docs/ against the code: their blocks run, what they name exists, the glossary is
the log's.    pytest tests/test_readme.py"""

import ast
import dataclasses
import importlib
import inspect
import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

import eval as evaluation
import gotr1
import render_boxes
import rewards
import train_grpo
import train_sft
from data import annotate, got
from demo import __main__ as demo
from engine import checkpoints, run, speed
from toy import ablate, explain, world

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
README = TEXT[ROOT / "README.md"]
GPU = TEXT[ROOT / "docs" / "gpu.md"]
# What follows `python` or `torchrun` on a command line -> the settings that it takes
COMMANDS = {
    "train_grpo.py": train_grpo.Config,
    "train_sft.py": train_sft.Config,
    "eval.py": evaluation.Config,
    "gotr1.py": gotr1.Config,
    "rewards.py": rewards.Config,
    "render_boxes.py": render_boxes.Config,
    "-m engine.checkpoints": checkpoints.Config,
    "-m data.annotate": annotate.Config,
    "-m toy.world": world.Config,
    "-m toy.ablate": ablate.Config,
    "-m demo": demo.Config,
    "-m toy.explain": explain.Config,
    "-m engine.speed rollout": speed.Rollout,
    "-m engine.speed memory": speed.Memory,
    "-m engine.speed checkpoints": speed.Checkpoints,
}
SETTINGS = [*COMMANDS.values(), got.Source]
OTHERS_FLAGS = {"nproc_per_node", "shutdown_timeout"}  # torchrun's own
OTHERS_FLAGS |= {"port", "max", "limit", "gpu", "data"}  # vLLM's: --max-model-len and so on
METHOD = "The method in twenty-five lines"
PACKAGES = {"PIL": "Pillow"}  # where the name to import is not the name to install
BRINGS = {"transformers": {"numpy", "huggingface_hub", "tokenizers"}, "datasets": {"numpy"}}


def section(text: str, title: str) -> str:
    """The part of a page below one heading."""
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def flags_of(settings) -> set[str]:
    names = set()
    for field in dataclasses.fields(settings):
        names.add(field.name)
        if field.type in (bool, "bool"):
            names.add(f"no_{field.name}")
    return names


# -------------------------------------------------------------------------------------------------
# What can be run


BLOCKS = []
for page in PAGES:
    BLOCKS += re.findall(r"```python run\n(.*?)```", TEXT[page], re.S)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_there_are_blocks_to_run():
    assert BLOCKS


def command_lines() -> list[str]:
    """Every command of the shell blocks, and every `python …` that stands in a sentence."""
    lines = []
    for text in TEXT.values():
        for block in re.findall(r"```bash\n(.*?)```", text, re.S):
            whole = re.sub(r"\s*\\\n\s*", " ", block)  # a command over several lines
            lines += re.split(r"\n|&&|;", whole)
        prose = " ".join(re.sub(r"```.*?```", "", text, flags=re.S).split())
        lines += re.findall(r"`((?:python|torchrun) [^`]+)`", prose)
    return [line.strip() for line in lines if re.match(r"\s*(python|torchrun) .*", line)]


@pytest.mark.parametrize("line", command_lines())
def test_commands_name_programs_and_flags_that_exist(line):
    words = shlex.split(line, comments=True)
    if "spacy" in words:  # python -m spacy download …
        return
    known = {name: settings for name, settings in COMMANDS.items() if f" {name}" in f" {line}"}
    assert len(known) == 1, f"{line}: no program of this repository"
    (name, settings), *_ = known.items()
    program = re.sub(r"-m (\S+).*", r"\1", name)
    path = program if program.endswith(".py") else program.replace(".", "/") + ".py"
    if (ROOT / program).is_dir():  # python -m FOLDER
        path = f"{program}/__main__.py"
    assert (ROOT / path).is_file()
    arguments = words[words.index(name.split()[-1]) + 1 :]
    presets = train_grpo.PRESETS if program == "train_grpo.py" else None
    if "…" not in line:
        run.parse_args(settings, "", arguments, presets)  # bad flags end in SystemExit


def test_flags_named_anywhere_exist():
    known = OTHERS_FLAGS.union(*(flags_of(settings) for settings in SETTINGS))
    for page, text in TEXT.items():
        if page.name == "log.md":  # of what is no longer there
            continue
        named = set(re.findall(r"--(\w+)", text))
        assert named <= known, (page.name, named - known)


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_is_explained(settings):
    """The comment behind a setting is what --help shows, if both stand on one line."""
    explained = set()
    for parent in settings.__mro__[:-1]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(parent)))
        lines = inspect.getsource(parent).splitlines()
        for node in tree.body[0].body:
            if isinstance(node, ast.AnnAssign) and node.lineno == node.end_lineno:
                if "  # " in lines[node.lineno - 1]:
                    explained.add(node.target.id)
    assert explained == {field.name for field in dataclasses.fields(settings)}


# -------------------------------------------------------------------------------------------------
# What is pointed at


def test_pictures_and_links_exist():
    for page, text in TEXT.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.is_file(), (page.name, target)
            titles = (
                re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M) if anchor else []
            )
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not anchor or anchor in anchors, (page.name, target)


def test_every_script_and_folder_has_its_line():
    table = section(README, "Files")
    named = set(re.findall(r"^\| `([\w/]+(?:\.py|/))` \|", table, re.M))
    scripts = {path.name for path in ROOT.glob("*.py")}
    folders = {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")}
    assert named == scripts | folders | {"docs/"}


def test_no_cell_is_too_long_to_be_read():
    for line in README.splitlines():
        if line.startswith("|"):
            assert max(len(cell.strip()) for cell in line.split(" | ")) <= 120, line


def test_the_first_screen_runs_and_the_method_comes_soon():
    lines = README.splitlines()
    assert "torchrun train_grpo.py" in "\n".join(lines[:17])
    assert lines.index(f"## {METHOD}") < 40


def test_the_loop_of_the_readme_is_the_script():
    (block,) = re.findall(r"```python\n(.*?)```", section(README, METHOD), re.S)
    assert block == (ROOT / "toy" / "loop.py").read_text(encoding="utf-8")


def test_steps_of_the_method_are_those_of_the_loop():
    said = re.findall(r"^(\d+)\. \*\*(.+?)\.?\*\*", section(README, METHOD), re.M)
    source = inspect.getsource(train_grpo)
    steps = re.findall(r"^ +# (\d+)\) ([^:.,]+)", source, re.M)
    assert said == [(number, name.strip()) for number, name in steps]


# -------------------------------------------------------------------------------------------------
# The log


def keys_of_table(text: str) -> list[str]:
    keys = []
    for cell in re.findall(r"^\| (`[^|]+) \|", text, re.M):
        keys += re.findall(r"`(\w+)`", cell)
    return keys


def test_glossary_is_what_the_log_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(train_grpo, "evaluate", lambda *args, **kwargs: None)
    monkeypatch.setattr(train_grpo, "summarise_run", lambda training: None)
    flags = "--steps 1 --batch_size 1 --group 4 --eval_prompts 2".split()
    train_grpo.main([*flags, "--out", str(tmp_path)])
    explained = keys_of_table(section(GPU, "Every key of the log"))
    four_marks = [f"sem_{name}" for name in rewards.CRITERIA]  # the toy's judge gives none
    logged = json.loads((tmp_path / "log.jsonl").read_text())
    assert sorted(explained) == sorted([*logged, *four_marks])
    watched = re.findall(r"`(\w+)`", section(README, "Results").split("What to watch")[1])
    assert watched
    assert set(watched) <= set(explained)


# -------------------------------------------------------------------------------------------------
# Pieces to borrow, packages


def pieces() -> list[tuple[list[str], list[str], list[str]]]:
    """(names, files, packages) of each row of the table that names whole files."""
    rows = []
    for piece, files, needs in re.findall(
        r"^\| (`[^|]+) \| ([^|]+) \| ([^|]+) \|$", section(README, "Borrow a piece"), re.M
    ):
        if "copy" not in files:
            names = re.findall(r"`(\w+)`", piece)
            rows.append((names, re.findall(r"`([\w/.]+)`", files), needs.split(", ")))
    return rows


def imported(tree: ast.AST) -> set[str]:
    """The modules that the given nodes import, in full: `from engine import decode` is
    engine.decode."""
    found = set()
    for node in tree:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own_file(module: str) -> str | None:
    path = module.replace(".", "/") + ".py"
    return path if (ROOT / path).is_file() else None


@pytest.mark.parametrize("names, files, needs", pieces())
def test_a_piece_needs_no_more_than_its_row_says(names, files, needs):
    """Importing the files of a row, and calling a piece of it, touches no other file of ours and no
    other package."""
    modules = set()
    for file in files:
        modules |= imported(ast.parse((ROOT / file).read_text(encoding="utf-8")).body)
    home = importlib.import_module(files[0].removesuffix(".py").replace("/", "."))
    for name in names:
        source = textwrap.dedent(inspect.getsource(getattr(home, name)))
        modules |= imported(ast.walk(ast.parse(source)))
    installed = set(needs)
    for package in needs:
        installed |= BRINGS.get(package, set())
    for module in modules:
        file = own_file(module)
        if file:
            assert file in files, f"{files[0]} imports {module}"
        package = module.split(".")[0]
        ours = (ROOT / package).is_dir() or (ROOT / f"{package}.py").is_file()
        if not ours and package not in sys.stdlib_module_names:
            assert PACKAGES.get(package, package) in installed, f"{files[0]} imports {package}"


def test_install_line_and_requirements_agree():
    """What pyproject.toml allows is what requirements.txt pins."""
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M))
    ranges = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    assert pins.keys() == ranges.keys()
    for name, lowest in ranges.items():
        assert [int(v) for v in pins[name].split(".")] >= [int(v) for v in lowest.split(".")], name


def test_an_install_holds_every_module():
    text = (ROOT / "pyproject.toml").read_text()
    modules = re.search(r"py-modules = \[(.*?)\]", text, re.S)[1]
    assert set(re.findall(r"\w+", modules)) == {path.stem for path in ROOT.glob("*.py")}
    packages = re.search(r"^packages = \[(.*?)\]", text, re.S | re.M)[1]
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(re.findall(r"\w+", packages)) == folders
