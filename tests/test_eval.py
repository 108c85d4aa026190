"""eval.py: held-out prompts, and the command end to end with the toy and tiny random networks."""

import dataclasses
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import random_networks
import torch
from PIL import Image
from random_networks import noise

import eval as evaluation
import gotr1
import rewards
from engine import run as engine_run
from evaluation import compbench, geneval, held_out, networks
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
    return rewards.score(toy.ToyJudge(), toy.crispness, prompts, chains, images)


def test_held_out_prompts_do_not_depend_on_the_number_of_processes(policy):
    model, tokenizer = policy
    prompts = toy.toy_prompts(24, seed=7, held_out=True)
    sampling = {"cfg": 1.0, "temperature": 1.0, "max_chain": 96}
    drawing = held_out.Drawing(model, tokenizer, seed=3, **sampling)
    ours = held_out.evaluate(drawing, exact_score, prompts)
    drawn = gotr1.rollout(model, tokenizer, prompts, group=1, seed=(3, 2**31), **sampling)
    assert [row["chain"] for row in ours] == drawn.chains
    pictures = gotr1.decode_images(model, drawn.image_tokens)
    for row, picture in zip(ours, pictures, strict=True):
        assert np.array_equal(row["image"], picture)
    assert [row["prompt"] for row in ours] == prompts
    assert len({row["chain"] for row in ours}) > 12
    for rank in (0, 1):
        part = dataclasses.replace(drawing, rank=rank, world=2)
        half = held_out.evaluate(part, exact_score, prompts)
        assert [row["chain"] for row in ours[rank::2]] == [row["chain"] for row in half]
        assert [row["scores"] for row in ours[rank::2]] == [row["scores"] for row in half]
    summary = held_out.summarise(ours)
    assert summary["total"] == pytest.approx(np.mean([row["scores"]["total"] for row in ours]))
    wanted = {"color: picture right", "spatial: plan right", "complex: picture right"}
    assert wanted <= summary.keys()


def test_boxes_found_are_those_of_the_planned_objects():
    picture = toy.draw_scene(["red ball", "blue cube"], [(0, 0, 3), (5, 4, 3)])
    ball, cube = toy.detect(picture)
    chain = "A <|obj_start|>blue cube<|obj_end|> <|box_start|>(0,0),(9,9)<|box_end|>"
    rows = [{"chain": chain, "image": picture}, {"chain": "no plan", "image": picture}]
    assert held_out.found_boxes(toy.ToyJudge(), rows) == [[cube], []]


def test_toy_look_is_a_mean_over_samples(policy):
    model, tokenizer = policy
    prompts = toy.toy_prompts(6, seed=7, held_out=True)
    means = held_out.toy_look(model, tokenizer, prompts, seed=0)
    drawn = gotr1.rollout(model, tokenizer, prompts, seed=0, max_chain=96)
    rows = exact_score(prompts, drawn.chains, gotr1.decode_images(model, drawn.image_tokens))
    assert list(means) == ["well_formed", *rewards.PARTS, "total"]
    assert means["total"] == pytest.approx(np.mean([row["total"] for row in rows]))
    assert 0 <= means["well_formed"] <= 1


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


# -------------------------------------------------------------------------------------------------
# The command: the toy


def test_toy_benchmark(tmp_path, capsys):
    """The table against a count by hand from the rows; two runs compared; other seeds differ."""
    for name, seed in (("a", 0), ("b", 5)):
        run("--out", tmp_path / name, "--toy_prompts", 30, "--toy_seeds", 2, "--seed", seed)
    shown = capsys.readouterr().out
    results = read_results(tmp_path / "a")
    judged = [row for row in results["rows"] if "reason" in row]  # the others are given plans
    assert len(judged) == 60
    right = []
    for row in judged:
        if len(re.findall("left|right|above|below", row["prompt"])) == 1:
            right.append(row["measures"]["pi"] == 1)
        assert (row["reason"] == "") == (row["measures"]["pi"] == 1)
    right = np.mean(right)
    line = results["summary"]["spatial: picture right"]
    assert line["score"] == pytest.approx(right) and line["low"] < right < line["high"]
    assert min(line["seeds"]) <= right <= max(line["seeds"]) and len(line["seeds"]) == 2
    assert f"spatial: picture right       {right:.4f}" in shown
    assert {"torch", "transformers"} <= results["versions"].keys()
    assert results["generation"]["cfg"] == 1.0
    for sheet in ("color", "left_of", "complex"):
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


METADATA = [
    {
        "tag": "single_object",
        "include": [{"class": "dog", "count": 1}],
        "prompt": "a photo of a dog",
    },
    {
        "tag": "two_object",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}],
        "prompt": "a photo of a dog and a cat",
    },
    {
        "tag": "colors",
        "include": [{"class": "dog", "count": 1, "color": "red"}],
        "prompt": "a photo of a red dog",
    },
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
    assert results["generation"]["size"] == "32 x 32" and results["generation"]["chain"] is True
    assert "not GenEval's own" in results["notes"][0] and "scoring" in results
    reasons = {row["reason"] for row in results["rows"] if row["group"] == "two_object"}
    assert reasons == {"cat: 0 found, 1 wanted"}
    assert (folder / "run" / "sheet_colors.png").is_file()
    # the same pictures, as if another model had made them
    run(*flags, "--images", images, "--out", folder / "again", "--model", "someone's")
    assert read_results(folder / "again")["summary"] == summary
    shown = capsys.readouterr().out
    assert re.search(r"^overall .* of 3 of 6 tags$", shown, re.M)

    # a folder with one prompt less: it pairs by prompt, and there is no overall to compare
    shutil.copytree(images, folder / "less")
    shutil.rmtree(folder / "less" / "00000")
    run(*flags, "--images", folder / "less", "--out", folder / "of less")
    capsys.readouterr()
    run("--compare", folder / "run" / "results.json", folder / "of less" / "results.json")
    shown = capsys.readouterr().out
    assert re.search(r"^colors .*   1 of    1  may be chance$", shown, re.M)
    assert "not both have all of it: overall, single_object" in shown


def watched(seen, most=None):
    """A detector that notes what it has seen, and is stopped after `most` calls."""
    detect = geneval.Mask2Former.__call__
    calls = []

    def call(self, images):
        if len(calls) == most:
            raise KeyboardInterrupt
        calls.append(len(images))
        seen.extend(images)
        return detect(self, images)

    return call


def test_lost_and_broken_pictures_are_made_again(geneval_run, tmp_path, capsys, monkeypatch):
    """They come back bit by bit; the others keep their files, and all keep their scores."""
    folder, flags, draw = geneval_run
    out = tmp_path / "run"
    shutil.copytree(folder / "run", out)
    lost = out / "images/00000/samples/0001.png"
    broken = out / "images/00002/samples/0000.png"
    lost.unlink()
    broken.write_bytes(broken.read_bytes()[:200])
    with (out / "scores_0.jsonl").open("a") as file:
        file.write('{"path": "half a li')
    seen = []
    monkeypatch.setattr(geneval.Mask2Former, "__call__", watched(seen))
    run(*flags, *draw, "--out", out)
    assert f"{broken} cannot be read" in capsys.readouterr().err
    assert files(out / "images") == files(folder / "run" / "images")
    assert seen == []  # the checksums are those of the rows that are there
    assert read_results(out)["summary"] == read_results(folder / "run")["summary"]
    noise(1, 32, 32)[0].save(lost)  # another picture: its row, and only its, is made anew
    run(*flags, *draw, "--out", out)
    assert len(seen) == 1

    assert "--cfg 1.0 (now 3.0)" in refused(capsys, *flags, *draw, "--out", out, "--cfg", 3)
    shutil.copy(random_networks.M2F / "config.json", broken)
    line = refused(capsys, *flags, "--images", out / "images", "--out", tmp_path / "other")
    assert "1 of 6 pictures cannot be read" in line and str(broken) in line


def test_scoring_goes_on_where_it_was(geneval_run, weights, tmp_path, monkeypatch):
    """With other weights all rows are made anew; what was scored before a Ctrl-C stays."""
    folder, flags, draw = geneval_run
    out = tmp_path / "run"
    shutil.copytree(folder / "run", out)
    shutil.copytree(weights / "detector", tmp_path / "detector")
    (tmp_path / "detector" / "model.safetensors").touch()
    command = [*flags, *draw, "--out", out, "--detector", tmp_path / "detector"]
    command += ["--score_batch", 2]
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(geneval.Mask2Former, "__call__", watched(seen, most=2))
        with pytest.raises(KeyboardInterrupt):
            run(*command)
    assert len(seen) == 4
    monkeypatch.setattr(geneval.Mask2Former, "__call__", watched(seen))
    run(*command)
    assert len(seen) == 6  # of three batches two were scored before the interruption


def test_stamps_of_files(tmp_path, monkeypatch):
    """Size and time of a file; of the hub's cache the hash of its content, of a hub id the
    commit. Folders of one name, as a base and its adapter may have, are not mixed up."""
    files = []
    for parent in ("sft", "grpo"):
        folder = tmp_path / parent / "step_000100"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        files.append(folder / "config.json")
    before = engine_run.file_stamps(files)
    assert len(before) == 2 and json.loads(json.dumps(before)) == before
    assert engine_run.changed_files(before, engine_run.file_stamps(reversed(files))) == []
    for file in files:
        seen = engine_run.file_stamps(files)
        later = file.stat().st_mtime_ns + 1
        os.utime(file, ns=(later, later))  # not `touch`: the clock of files is coarse
        now = engine_run.file_stamps(files)
        assert engine_run.changed_files(seen, now) == ["step_000100/config.json"]
    assert engine_run.changed_files(now, now[:1]) == ["step_000100/config.json"]
    shutil.copytree(tmp_path / "sft", tmp_path / "moved")  # with its times
    moved = engine_run.file_stamps([tmp_path / "moved" / "step_000100" / "config.json"])
    assert engine_run.changed_files(moved, engine_run.file_stamps(files[:1])) == []

    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123abcd").write_text("weights")
    link = tmp_path / "snapshots" / "model.safetensors"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "blobs" / "0123abcd")
    downloaded = engine_run.file_stamps([link])
    (tmp_path / "blobs" / "0123abcd").touch()  # downloaded again
    assert engine_run.file_stamps([link]) == downloaded

    def of_commit(name, file):
        return str(tmp_path / "snapshots" / commit / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", of_commit)
    commit = "aaaa"
    first = networks.network_stamps("openai/clip-vit-large-patch14", "clip")
    commit = "bbbb"
    second = networks.network_stamps("openai/clip-vit-large-patch14", "clip")
    changed = engine_run.changed_files(first, second)
    assert changed == ["openai/clip-vit-large-patch14"]


def test_pictures_of_other_weights_are_refused(weights, tmp_path, capsys, monkeypatch):
    """A model that was trained on in its own folder, then the base of an adapter."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = gotr1.load_policy("toy")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model.name_or_path = model.config._name_or_path = str(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    prompts = tmp_path / "color_val.txt"
    prompts.write_text("a red ball and a blue cube")
    for name in ("base", "adapter"):
        out = tmp_path / f"of {name}"
        draw = ["--bench", "compbench", "--prompts", prompts, "--samples", 1, "--generate_only"]
        draw += ["--model", tmp_path / name, "--out", out]
        run(*draw)
        drawn = files(out)
        with monkeypatch.context() as patch:  # nothing has changed, so nothing is loaded
            patch.setattr(gotr1, "load_policy", None)
            run(*draw)
        (tmp_path / "base" / "model.safetensors").touch()
        line = refused(capsys, *draw)
        assert f"{out}/images holds pictures of other weights" in line
        assert "base/model.safetensors differ" in line and "give another --out" in line
        assert files(out) == drawn
        (out / "images" / "weights.json").unlink()
        assert "does not say which weights" in refused(capsys, *draw)


def test_scores_of_other_networks_are_made_anew(
    geneval_run, weights, tmp_path, capsys, monkeypatch
):
    """A detector in the old one's place, then a new rule; with nothing touched nothing is done."""
    folder, flags, _ = geneval_run
    detector = tmp_path / "detector"
    shutil.copytree(weights / "detector", detector)
    score = [*flags, "--images", folder / "run" / "images", "--detector", detector]
    score += ["--out", tmp_path / "out"]
    seen = []
    monkeypatch.setattr(geneval.Mask2Former, "__call__", watched(seen))

    def looked_at():
        seen.clear()
        run(*score)
        return len(seen), "made anew" in capsys.readouterr().out

    assert looked_at() == (6, False)
    assert looked_at() == (0, False)
    other = geneval.Mask2Former(str(detector))
    other.model.class_predictor.bias.data[geneval.CLASSES.index("dog")] = -9
    other.model.class_predictor.bias.data[geneval.CLASSES.index("cat")] = 9
    other.model.save_pretrained(detector)
    run(*score)
    assert "6 scores are made anew: detector changed" in capsys.readouterr().out
    reasons = {row["reason"] for row in read_results(tmp_path / "out")["rows"]}
    assert "dog: 0 found, 1 wanted" in reasons
    assert looked_at() == (0, False)
    monkeypatch.setattr(geneval, "RULES", geneval.RULES + 1)
    run(*score)
    assert "6 scores are made anew: rules changed" in capsys.readouterr().out
    assert read_results(tmp_path / "out")["scoring"]["rules"] == geneval.RULES


def test_pictures_only_and_without_a_chain(geneval_run, tmp_path, capsys):
    folder, _, draw = geneval_run
    run("--bench", "geneval", *draw, "--out", tmp_path, "--generate_only", "--no_chain")
    assert "6 pictures" in capsys.readouterr().out and not (tmp_path / "results.json").exists()
    assert {path.read_text() for path in tmp_path.rglob("chains/*.txt")} == {""}
    assert files(tmp_path / "images") != files(folder / "run" / "images")


# -------------------------------------------------------------------------------------------------
# The command: T2I-CompBench

LONG = "The red book is next to the kite."
PHRASES = {
    "made by": "spaCy test",
    "prompts": {
        LONG: {
            "chunks": ["The red book", "the kite"],
            "tokens": ["The", "red", "book", "is", "next", "to", "the", "kite", "."],
            "pos": ["DET", "ADJ", "NOUN", "AUX", "ADV", "ADP", "DET", "NOUN", "PUNCT"],
        }
    },
}
COLOR = ["a red ball and a blue cube", "a green cone and a red cube"]
COMPBENCH_FILES = {
    "color_val.txt": COLOR,
    "spatial_val.txt": ["a dog on the left of a cat"],
    "non_spatial_val.txt": [LONG],
    "complex_val.txt": [LONG],
    "complex_val_spatial.txt": [LONG],
    "complex_val_action.txt": ["The dog runs."],
}


@pytest.fixture(scope="module")
def compbench_run(weights, tmp_path_factory):
    """(folder, flags) of a finished run: two samples of each prompt, scored by tiny networks."""
    folder = tmp_path_factory.mktemp("compbench")
    for name, prompts in COMPBENCH_FILES.items():
        (folder / name).write_text("\n".join(prompts))
    (folder / "phrases.json").write_text(json.dumps(PHRASES))
    flags = ["--bench", "compbench", "--phrases", folder / "phrases.json"]
    for name in ("blip", "gdino", "clip_b32"):
        flags += [f"--{name}", weights / name]
    lists = [folder / "complex_val_spatial.txt", folder / "complex_val_action.txt"]
    flags += ["--complex_lists", *lists]
    categories = ("color", "spatial", "non_spatial", "complex")
    prompts = [folder / f"{category}_val.txt" for category in categories]
    run(*flags, "--prompts", *prompts, "--model", "toy", "--samples", 2, "--out", folder / "run")
    return folder, flags


def test_compbench_layout_and_report(compbench_run, weights):
    folder, flags = compbench_run
    images = folder / "run" / "images"
    drawn = files(images)
    wanted = {f"color/samples/{COLOR[k // 2]}_{k:06d}.png" for k in range(4)}
    assert {name for name in drawn if name.startswith("color")} == wanted
    assert len(drawn) == 10
    results = read_results(folder / "run")
    assert set(results["summary"]) == {"color", "spatial-gdino", "non_spatial", "complex-gdino"}
    assert "not the published" in results["notes"][0]
    assert "spaCy test" in results["scoring"]["phrases"]

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


def test_a_list_or_a_parse_that_changed_makes_its_scores_anew(compbench_run, tmp_path, capsys):
    """Another complex list of the same name, then other phrases: the other categories stay."""
    folder, flags = compbench_run
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    flags = [str(flag).replace(str(folder), str(tmp_path)) for flag in flags]
    score = [*flags, "--images", tmp_path / "run" / "images", "--out", tmp_path / "out"]
    run(*score)
    spatial_list = tmp_path / "complex_val_spatial.txt"
    spatial_list.touch()  # the same lines
    run(*score)
    assert "made anew" not in capsys.readouterr().out
    spatial_list.write_text("another prompt")
    run(*score)
    assert "2 scores are made anew: complex_lists changed" in capsys.readouterr().out
    content = json.loads(json.dumps(PHRASES))
    content["prompts"][LONG]["chunks"] = ["a kite"]
    (tmp_path / "phrases.json").write_text(json.dumps(content))
    run(*score)
    assert "2 scores are made anew: what the networks are asked" in capsys.readouterr().out
    run(*score)
    assert "made anew" not in capsys.readouterr().out


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
    """No "no objects found", no "red": one line names network, picture and prompt, and no row of
    that batch is written."""
    if group == "geneval":
        folder, flags, _ = geneval_run
        shutil.copytree(folder / "run" / "images", tmp_path / "images")
        broken = tmp_path / "images/00002/samples/0001.png"  # of the tag that asks for a colour
        prompt = METADATA[2]["prompt"]
    else:
        folder, flags = compbench_run
        shutil.copytree(folder / "run" / "images" / group, tmp_path / "images" / group)
        broken = sorted((tmp_path / "images").glob("*/samples/*.png"))[1]
        prompt = broken.stem.split("_")[0]
    Image.new("RGB", (32, 32), (255, 255, 255)).save(broken)
    prepare = getattr(module, name)

    def spoil(picture, *args, **kwargs):
        """nan in place of the pixels of a white picture, and of what is cut out of it."""
        ready = prepare(picture, *args, **kwargs)
        if torch.is_tensor(picture):
            white = picture.float().mean() == 255
        else:
            white = np.isin(np.array(picture), (0x99, 255)).all()
        if not white:
            return ready
        if isinstance(ready, tuple):
            return ready[0] * torch.nan, *ready[1:]
        return ready * torch.nan

    monkeypatch.setattr(module, name, spoil)
    line = refused(capsys, *flags, "--images", tmp_path / "images", "--out", tmp_path / "out")
    assert network in line and "not finite" in line
    assert f"{broken}, {prompt!r}" in line
    assert not (tmp_path / "out" / "results.json").exists()
    for path in (tmp_path / "out").glob("scores_*.jsonl"):
        written = path.read_text()
        assert "NaN" not in written and str(broken.relative_to(tmp_path / "images")) not in written


def test_a_score_that_is_not_finite_is_not_written(geneval_run, tmp_path, capsys, monkeypatch):
    folder, flags, _ = geneval_run
    verdict = {"score": float("nan"), "reason": "", "boxes": []}
    monkeypatch.setattr(
        geneval.GenEval, "__call__", lambda self, images, metadata: [verdict] * len(images)
    )
    images = folder / "run" / "images"
    line = refused(capsys, *flags, "--images", images, "--out", tmp_path)
    assert "the score is not finite" in line and "a photo of a dog" in line
    assert (tmp_path / "scores_0.jsonl").read_text() == ""


def test_turned_pictures_are_seen_as_the_official_programs_see_them(
    compbench_run, weights, tmp_path, monkeypatch
):
    """GenEval and UniDet turn a picture as its EXIF data says; BLIP and CLIP of T2I-CompBench look
    at the pixels as they lie in the file."""
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by a quarter
    lying = noise(1, 48, 32)[0]
    for kind, exif in (("plain", None), ("turned", turned)):
        for group, prompt in (("color", COLOR[0]), ("spatial", "a dog on the left of a cat")):
            path = tmp_path / kind / group / "samples" / f"{prompt}_000000.png"
            path.parent.mkdir(parents=True)
            lying.save(path, **({"exif": exif} if exif else {}))
    _, flags = compbench_run
    seen = []
    see = compbench.BlipVQA._see
    find = compbench.GroundingDino._find

    def blip_sees(self, images):
        seen.extend(image.size for image in images)
        return see(self, images)

    def gdino_sees(self, rows):
        seen.extend(image.size for image, _ in rows)
        return find(self, rows)

    monkeypatch.setattr(compbench.BlipVQA, "_see", blip_sees)
    monkeypatch.setattr(compbench.GroundingDino, "_find", gdino_sees)
    for kind, sizes in (("plain", [(48, 32), (48, 32)]), ("turned", [(48, 32), (32, 48)])):
        seen.clear()
        run(*flags, "--images", tmp_path / kind, "--out", tmp_path / f"{kind} out")
        assert seen == sizes  # BLIP's, then Grounding DINO's
    path = next((tmp_path / "turned").glob("spatial/*/*.png"))
    image = Image.open(path).convert("RGB")  # as eval.py opens it
    found = []

    def detector(images):
        instances = geneval.Mask2Former(str(weights / "detector"))(images)
        found.extend(instances[0])
        return instances

    judge = geneval.GenEval(detector, lambda crops, names: [])
    assert judge([image], [METADATA[0]])[0]["score"] == 1
    assert {one.mask.shape for one in found} == {(48, 32)}


def test_pictures_come_by_the_number_in_their_names(tmp_path):
    """As the official programs sort them; a name without a number is an error, not a prompt."""
    samples = tmp_path / "color" / "samples"
    samples.mkdir(parents=True)
    for name in ("b_9", "a_10", "a_000002"):
        noise(1)[0].save(samples / f"{name}.png")
    found = [picture.path.stem for picture in compbench.find_pictures(tmp_path)]
    assert found == ["a_000002", "b_9", "a_10"]
    noise(1)[0].save(samples / "portrait.png")
    with pytest.raises(ValueError, match="portrait.png: expected a name like"):
        compbench.find_pictures(tmp_path)


def test_processes_change_nothing(compbench_run, tmp_path):
    """Two processes draw and score what one does."""
    folder, flags = compbench_run
    argv = [*flags, "--prompts", folder / "color_val.txt", "--model", "toy", "--samples", 2]
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 eval.py".split()
    command = [sys.executable, *launch, *argv, "--out", tmp_path / "two"]

    def run_two():
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    run_two()
    run(*argv, "--out", tmp_path / "one")
    kept = files(tmp_path / "two" / "images")
    assert files(tmp_path / "one" / "images") == kept
    one = read_results(tmp_path / "one")
    two = read_results(tmp_path / "two")
    assert one["summary"] == two["summary"] and len(two["rows"]) == 4
    rows = [path.read_text().splitlines() for path in (tmp_path / "two").glob("scores_*.jsonl")]
    assert [len(some) for some in rows] == [2, 2]

    # what is missing is shared out anew: nobody may look before all have drawn
    pictures = sorted((tmp_path / "two" / "images").glob("*/samples/*.png"))
    pictures[1].unlink()
    run_two()
    assert files(tmp_path / "two" / "images") == kept


def test_other_prompts_in_the_same_file_are_not_scored_with_the_pictures_of_the_first(
    compbench_run, tmp_path, capsys
):
    folder, flags = compbench_run
    prompts = tmp_path / "color_val.txt"
    prompts.write_text((folder / "color_val.txt").read_text())
    argv = [*flags, "--prompts", prompts, "--model", "toy", "--samples", 1, "--generate_only"]
    argv += ["--out", tmp_path / "run"]
    run(*argv)
    prompts.write_text("a blue cup and a red car\n")
    assert "--prompts_crc" in refused(capsys, *argv)


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
    code = "import sys, eval; print([name for name in sys.modules if name.startswith('bench')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "['evaluation', 'evaluation.stats']", done.stderr


def test_bad_flags_are_one_line(geneval_run, tmp_path, capsys):
    _, flags, draw = geneval_run
    assert "--model is missing" in refused(capsys, *flags, *draw[:2])
    assert "--images" in refused(capsys, *flags)
    assert "--samples is -1" in refused(capsys, "--samples", -1)
    assert "no --no_chain" in refused(capsys, "--no_chain")
    (tmp_path / "names.txt").write_text("a dog")
    names = [tmp_path / "names.txt"] * 2
    assert "results.json" in refused(capsys, "--compare", *names)
    assert "give two" in refused(capsys, "--compare", *names[:1])


def test_bad_weights_and_pictures_are_one_line(geneval_run, tmp_path, capsys):
    folder, flags, _ = geneval_run
    score = [*flags, "--images", folder / "run" / "images", "--out", tmp_path / "out"]
    missing = refused(capsys, *score, "--detector", tmp_path / "m2f.pth")
    assert "743b7d99.pth from download.openmmlab.com" in missing
    assert "--detector PATH" in missing and str(tmp_path / "m2f.pth") in missing
    missing = refused(capsys, *score, "--clip", tmp_path / "nothing")
    assert "openai/clip-vit-large-patch14" in missing and "--clip PATH" in missing
    torch.save({"state_dict": {"backbone.norm0.weight": torch.ones(2)}}, tmp_path / "other.pth")
    assert "do not fit" in refused(capsys, *score, "--detector", tmp_path / "other.pth")
    nothing = refused(capsys, *flags, "--images", tmp_path / "empty", "--out", tmp_path / "out")
    assert "nothing for geneval" in nothing


def test_bad_prompts_are_one_line(geneval_run, tmp_path, capsys):
    _, flags, _ = geneval_run
    out = tmp_path / "out"
    bad = tmp_path / "bad.jsonl"
    draw = [*flags, "--model", "toy", "--out", out, "--prompts", bad]
    bad.write_text('{"prompt": "a dog", "tag": "colors"}')
    assert "line 1" in refused(capsys, *draw)
    unknown = {**METADATA[0], "include": [{"class": "dragon", "count": 1}]}
    bad.write_text(json.dumps(unknown))
    assert "dragon" in refused(capsys, *draw)

    draw = ["--bench", "compbench", "--model", "toy", "--out", out, "--prompts"]
    (tmp_path / "names.txt").write_text("a dog")
    assert "color_val.txt" in refused(capsys, *draw, tmp_path / "names.txt")
    (tmp_path / "color_val.txt").write_text("a snake_case dog")
    assert "line 1" in refused(capsys, *draw, tmp_path / "color_val.txt")
    hard = tmp_path / "complex_val.txt"
    hard.write_text(LONG)
    assert "--complex_lists" in refused(capsys, *draw, hard)
    assert "en_core_web_sm" in refused(capsys, *draw, hard, "--complex_lists", hard, hard)
    assert not list((out / "images").glob("complex"))  # what cannot be scored is not drawn


def test_every_setting_is_explained():
    lines = inspect.getsource(evaluation.Config).splitlines()
    fields = [line for line in lines if re.match(r"    \w+: ", line)]
    assert len(fields) == len(dataclasses.fields(evaluation.Config))
    assert all("  # " in line for line in fields)


def test_default_weights_are_those_that_are_named_when_missing():
    for flag in ("clip", "clip_b32", "blip_tokenizer", "gdino"):
        assert getattr(evaluation.Config(), flag) == networks.WEIGHTS[flag].name
