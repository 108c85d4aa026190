"""Order, schedule and command line of both trainers.   pytest tests/test_runtime.py"""

import math
import random
from dataclasses import dataclass

import pytest

from engine import run


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (3, 8), (7, 7), (1, 2), (20, 8)])
def test_each_prompt_or_record_is_taken_once_an_epoch_in_an_order_that_is_a_function_of_the_step(
    count, batch
):
    steps = [run.order_of_step(count, step, batch, seed=1) for step in range(4 * count)]
    places = [index for step in steps for index in step]
    epochs = [places[k * count : (k + 1) * count] for k in range(4 * batch)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    random.seed(1)
    assert run.order_of_step(count, 2, batch, seed=1) == steps[2]
    if count == 20:
        assert epochs[0] != epochs[1]
        assert run.order_of_step(count, 0, count, seed=1) == epochs[0]
        assert run.order_of_step(count, 0, count, seed=2) != epochs[0]


def test_cosine_with_warm_up():
    lr = [run.cosine_lr(step, 100, peak=2.0, warmup=0.1, floor=0.1) for step in range(101)]
    assert lr[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)])
    assert lr[10] == 2.0 and lr[100] == pytest.approx(0.2)
    assert lr[55] == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2))
    assert run.cosine_lr(0, 100, 2.0, warmup=0.0, floor=0.0) == 2.0


@dataclass
class Config:
    size: int = 3  # how large
    share: float = 0.5  # how much
    preset: str = "small"  # defaults


def test_presets_change_defaults_and_flags_still_win():
    presets = {"small": {}, "large": {"size": 30, "share": 0.1}}
    parse = lambda *words: run.parse_args(Config, "", [*words], presets)  # noqa: E731
    assert parse() == Config()
    assert parse("--preset", "large") == parse("--preset=large") == Config(30, 0.1, "large")
    assert parse("--size", "4", "--preset", "large") == Config(4, 0.1, "large")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(size=0), "--size is 0: expected 1 or more"),
        (Config(share=float("nan")), "--share is nan: expected a number above 0"),
        (Config(share=0.0), "--share is 0.0: expected a number above 0"),
    ],
)
def test_a_setting_out_of_its_range_ends_the_program_in_one_line(config, words, capsys):
    run.check_ranges(Config(), at_least_one="size", above_zero="share")
    with pytest.raises(SystemExit) as stop:
        run.check_ranges(config, at_least_one="size", above_zero="share")
    assert stop.value.code == 2 and capsys.readouterr().err.strip() == f"error: {words}"
