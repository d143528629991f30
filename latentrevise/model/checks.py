"""Whether a model can be taken apart: its attention, its forward pass, its head, compared with itself on a few tokens.

A model is accepted because it gives the same numbers plain and packed, not because of its name; one that computes in a
way not understood here is refused with the reason, never approximated.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from latentrevise.errors import ModelError
from latentrevise.model.cache import PromptCache
from latentrevise.model.head import Head, fitting_transform, strange_logits
from latentrevise.model.loading import cache_argument, spread
from latentrevise.model.packing import PAD, PREFIX

_ATTENTION = ("sdpa", "eager", "flex_attention")  # implementations that take a mask of our own
_LAYER_TYPES = ("full_attention", "sliding_attention")
_NEEDED = ("inputs_embeds", "attention_mask", "position_ids")


class Subject(Protocol):
    """What of a policy is looked at and tried."""

    model: Any
    config: Any
    body: nn.Module
    embedding: Any
    table: Tensor
    allowed: Tensor

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def frozen(self) -> AbstractContextManager[None]: ...
    def embed(self, tokens: Tensor) -> Tensor: ...
    def output(self) -> tuple[Tensor, Tensor | None]: ...
    def whole(self, **inputs: Any) -> tuple[Tensor, Tensor]: ...
    def prompt_cache(self, prompts: Sequence[Sequence[int] | Tensor]) -> PromptCache: ...
    def prepare(self, tokens: Tensor, position: Tensor, segment: Tensor, prompt: PromptCache) -> Any: ...
    def hidden(self, ready: Any, index: Tensor | None = None, values: Tensor | None = None) -> Tensor: ...


def check_attention(policy: Subject) -> None:
    """Raise ModelError for attention that can't be masked by us, or layers that can't share a prefix."""
    kind = getattr(policy.config, "_attn_implementation", None)
    if kind not in _ATTENTION:
        raise ModelError(
            f"attention implementation {kind!r} takes no explicit mask, which the packed pass needs; load the"
            " model with attn_implementation='sdpa' (or call model.set_attn_implementation('sdpa')), 'eager'"
            " where the architecture has no sdpa, or 'flex_attention' on a GPU"
        )
    if kind == "flex_attention" and policy.device.type == "cpu":
        raise ModelError(
            "FlexAttention has no backward pass on a CPU, which a revision needs; load the model with"
            " attn_implementation='sdpa', or put it on a GPU"
        )
    types = set(getattr(policy.config, "layer_types", None) or _LAYER_TYPES)
    strange = sorted(types - set(_LAYER_TYPES))
    if strange:
        raise ModelError(
            f"{type(policy.model).__name__} has layers of type {', '.join(strange)}; only full and sliding-window"
            " attention can share a prefix between two branches exactly"
        )


def check_forward(policy: Subject) -> None:
    """Raise ModelError for a body that takes no embeddings, masks and positions, or whose weights are elsewhere."""
    parameters = inspect.signature(policy.body.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    needed = (*_NEEDED, cache_argument(policy.body))
    missing = [] if anything else [name for name in needed if name not in parameters]
    if missing:
        raise ModelError(
            f"{type(policy.body).__name__}.forward takes no {', '.join(missing)}; the packed pass places tokens and"
            " masks itself, which this architecture does not allow"
        )
    for name, weight in (
        ("input embedding", policy.embedding.weight),
        *(("body", p) for p in policy.body.parameters()),
    ):
        if weight.device.type == "meta":
            raise ModelError(
                f"the weights of the {name} are not in memory (meta device: offloaded or not loaded); load the"
                " model without offloading, spread over more devices or in a smaller dtype"
            )
    if policy.embedding.weight.ndim != 2 or not policy.embedding.weight.numel():
        raise ModelError(
            f"the embedding table has shape {tuple(policy.embedding.weight.shape)}: its weights are flattened or"
            " partitioned (FSDP1, ZeRO-3); use FSDP2 (fully_shard), or gather the parameters first"
        )


def measured_head(policy: Subject) -> Head:
    """The head, after the model's own passes over a few tokens were compared with ours, plain and packed."""
    weight, bias = policy.output()
    exact = policy.dtype in (torch.float32, torch.float64)
    known = policy.allowed.nonzero().flatten()
    ids = known[torch.tensor(spread(len(known), 12, repeat=True), device=policy.device)].tolist()
    # A prompt, a prefix and two branches; the second row is shorter everywhere.
    work = [(ids[:4], ids[4:7], [ids[7:10], ids[10:12]]), (ids[2:4], ids[5:7], [ids[8:10], ids[11:]])]
    with policy.frozen(), torch.no_grad(), _narrow_window(policy):
        plain = [[_plain(policy, [*x, *z, *end]) for end in ends] for x, z, ends in work]
        head = _transform(policy, weight, bias, *plain[0][0], exact)
        try:
            packed = _packed(policy, work)
            _check_gradient(policy, ids)
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ModelError(
                f"{type(policy.model).__name__} does not run on embeddings with masks, positions and a cache of its"
                f" prompt ({type(error).__name__}: {error}); its attention cannot share a prefix between branches"
            ) from error
    own = [
        hidden[0, len(x) + (0 if first else len(z)) :]
        for (x, z, _), rows in zip(work, plain, strict=True)
        for first, (hidden, _) in zip((True, False), rows, strict=True)
    ]
    wanted = torch.cat([part.to(policy.device) for part in own]).float()
    off = (packed.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-6)
    # In low precision single tokens may be far off (a router at a tie), but not half of them.
    difference = float(off.max() if exact else off.median())
    if not difference < (1e-4 if exact else 5e-2):
        raise ModelError(
            f"{type(policy.model).__name__} gives other hidden states for two branches packed behind a cached prompt"
            f" than for plain sequences (relative difference {difference:.1e}): its attention, positions or inputs"
            " do not follow the masks, positions and embeddings it is given"
        )
    return head


def _check_gradient(policy: Subject, ids: list[int]) -> None:
    """Refuse a body with a module that reads its input and passes no gradient on (quantised for inference)."""
    cut: set[str] = set()

    def look(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if not any(isinstance(x, Tensor) and x.requires_grad for x in (*arguments, *keywords.values())):
            return
        found = _floats(output)
        if not found or any(x.requires_grad for x in found):
            return
        # Some only look at the input's dtype, as rotary tables do.
        with torch.no_grad():
            other = [x + 1 if isinstance(x, Tensor) and x.requires_grad else x for x in arguments]
            named = {k: x + 1 if isinstance(x, Tensor) and x.requires_grad else x for k, x in keywords.items()}
            again = _floats(module.forward(*other, **named))
        if not all(torch.equal(a, b) for a, b in zip(found, again, strict=True)):
            cut.add(type(module).__name__)

    tokens = torch.tensor([ids], device=policy.device)
    ready = policy.prepare(
        tokens,
        torch.arange(1, len(ids) + 1, device=policy.device).unsqueeze(0),
        torch.zeros_like(tokens) + PREFIX,
        policy.prompt_cache([ids[:1]]),
    )
    handles = [m.register_forward_hook(look, with_kwargs=True) for m in policy.body.modules() if m is not policy.body]
    try:
        with torch.enable_grad():
            values = policy.embed(tokens[0]).requires_grad_(True)
            hidden = policy.hidden(ready, torch.arange(len(ids), device=policy.device), values)
    finally:
        for handle in handles:
            handle.remove()
    if cut or not hidden.requires_grad:
        raise ModelError(
            f"{type(policy.model).__name__} passes no gradient through {', '.join(sorted(cut)) or 'its body'}; a"
            " revision needs the gradient with respect to the input embeddings, so load the body in a float dtype,"
            " or quantised in a way that can be trained with adapters"
        )


def _plain(policy: Subject, ids: list[int]) -> tuple[Tensor, Tensor]:
    hidden, logits = policy.whole(input_ids=torch.tensor([ids], device=policy.device), use_cache=False)
    if not hidden.shape[1] == logits.shape[1] == len(ids):
        raise ModelError(
            f"{type(policy.model).__name__} runs {hidden.shape[1]} positions for {len(ids)} tokens (virtual tokens?);"
            " a prompt can be cached only if the model reads nothing but its tokens"
        )
    return hidden, logits


def _packed(policy: Subject, work: list[tuple[list[int], list[int], list[list[int]]]]) -> Tensor:
    """Hidden states of (prompt, prefix, branches), packed: of each prefix, then of its branches."""
    width = max(len(z) + sum(map(len, ends)) for _, z, ends in work)
    grid = torch.zeros(3, len(work), width, dtype=torch.long)  # tokens, positions, segments
    grid[2] = PAD
    for b, (x, z, ends) in enumerate(work):
        start = 0
        for segment, part in enumerate([z, *ends]):
            first = len(x) + (len(z) if segment else 0)
            for row, values in enumerate((part, range(first, first + len(part)), [segment] * len(part))):
                grid[row, b, start : start + len(part)] = torch.tensor(values)
            start += len(part)
    tokens, position, segments = grid.to(policy.device)
    hidden = policy.hidden(policy.prepare(tokens, position, segments, policy.prompt_cache([x for x, _, _ in work])))
    return hidden[segments.flatten() != PAD]


@contextmanager
def _narrow_window(policy: Subject) -> Iterator[None]:
    """A sliding window of 3 tokens, so that which layers have one shows on a few tokens already."""
    configs = {id(c): c for c in (policy.config, getattr(policy.body, "config", policy.config))}.values()
    saved = [(c, c.sliding_window) for c in configs if getattr(c, "sliding_window", None) is not None]
    try:
        for config, _ in saved:
            config.sliding_window = 3
        yield
    finally:
        for config, window in saved:
            config.sliding_window = window


def _transform(policy: Subject, weight: Tensor, bias: Tensor | None, hidden: Tensor, own: Tensor, exact: bool) -> Head:
    """The head whose logits are the model's own: ``hidden [1, n, d]``, ``own [1, n, V]``."""
    if not torch.isfinite(own).all():
        raise ModelError(
            f"{type(policy.model).__name__} gives NaN or infinite logits on plain tokens; check its weights"
        )
    found = fitting_transform(nn.functional.linear(hidden.to(weight), weight, bias), own, policy.config, exact)
    if found is None:
        raise strange_logits(policy.model)
    return Head(weight, bias, *found)


def _floats(output: Any) -> list[Tensor]:
    values = output if isinstance(output, tuple | list) else [output]
    return [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]
