"""How much goes into one batch: a token budget from the memory there is, and smaller batches where it runs out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from latentrevise.errors import RunError
from latentrevise.model.packing import batches


class Policy(Protocol):
    """What of a policy decides how much fits: its shapes, its dtype and where it is."""

    @property
    def config(self) -> Any: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def sharded(self) -> bool: ...


# On a CPU a product of some hundred rows is near its best rate already, and larger batches only take memory; a small
# model gains from more rows until the calls themselves cost nothing. By bytes a number: half precision, half the rows.
_CPU_TOKENS = {2: 192, 4: 384, 8: 384}
_CPU_BYTES = 128 << 20
_GPU_TOKENS = 131072


def activation_bytes(policy: Policy, recompute: bool = False) -> int:
    """Estimate of what one token keeps alive between forward and backward pass of the frozen body.

    Weights need no gradient, so a linear layer keeps nothing; norms (which compute in float32), attention and the two
    factors of the gated product do. Scores of eager attention and routing tables are not counted. recompute: layers
    keep their inputs, and one of them all the rest.
    """
    config, size = policy.config, policy.dtype.itemsize
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    experts = getattr(config, "num_experts_per_tok", None)
    if experts:
        inner = max(inner, experts * (getattr(config, "moe_intermediate_size", None) or inner))
    layer = 2 * config.hidden_size * max(size, 4) + (4 * _heads(policy) + 2 * inner) * size
    if recompute:
        # A layer's backward pass has its gradients beside it; elsewhere they are few among all layers.
        return config.num_hidden_layers * config.hidden_size * size + 2 * layer
    return config.num_hidden_layers * layer


def cached_share(policy: Policy, recompute: bool = False) -> float:
    """What a token of a cached prompt takes, as a share of a token that is fed.

    Keys and values in the cache, and, put before the suffix and repeated for all heads, once more in each layer.
    """
    config, size = policy.config, policy.dtype.itemsize
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kept = 2 * _heads(policy) * key_heads // config.num_attention_heads
    copied = 2 * _heads(policy)
    layers = config.num_hidden_layers
    taken = layers * kept + (2 if recompute else layers) * copied
    return min(1.0, taken * size / activation_bytes(policy, recompute))


def _heads(policy: Policy) -> int:
    """Width of all attention heads together."""
    config = policy.config
    return config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def token_budget(policy: Policy, recompute: bool = False) -> int:
    """Padded tokens to feed in one batch: as many as pay, halved until they fit into half of the free memory.

    Halving keeps the batches, and so the last bits of the results, the same while free memory varies a little. Where
    weights are spread over processes all get the least of theirs, and must ask together.
    """
    size = activation_bytes(policy, recompute)
    if policy.device.type == "cuda":
        # Memory the allocator holds but does not use is free too.
        cached = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
        free, budget = torch.cuda.mem_get_info(policy.device)[0] + cached, _GPU_TOKENS
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        budget = max(_CPU_TOKENS[policy.dtype.itemsize], _CPU_BYTES // size)
    while budget > 1 and budget * size > free // 2:
        budget //= 2
    if policy.sharded:
        least = torch.tensor(budget, device=policy.device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        budget = int(least)
    return budget


def in_batches(
    policy: Policy,
    sizes: Sequence[tuple[int, int]],
    budget: int,
    share: float,
    work: Callable[[list[int]], None],
    what: str,
) -> int:
    """Call ``work`` on batches of rows until all are done; where memory runs out, halve the budget and go on.

    policy: what ``work`` runs. sizes: (cached, fed) tokens of each row; share: how much of a fed token a cached one
    counts in the budget. ``work`` is handed indices and must keep nothing of a batch that failed.
    Returns the budget at the end. Raises RunError if one row alone does not fit, or if the policy's weights are spread
    over processes, of which the others would go on with larger batches.
    """
    pending = batches(sizes, budget, share)
    while pending:
        batch = pending[0]
        try:
            work(batch)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if policy.sharded:
                raise RunError(
                    f"memory does not suffice for a batch of {len(batch)} rows ({budget} tokens) of a sharded model,"
                    " and no process can make smaller ones alone; set token_budget lower"
                ) from error
            cached, fed = (max(sizes[i][part] for i in batch) for part in (0, 1))
            if len(batch) == 1:
                raise RunError(
                    f"memory does not suffice for one {what} of {cached} cached and {fed} fed tokens; load the model"
                    " in bfloat16, shorten it, or use a larger machine"
                ) from error
            budget = max(1, int(min(budget, (share * cached + fed) * len(batch))) // 2)
        else:
            del pending[0]
            continue
        # Behind the except clause, for the traceback there holds on to the batch's tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        left = [i for rest in pending for i in rest]
        pending = [[left[i] for i in part] for part in batches([sizes[i] for i in left], budget, share)]
    return budget


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator gave up; on a CPU it raises a bare RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
