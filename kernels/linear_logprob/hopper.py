"""CUDA implementation for bfloat16 on Hopper (csrc/cuda/linear_logprob.cu): tensor copies and wgmma for both products,
launched on the current stream, no synchronisation.

4NVd FLOP with a gradient, 2NVd without; the exponentials of a chunk of tokens are written once in between and read once
a block of 256 columns. Limits: bfloat16, table rows of whole 16-byte chunks. The automatic choice takes Triton until a
measurement says otherwise.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import native
from ..dispatch import Call
from ..numerics import Transform
from .chunks import MOST_ROWS, chunk_rows


def unsupported(call: Call) -> str | None:
    if not call.aligned:
        return "rows of the table are not whole 16-byte chunks"
    for dtype in call.dtypes[:2]:  # W and H
        if dtype != torch.bfloat16:
            return f"no kernel for {str(dtype).removeprefix('torch.')} tensors"
    return "float64 biases are for the reference only" if torch.float64 in call.dtypes else None


def linear_logprob(
    H: Tensor, W: Tensor, y: Tensor, bias: Tensor | None, transform: Transform, entropy: bool, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    H, y, (N, d) = native.aligned_rows(H), y.contiguous(), H.shape
    bias = None if bias is None else bias.float().contiguous()
    logp = torch.empty(N, device=W.device)
    entropies = torch.empty(N if entropy else 0, device=W.device)
    gradients = torch.empty(N if gradient else 0, d, device=W.device)
    processors = torch.cuda.get_device_properties(W.device).multi_processor_count
    chunk = chunk_rows(W) if gradient else 8 * MOST_ROWS
    for start in range(0, N, chunk):
        part = slice(start, start + chunk)
        call = partial(
            native.call, "cuda", table=W, queries=H[part], bias=bias, targets=y[part], logp=logp[part],
            entropy=entropies[part] if entropy else None, gradient=gradients[part] if gradient else None,
            rows=H[part].shape[0], scale=transform.scale, softcap=transform.softcap or 0.0,
            temperature=transform.temperature, blocks=processors,
        )  # fmt: skip
        needed = call("linear_logprob_workspace")
        workspace = torch.empty(needed, dtype=torch.uint8, device=W.device)
        call("linear_logprob", workspace=workspace, workspace_bytes=needed)
    return logp, entropies, gradients
