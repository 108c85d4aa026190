"""Where things stand: six scripts on top, imports that go one way, downwards, and pieces that come
alone when they are copied.   pytest tests/test_house.py"""

import ast
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train_grpo

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train_grpo", "train_sft", "eval", "gotr1", "rewards", "render_boxes"}
MOST_FILES = 20
MOST_LINES = 6500
MOST_FLAGS = 40
ROOMS = ("data", "demo", "engine", "evaluation", "judges", "toy")

# From top to bottom. A module may import what stands in a lower row, and nothing else of ours
LAYERS = [
    ["toy.loop", "toy.explain"],
    ["train_grpo", "train_sft", "eval", "demo.__main__", "toy.ablate", "engine.speed"],
    ["evaluation.run"],
    ["evaluation.geneval", "evaluation.compbench", "evaluation.geneval2", "data.annotate"],
    ["evaluation.networks", "evaluation.held_out", "data.cache", "toy.model"],
    ["gotr1"],
    ["engine.trainer"],
    ["engine.checkpoints"],
    ["engine.decode", "engine.drift", "data.prompts"],
    ["engine.run"],
    ["judges.qwen", "judges.served", "judges.hps"],
    ["rewards"],
    ["evaluation.stats", "evaluation.sheets", "evaluation.variety", "data.got", "toy.world"],
    ["render_boxes"],
]
# The one door upwards: rewards.load_judge loads the judge that a flag names
DOORS = {("rewards", f"judges.{name}") for name in ("qwen", "served", "hps")}
# What the trainers load of evaluation/
LOOKING = {f"evaluation.{name}" for name in ("held_out", "variety", "stats", "sheets")}


def path_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def modules() -> set[str]:
    found = set()
    for path in ROOT.glob("*.py"):
        found.add(path.stem)
    for room in ROOMS:
        for path in (ROOT / room).glob("*.py"):
            if path.stem != "__init__":
                found.add(f"{room}.{path.stem}")
    return found


def imports(module: str, top_only: bool = False) -> set[str]:
    """Which of our modules it imports: everywhere but in its command line (`main`), or only at the
    top of the file."""
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    nodes = []
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "main":
            continue
        nodes += [statement] if top_only else ast.walk(statement)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names & modules()


def test_six_scripts_stand_on_top_and_every_module_has_its_layer():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS
    placed = [module for layer in LAYERS for module in layer]
    assert sorted(placed) == sorted(modules())


def test_imports_go_downwards():
    """Which also forbids circles."""
    depth = {}
    for row, layer in enumerate(LAYERS):
        for module in layer:
            depth[module] = row
    up = []
    arrows = 0
    for module in depth:
        for other in imports(module):
            arrows += 1
            if depth[other] <= depth[module] and (module, other) not in DOORS:
                up.append(f"{module} imports {other}")
    assert not up
    assert arrows > 30, "this test has lost sight of the imports"


def test_trainers_load_no_benchmark_and_the_engine_no_policy():
    for trainer in ("train_grpo", "train_sft"):
        assert {name for name in imports(trainer) if name.startswith("evaluation.")} <= LOOKING
    assert imports("gotr1", top_only=True) == {"engine.decode"}
    for module in modules() - {"engine.speed"}:
        if module.startswith(("engine.", "judges.")):
            assert "gotr1" not in imports(module)


FIRST_STEP = """
import json, sys
import train_grpo
from engine import trainer

def loaded(*args):
    import pathlib
    here = pathlib.Path("ROOT")
    files = [m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
    ours = [f for f in files if pathlib.Path(f).is_relative_to(here)]
    print("OURS", json.dumps(sorted(f for f in ours if not f.endswith("__init__.py"))))
    sys.exit(0)

trainer.Engine.step = loaded
train_grpo.main("--steps 1 --batch_size 1 --group 2 --eval_prompts 2 --out OUT".split())
"""


def test_few_files_are_loaded_until_the_first_step(tmp_path):
    """DESIGN: at most 14 files and about 5,000 lines before `optimizer.step()`."""
    program = FIRST_STEP.replace("ROOT", str(ROOT)).replace("OUT", str(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("OURS ")]
    files = json.loads(line.removeprefix("OURS "))
    assert len(files) <= MOST_FILES, files
    assert sum(len(Path(file).read_text().splitlines()) for file in files) <= MOST_LINES


def test_the_loop_can_be_read():
    """Branches: if, for, while, try and conditional expressions."""
    tree = ast.parse(path_of("train_grpo").read_text(encoding="utf-8"))
    (main,) = [node for node in tree.body if getattr(node, "name", "") == "main"]
    loops = [node for node in ast.walk(main) if isinstance(node, ast.For)]
    loop = max(loops, key=lambda node: node.end_lineno - node.lineno)
    kinds = (ast.If, ast.For, ast.While, ast.Try, ast.IfExp)
    assert sum(isinstance(node, kinds) for node in ast.walk(loop)) <= 12
    assert loop.end_lineno - loop.lineno < 110


def test_few_flags():
    assert len(dataclasses.fields(train_grpo.Config)) <= MOST_FLAGS


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_lines_are_short_and_comprehensions_rare(script):
    text = path_of(script).read_text(encoding="utf-8")
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    count = sum(isinstance(node, kinds) for node in ast.walk(ast.parse(text)))
    lines = text.splitlines()
    assert count < 4 * len(lines) / 100
    assert max(map(len, lines)) <= 100


def test_a_new_arrow_upwards_would_be_seen(monkeypatch, tmp_path):
    """The test above, tried on a house where render_boxes imports the trainer."""
    text = (ROOT / "render_boxes.py").read_text(encoding="utf-8")
    (tmp_path / "render_boxes.py").write_text(text + "\nfrom engine import trainer\n")
    monkeypatch.setitem(globals(), "path_of", lambda module: tmp_path / f"{module}.py")
    assert imports("render_boxes") == {"engine.trainer"}


# -------------------------------------------------------------------------------------------------
# Lifting: README's table of pieces to borrow, each tried in an empty folder

ALLOW = """
import builtins, os

import_anything = builtins.__import__
REFUSED = 'REFUSED_NAMES'.split()

def import_if_named(name, globals=None, *rest, **more):
    # stands for a machine without these packages, as the copied files see it; what the packages
    # that the table names import themselves is their affair
    importer = (globals or {}).get('__file__', '')
    if os.path.dirname(importer).startswith(os.getcwd()) and name.split('.')[0] in REFUSED:
        raise ImportError(f'{importer} wants {name}, which the table does not name')
    return import_anything(name, globals, *rest, **more)

builtins.__import__ = import_if_named
"""
TINY_JANUS = """
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig,
    PreTrainedTokenizerFast,
)

import gotr1

letters = {letter: k for k, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
bytes_only = Tokenizer(models.BPE(vocab=letters, merges=[]))
bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, **gotr1.SPECIAL_TOKENS)
text = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
)
vision = JanusVisionConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32, patch_size=8,
    projection_dim=32, num_image_tokens=16, depth=1,
)
vq = JanusVQVAEConfig(
    embed_dim=8, num_embeddings=16, latent_channels=32, base_channels=32,
    channel_multiplier=[1, 1], num_res_blocks=1, num_patches=4, projection_dim=32,
    image_token_embed_dim=32,
)
torch.manual_seed(0)
model = JanusForConditionalGeneration(
    JanusConfig(text_config=text, vision_config=vision, vq_config=vq)
).eval()
sampled = gotr1.rollout(model, tokenizer, ["a red ball"], group=2, cfg=2.0, max_chain=9)
assert sampled.image_tokens.shape == (2, 16)
logp, mask = gotr1.token_logps(model, sampled)
assert ((logp - sampled.logp) * mask).abs().max() < 1e-3 and mask.sum() >= 32
logp.sum().backward()
"""
BOXES = """
from render_boxes import Box, draw_boxes, format_chain, iou, parse_chain, strip_boxes

ball = Box("red ball", 100, 100, 500, 500)
chain = format_chain(["A", ball])
assert parse_chain(chain) == [ball] and strip_boxes(chain) == "A red ball" and iou(ball, ball) == 1
assert draw_boxes([ball], size=64).size == (64, 64)
"""
REWARDS = """
from rewards import parse_bboxes, parse_score, score, total_reward

class Judge:
    def semantic(self, prompts, chains):
        return [1.0] * len(prompts)

chain = "A <|obj_start|>ball<|obj_end|> <|box_start|>(1,2),(300,400)<|box_end|>"
assert score(Judge(), None, ["a ball"], [chain], [], parts=("sem",))[0]["total"] == 1
assert total_reward({"sem": 0.5, "pi": 0.5}) == 0.25 and parse_score('{"score": 7}') == 0.7
assert len(parse_bboxes("[[0, 0, 10, 10]]", width=20, height=20)) == 1
"""
JUDGE = """
from judges.qwen import QwenJudge

try:
    QwenJudge("/no/such/folder")
except (OSError, ValueError) as problem:
    assert "/no/such/folder" in str(problem)
"""
PREFERENCE = JUDGE.replace("qwen", "hps").replace("QwenJudge", "HPS")
SERVED = """
from judges.served import ServedJudge

try:
    ServedJudge("http://:0/v1")
except ValueError as problem:
    assert "is no address of a server" in str(problem)
"""
DATA = """
from data.got import Source, normalize_chain, open_rows

chain = normalize_chain("a small red ball (125,250),(375,500).", "0..999")
assert "<|obj_start|>small red ball<|obj_end|>" in chain
open("one.jsonl", "w").write('{"prompt": "a", "chain": "b", "image": "c"}')
assert len(open_rows(Source(data="one.jsonl", box_format="0..999"))) == 1
"""
MATHS = """
import torch
from grpo import group_advantages, grpo_loss

advantages = group_advantages(torch.tensor([1.0, 0.0]), group=2)
logp = torch.zeros(2, 3, requires_grad=True)
weight = torch.full((2, 3), 1 / 6)
loss, sums = grpo_loss(logp, logp.detach(), logp.detach(), advantages, weight)
loss.backward()
assert logp.grad.abs().max() > 0
"""
OTHERS = "tyro tqdm scipy datasets peft matplotlib pandas"  # what a table's row may leave out
PIECES = {  # first name of a row of the table -> how it is used, and what it must do without
    "group_advantages": (MATHS, f"transformers PIL {OTHERS}"),
    "parse_chain": (BOXES, f"torch transformers numpy {OTHERS}"),
    "total_reward": (REWARDS, f"torch transformers numpy {OTHERS}"),
    "ServedJudge": (SERVED, f"torch transformers numpy {OTHERS}".replace("tqdm ", "")),
    "QwenJudge": (JUDGE, "tyro scipy datasets peft matplotlib"),
    "HPS": (PREFERENCE, "tyro scipy datasets peft matplotlib"),
    "rollout": (TINY_JANUS, f"PIL {OTHERS}"),
    "normalize_chain": (DATA, "torch transformers tyro scipy peft matplotlib"),
}


def borrow_table() -> dict[str, tuple[list[str], str]]:
    """First name of each row -> (names, the cell that says which files)."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## Borrow a piece")[1].split("\n## ")[0]
    rows = {}
    for piece, files, _ in re.findall(r"^\| (`[^|]+) \| ([^|]+) \| ([^|]+) \|$", table, re.M):
        names = re.findall(r"`(\w+)`", piece)
        rows[names[0]] = (names, files)
    return rows


def test_every_piece_of_the_table_is_tried_below():
    assert borrow_table().keys() == PIECES.keys()


def copy_functions(names: list[str], source: Path, target: Path) -> None:
    """What a person does with a mouse: the functions' text, and the one import they need."""
    text = source.read_text(encoding="utf-8")
    pieces = ["import torch"]
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            pieces.append(ast.get_source_segment(text, node))
    target.write_text("\n\n\n".join(pieces) + "\n")


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_is_copied_into_an_empty_folder_and_used_there(piece, tmp_path):
    names, cell = borrow_table()[piece]
    files = re.findall(r"`([\w/.]+\.py)`", cell)
    program, refused = PIECES[piece]
    if piece == "group_advantages":  # by text: the file itself imports the whole house
        copy_functions(names, ROOT / files[0], tmp_path / "grpo.py")
    else:
        for file in files:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / file, tmp_path / file)
    script = tmp_path / "use_it.py"
    script.write_text(ALLOW.replace("REFUSED_NAMES", refused) + program)
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
