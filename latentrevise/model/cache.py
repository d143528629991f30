"""Keys and values of prompts, computed once and read by every pass behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from latentrevise.errors import ModelError


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of ``B`` prompts, right-padded to ``P``, and the hidden states.

    layers: one pair ``[B, heads, P, head_dim]`` a layer. lengths: int64 ``[B]``. hidden: ``[B, P, d]``.
    """

    layers: list[tuple[Tensor, Tensor]]
    lengths: Tensor
    hidden: Tensor

    def select(self, rows: Tensor, width: int | None = None) -> PromptCache:
        """Rows of the cache, cut to their first ``width`` positions."""
        layers = [(_rows(keys[:, :, :width], rows), _rows(values[:, :, :width], rows)) for keys, values in self.layers]
        return PromptCache(
            layers,
            self.lengths[rows].clamp(max=self.hidden.shape[1] if width is None else width),
            _rows(self.hidden[:, :width], rows),
        )

    @property
    def last_hidden(self) -> Tensor:
        """``[B, d]``, at each prompt's last token."""
        return self.hidden[torch.arange(len(self.lengths), device=self.hidden.device), self.lengths - 1]


class Behind(DynamicLayer):
    """A prompt's keys and values that others are put behind but never into: running a pass leaves no trace."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)


def cached_layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            raise ModelError(
                f"the model's cache holds a {type(layer).__name__}; a prompt can be shared only as plain keys and"
                " values"
            )
        pairs.append((layer.keys, layer.values))
    return pairs


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    return values.index_select(0, rows.to(values.device))
