"""Keys and values of the engine's batches: a layer with room to grow, and the taking over of lines of another."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """Keys and values in a buffer with room to grow: appending a token writes that token and copies nothing else."""

    _buffers: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = (key_states[:, :, :0], value_states[:, :, :0])
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if stop > self._buffers[0].shape[-2]:
            room = stop + max(32, stop // 2)
            self._buffers = (_enlarged(self._buffers[0], start, room), _enlarged(self._buffers[1], start, room))
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = new
        self._show(stop)
        return self.keys, self.values  # type: ignore[return-value]

    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.get_seq_length()
        self._buffers = (self._buffers[0].index_select(0, indices), self._buffers[1].index_select(0, indices))
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def _enlarged(buffer: Tensor, used: int, room: int) -> Tensor:
    batch, heads, _, width = buffer.shape
    larger = buffer.new_empty(batch, heads, room, width)
    larger[:, :, :used] = buffer[:, :, :used]
    return larger


def gathered(cached: Tensor, lines: Tensor, slots: Tensor) -> Tensor:
    """``[B, heads, S, width]``: of ``cached [U, heads, L, width]`` the line and the slots ``[B, S]`` of each row."""
    lines, slots = lines.to(cached.device), slots.to(cached.device)
    return cached.transpose(1, 2)[lines[:, None], slots].transpose(1, 2)


def stored(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer of a cache whose layers keep every position."""
    found = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        found.append((layer.keys, layer.values))
    return found
