"""A model's head: logits from hidden states, in a form that the kernels know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentrevise import kernels
from latentrevise.errors import ModelError


@dataclass(frozen=True)
class Head:
    """``logits = softcap * tanh(scale * (h W^T + bias) / softcap)``; without a softcap ``scale * (h W^T + bias)``."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logprob(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probability of ``targets [N]`` under ``hidden [N, d]``, float32 ``[N]``, without ``[N, V]``."""
        return self._scored(hidden, targets, temperature=temperature).to(hidden.device)

    def logprob_and_entropy(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As ``logprob``, and the entropy of each distribution in nats, float32 ``[N]``."""
        logprobs, entropies = self._scored(hidden, targets, entropy=True)
        return logprobs.to(hidden.device), entropies.to(hidden.device)

    def _scored(self, hidden: Tensor, targets: Tensor, **options: Any) -> Any:
        """``linear_logprob`` on the head's device: a tensor, or a pair of them with ``entropy``."""
        device = self.weight.device
        return kernels.linear_logprob(
            hidden.to(device),
            self.weight,
            targets.to(device),
            bias=self.bias,
            scale=self.scale,
            softcap=self.softcap,
            ignore_index=None,
            **options,
        )

    def plausible(self, hidden: Tensor, p_min: float, count: int, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens with probability of at least ``p_min``: ids ``[T, C]`` (padded -1), logprobs, counts."""
        ids, logprobs, counts = kernels.plausible_vertices(
            hidden.to(self.weight.device),
            self.weight,
            p_min,
            count,
            bias=self.bias,
            scale=self.scale,
            softcap=self.softcap,
            allowed=allowed.to(self.weight.device),
        )
        return ids.to(hidden.device), logprobs.to(hidden.device), counts.to(hidden.device)


def _logit_transforms(config: Any) -> Iterator[tuple[float, float | None]]:
    """Candidate (scale, softcap) pairs from what configurations call them; a measurement picks the true one."""
    softcap = getattr(config, "final_logit_softcapping", None)
    scales = [1.0]
    if getattr(config, "logit_scale", None):
        scales.insert(0, float(config.logit_scale))
    if getattr(config, "logits_scaling", None):
        scales[:0] = [1.0 / float(config.logits_scaling), float(config.logits_scaling)]
    for scale in scales:
        yield scale, None if softcap is None else float(softcap)


def fitting_transform(raw: Tensor, own: Tensor, config: Any, exact: bool) -> tuple[float, float | None] | None:
    """The (scale, softcap) that make a model's ``own`` logits of ``raw = h W^T + bias``, of the same shape; None where
    no known form does. exact: in full precision."""
    raw = raw.float()
    own = own.to(raw)
    most = own.abs().max().clamp_min(1e-6) * (1e-4 if exact else 2e-2)
    for scale, softcap in _logit_transforms(config):
        logits = raw * scale if softcap is None else softcap * torch.tanh(raw * scale / softcap)
        if (logits - own).abs().max() < most:
            return scale, softcap
    return None


def strange_logits(model: nn.Module) -> ModelError:
    return ModelError(
        f"{type(model).__name__} computes its logits in a way not understood here: neither plain, scaled nor"
        " soft-capped h W^T"
    )
