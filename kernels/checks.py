"""Contract checks shared by the public functions. None of them synchronises with a GPU.

Checks of *values* (ids inside the table, at least one allowed vertex) need a host round trip and are made for CPU
tensors only; what a GPU implementation does instead is in each op's docstring.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = (torch.int64, torch.int32)


def tensor(name: str, x: object, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """``x`` as a tensor of that shape (None: any size) and one of those dtypes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {str(x.dtype).removeprefix('torch.')}; convert it first")
    if x.dim() != len(shape) or any(
        want is not None and want != have
        for want, have in zip(shape, x.shape, strict=True)  # sizes may be symbolic
    ):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(x.shape)}")
    return x


def table(name: str, x: object, shape: tuple[int | None, ...] = (None, None)) -> Tensor:
    """A vocabulary-sized table: at least one row, last dimension contiguous (a copy per call would be gigabytes)."""
    x = tensor(name, x, shape, FLOATS)
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"{name} must have at least one row and one column, got {list(x.shape)}")
    if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        raise ValueError(
            f"{name} must be laid out row by row (strides >= [{x.shape[1]}, 1]), got strides {list(x.stride())}; "
            f"pass {name}.contiguous() and keep that copy"
        )
    return x


def same_device(**tensors: Tensor | None) -> None:
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {found}")


def transformed(x: Tensor) -> bool:
    """Whether ``x`` is a wrapper of torch.func (grad, vmap, jvp ...), which has no memory of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def ids_in_table(name: str, ids: Tensor, rows: int) -> None:
    """Every id is a row of the table (CPU tensors only). In a compiled graph it is a RuntimeError when that runs."""
    if torch.compiler.is_compiling():
        if ids.device.type == "cpu":
            torch._assert_async(((ids >= 0) & (ids < rows)).all(), f"{name} must be rows of the table")
    elif transformed(ids):
        return  # values of a batch cannot be asked for; the reference's own indexing refuses what is outside
    elif ids.device.type == "cpu" and ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < rows):
        raise ValueError(f"{name} must be in [0, {rows}), got values from {int(ids.min())} to {int(ids.max())}")


def positive(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value}")


def finite(name: str, value: float) -> None:
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite number, got {value}")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
