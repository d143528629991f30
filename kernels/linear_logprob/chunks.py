"""How many tokens the GPU kernels take at a time: between two products a chunk's exponentials are in memory."""

from __future__ import annotations

import torch
from torch import Tensor

WORKSPACE = 64  # the part of the device's memory that a chunk's exponentials may take
MOST_ROWS, FEWEST_ROWS = 2048, 128


def chunk_rows(W: Tensor) -> int:
    """Tokens whose exponentials take at most a WORKSPACE-th of the device's memory: the table is read twice a chunk."""
    total = torch.cuda.get_device_properties(W.device).total_memory if W.device.type == "cuda" else 16 << 30
    rows = total // WORKSPACE // (W.element_size() * W.shape[0])
    return min(MOST_ROWS, max(FEWEST_ROWS, rows // FEWEST_ROWS * FEWEST_ROWS))
