"""One thread at a time where a model's state is changed: hooks, flags of its parameters, forwards of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from weakref import WeakKeyDictionary

import torch
from torch import nn

_guard = Lock()
_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()  # type: ignore[valid-type]


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """No other thread is inside for this model; the caller's inference mode is left meanwhile."""
    with _guard:
        lock = _locks.setdefault(model, RLock())
    with lock, torch.inference_mode(False):
        yield
