"""The frozen policy: a Hugging Face causal LM taken apart into embedding table, body and head.

Everything is found from modules and configuration and then *measured*: at construction the policy's own logits, plain
and packed, are compared with the model's on a few tokens. A model that computes in a way not understood here is
refused with the reason, never approximated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache

from latentrevise.errors import InputError, ModelError
from latentrevise.model.alone import alone
from latentrevise.model.cache import Behind, PromptCache, cached_layers
from latentrevise.model.checks import check_attention, check_forward, measured_head
from latentrevise.model.lean import Widened, activations_made_again, release, slow
from latentrevise.model.loading import cache_argument, check_model, input_embedding, position_limit, sharded
from latentrevise.model.packing import PAD, PREFIX, bucket, visible

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Ready:
    """All of a packed pass that does not change from step to step.

    embeddings: ``[B, S, d]`` of the plain tokens; position: int64 ``[B, S]``; masks: what the body takes; layers: the
    prompts' keys and values.
    """

    embeddings: Tensor
    position: Tensor
    masks: Any
    layers: list[tuple[Tensor, Tensor]]


class Policy:
    """A causal LM that is read, and differentiated with respect to its input embeddings, but never changed.

    model: any causal LM of transformers with a plain input embedding and a linear head; LoRA on top of it (peft),
        weights spread over devices (device_map) and FSDP2 (fully_shard) are understood. It may be trained between
        calls. Under FSDP2 each pass gathers parameters from all processes, so all must be given the same work, with a
        token budget that suffices everywhere.
    tokenizer: used for which rows are real tokens and which of them are special; without it only the special ids of the
        configuration are known.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        with alone(model):  # the probes hook into it
            self._take_apart(model, tokenizer)

    def _take_apart(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        check_model(model, tokenizer)
        self.embedding = input_embedding(model)
        self.body: nn.Module = model.get_decoder()
        if self.body is model or self.body is None:
            raise ModelError(f"{type(model).__name__} has no separate decoder body; use a causal LM of transformers")
        check_attention(self)
        check_forward(self)
        # Under FSDP2 parameters are gathered by hooks on the root, so the pass must go through it.
        self.sharded = sharded(model)
        for module in model.modules():
            # The root keeps its parameters gathered after a pass; what was read from them would vanish with them.
            if isinstance(module, FSDPModule):
                module.reshard()
        self._derived: list[tuple[Tensor, Callable[[], Tensor]]] = []
        # A GPU gains from shapes that repeat (allocation, choice of kernels); on a CPU padding costs what tokens cost.
        self.buckets = self.device.type == "cuda"
        with torch.no_grad():
            self.table = self._table()
        self.known, self.allowed = self._vertices(tokenizer)
        self.limit = position_limit(model)
        self.head = measured_head(self)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The model in eval mode with no parameter requiring a gradient; both are restored on the way out.

        Copies made of the weights (a scaled table, a head with LoRA) are brought up to date on the way in. Another
        thread that wants the same model frozen waits; a caller's inference mode is left, since gradients are taken.
        """
        with alone(self.model):
            yield from self._frozen()

    def _frozen(self) -> Iterator[None]:
        training = [module for module in self.model.modules() if module.training]
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        try:
            for parameter in trained.values():
                parameter.requires_grad_(False)
            self.model.eval()
            with torch.no_grad():
                for copy, make in self._derived:
                    copy.copy_(make())
            yield
        finally:
            release()
            for parameter in trained.values():
                parameter.requires_grad_(True)
            for name, parameter in self.model.named_parameters():
                # FSDP2 may have put gathered parameters in the place of the shards, with the flags those had.
                parameter.requires_grad_(parameter.requires_grad or name in trained)
            for module in training:
                module.training = True

    def check_ids(self, ids: Sequence[int], what: str) -> None:
        """Raises InputError if ``what`` holds an id that is no row of the model's table."""
        top = max(ids, default=0)
        if top >= self.table.shape[0]:
            raise InputError(
                f"{what} holds token {top}, but the model's table has {self.table.shape[0]} rows; tokenizer and"
                " model do not belong together"
            )

    def check_length(self, length: int, what: str) -> None:
        """Raises InputError if ``what`` needs more positions than the model has."""
        if self.limit is not None and length > self.limit:
            raise InputError(
                f"{what}: {length} tokens exceed the model's {self.limit} positions; shorten the prompt or the prefix"
            )

    def prompt_cache(self, prompts: Sequence[Sequence[int] | Tensor]) -> PromptCache:
        """Run the prompts once: token ids, or embeddings ``[L, d]``. Equal ids are run once for all of their rows."""
        keys = [i if isinstance(p, Tensor) and p.is_floating_point() else _as_ids(p) for i, p in enumerate(prompts)]
        row = {key: r for r, key in enumerate(dict.fromkeys(keys))}
        unique = [prompts[key] if isinstance(key, int) else key for key in row]
        lengths = torch.tensor([len(p) for p in unique], device=self.device)
        width = bucket(int(lengths.max())) if self.buckets else int(lengths.max())
        embeddings = self.table.new_zeros(len(unique), width, self.table.shape[1])
        for r, prompt in enumerate(unique):
            given = prompt if isinstance(prompt, Tensor) else self.embed(torch.tensor(prompt, device=self.device))
            embeddings[r, : len(prompt)] = given.to(self.device, self.table.dtype)
        position = torch.arange(width, device=self.device).expand(len(unique), -1)
        segment = torch.where(position < lengths.unsqueeze(1), PREFIX, PAD)
        with torch.no_grad():
            cache = DynamicCache()
            masks = self._masks(position, segment, position, segment, None)
            hidden = self._run(embeddings, position, masks, cache)
        whole = PromptCache(cached_layers(cache), lengths, hidden)
        if len(unique) == len(prompts):
            return whole
        return whole.select(torch.tensor([row[key] for key in keys], device=self.device))

    def prepare(
        self, tokens: Tensor, position: Tensor, segment: Tensor, prompt: PromptCache, reach: Tensor | None = None
    ) -> Ready:
        """What a packed pass behind ``prompt`` needs; all int64 ``[B, S]``, see ``packing``."""
        longest = prompt.hidden.shape[1]
        prompt_position = torch.arange(longest, device=self.device).expand(len(tokens), -1)
        prompt_segment = torch.where(prompt_position < prompt.lengths.unsqueeze(1), PREFIX, PAD)
        masks = self._masks(
            position,
            segment,
            torch.cat([prompt_position, position], 1),
            torch.cat([prompt_segment, segment], 1),
            reach,
        )
        return Ready(self.embed(tokens), position, masks, prompt.layers)

    def hidden(
        self,
        ready: Ready,
        index: Tensor | None = None,
        values: Tensor | None = None,
        *,
        recompute: bool = False,
    ) -> Tensor:
        """Hidden states of the suffixes, ``[B * S, d]``.

        values: ``[T, d]``, in place of the plain tokens that lie at ``index [T]`` of the flattened ``[B * S]``.
        recompute: keep only the layers' inputs for the backward pass, which runs each layer again.
        """
        count, width, d = ready.embeddings.shape
        embeddings = ready.embeddings
        if index is not None and values is not None:
            flat = embeddings.reshape(count * width, d).index_copy(0, index, values.to(embeddings.dtype))
            embeddings = flat.view(count, width, d)
        cache = Cache(layers=[Behind(keys, values) for keys, values in ready.layers])
        with self._recomputed() if recompute else activations_made_again():
            return self._run(embeddings, ready.position, ready.masks, cache).reshape(count * width, -1)

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of the table, ``[..., d]``, for token ids of any shape."""
        return nn.functional.embedding(tokens, self.table)

    def _masks(
        self, position: Tensor, segment: Tensor, key_position: Tensor, key_segment: Tensor, reach: Tensor | None
    ) -> Any:
        """The mask of each kind of layer, in the form the body takes: additive ``[B, 1, Q, L]``, or a BlockMask."""

        def blocks(window: int | None) -> BlockMask:
            def sees(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                end = None if reach is None else reach[b, q]
                return visible(segment[b, q], position[b, q], key_segment[b, k], key_position[b, k], window, end)

            (count, queries), keys = segment.shape, key_segment.shape[1]
            return create_block_mask(sees, count, None, queries, keys, device=segment.device)

        def mask(window: int | None) -> Tensor | BlockMask:
            if self.config._attn_implementation == "flex_attention":
                return blocks(window)
            seen = visible(
                segment.unsqueeze(2),
                position.unsqueeze(2),
                key_segment.unsqueeze(1),
                key_position.unsqueeze(1),
                window,
                None if reach is None else reach.unsqueeze(2),
            ).unsqueeze(1)
            # Additive and finite: a padded query then attends to everything evenly instead of producing NaN.
            lowest = torch.finfo(self.dtype).min
            return torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill(~seen, lowest)

        window = getattr(self.config, "sliding_window", None)
        kinds = sorted(set(getattr(self.config, "layer_types", None) or [])) or [
            "full_attention" if window is None else "sliding_attention"
        ]
        by_kind = {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
        return by_kind if len(by_kind) > 1 else by_kind[kinds[0]]

    def _run(self, embeddings: Tensor, position: Tensor, masks: Any, cache: Cache) -> Tensor:
        inputs = {
            "inputs_embeds": embeddings,
            "attention_mask": masks,
            "position_ids": position,
            cache_argument(self.model if self.sharded else self.body): cache,
            "use_cache": True,
        }
        with self._arithmetic():
            if self.sharded:
                hidden, _ = self.whole(**inputs)
            else:
                hidden = self.body(**inputs).last_hidden_state
        return hidden.to(self.device)

    def _arithmetic(self) -> AbstractContextManager[Any]:
        return Widened() if self.device.type == "cpu" and slow(self.dtype) else nullcontext()

    @contextmanager
    def _recomputed(self) -> Iterator[None]:
        """Every layer of the body keeps its input alone while this is open.

        Not by transformers' own switch, which needs training mode and drops the cache. Within ``forward``, as there, so
        that hooks stay outside and run once.
        """
        layers = self._layers()
        own = [vars(layer).get("forward") for layer in layers]
        again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), self._arithmetic()))
        try:
            for layer in layers:
                layer.forward = partial(again, layer.forward)
            yield
        finally:
            for layer, forward in zip(layers, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _layers(self) -> nn.ModuleList:
        for module in self.body.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.config.num_hidden_layers:
                return module
        raise ModelError(
            f"{type(self.body).__name__} holds no list of its {self.config.num_hidden_layers} layers, so they cannot be"
            " recomputed one by one; leave `recompute` off"
        )

    def whole(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Hidden states and logits of the model itself."""
        caught: list[Tensor] = []

        thread = get_ident()

        def catch(module: nn.Module, arguments: Any, output: Any) -> None:
            if get_ident() == thread:  # the model may run in another one, too
                caught.append(output.last_hidden_state)

        handle = self.body.register_forward_hook(catch)
        try:
            if "input_ids" not in inputs and "logits_to_keep" in inspect.signature(self.model.forward).parameters:
                inputs["logits_to_keep"] = 1
            logits = self.model(**inputs).logits
        finally:
            handle.remove()
        if len(caught) != 1:
            raise ModelError(
                f"{type(self.model).__name__} ran its decoder {len(caught)} times in one forward pass; the packed pass"
                " needs a model that runs it once"
            )
        return caught[0], logits

    def _derive(self, make: Callable[[], Tensor]) -> Tensor:
        """A copy that depends on the weights and is renewed at the start of every call."""
        copy = make().clone()
        self._derived.append((copy, make))
        return copy

    def _table(self) -> Tensor:
        weight = self.embedding.weight
        plain = type(self.embedding).forward is nn.Embedding.forward
        if plain:
            return self._derive(weight.full_tensor) if isinstance(weight, DTensor) else weight.detach()
        rows = torch.arange(weight.shape[0], device=weight.device)
        if isinstance(weight, DTensor):
            return self._derive(
                lambda: torch.func.functional_call(self.embedding, {"weight": weight.full_tensor()}, (rows,)).detach()
            )
        return self._derive(lambda: self.embedding(rows).detach())

    def _vertices(self, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Tensor, Tensor]:
        """bool ``[V]`` each: the rows of the tokenizer; those of them that are no special tokens."""
        rows = self.table.shape[0]
        if tokenizer is None:
            special = [getattr(self.config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
            ids = [i for value in special if value is not None for i in (value if isinstance(value, list) else [value])]
            real = rows
        else:
            ids, real = list(tokenizer.all_special_ids), len(tokenizer)
        known = torch.arange(rows, device=self.device) < real
        allowed = known.clone()
        allowed[[i for i in ids if i < rows]] = False
        return known, allowed

    def output(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``[V, d]`` and bias of the head."""
        module = self.model.get_output_embeddings()
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ModelError(f"{type(self.model).__name__} has no linear head; the loss needs logits = h W^T")
        if type(module).forward is nn.Linear.forward:
            bias = getattr(module, "bias", None)
            if isinstance(weight, DTensor):
                tied = weight is self.embedding.weight and type(self.embedding).forward is nn.Embedding.forward
                whole = self.table if tied else self._derive(weight.full_tensor)
                return whole, bias if bias is None else self._derive(bias.full_tensor)
            return weight.detach(), None if bias is None else bias.detach()

        # Linear in some other way (LoRA on the head, quantised): what it does to the unit vectors is its matrix.
        def zero() -> Tensor:
            return module(torch.zeros(1, self.table.shape[1], dtype=self.dtype, device=weight.device))[0]

        def matrix() -> Tensor:
            units = torch.eye(self.table.shape[1], dtype=self.dtype, device=weight.device)
            return (module(units) - zero()).T.contiguous()

        with self.frozen(), torch.no_grad():
            return self._derive(matrix), self._derive(zero) if bool(zero().any()) else None


def _as_ids(prompt: Sequence[int] | Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in prompt)
