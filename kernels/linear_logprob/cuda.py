"""CUDA implementation for bfloat16 (csrc/cuda/linear_logprob.cu), launched on the current stream, no synchronisation.

A call it has no code for (rows that are not whole 16-byte chunks) is refused by name; the automatic choice takes Triton
until a measurement says otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch import BackendError, Call

WORKSPACE = 256 << 20  # bytes of exponentials at a time, never fewer than one tile of tokens


def unsupported(call: Call) -> str | None:
    for dtype in call.dtypes[:2]:  # W and H
        if dtype != torch.bfloat16:
            return f"no kernel for {str(dtype).removeprefix('torch.')} tensors"
    return "float64 biases are for the reference only" if torch.float64 in call.dtypes else None


def linear_logprob(
    H: Tensor,
    W: Tensor,
    y: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    entropy: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if W.shape[1] % 8 or W.stride(0) % 8 or W.data_ptr() % 16:
        raise BackendError(
            "the CUDA log-probs take a table whose rows are whole 16-byte chunks; leave backend unset or use 'triton'"
        )
    module, (V, d) = native.load("cuda"), W.shape
    H, y, N = native.aligned_rows(H), y.contiguous(), H.shape[0]
    bias = None if bias is None else bias.float().contiguous()
    logp = torch.empty(N, device=W.device)
    entropies = torch.empty(N if entropy else 0, device=W.device)
    gradients = torch.empty(N if gradient else 0, d, device=W.device)
    processors = torch.cuda.get_device_properties(W.device).multi_processor_count
    chunk = max(128, WORKSPACE // (2 * V) // 128 * 128) if gradient else 16384
    for start in range(0, N, chunk):
        part = slice(start, start + chunk)
        arguments = {
            **native.matrix(module, "queries", H[part]),
            **native.matrix(module, "table", W),
            "bias": native.pointer(bias),
            "targets": y[part].data_ptr(),
            "logp": logp[part].data_ptr(),
            "entropy": entropies[part].data_ptr() if entropy else None,
            "gradient": gradients[part].data_ptr() if gradient else None,
            "rows": H[part].shape[0],
            "vocab": V,
            "dim": d,
            "scale": scale,
            "softcap": softcap or 0.0,
            "temperature": temperature,
            "blocks": 2 * processors,  # two blocks of 48 KiB a processor
            "where": native.where("cuda", W.device),
        }
        needed = module.linear_logprob_workspace(**arguments, workspace=None, workspace_bytes=0)
        workspace = torch.empty(needed, dtype=torch.uint8, device=W.device)
        module.linear_logprob(**arguments, workspace=workspace.data_ptr(), workspace_bytes=needed)
    return logp, entropies, gradients
