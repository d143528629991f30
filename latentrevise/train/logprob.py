"""TRL's trainers with their log-probs from ``linear_logprob``.

TRL's trainers call ``model(..., labels=labels, fused_lm_head=True)`` and read per-token log-probs, entropy and top-1
hits from the result. This module answers that call with the package's kernels: one pass over the table a forward, no
tile of logits, and with a frozen head a backward without any. Both uses of a tied table share one gradient of its size.
The rest of the model, generation too, stays as it is.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import FusedCausalLMOutput

from latentrevise import kernels
from latentrevise.engines.base import evaluating
from latentrevise.errors import ConfigError
from latentrevise.model.head import fitting_transform, strange_logits
from latentrevise.model.loading import sharded, spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100
METRICS = ("entropy", "is_top1")


def add_linear_logprob(model: PreTrainedModel, *, temperature: float = 1.0, metrics: tuple[str, ...] = ()) -> None:
    """Let ``model(..., labels=..., fused_lm_head=True)`` compute log-probs by ``linear_logprob``.

    model: a causal LM of transformers, below any adapter. temperature: the logits are divided by it. metrics: which of
    METRICS to compute besides; ``is_top1`` costs a pass of the vertex oracle. Only the positions with a label are run
    through the head. Raises ModelError if the model's logits have a form not understood, ConfigError under ZeRO-3.
    """
    if is_deepspeed_zero3_enabled():
        raise ConfigError("ZeRO-3 takes the head's weights away before the backward pass; use FSDP2, or ZeRO-2")
    unknown = set(metrics) - set(METRICS)
    if unknown:
        raise ConfigError(f"linear_logprob has no metric {', '.join(sorted(unknown))}; it has {', '.join(METRICS)}")
    scale, softcap = _transform(model)
    text = model.config.get_text_config(decoder=True)
    plain = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels}
            return plain(*args, **kwargs, **{k: v for k, v in given.items() if v is not None})
        items = kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        if getattr(text, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        # Looked up at each call: adapters and FSDP2 change modules after this.
        head = self.get_output_embeddings()
        with _TiedTable(head, later=not sharded(self)) as table:
            body = self.base_model(*args, **kwargs)
        hidden = body.last_hidden_state
        if shift_labels is None:
            assert labels is not None  # TRL gives one or the other
            hidden, targets = hidden[:, :-1], labels[:, 1:]
        else:
            targets = shift_labels
        targets, hidden = targets.to(head.weight.device), hidden.to(head.weight.device)
        mask = targets != IGNORED
        logp, entropy, top = _head(hidden[mask], table, head.bias, targets[mask], scale, softcap, temperature, metrics)
        loss = -logp.sum() / (mask.sum().clamp(min=1) if items is None else items)
        balance = _balance(body, text, kwargs) if kwargs.get("output_router_logits") else None
        if balance is not None:
            loss = loss + getattr(text, "router_aux_loss_coef", 0.0) * balance
        return FusedCausalLMOutput(
            loss=loss,
            log_probs=_spread(logp, mask),
            entropy=None if entropy is None else _spread(entropy, mask),
            is_top1=None if top is None else _spread(top, mask),
            label_mask=mask,
            aux_loss=balance,
        )

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


class _TiedTable(TorchFunctionMode):
    """While the body runs: lookups in the head's own table, which then share one gradient with the head.

    Autograd would hold a gradient of the table's size for each use until it adds them, and the head's all through the
    body's backward pass, on top of every activation. Only ``embedding(ids, weight)`` itself is taken over, so whatever
    a model does to its embeddings (scales, adapters, checkpoints) stays its own. Any other lookup (another or a frozen
    table, a DTensor, ``max_norm``, ``scale_grad_by_freq``, ``sparse``) goes as it is.

    later: make the head's gradient when the lookups' is there, the activations being gone. It needs the table then,
    which FSDP2 may have let go of.
    """

    def __init__(self, head: Any, later: bool) -> None:
        super().__init__()
        self._head = head
        self._table: Tensor | None = None
        self._shared: Tensor
        self._later = _Later() if later else None

    @property
    def weight(self) -> Tensor:
        """The table ``[V, d]`` for the next use of it: the head's weight, through the lookups there were."""
        # Read at each use: FSDP2 gathers the table for the first lookup, and may have let go of it since.
        weight = self._head.weight
        return self._shared if weight is self._table else weight

    @property
    def later(self) -> _Later | None:
        """Where the head leaves what the lookups make its gradient from; None where it is to make it itself."""
        return None if self._table is None else self._later

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not embedding or args[1] is not self._head.weight:
            return func(*args, **kwargs)
        ids, table = args
        unusual = any(kwargs.get(name) for name in ("max_norm", "scale_grad_by_freq", "sparse"))
        if unusual or isinstance(table, DTensor) or not (table.requires_grad and torch.is_grad_enabled()):
            return func(*args, **kwargs)
        found, self._shared = _Lookup.apply(self.weight, ids, kwargs.get("padding_idx"), self._later)
        self._table = table
        return found


class _Lookup(torch.autograd.Function):
    """``(W[ids], W)``: the rows' gradients are added into the gradient that the later use of ``W`` gives, or leaves to
    be made."""

    @staticmethod
    def forward(
        ctx: Any, W: Tensor, ids: Tensor, padding_idx: int | None, later: _Later | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.vocab, ctx.later = padding_idx, len(W), later
        ctx.set_materialize_grads(False)
        return embedding(ids, W), W.view_as(W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor | None, grad_W: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (ids,) = ctx.saved_tensors
        if ctx.later is not None and (made := ctx.later.gradient()) is not None:
            grad_W = made if grad_W is None else grad_W.add_(made)
        if grad_rows is None:
            return grad_W, None, None, None
        if grad_W is None:
            grad_W = grad_rows.new_zeros(ctx.vocab, grad_rows.shape[-1])
        # torch's own sums, which have an order, over a table of the ids that occur
        seen, places = ids.unique(return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(grad_rows, places, len(seen), -1, False)
        if ctx.padding_idx is not None:
            sums[seen == ctx.padding_idx] = 0
        # In place: made for this node alone, by `linear_logprob`, its cast or the lookup behind this one.
        return grad_W.index_add_(0, seen, sums), None, None, None


class _Later:
    """The head's gradient of a tied table, which its node leaves here and a lookup's node makes."""

    make: Callable[[], Tensor] | None = None

    def gradient(self) -> Tensor | None:
        """It, once; None if the head has left none, or it is made already."""
        make, self.make = self.make, None
        return None if make is None else make()


class _PutOff(torch.autograd.Function):
    """``(logp, entropy)`` as they are; of the gradient of ``shared`` only how to make it is left behind.

    shared: the table's view from its last lookup, whose node hence runs after this one, whether or not the rows that it
    looked up have a gradient. weight: the same as the head used it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        later: _Later,
        transform: dict[str, Any],
        shared: Tensor,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        logp: Tensor,
        entropy: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(hidden, weight, targets, bias, logp, entropy)
        ctx.later, ctx.transform, ctx.dtype = later, transform, shared.dtype
        ctx.set_materialize_grads(False)
        return logp.view_as(logp), None if entropy is None else entropy.view_as(entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, logp, entropy = ctx.saved_tensors
        if grad_logp is not None or grad_entropy is not None:
            coefficients = torch.zeros_like(logp) if grad_logp is None else grad_logp
            ctx.later.make = lambda: kernels.table_gradient(
                hidden, weight, targets, logp, coefficients,
                bias=bias, entropy=entropy, grad_entropy=grad_entropy, **ctx.transform,
            ).to(ctx.dtype)  # fmt: skip
        return *[None] * 7, grad_logp, grad_entropy


def _head(
    hidden: Tensor,
    table: _TiedTable,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    metrics: tuple[str, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probs, entropy and top-1 hits of ``hidden [N, d]``, float32 (bool) ``[N]``."""
    weight, bias = _whole(table.weight), None if bias is None else _whole(bias)
    shared = weight
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    hidden = hidden.contiguous()
    # Of other dtypes linear_logprob's own gradient is not the blocked one.
    later = table.later if hidden.dtype in (torch.float32, torch.bfloat16) else None
    weight = weight if later is None else weight.detach()
    transform: dict[str, Any] = {"scale": scale, "softcap": softcap, "temperature": temperature}
    found = kernels.linear_logprob(hidden, weight, targets, bias=bias, entropy="entropy" in metrics, **transform)
    logp, entropy = found if isinstance(found, tuple) else (found, None)
    if later is not None:
        logp, entropy = _PutOff.apply(later, transform, shared, hidden.detach(), weight, targets, bias, logp, entropy)
    return logp, entropy, _top1(hidden, weight, bias, targets) if "is_top1" in metrics else None


@torch.no_grad()
def _top1(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Whether the target has the largest logit: the vertex oracle of the negative hidden states (lowest id on ties)."""
    if bias is not None:  # one more column: a copy of the table, for the few architectures with a bias
        weight = torch.cat([weight, bias[:, None].to(weight.dtype)], 1)
        hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)
    return kernels.vertex_oracle(-hidden.detach(), weight.detach())[0] == targets


def _whole(parameter: Tensor) -> Tensor:
    """FSDP2's shards gathered; the gradient finds its way back to them."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Back to ``[B, T]``, zero (and still part of the graph) where there is no label."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _balance(body: Any, text: Any, kwargs: dict[str, Any]) -> Tensor:
    """The load-balancing loss of a mixture of experts, as the model's own forward computes it."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss = load_balancing_loss_func(
        body.router_logits, text.num_experts, text.num_experts_per_tok, kwargs.get("attention_mask")
    )
    assert isinstance(loss, Tensor)  # an int only without router logits
    return loss


def _transform(model: PreTrainedModel) -> tuple[float, float | None]:
    """``(scale, softcap)`` with which the model forms its logits: measured in the first process, told to the others.

    The others may hold no weights yet (FSDP with RAM-efficient loading).
    """
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    found = [_measured(model) if first else None]
    if torch.distributed.is_initialized():
        broadcast_object_list(found)
    if found[0] is None:
        raise strange_logits(model)
    return found[0]


@torch.no_grad()
def _measured(model: PreTrainedModel) -> tuple[float, float | None] | None:
    head = model.get_output_embeddings()
    text = model.config.get_text_config(decoder=True)
    ids = torch.tensor([spread(text.vocab_size, 8)], device=head.weight.device)
    with evaluating(model):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        own = model(input_ids=ids, use_cache=False).logits
    raw = torch.nn.functional.linear(hidden.to(head.weight), head.weight, head.bias)
    return fitting_transform(raw, own, text, model.dtype in (torch.float32, torch.float64))
