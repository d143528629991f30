"""Small definitions that several references share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Transform(NamedTuple):
    """What makes logits of a head's raw scores: ``softcap * tanh(scale * (raw + bias) / softcap) / temperature``."""

    scale: float
    softcap: float | None  # None: no tanh
    temperature: float


class Combination(NamedTuple):
    """How two gradients become one, ``alpha * G_gold + beta * G_away``."""

    alpha: float
    beta: float
    combine: str  # "sum", or "normalized": each row is divided by its 2-norm first (a zero row stays)


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 as soon as one operand is (which only the references accept, as the ground truth)."""
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def transform_logits(raw: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
    scale, softcap, temperature = transform
    logits = scale * (raw if bias is None else raw + bias.to(raw.dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def combine_gradients(G_gold: Tensor, G_away: Tensor | None, combination: Combination) -> Tensor:
    dtype = accumulation_dtype(G_gold, G_away)

    def prepared(G: Tensor) -> Tensor:
        G = G.to(dtype)
        if combination.combine == "normalized":
            norm = G.norm(dim=1, keepdim=True)
            G = torch.where(norm > 0, G / norm, torch.zeros_like(G))
        return G

    g = combination.alpha * prepared(G_gold)
    return g if G_away is None else g + combination.beta * prepared(G_away)
