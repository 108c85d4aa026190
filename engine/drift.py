"""Drift: what the sampler recorded against what the training pass says of the same tokens.

Between them stand a cache, hand-written layers, graphs and adapters: each may silently be another
policy."""

import math

import torch

from engine import run

# Largest healthy mean of |logp - recorded|, in nats per token. In float32 only the order of sums
# differs. bfloat16 has 8 bits: a logit near 16 is off by up to 0.06, in either pass.
LIMITS = {"float32": 1e-3, "bfloat16": 0.2}


class Drift:
    """Mean |logp - recorded| over the trained tokens of a step, of text and of image: it must be
    near 0. At the first step also mean |logp - reference|: training starts from the reference.

    dtype: of the forward pass. cfg, logp: guidance, and "cond" or "guided", see gotr1.rollout."""

    def __init__(self, dtype: str, cfg: float, logp: str, device: torch.device):
        self.limits = drift_limits(dtype, cfg, logp)
        self.gaps = torch.zeros(2, device=device)  # of text, of image
        self.tokens = torch.zeros(2, device=device)
        self.reference_gap = torch.zeros(2, device=device)

    def add(self, logp, recorded, logp_ref, is_trained, n_images: int) -> None:
        """A micro-batch: all (N, S), the image's `n_images` last; `logp_ref` may be None."""
        self.gaps += text_and_image(logp - recorded, is_trained, n_images)
        self.tokens += text_and_image(torch.ones_like(logp), is_trained, n_images)
        if logp_ref is not None:
            self.reference_gap += text_and_image(logp - logp_ref, is_trained, n_images)

    def check(self, is_first_step: bool) -> None:
        """Sums over the ranks, then stops the run when the policy is not the one that sampled or,
        at the first step, not the reference. Every rank has to call it, once."""
        for sums in (self.gaps, self.tokens, self.reference_gap):
            run.all_sum(sums)
        tokens = self.tokens.clamp(min=1)
        self.means = (self.gaps / tokens).tolist()
        for kind, mean, limit in zip(("text", "image"), self.means, self.limits, strict=True):
            if not mean <= limit:  # nan is not
                raise RuntimeError(
                    f"drift: the policy is not the one that was recorded: log-probabilities of "
                    f"{kind} tokens differ by {mean:.2g} on average (at most {limit:.2g} is "
                    "rounding)"
                )
        from_reference = (self.reference_gap / tokens).tolist()
        for mean, limit in zip(from_reference, self.limits, strict=True):
            if is_first_step and not mean <= limit:
                raise RuntimeError(
                    "self-test: the reference is not the model that training starts from: "
                    f"log-probabilities differ by {mean:.2g} on average (at most {limit:.2g} is "
                    "rounding)"
                )

    def row(self) -> dict[str, float]:
        """For the log, after `check`."""
        return {"drift_text": self.means[0], "drift_image": self.means[1]}


def text_and_image(gap, is_trained, n_images: int) -> torch.Tensor:
    """(2,): the sums of |gap| (N, S) over the trained tokens of text and of image."""
    gap = gap.abs() * is_trained
    return torch.stack([gap[:, :-n_images].sum(), gap[:, -n_images:].sum()])


def drift_limits(dtype: str, cfg: float, logp: str) -> tuple[float, float]:
    """(text, image): the largest healthy drift, in nats per token.

    Guided logits are u + cfg * (c - u) = cfg * c - (cfg - 1) * u. When c and u have independent
    rounding errors of one size, the error of the guided logit is sqrt(cfg^2 + (cfg - 1)^2) times as
    large (6.4 times at cfg 5), and so is the limit."""
    limit = LIMITS[dtype]
    guidance = 1.0
    if logp == "guided" and dtype != "float32":
        guidance = max(1.0, math.hypot(cfg, cfg - 1))
    return limit, limit * guidance
