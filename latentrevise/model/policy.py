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
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from latentrevise import kernels
from latentrevise.errors import InputError, ModelError
from latentrevise.model.alone import alone
from latentrevise.model.lean import Widened, activations_made_again, release, slow
from latentrevise.model.loading import check_model, input_embedding, position_limit, sharded
from latentrevise.model.packing import PAD, PREFIX, bucket, visible

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ATTENTION = ("sdpa", "eager", "flex_attention")  # implementations that take a mask of our own
_LAYER_TYPES = ("full_attention", "sliding_attention")
_NEEDED = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values")


@dataclass(frozen=True)
class Head:
    """``logits = softcap * tanh(scale * (h W^T + bias) / softcap)``; without a softcap ``scale * (h W^T + bias)``."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logprob(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probability of ``targets [N]`` under ``hidden [N, d]``, float32 ``[N]``, without ``[N, V]``."""
        return self._scored(hidden, targets, temperature=temperature).to(hidden.device)

    def logprob_and_entropy(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As ``logprob``, and the entropy of each distribution in nats, float32 ``[N]``."""
        logprobs, entropies = self._scored(hidden, targets, entropy=True)
        return logprobs.to(hidden.device), entropies.to(hidden.device)

    def _scored(self, hidden: Tensor, targets: Tensor, **options: Any) -> Any:
        """``linear_logprob`` on the head's device: a tensor, or a pair of them with ``entropy``."""
        device = self.weight.device
        return kernels.linear_logprob(
            hidden.to(device),
            self.weight,
            targets.to(device),
            bias=self.bias,
            scale=self.scale,
            softcap=self.softcap,
            ignore_index=None,
            **options,
        )

    def plausible(self, hidden: Tensor, p_min: float, count: int, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens with probability of at least ``p_min``: ids ``[T, C]`` (padded -1), logprobs, counts."""
        ids, logprobs, counts = kernels.plausible_vertices(
            hidden.to(self.weight.device),
            self.weight,
            p_min,
            count,
            bias=self.bias,
            scale=self.scale,
            softcap=self.softcap,
            allowed=allowed.to(self.weight.device),
        )
        return ids.to(hidden.device), logprobs.to(hidden.device), counts.to(hidden.device)


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of ``B`` prompts, right-padded to ``P``, and the hidden states.

    layers: one pair ``[B, heads, P, head_dim]`` a layer. lengths: int64 ``[B]``. hidden: ``[B, P, d]``.
    """

    layers: list[tuple[Tensor, Tensor]]
    lengths: Tensor
    hidden: Tensor

    def select(self, rows: Tensor, width: int | None = None) -> PromptCache:
        """Rows of the cache, cut to their first ``width`` positions."""
        layers = [(_rows(keys[:, :, :width], rows), _rows(values[:, :, :width], rows)) for keys, values in self.layers]
        return PromptCache(
            layers,
            self.lengths[rows].clamp(max=self.hidden.shape[1] if width is None else width),
            _rows(self.hidden[:, :width], rows),
        )

    @property
    def last_hidden(self) -> Tensor:
        """``[B, d]``, at each prompt's last token."""
        return self.hidden[torch.arange(len(self.lengths), device=self.hidden.device), self.lengths - 1]


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


class _Behind(DynamicLayer):
    """A prompt's keys and values that others are put behind but never into: running a pass leaves no trace."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)


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
        self._check_attention()
        self._check_forward()
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
        self.head = self._measured()

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
            given = prompt if isinstance(prompt, Tensor) else self._embed(torch.tensor(prompt, device=self.device))
            embeddings[r, : len(prompt)] = given.to(self.device, self.table.dtype)
        position = torch.arange(width, device=self.device).expand(len(unique), -1)
        segment = torch.where(position < lengths.unsqueeze(1), PREFIX, PAD)
        with torch.no_grad():
            cache = DynamicCache()
            masks = self._masks(position, segment, position, segment, None)
            hidden = self._run(embeddings, position, masks, cache)
        whole = PromptCache(_layers(cache), lengths, hidden)
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
        return Ready(self._embed(tokens), position, masks, prompt.layers)

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
        cache = Cache(layers=[_Behind(keys, values) for keys, values in ready.layers])
        with self._recomputed() if recompute else activations_made_again():
            return self._run(embeddings, ready.position, ready.masks, cache).reshape(count * width, -1)

    def _embed(self, tokens: Tensor) -> Tensor:
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
            "past_key_values": cache,
            "use_cache": True,
        }
        with self._arithmetic():
            if self.sharded:
                hidden, _ = self._whole(**inputs)
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

    def _whole(self, **inputs: Any) -> tuple[Tensor, Tensor]:
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

    def _check_attention(self) -> None:
        kind = getattr(self.config, "_attn_implementation", None)
        if kind not in _ATTENTION:
            raise ModelError(
                f"attention implementation {kind!r} takes no explicit mask, which the packed pass needs; load the"
                " model with attn_implementation='sdpa' (or call model.set_attn_implementation('sdpa')), 'eager'"
                " where the architecture has no sdpa, or 'flex_attention' on a GPU"
            )
        if kind == "flex_attention" and self.device.type == "cpu":
            raise ModelError(
                "FlexAttention has no backward pass on a CPU, which a revision needs; load the model with"
                " attn_implementation='sdpa', or put it on a GPU"
            )
        types = set(getattr(self.config, "layer_types", None) or _LAYER_TYPES)
        strange = sorted(types - set(_LAYER_TYPES))
        if strange:
            raise ModelError(
                f"{type(self.model).__name__} has layers of type {', '.join(strange)}; only full and sliding-window"
                " attention can share a prefix between two branches exactly"
            )

    def _check_forward(self) -> None:
        parameters = inspect.signature(self.body.forward).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        missing = [] if anything else [name for name in _NEEDED if name not in parameters]
        if missing:
            raise ModelError(
                f"{type(self.body).__name__}.forward takes no {', '.join(missing)}; the packed pass places tokens and"
                " masks itself, which this architecture does not allow"
            )
        for name, weight in (
            ("input embedding", self.embedding.weight),
            *(("body", p) for p in self.body.parameters()),
        ):
            if weight.device.type == "meta":
                raise ModelError(
                    f"the weights of the {name} are not in memory (meta device: offloaded or not loaded); load the"
                    " model without offloading, spread over more devices or in a smaller dtype"
                )
        if self.embedding.weight.ndim != 2 or not self.embedding.weight.numel():
            raise ModelError(
                f"the embedding table has shape {tuple(self.embedding.weight.shape)}: its weights are flattened or"
                " partitioned (FSDP1, ZeRO-3); use FSDP2 (fully_shard), or gather the parameters first"
            )

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

    def _output(self) -> tuple[Tensor, Tensor | None]:
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

    def _measured(self) -> Head:
        """The head, after the model's own passes over a few tokens were compared with ours, plain and packed."""
        weight, bias = self._output()
        exact = self.dtype in (torch.float32, torch.float64)
        known = self.allowed.nonzero().flatten()
        ids = known[torch.linspace(0, len(known) - 1, 12, device=self.device).long()].tolist()
        # A prompt, a prefix and two branches; the second row is shorter everywhere.
        work = [(ids[:4], ids[4:7], [ids[7:10], ids[10:12]]), (ids[2:4], ids[5:7], [ids[8:10], ids[11:]])]
        with self.frozen(), torch.no_grad(), self._narrow_window():
            plain = [[self._plain([*x, *z, *end]) for end in ends] for x, z, ends in work]
            head = self._transform(weight, bias, *plain[0][0], exact)
            try:
                packed = self._packed(work)
                self._check_gradient(ids)
            except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise ModelError(
                    f"{type(self.model).__name__} does not run on embeddings with masks, positions and a cache of its"
                    f" prompt ({type(error).__name__}: {error}); its attention cannot share a prefix between branches"
                ) from error
        own = [
            hidden[0, len(x) + (0 if first else len(z)) :]
            for (x, z, _), rows in zip(work, plain, strict=True)
            for first, (hidden, _) in zip((True, False), rows, strict=True)
        ]
        wanted = torch.cat([part.to(self.device) for part in own]).float()
        off = (packed.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-6)
        # In low precision single tokens may be far off (a router at a tie), but not half of them.
        difference = float(off.max() if exact else off.median())
        if not difference < (1e-4 if exact else 5e-2):
            raise ModelError(
                f"{type(self.model).__name__} gives other hidden states for two branches packed behind a cached prompt"
                f" than for plain sequences (relative difference {difference:.1e}): its attention, positions or inputs"
                " do not follow the masks, positions and embeddings it is given"
            )
        return head

    def _check_gradient(self, ids: list[int]) -> None:
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

        tokens = torch.tensor([ids], device=self.device)
        ready = self.prepare(
            tokens,
            torch.arange(1, len(ids) + 1, device=self.device).unsqueeze(0),
            torch.zeros_like(tokens) + PREFIX,
            self.prompt_cache([ids[:1]]),
        )
        handles = [m.register_forward_hook(look, with_kwargs=True) for m in self.body.modules() if m is not self.body]
        try:
            with torch.enable_grad():
                values = self._embed(tokens[0]).requires_grad_(True)
                hidden = self.hidden(ready, torch.arange(len(ids), device=self.device), values)
        finally:
            for handle in handles:
                handle.remove()
        if cut or not hidden.requires_grad:
            raise ModelError(
                f"{type(self.model).__name__} passes no gradient through {', '.join(sorted(cut)) or 'its body'}; a"
                " revision needs the gradient with respect to the input embeddings, so load the body in a float dtype,"
                " or quantised in a way that can be trained with adapters"
            )

    def _plain(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        hidden, logits = self._whole(input_ids=torch.tensor([ids], device=self.device), use_cache=False)
        if not hidden.shape[1] == logits.shape[1] == len(ids):
            raise ModelError(
                f"{type(self.model).__name__} runs {hidden.shape[1]} positions for {len(ids)} tokens (virtual tokens?);"
                " a prompt can be cached only if the model reads nothing but its tokens"
            )
        return hidden, logits

    def _packed(self, work: list[tuple[list[int], list[int], list[list[int]]]]) -> Tensor:
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
        tokens, position, segments = grid.to(self.device)
        hidden = self.hidden(self.prepare(tokens, position, segments, self.prompt_cache([x for x, _, _ in work])))
        return hidden[segments.flatten() != PAD]

    @contextmanager
    def _narrow_window(self) -> Iterator[None]:
        """A sliding window of 3 tokens, so that which layers have one shows on a few tokens already."""
        configs = {id(c): c for c in (self.config, getattr(self.body, "config", self.config))}.values()
        saved = [(c, c.sliding_window) for c in configs if getattr(c, "sliding_window", None) is not None]
        try:
            for config, _ in saved:
                config.sliding_window = 3
            yield
        finally:
            for config, window in saved:
                config.sliding_window = window

    def _transform(self, weight: Tensor, bias: Tensor | None, hidden: Tensor, own: Tensor, exact: bool) -> Head:
        """The head whose logits are the model's own: ``hidden [1, n, d]``, ``own [1, n, V]``."""
        if not torch.isfinite(own).all():
            raise ModelError(
                f"{type(self.model).__name__} gives NaN or infinite logits on plain tokens; check its weights"
            )
        found = fitting_transform(nn.functional.linear(hidden.to(weight), weight, bias), own, self.config, exact)
        if found is None:
            raise strange_logits(self.model)
        return Head(weight, bias, *found)


def _floats(output: Any) -> list[Tensor]:
    values = output if isinstance(output, tuple | list) else [output]
    return [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]


def _as_ids(prompt: Sequence[int] | Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in prompt)


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    return values.index_select(0, rows.to(values.device))


def _logit_transforms(config: Any) -> Iterator[tuple[float, float | None]]:
    """Candidate (scale, softcap) pairs from what configurations call them; a measurement picks the true one."""
    softcap = getattr(config, "final_logit_softcapping", None)
    scales = [1.0]
    if getattr(config, "logit_scale", None):
        scales.insert(0, float(config.logit_scale))
    if getattr(config, "logits_scaling", None):
        scales[:0] = [1.0 / float(config.logits_scaling), float(config.logits_scaling)]
    for scale in scales:
        yield scale, None if softcap is None else float(softcap)


def fitting_transform(raw: Tensor, own: Tensor, config: Any, exact: bool) -> tuple[float, float | None] | None:
    """The (scale, softcap) that make a model's ``own`` logits of ``raw = h W^T + bias``, of the same shape; None where
    no known form does. exact: in full precision."""
    raw = raw.float()
    own = own.to(raw)
    most = own.abs().max().clamp_min(1e-6) * (1e-4 if exact else 2e-2)
    for scale, softcap in _logit_transforms(config):
        logits = raw * scale if softcap is None else softcap * torch.tanh(raw * scale / softcap)
        if (logits - own).abs().max() < most:
            return scale, softcap
    return None


def strange_logits(model: nn.Module) -> ModelError:
    return ModelError(
        f"{type(model).__name__} computes its logits in a way not understood here: neither plain, scaled nor"
        " soft-capped h W^T"
    )


def _layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            raise ModelError(
                f"the model's cache holds a {type(layer).__name__}; a prompt can be shared only as plain keys and"
                " values"
            )
        pairs.append((layer.keys, layer.values))
    return pairs
