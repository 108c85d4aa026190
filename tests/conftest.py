"""Shared by all tests: one torch thread (two processes with two threads each on two cores are many
times slower), no network."""

import functools
import os

os.environ["HF_HUB_OFFLINE"] = "1"

if (
    "GOTR1_TEST_GPU" not in os.environ
):  # bitwise equality is promised on the CPU; tests/test_decode.py has GPU tests
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def policy():
    """The shipped toy model and its tokenizer. Tests that change weights take a copy."""
    import gotr1

    return gotr1.load_policy("toy")


@pytest.fixture
def float64(monkeypatch):
    """What trainers load and train in float32 is float64 in this test. Rounding then stays below
    1e-10, so that runs with other batch shapes can be compared on any processor: float32 sums of
    another order differ, and AdamW makes large steps of tiny gradients."""
    from engine import checkpoints

    monkeypatch.setitem(checkpoints.DTYPES, "float32", torch.float64)


@pytest.fixture(scope="session", autouse=True)
def toy_prompts_once():
    """A run draws 2,000 toy scenes for its prompts: once for all tests of a process."""
    from data import prompts

    prompts.toy_prompts = functools.lru_cache(prompts.toy_prompts)
