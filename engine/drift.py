"""Drift: what the sampler recorded against what the training pass says of the same tokens.

Between them stand a cache, hand-written layers, graphs and adapters: each may silently be another
policy."""

import math

import torch

from engine import run


def self_test(logp, recorded, logp_ref, mask, exact: bool) -> None:
    """At step 0 the policy that is trained is the one that sampled, and it is the reference.
    Anything else is a bug, and stops the run. All (N, S).

    exact: float32, where each token must agree. In bfloat16 sampling and scoring round
    differently; there only the means count, see `check_drift`."""
    gap = ((logp - recorded) * mask).abs().max()
    if exact and not gap < 1e-3:  # nan is not
        raise RuntimeError(
            f"self-test: log-probabilities differ by {gap:.2g} between rollout and training"
        )
    if logp_ref is not None:
        gaps = ((logp - logp_ref) * mask).abs()
        gap = gaps.max() if exact else gaps.sum() / mask.sum().clamp(min=1)
        if not gap <= (1e-5 if exact else 1e-2):
            raise RuntimeError(
                "self-test: the reference is not the model that training starts from"
            )


# Largest healthy mean of |logp - recorded|, in nats per token at temperature 1. In float32 only the
# order of sums differs. bfloat16 has 8 bits: a logit near 16 is off by up to 0.06, in either pass.
DRIFT_LIMITS = {"float32": 1e-3, "bfloat16": 0.2}


class Drifts:
    """Sums over the tokens that are trained in a step: how far apart log-probabilities are that
    should be equal, of policy and sampler."""

    def __init__(self, device: torch.device):
        self.gaps = torch.zeros(2, device=device)  # of text, of image
        self.tokens = torch.zeros(2, device=device)

    def add(self, logp, recorded, mask, n_images: int) -> None:
        """A micro-batch: all (N, S), the image's `n_images` last."""
        gap = ((logp - recorded) * mask).abs()
        self.gaps += torch.stack([gap[:, :-n_images].sum(), gap[:, -n_images:].sum()])
        self.tokens += torch.stack([mask[:, :-n_images].sum(), mask[:, -n_images:].sum()])

    def means(self) -> list[float]:
        """[text, image]: mean |logp - recorded| per token over all ranks; 0 without tokens."""
        return (run.all_sum(self.gaps) / run.all_sum(self.tokens).clamp(min=1)).tolist()


def drift_limits(dtype: str, temperature: float, cfg: float, logp: str) -> tuple[float, float]:
    """(text, image): the largest healthy drift, in nats per token. `logp`: "cond" or "guided".

    Guided logits are u + cfg * (c - u) = cfg * c - (cfg - 1) * u. When c and u have independent
    rounding errors of one size, the error of the guided logit is sqrt(cfg^2 + (cfg - 1)^2) times as
    large (6.4 times at cfg 5), and so is the limit. Dividing logits by the temperature divides
    their errors, too."""
    limit = DRIFT_LIMITS[dtype] * max(1.0, 1 / temperature)
    guidance = 1.0
    if logp == "guided" and dtype != "float32":
        guidance = max(1.0, math.hypot(cfg, cfg - 1))
    return limit, limit * guidance


def check_drift(text: float, image: float, text_limit: float, image_limit: float) -> None:
    """Stops the run when the policy is not the one whose log-probabilities were recorded."""
    for kind, drift, limit in (("text", text, text_limit), ("image", image, image_limit)):
        if not drift <= limit:  # nan is not
            raise RuntimeError(
                f"drift: the policy is not the one that was recorded: log-probabilities of {kind} "
                f"tokens differ by {drift:.2g} on average (at most {limit:.2g} is rounding)"
            )
