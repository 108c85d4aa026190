"""Drift: what the sampler recorded against what the training pass says of the same tokens.

Between them stand a cache, hand-written layers, graphs and adapters: each may silently be another
policy. Every step compares them, and step 0 the reference as well.

They are never quite equal, since the same sums are taken in another order. In float32 a
log-probability is then off by 1e-6 to 1e-4. bfloat16 has 8 bits: a logit near 16 is off by up to
0.06 after one rounding, and every layer rounds."""

import math

import torch

from engine import run

# Largest healthy mean of |logp - recorded|, in nats per token at temperature 1
DRIFT_LIMITS = {"float32": 1e-3, "bfloat16": 0.2}


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


def self_test(logp, recorded, logp_ref, mask, limit: float) -> None:
    """At step 0 the policy that is trained is the one that sampled, and it is the reference.
    Anything else is a bug, and stops the run. All (N, S); `logp_ref` None: there is no reference.

    limit: the largest of `drift_limits`. It holds for the reference as well: under LoRA that one
    computes x W^T, the policy x W^T + 0 in one operation, for which a GPU has other kernels. It
    holds for the mean of each sample: single tokens may be off by more, and a fault in a few
    samples would drown in the mean of all."""
    others = {"the sampler's": recorded, "the reference's": logp_ref}
    for whose, other in others.items():
        if other is None:
            continue
        gaps = ((logp - other) * mask).abs().sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        if not gaps.max() <= limit:  # nan is not
            raise RuntimeError(
                f"self-test: the policy's log-probabilities should be {whose}, but differ by "
                f"{gaps.max():.2g} nats per token in a sample (at most {limit:.2g} is rounding)"
            )


class Drifts:
    """Sums over the trained tokens of a step: |logp - recorded|, of policy and sampler."""

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


def check_drift(text: float, image: float, text_limit: float, image_limit: float) -> None:
    """Stops the run when the policy is not the one whose log-probabilities were recorded."""
    for kind, drift, limit in (("text", text, text_limit), ("image", image, image_limit)):
        if not drift <= limit:  # nan is not
            raise RuntimeError(
                f"drift: the policy is not the one that was recorded: log-probabilities of {kind} "
                f"tokens differ by {drift:.2g} on average (at most {limit:.2g} is rounding)"
            )
