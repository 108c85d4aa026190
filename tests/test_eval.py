"""eval.py: held-out prompts, and the command end to end with the toy and tiny random networks."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import random_networks
import torch
from PIL import Image
from random_networks import noise
from transformers import JanusConfig

import eval as evaluation
import gotr1
import rewards
from engine import run as engine_run
from evaluation import compbench, geneval, held_out, networks
from evaluation import run as steps
from toy import world as toy

ROOT = Path(__file__).resolve().parent.parent


def run(*argv):
    evaluation.main([str(arg) for arg in argv])


def refused(capsys, *argv):
    """The one line that bad input gets, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: ")
    return line


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def files(folder):
    """Name -> content of all pictures in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


# -------------------------------------------------------------------------------------------------
# Held-out prompts: what train_grpo.py and `--bench toy` share


def exact_score(prompts, chains, images):
    return rewards.score_with_boxes(toy.ToyJudge(), toy.crispness, prompts, chains, images)


def test_held_out_prompts_do_not_depend_on_the_number_of_processes(policy, capsys):
    model, tokenizer = policy
    prompts = toy.toy_prompts(16, seed=7, held_out=True)
    sampling = {"cfg": 1.0, "temperature": 1.0, "max_chain": 50}
    drawing = held_out.Drawing(model, tokenizer, seed=3, **sampling)
    ours = held_out.evaluate(drawing, exact_score, prompts, exact=True)
    drawn = gotr1.rollout(model, tokenizer, prompts, group=1, seed=(3, 2**31), **sampling)
    assert [row["chain"] for row in ours] == drawn.chains
    pictures = gotr1.decode_images(model, drawn.image_tokens)
    for row, picture in zip(ours, pictures, strict=True):
        assert np.array_equal(row["image"], picture)
    assert [row["prompt"] for row in ours] == prompts and len({row["chain"] for row in ours}) > 8
    forced = drawn.forced.sum() / 16
    assert 0 < forced < 1, "some chains have three objects, which do not fit into 50 tokens"
    assert f"eval: {forced:.1%} of 16 chains were cut at --max_chain 50" in capsys.readouterr().out
    for rank in (0, 1):
        part = dataclasses.replace(drawing, rank=rank, world=2)
        half = held_out.evaluate(part, exact_score, prompts)  # by a judge who may err
        assert [row["chain"] for row in ours[rank::2]] == [row["chain"] for row in half]
        assert [row["scores"] for row in ours[rank::2]] == [row["scores"] for row in half]
        names = {name for row in half for name in row["measures"]}
        assert not any(name.endswith(" right") for name in names)
    summary = held_out.summarise(ours)
    assert summary["total"] == pytest.approx(np.mean([row["scores"]["total"] for row in ours]))
    wanted = {"color: picture right", "spatial: plan right", "complex: picture right"}
    assert wanted <= summary.keys()


def test_rows_have_the_boxes_that_the_judge_found(policy, tmp_path):
    """The sheet asks no judge again. A name without a readable reply has no box."""
    box = rewards.Box("red ball", 0, 0, 500, 500)

    def score(prompts, chains, images):
        return [{"total": 0.5}] * 2, [{"red ball": [box], "blue cube": None}, {}]

    drawing = held_out.Drawing(*policy)
    rows = held_out.evaluate(drawing, score, ["a red ball"] * 2, label="")
    assert [row["found"] for row in rows] == [[box], []]
    held_out.draw_sheet(rows, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 2 * 3 * 160


def test_categories_and_faults():
    prompt = "a red ball left of a blue cube"
    assert held_out.categories(prompt) == ["spatial", "left of"]
    assert held_out.categories(prompt + " and above a green cone") == ["complex"]
    assert held_out.categories("a red ball and a blue cube") == ["color"]
    assert held_out.categories("a photo of a dog") == []
    # the ball left of and above the cube
    boxes = toy.detect(toy.draw_scene(["red ball", "blue cube"], [(0, 0, 3), (5, 4, 3)]))
    assert held_out.toy_faults(prompt, boxes) == ""
    wrong = held_out.toy_faults("a red ball below a blue cube", boxes)
    assert wrong == "red ball not below blue cube"
    wrong = "no green cone; red ball not asked for; blue cube not asked for"
    assert held_out.toy_faults("a green cone", boxes) == wrong
    for kind in toy.PROMPT_MIX:  # the words agree with the exact judge
        for seed in range(20):
            example = toy.make_example(np.random.default_rng(seed), kind)
            faults = held_out.toy_faults(example.prompt, toy.detect(example.image))
            right = toy.ToyJudge().alignment([example.prompt], [example.image]) == [1.0]
            assert right == (faults == "")


def test_a_line_of_json_may_hold_any_character(tmp_path):
    """U+2028 ends a line for str.splitlines, not for JSON."""
    plan = "A <|obj_start|>cat<|obj_end|> <|box_start|>(1,2),(300,400)<|box_end|>"
    line = json.dumps({"prompt": "a\u2028cat", "chain": plan}, ensure_ascii=False)
    path = tmp_path / "plans.jsonl"
    path.write_bytes((line + "\r\n" + line + "\n").encode())
    assert networks.read_lines(path) == [line] * 2


# -------------------------------------------------------------------------------------------------
# The command: the toy


def test_toy_benchmark(tmp_path, capsys, monkeypatch):
    """The table against a count by hand from the rows; two runs compared; other seeds differ."""
    plans = toy.follow_plans()[::30]
    monkeypatch.setattr(toy, "follow_plans", lambda: plans)
    monkeypatch.setattr(held_out, "VARIETY_PROMPTS", 4)
    for name, seed in (("a", 0), ("b", 5)):
        run("--out", tmp_path / name, "--toy_prompts", 20, "--toy_seeds", 2, "--seed", seed)
    shown = capsys.readouterr().out
    assert "--cfg 1 --max_chain 96" in shown and "seed 6: 0.0% of 20 chains were cut" in shown
    results = read_results(tmp_path / "a")
    judged = [row for row in results["rows"] if "reason" in row]  # the others are given plans
    assert len(judged) == 40
    right = []
    for row in judged:
        if len(re.findall("left|right|above|below", row["prompt"])) == 1:
            right.append(row["measures"]["pi"] == 1)
        assert (row["reason"] == "") == (row["measures"]["pi"] == 1)
    right = np.mean(right)
    line = results["summary"]["spatial: picture right"]
    assert line["score"] == pytest.approx(right) and line["low"] < right < line["high"]
    assert f"spatial: picture right       {right:.4f}" in shown
    assert results["generation"]["cfg"] == 1.0
    for sheet in ("color", "complex"):
        assert (tmp_path / "a" / f"sheet_{sheet}.png").is_file()
    run("--compare", tmp_path / "a" / "results.json", tmp_path / "b" / "results.json")
    shown = capsys.readouterr().out
    assert "seed 0 and 5" in shown and "may be chance" in shown and " real\n" not in shown


# -------------------------------------------------------------------------------------------------
# The command: GenEval


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of tiny networks, named like the flags."""
    with random_networks.small_networks(tmp_path_factory.mktemp("networks")) as folder:
        yield folder


DOG = {"class": "dog", "count": 1}
CAT = {"class": "cat", "count": 1}
METADATA = [
    {"tag": "single_object", "include": [DOG], "prompt": "a photo of a dog"},
    {"tag": "two_object", "include": [DOG, CAT], "prompt": "a photo of a dog and a cat"},
    {"tag": "colors", "include": [{**DOG, "color": "red"}], "prompt": "a photo of a red dog"},
]


@pytest.fixture(scope="module")
def geneval_run(weights, tmp_path_factory):
    """(folder, flags, flags to draw) of a finished run: two samples of three prompts by the toy,
    scored by tiny networks."""
    folder = tmp_path_factory.mktemp("geneval")
    prompts = folder / "evaluation_metadata.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in METADATA))
    flags = ["--bench", "geneval", "--detector", weights / "detector", "--clip", weights / "clip"]
    draw = ["--prompts", prompts, "--model", "toy", "--samples", 2]
    run(*flags, *draw, "--out", folder / "run")
    return folder, flags, draw


def test_geneval_layout_and_report(geneval_run, capsys):
    folder, flags, _ = geneval_run
    images = folder / "run" / "images"
    wanted = {f"{p:05d}/samples/{s:04d}.png" for p in range(3) for s in range(2)}
    # each prompt has pictures of its own; the toy's two samples of one may be the same
    assert set(files(images)) == wanted and len(set(files(images).values())) >= 3
    for p, line in enumerate(METADATA):
        assert json.loads((images / f"{p:05d}" / "metadata.jsonl").read_text()) == line
        assert "<|obj_start|>" in (images / f"{p:05d}" / "chains" / "0000.txt").read_text()
    results = read_results(folder / "run")
    summary = results["summary"]
    assert summary["single_object"]["score"] == 1  # the detector sees dogs only
    assert summary["two_object"]["score"] == 0
    means = [summary[line["tag"]]["score"] for line in METADATA]
    assert list(summary) == ["single_object", "two_object", "colors", "overall"]
    assert summary["overall"]["score"] == pytest.approx(np.mean(means))
    assert len(results["rows"]) == 6
    assert results["generation"]["cfg"] == 1  # the toy's
    assert "not GenEval's own" in results["notes"][0] and "scoring" in results
    reasons = {row["reason"] for row in results["rows"] if row["group"] == "two_object"}
    assert reasons == {"cat: 0 found, 1 wanted"}
    assert (folder / "run" / "sheet_colors.png").is_file()
    # the same pictures, as if another model had made them
    run(*flags, "--images", images, "--out", folder / "again", "--model", "someone's")
    assert read_results(folder / "again")["summary"] == summary

    # a folder with one prompt less: it pairs by prompt, and there is no overall to compare
    shutil.copytree(images, folder / "less")
    shutil.rmtree(folder / "less" / "00000")
    run(*flags, "--images", folder / "less", "--out", folder / "of less")
    capsys.readouterr()
    run("--compare", folder / "run" / "results.json", folder / "of less" / "results.json")
    shown = capsys.readouterr().out
    assert re.search(r"^colors .*   1 of    1  may be chance$", shown, re.M)
    assert not re.search("^(overall|single_object) ", shown, re.M)


def test_lost_and_broken_pictures_are_made_again(geneval_run, tmp_path, capsys):
    """They come back bit by bit; the others keep their files."""
    folder, flags, draw = geneval_run
    out = tmp_path / "run"
    shutil.copytree(folder / "run", out)
    lost = out / "images/00000/samples/0001.png"
    broken = out / "images/00002/samples/0000.png"
    lost.unlink()
    broken.write_bytes(broken.read_bytes()[:200])
    run(*flags, *draw, "--out", out)
    captured = capsys.readouterr()
    assert f"{broken} cannot be read" in captured.err
    assert "pictures: 0.0% of 2 chains were cut at --max_chain 96" in captured.out
    assert files(out / "images") == files(folder / "run" / "images")
    assert read_results(out)["rows"] == read_results(folder / "run")["rows"]

    assert "--cfg 1.0 (now 3.0)" in refused(capsys, *flags, *draw, "--out", out, "--cfg", 3)
    shutil.copy(random_networks.M2F / "config.json", broken)
    line = refused(capsys, *flags, "--images", out / "images", "--out", tmp_path / "other")
    assert "1 of 6 pictures cannot be read" in line and str(broken) in line


def test_a_process_reads_only_its_share_of_the_pictures(geneval_run, weights, monkeypatch):
    folder, _, _ = geneval_run
    config = evaluation.Config(detector=str(weights / "detector"), clip=str(weights / "clip"))
    board = geneval.Board(config, "cpu")
    images = folder / "run" / "images"
    pictures = board.find_pictures(images)
    opened = set()
    read = Image.open

    def watched(path, *args):
        opened.add(path)
        return read(path, *args)

    monkeypatch.setattr(Image, "open", watched)
    rows = steps.score_pictures(board, pictures, images, batch_size=2, rank=1, world=2)
    assert opened == {picture.path for picture in pictures[1::2]} and len(rows) == 3


def test_stamps_of_files(tmp_path):
    """Size and time of a file; of the hub's cache the hash of its content. Folders of one name, as
    a base and its adapter may have, are not mixed up."""
    files = [tmp_path / parent / "step_000100" / "config.json" for parent in ("sft", "grpo")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    for file in files:
        seen = engine_run.file_stamps(files)
        later = file.stat().st_mtime_ns + 1
        os.utime(file, ns=(later, later))  # not `touch`: the clock of files is coarse
        now = engine_run.file_stamps(reversed(files))
        assert engine_run.changed_files(seen, now) == ["step_000100/config.json"]
    moved = (tmp_path / "sft").rename(tmp_path / "moved") / "step_000100" / "config.json"
    assert engine_run.changed_files(now, engine_run.file_stamps([moved, files[1]])) == []

    blob = tmp_path / "blobs" / "0123abcd"
    blob.parent.mkdir()
    blob.write_text("weights")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    downloaded = engine_run.file_stamps([link])
    blob.touch()  # downloaded again
    assert engine_run.file_stamps([link]) == downloaded


def test_pictures_of_other_weights_or_prompts_are_refused(weights, tmp_path, capsys, monkeypatch):
    """A model that was trained on in its own folder, then the base of an adapter."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = gotr1.load_policy("toy")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model.name_or_path = model.config._name_or_path = str(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    prompts = tmp_path / "non_spatial_val.txt"
    prompts.write_text("a red ball and a blue cube")
    for name in ("base", "adapter"):
        out = tmp_path / f"of {name}"
        draw = ["--bench", "compbench", "--prompts", prompts, "--samples", 1]
        draw += ["--clip_b32", weights / "clip", "--model", tmp_path / name, "--out", out]
        run(*draw)
        drawn = files(out / "images")
        with monkeypatch.context() as patch:  # nothing has changed, so nothing is loaded
            patch.setattr(gotr1, "load_policy", None)
            run(*draw)
        (tmp_path / "base" / "model.safetensors").touch()
        line = refused(capsys, *draw)
        assert f"{out}/images holds pictures of other weights" in line
        assert "base/model.safetensors differ" in line and "give another --out" in line
        assert files(out / "images") == drawn
        (out / "images" / "weights.json").unlink()
        assert "does not say which weights" in refused(capsys, *draw)
    prompts.write_text("a blue cup and a red car")  # other prompts in the same file
    assert "--prompts_crc" in refused(capsys, *draw)


def test_guidance_and_chain_length_suit_the_model(tmp_path):
    """Janus-Pro has 576 image tokens; no weights are read. A flag wins."""
    JanusConfig(vq_config={"num_patches": 24}).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    config = evaluation.Config(model=str(tmp_path), max_chain=300)
    config = steps.with_model_defaults(config)
    assert (config.cfg, config.max_chain) == (5.0, 300)
    assert steps.with_model_defaults(evaluation.Config(model="toy")).max_chain == 96


def test_pictures_without_a_chain(geneval_run, tmp_path):
    folder, flags, draw = geneval_run
    run(*flags, *draw, "--out", tmp_path, "--no_chain")
    assert {path.read_text() for path in tmp_path.rglob("chains/*.txt")} == {""}
    assert files(tmp_path / "images") != files(folder / "run" / "images")


# -------------------------------------------------------------------------------------------------
# The command: T2I-CompBench

BOOK = "The red book is next to the kite."
COLOR = ["a red ball and a blue cube", "a green cone and a red cube"]
PLACES = "a dog on the left of a cat"


class Doc(list):
    """What spaCy would say of a prompt: the words of "word/POS word/POS", and noun phrases."""

    def __init__(self, tagged, *chunks):
        for pair in tagged.split():
            text, pos = pair.split("/")
            self.append(types.SimpleNamespace(text=text, pos_=pos))
        self.noun_chunks = [types.SimpleNamespace(text=chunk) for chunk in chunks]


BOOK_TAGS = "The/DET red/ADJ book/NOUN is/AUX next/ADV to/ADP the/DET kite/NOUN ./PUNCT"
DOCS = {
    BOOK: Doc(BOOK_TAGS, "The red book", "the kite"),
    COLOR[0]: Doc("ball/NOUN cube/NOUN", "a red ball", "a blue cube"),
    COLOR[1]: Doc("cone/NOUN cube/NOUN", "a green cone", "a red cube"),
    PLACES: Doc("a/DET dog/NOUN left/NOUN a/DET cat/NOUN", "a dog", "the left", "a cat"),
}
COMPBENCH_FILES = {
    "color_val.txt": COLOR,
    "spatial_val.txt": [PLACES],
    "non_spatial_val.txt": [BOOK],
    "complex_val.txt": [BOOK],
    "complex_val_spatial.txt": [BOOK],
    "complex_val_action.txt": ["The dog runs."],
}


@pytest.fixture(scope="module")
def compbench_run(weights, tmp_path_factory):
    """(folder, flags) of a finished run: two samples of each prompt, scored by tiny networks."""
    nlp = types.SimpleNamespace(pipe=lambda prompts: [DOCS[prompt] for prompt in prompts])
    patch = pytest.MonkeyPatch()
    patch.setattr(compbench, "load_spacy", lambda: nlp)
    folder = tmp_path_factory.mktemp("compbench")
    for name, prompts in COMPBENCH_FILES.items():
        (folder / name).write_text("\n".join(prompts))
    flags = ["--bench", "compbench"]
    for name in ("blip", "gdino", "clip_b32"):
        flags += [f"--{name}", weights / name]
    lists = [folder / "complex_val_spatial.txt", folder / "complex_val_action.txt"]
    flags += ["--complex_lists", *lists]
    categories = ("color", "spatial", "non_spatial", "complex")
    prompts = [folder / f"{category}_val.txt" for category in categories]
    run(*flags, "--prompts", *prompts, "--model", "toy", "--samples", 2, "--out", folder / "run")
    yield folder, flags
    patch.undo()


def test_compbench_layout_and_report(compbench_run, weights):
    folder, flags = compbench_run
    images = folder / "run" / "images"
    drawn = files(images)
    wanted = {f"color/samples/{COLOR[k // 2]}_{k:06d}.png" for k in range(4)}
    assert {name for name in drawn if name.startswith("color")} == wanted
    assert len(drawn) == 10
    results = read_results(folder / "run")
    assert list(results["summary"]) == ["color", "spatial-gdino", "non_spatial", "complex-gdino"]
    assert "not the published" in results["notes"][0]

    blip = compbench.BlipVQA(str(weights / "blip"))
    clip = networks.Clip(str(weights / "clip_b32"), "clip_b32")
    gdino = compbench.GroundingDino(str(weights / "gdino"))
    for row in results["rows"]:
        picture = Image.open(images / row["path"])
        if row["group"] == "color":  # by hand: the product of the phrases, asked alone
            scores = []
            for phrase in row["prompt"].split(" and "):
                scores += blip([picture], [[f"{phrase}?"]])[0]
            assert row["score"] == pytest.approx(np.prod(scores), abs=3e-4)
        if row["group"] == "complex":
            # of a spatial prompt, the mean of attributes and place; the cosine plays no part
            scores = blip([picture], [["the red book?", "the kite?"]])[0]
            found = gdino([picture], [["book", "kite"]])[0]
            place = compbench.spatial_score(["book", "kite"], "next to", found)[1]
            assert row["score"] == pytest.approx((np.prod(scores) + place) / 2, abs=3e-4)
        if row["group"] == "non_spatial":
            cosine = compbench.cosines(clip, [picture], [row["prompt"]])[0]
            assert row["score"] == pytest.approx(cosine, abs=1e-5)
    run(*flags, "--images", images, "--out", folder / "again")
    assert read_results(folder / "again")["summary"] == results["summary"]


NOT_FINITE = [  # (module and name of what prepares a network's input, category, the network)
    (geneval, "detector_pixels", "geneval", "the detector's answer"),
    (networks, "clip_pixels", "geneval", "CLIP's answer"),
    (compbench, "normalised", "color", "BLIP's answer"),
    (compbench, "detector_pixels", "spatial", "Grounding DINO's answer"),
    (networks, "clip_pixels", "non_spatial", "CLIP's answer"),
]


@pytest.mark.parametrize("module, name, group, network", NOT_FINITE)
def test_a_network_that_is_not_finite_is_an_error(
    module, name, group, network, geneval_run, compbench_run, tmp_path, capsys, monkeypatch
):
    """No "no objects found", no "red": one line names network, picture and prompt."""
    if group == "geneval":
        folder, flags, _ = geneval_run
        shutil.copytree(folder / "run/images/00002", tmp_path / "00002")  # asks for a colour
    else:
        folder, flags = compbench_run
        shutil.copytree(folder / "run" / "images" / group, tmp_path / group)
    first = min(tmp_path.glob("*/samples/*.png"), key=lambda path: path.stem[-4:])
    prepare = getattr(module, name)

    def spoil(*args, **kwargs):
        ready = prepare(*args, **kwargs)
        return (ready[0] * torch.nan, *ready[1:]) if isinstance(ready, tuple) else ready * torch.nan

    monkeypatch.setattr(module, name, spoil)
    line = refused(capsys, *flags, "--images", tmp_path, "--out", tmp_path / "out")
    prompt = METADATA[2]["prompt"] if group == "geneval" else first.stem.split("_")[0]
    assert network in line and "not finite" in line and f"{first}, {prompt!r}" in line
    assert not (tmp_path / "out" / "results.json").exists()


def test_of_a_batch_the_picture_that_fails_is_named(geneval_run, tmp_path, capsys, monkeypatch):
    folder, flags, _ = geneval_run
    shutil.copytree(folder / "run" / "images", tmp_path / "images")
    wide = tmp_path / "images/00002/samples/0001.png"
    Image.new("RGB", (40, 32)).save(wide)
    verdict = geneval.verdict

    def fail(line, found, colors, size):
        row = verdict(line, found, colors, size)
        return {**row, "score": float("nan")} if size == (40, 32) else row

    monkeypatch.setattr(geneval, "verdict", fail)
    line = refused(capsys, *flags, "--images", tmp_path / "images", "--out", tmp_path / "out")
    assert f"{wide}, {METADATA[2]['prompt']!r}: the score is not finite" in line


def test_turned_pictures_are_seen_as_the_official_programs_see_them(
    compbench_run, weights, tmp_path, monkeypatch
):
    """GenEval and UniDet turn a picture as its EXIF data says; BLIP and CLIP of T2I-CompBench look
    at the pixels as they lie in the file."""
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by a quarter
    for group, prompt in (("color", COLOR[0]), ("spatial", PLACES)):
        path = tmp_path / "turned" / group / "samples" / f"{prompt}_000000.png"
        path.parent.mkdir(parents=True)
        noise(1, 48, 32)[0].save(path, exif=turned)
    sizes = []

    def watch(owner, name):
        look = getattr(owner, name)

        def watched(self, rows):
            images = [row if isinstance(row, Image.Image) else row[0] for row in rows]
            sizes.extend(image.size for image in images)
            return look(self, rows)

        monkeypatch.setattr(owner, name, watched)

    watch(compbench.BlipVQA, "_see")
    watch(compbench.GroundingDino, "_find")
    watch(geneval.Mask2Former, "__call__")
    _, flags = compbench_run
    run(*flags, "--images", tmp_path / "turned", "--out", tmp_path / "out")
    detector = geneval.Mask2Former(str(weights / "detector"))
    image = Image.open(path).convert("RGB")  # as eval.py opens it
    geneval.GenEval(detector, lambda crops, names: [])([image], [METADATA[0]])
    assert sizes == [(48, 32), (32, 48), (32, 48)]  # BLIP, Grounding DINO, Mask2Former


def test_two_processes_draw_and_score_what_one_does(compbench_run, tmp_path):
    """Three of four pictures are missing: they are shared out, and nobody looks too early."""
    folder, flags = compbench_run
    prompts = folder / "non_spatial_val.txt"
    argv = [*flags, "--prompts", prompts, "--model", "toy", "--samples", 4]
    run(*argv, "--out", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    drawn = files(tmp_path / "one" / "images")
    for name in sorted(drawn)[1:]:
        (tmp_path / "two" / "images" / name).unlink()
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 eval.py".split()
    command = [sys.executable, *launch, *argv, "--out", tmp_path / "two"]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "of 3 chains were cut" in done.stdout
    assert files(tmp_path / "two" / "images") == drawn
    one = read_results(tmp_path / "one")["rows"]
    two = read_results(tmp_path / "two")["rows"]
    assert len(two) == 4 and [row["path"] for row in one] == [row["path"] for row in two]
    scores = [row["score"] for row in one]
    assert [row["score"] for row in two] == pytest.approx(scores, abs=1e-6)  # other batches


# -------------------------------------------------------------------------------------------------
# The command: what it does not do


def test_scoring_never_touches_the_network(geneval_run, compbench_run, tmp_path, monkeypatch):
    """With paths given, and with the hub's offline switch off; with a hub id it would be asked."""
    import huggingface_hub.constants

    asked = []

    class Asked(BaseException):
        """Nothing on the way up takes this for an ordinary failure, to try again or to hide it."""

    def refuse(*address, **_):
        asked.append(address)
        raise Asked

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for k, (folder, flags, *_) in enumerate((geneval_run, compbench_run)):
        run(*flags, "--images", folder / "run" / "images", "--out", tmp_path / str(k))
        assert (tmp_path / str(k) / "results.json").is_file()
    assert asked == []
    folder, flags, _ = geneval_run
    argv = [*flags, "--images", folder / "run" / "images", "--out", tmp_path / "other"]
    with pytest.raises(Asked):
        run(*argv, "--clip", "nobody/nothing")


def test_a_benchmark_is_loaded_only_when_it_is_asked_for():
    for path in ("eval.py", "evaluation/run.py", "evaluation/networks.py"):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not re.search("^(import|from) .*(geneval|compbench)", text, re.M), path


DRAW = "--bench {} --model toy --out OUT --prompts {}"
LOOK = "--bench geneval --images IMAGES --out OUT --detector DETECTOR --clip CLIP"
DRAGON = json.dumps({**METADATA[0], "include": [{"class": "dragon", "count": 1}]})
REFUSED = [  # (flags, name and content of a file, what the line says)
    ("--bench geneval --prompts FILE", "a.jsonl", "", "--model is missing"),
    ("--bench geneval", "", "", "or --images to score"),
    ("--samples -1", "", "", "--samples is -1"),
    ("--cfg -1", "", "", "--cfg is -1"),
    ("--max_chain 0", "", "", "--max_chain is 0"),
    ("--no_chain", "", "", "no --no_chain"),
    ("--compare FILE FILE", "names.txt", "a dog", "no two results.json"),
    ("--compare FILE", "names.txt", "a dog", "give two"),
    (f"{LOOK} --detector NONE.pth", "", "", "NONE.pth: no weights there; docs/evaluation.md"),
    (f"{LOOK} --clip NONE", "", "", "NONE: no weights there; docs/evaluation.md"),
    (f"{LOOK} --detector OTHER.pth", "", "", "do not fit"),
    ("--bench geneval --images OUT --out OUT", "", "", "nothing for geneval"),
    (DRAW.format("geneval", "FILE FILE"), "a.jsonl", "", "geneval has one file"),
    (DRAW.format("geneval", "FILE"), "a.jsonl", '{"prompt": "a dog", "tag": "colors"}', "line 1"),
    (DRAW.format("geneval", "FILE"), "a.jsonl", DRAGON, "dragon"),
    (DRAW.format("compbench", "FILE"), "names.txt", "a dog", "color_val.txt"),
    (DRAW.format("compbench", "FILE"), "color_val.txt", "a snake_case dog", "line 1"),
    (DRAW.format("compbench", "FILE"), "complex_val.txt", BOOK, "--complex_lists"),
]


@pytest.mark.parametrize("flags, name, content, words", REFUSED)
def test_bad_input_is_one_line(flags, name, content, words, geneval_run, weights, tmp_path, capsys):
    """What cannot be scored is not drawn either."""
    torch.save({"state_dict": {"backbone.norm0.weight": torch.ones(2)}}, tmp_path / "OTHER.pth")
    places = {
        "OUT": tmp_path / "out",
        "IMAGES": geneval_run[0] / "run" / "images",
        "DETECTOR": weights / "detector",
        "CLIP": weights / "clip",
        "NONE": tmp_path / "NONE",
        "NONE.pth": tmp_path / "NONE.pth",
        "OTHER.pth": tmp_path / "OTHER.pth",
        "FILE": tmp_path / name,
    }
    if name:
        places["FILE"].write_text(content)
    assert words in refused(capsys, *[places.get(flag, flag) for flag in flags.split()])
    assert not list(tmp_path.glob("out/**/*.png"))
