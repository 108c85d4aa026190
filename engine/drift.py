"""Drift: what the sampler recorded against what the training pass says of the same tokens.

Between them stand a cache, hand-written layers, graphs and adapters: each may silently be another
policy. They are never quite equal, since the same sums are taken in another order. In float32 a
log-probability is then off by 1e-6 to 1e-4. bfloat16 has 8 bits: a logit near 16 is off by up to
0.06 after one rounding, and every layer rounds."""

import math

import torch

from engine import run

# Largest healthy mean of |logp - recorded|, in nats per token
LIMITS = {"float32": 1e-3, "bfloat16": 0.2}


def drift_limits(dtype: str, cfg: float, logp: str) -> tuple[float, float]:
    """(text, image): the largest healthy drift, in nats per token. `logp`: "cond" or "guided".

    Guided logits are u + cfg * (c - u) = cfg * c - (cfg - 1) * u. When c and u have independent
    rounding errors of one size, the error of the guided logit is sqrt(cfg^2 + (cfg - 1)^2) times as
    large (6.4 times at cfg 5), and so is the limit."""
    limit = LIMITS[dtype]
    guidance = 1.0
    if logp == "guided" and dtype != "float32":
        guidance = max(1.0, math.hypot(cfg, cfg - 1))
    return limit, limit * guidance


class Drift:
    """Of one step: mean |logp - recorded| over the trained tokens of text and of image, which must
    be near 0 at every step. At the first step that must hold for each sample, and for the
    reference, too: training starts from it.

    dtype: of the forward pass. cfg, logp: guidance, and "cond" or "guided", see gotr1.rollout."""

    def __init__(self, dtype: str, cfg: float, logp: str, device: torch.device):
        self.limits = drift_limits(dtype, cfg, logp)
        self.gaps = torch.zeros(2, device=device)  # of text, of image
        self.tokens = torch.zeros(2, device=device)
        self.worst_from_sampler = torch.zeros((), device=device)  # of a sample, nats per token
        self.worst_from_reference = torch.zeros((), device=device)

    def add(self, logp, recorded, logp_ref, is_trained, n_images: int) -> None:
        """A micro-batch: all (N, S), the image's `n_images` last; `logp_ref` may be None."""
        gap = (logp - recorded).abs() * is_trained
        self.gaps += torch.stack([gap[:, :-n_images].sum(), gap[:, -n_images:].sum()])
        text, image = is_trained[:, :-n_images].sum(), is_trained[:, -n_images:].sum()
        self.tokens += torch.stack([text, image])
        worst = worst_sample(gap, is_trained)
        self.worst_from_sampler = torch.maximum(self.worst_from_sampler, worst)
        if logp_ref is not None:
            worst = worst_sample((logp - logp_ref).abs() * is_trained, is_trained)
            self.worst_from_reference = torch.maximum(self.worst_from_reference, worst)

    def check(self, is_first_step: bool) -> None:
        """Sums over the ranks, then raises RuntimeError when the policy is not the one that sampled
        or, at the first step, not the reference. Every rank has to call it, once.

        The limits hold for the reference as well: under LoRA it computes x W^T, the policy x W^T +
        0 in one operation, for which a GPU has other kernels (0.018 nats were seen in bfloat16). At
        the first step each sample counts: a fault in a few would drown in the mean of all."""
        run.all_sum(self.gaps)
        run.all_sum(self.tokens)
        self.means = (self.gaps / self.tokens.clamp(min=1)).tolist()
        if is_first_step:
            check_start(self.worst_from_sampler.item(), "the sampler's", max(self.limits))
            check_start(self.worst_from_reference.item(), "the reference's", max(self.limits))
        for kind, mean, limit in zip(("text", "image"), self.means, self.limits, strict=True):
            if not mean <= limit:  # nan is not
                raise RuntimeError(
                    "drift: the policy is not the one that was recorded: log-probabilities of "
                    f"{kind} tokens differ by {mean:.2g} on average (at most {limit:.2g} is "
                    "rounding)"
                )

    def row(self) -> dict[str, float]:
        """For the log, after `check`."""
        return {"drift_text": self.means[0], "drift_image": self.means[1]}


def worst_sample(gap, is_trained) -> torch.Tensor:
    """The largest mean over the trained tokens of a sample; gap and is_trained are (N, S)."""
    return (gap.sum(dim=1) / is_trained.sum(dim=1).clamp(min=1)).max()


def check_start(worst: float, whose: str, limit: float) -> None:
    """Raises RuntimeError when log-probabilities that are equal by definition are not."""
    if not worst <= limit:  # nan is not
        raise RuntimeError(
            f"self-test: the policy's log-probabilities should be {whose}, but differ by "
            f"{worst:.2g} nats per token in a sample (at most {limit:.2g} is rounding)"
        )
