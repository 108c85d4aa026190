"""Order of the data and learning rate of both trainers.   pytest tests/test_schedule.py"""

import math
import random

import pytest

from engine.trainer import cosine_lr, order_of_step


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (3, 8), (7, 7), (1, 2), (20, 8)])
def test_every_epoch_takes_each_record_once_in_an_order_that_only_the_step_decides(count, batch):
    steps = [order_of_step(count, step, batch, seed=1) for step in range(4 * count)]
    places = [index for step in steps for index in step]
    for epoch in range(4 * batch):
        assert sorted(places[epoch * count : (epoch + 1) * count]) == list(range(count))
    random.seed(1)  # the global generator has no part in it
    assert order_of_step(count, 2, batch, seed=1) == steps[2]


def test_epochs_and_seeds_have_different_orders():
    first_epoch = order_of_step(20, 0, 20, seed=1)
    assert first_epoch != order_of_step(20, 1, 20, seed=1)
    assert first_epoch != order_of_step(20, 0, 20, seed=2)
    in_parts = [order_of_step(20, step, 8, seed=1) for step in range(3)]
    assert first_epoch == (in_parts[0] + in_parts[1] + in_parts[2])[:20]


def test_cosine_with_warm_up():
    rates = [cosine_lr(step, 100, peak=2.0, warmup=0.1, floor=0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)])
    assert rates[10] == 2.0 and rates[100] == pytest.approx(0.2)
    assert rates[55] == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2))
    assert cosine_lr(0, 100, 2.0, warmup=0.0, floor=0.0) == 2.0
