"""How much goes into one batch: a token budget from the memory there is, and smaller batches where it runs out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from latentrevise.errors import RunError
from latentrevise.packing import batches

if TYPE_CHECKING:
    from latentrevise.policy import Policy

# On a CPU larger batches gain no speed once a product has some hundred rows, they only take memory.
_CPU_BYTES = 1 << 30
_CPU_TOKENS = 16384
_GPU_TOKENS = 131072


def activation_bytes(policy: Policy) -> int:
    """Estimate of what one token keeps alive between forward and backward pass of the frozen body.

    Weights need no gradient, so a linear layer keeps nothing; norms, attention inputs and the gated product do. Scores
    of eager attention and routing tables are not counted.
    """
    config = policy.config
    d = config.hidden_size
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or d // config.num_attention_heads)
    inner = getattr(config, "intermediate_size", None) or 4 * d
    experts = getattr(config, "num_experts_per_tok", None)
    if experts:
        inner = max(inner, experts * (getattr(config, "moe_intermediate_size", None) or inner))
    return int(config.num_hidden_layers * (8 * d + 4 * heads + 5 * inner) * policy.dtype.itemsize)


def token_budget(policy: Policy) -> int:
    """Padded tokens for one batch: what fits into half of the free memory, rounded down to a power of two.

    The rounding keeps the batches, and so the last bits of the results, the same while free memory varies a little. On
    a CPU at most 1 GiB is taken.
    """
    if policy.device.type == "cuda":
        # Memory the allocator holds but does not use is free too.
        cached = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
        free, most = torch.cuda.mem_get_info(policy.device)[0] + cached, _GPU_TOKENS
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free, most = min(free, 2 * _CPU_BYTES), _CPU_TOKENS
    fitting = max(1, min(most, free // 2 // activation_bytes(policy)))
    return 1 << (fitting.bit_length() - 1)


def in_batches(sizes: Sequence[tuple[int, int]], budget: int, work: Callable[[list[int]], None], what: str) -> int:
    """Call ``work`` on batches of rows until all are done; where memory runs out, halve the budget and go on.

    sizes: (cached, fed) tokens of each row. ``work`` is handed indices and must keep nothing of a batch that failed.
    Returns the budget at the end. Raises RunError if one row alone does not fit.
    """
    pending = batches(sizes, budget)
    while pending:
        batch = pending[0]
        try:
            work(batch)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            cached, fed = (max(sizes[i][part] for i in batch) for part in (0, 1))
            if len(batch) == 1:
                raise RunError(
                    f"memory does not suffice for one {what} of {cached} cached and {fed} fed tokens; load the model"
                    " in bfloat16, shorten it, or use a larger machine"
                ) from error
            budget = max(1, min(budget, (cached + fed) * len(batch)) // 2)
        else:
            del pending[0]
            continue
        # Behind the except clause, for the traceback there holds on to the batch's tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        left = [i for rest in pending for i in rest]
        pending = [[left[i] for i in part] for part in batches([sizes[i] for i in left], budget)]
    return budget


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator gave up; on a CPU it raises a bare RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
