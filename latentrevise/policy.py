"""The frozen policy: a Hugging Face causal LM taken apart into embedding table, body and head.

Everything is found from modules and configuration and then *measured*: at construction the policy's own logits on a few
tokens are compared with the model's. A model that computes its logits in a way not understood here is refused with the
reason, never approximated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from latentrevise import kernels
from latentrevise.errors import InputError, ModelError
from latentrevise.models import check_model, input_embedding
from latentrevise.packing import PAD, PREFIX, Packing, visible

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ATTENTION = ("sdpa", "eager")  # implementations that take an explicit mask
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Head:
    """``logits = softcap * tanh(scale * (h W^T + bias) / softcap)``; without a softcap ``scale * (h W^T + bias)``."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logprob(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probability of ``targets [N]`` under ``hidden [N, d]``, float32 ``[N]``, without ``[N, V]``."""
        return kernels.linear_logprob(
            hidden,
            self.weight,
            targets,
            bias=self.bias,
            scale=self.scale,
            softcap=self.softcap,
            temperature=temperature,
        )

    def plausible(self, hidden: Tensor, p_min: float, count: int, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens with probability of at least ``p_min``: ids ``[T, C]`` (padded -1), logprobs, counts."""
        return kernels.plausible_vertices(
            hidden,
            self.weight,
            p_min,
            count,
            bias=self.bias,
            scale=self.scale,
            softcap=self.softcap,
            allowed=allowed,
        )


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of ``B`` prompts, right-padded to ``P``, and the last hidden state of each.

    layers: one pair ``[B, heads, P, head_dim]`` a layer. lengths: int64 ``[B]``. last_hidden: ``[B, d]``.
    """

    layers: list[tuple[Tensor, Tensor]]
    lengths: Tensor
    last_hidden: Tensor

    def select(self, rows: Tensor) -> PromptCache:
        layers = [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in self.layers]
        return PromptCache(layers, self.lengths[rows], self.last_hidden[rows])


class Policy:
    """A causal LM that is read, and differentiated with respect to its input embeddings, but never changed.

    model: any causal LM of transformers with a plain input embedding and a linear head.
    tokenizer: used for which rows are real tokens and which of them are special; without it only the special ids of the
        configuration are known.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        check_model(model, tokenizer)
        self.embedding = input_embedding(model)
        self.body: nn.Module = model.get_decoder()
        if self.body is model or self.body is None:
            raise ModelError(f"{type(model).__name__} has no separate decoder body; use a causal LM of transformers")
        self._check_attention()
        with torch.no_grad():
            self.table = self._table()
        self.allowed = self._allowed(tokenizer)
        self.head = self._head()

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The model in eval mode with no parameter requiring a gradient; both are restored on the way out."""
        training = [module for module in self.model.modules() if module.training]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            self.model.eval()
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True

    def check_ids(self, ids: Sequence[int], what: str) -> None:
        top = max(ids, default=0)
        if top >= self.table.shape[0]:
            raise InputError(
                f"{what} holds token {top}, but the model's table has {self.table.shape[0]} rows; tokenizer and"
                " model do"
                " not belong together"
            )

    def prompt_cache(self, prompts: Sequence[Sequence[int]]) -> PromptCache:
        """Run the prompts once. Equal prompts are run once for all of their rows."""
        unique = list(dict.fromkeys(tuple(p) for p in prompts))
        lengths = torch.tensor([len(p) for p in unique], device=self.device)
        width = int(lengths.max())
        tokens = torch.zeros(len(unique), width, dtype=torch.long, device=self.device)
        for i, prompt in enumerate(unique):
            tokens[i, : len(prompt)] = torch.tensor(prompt, device=self.device)
        position = torch.arange(width, device=self.device).expand(len(unique), -1)
        segment = torch.where(position < lengths.unsqueeze(1), PREFIX, PAD)
        with torch.no_grad():
            cache = DynamicCache()
            hidden = self._run(self.embedding(tokens), position, segment, position, segment, cache)
        row = {prompt: i for i, prompt in enumerate(unique)}
        rows = torch.tensor([row[tuple(p)] for p in prompts], device=self.device)
        last = hidden[torch.arange(len(unique), device=self.device), lengths - 1]
        return PromptCache(_layers(cache), lengths, last).select(rows)

    def packed(self, packing: Packing, prompt: PromptCache, prefix: Tensor) -> Tensor:
        """Hidden states of the suffixes, ``[B * S, d]``, with ``prefix [T, d]`` in place of the plain prefix tokens."""
        count, width = packing.tokens.shape
        plain = self.embedding(packing.tokens).detach().reshape(count * width, -1)
        embeddings = plain.index_copy(0, packing.prefix_index, prefix.to(plain.dtype)).view(count, width, -1)
        position = packing.offset + prompt.lengths.unsqueeze(1)
        longest = prompt.layers[0][0].shape[2]
        prompt_position = torch.arange(longest, device=self.device).expand(count, -1)
        prompt_segment = torch.where(prompt_position < prompt.lengths.unsqueeze(1), PREFIX, PAD)
        hidden = self._run(
            embeddings,
            position,
            packing.segment,
            torch.cat([prompt_position, position], 1),
            torch.cat([prompt_segment, packing.segment], 1),
            DynamicCache(prompt.layers),
        )
        return hidden.reshape(count * width, -1)

    def logprobs(
        self, contexts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], token_budget: int
    ) -> list[Tensor]:
        """Log-probability of each completion token behind its plain context: float32 ``[len(completion)]`` on the CPU.

        Temperature 1, unfiltered. token_budget: padded tokens in one batch.
        """
        size = [len(context) + len(completion) for context, completion in zip(contexts, completions, strict=True)]
        order = sorted(range(len(size)), key=size.__getitem__)
        found: dict[int, Tensor] = {}
        with self.frozen(), torch.no_grad():
            while order:
                # The longest first: the batch's width is known, and memory fails early if it has to.
                count = max(1, token_budget // size[order[-1]])
                batch, order = order[-count:], order[:-count]
                width = max(size[i] for i in batch)
                tokens = torch.zeros(len(batch), width, dtype=torch.long)
                for row, i in enumerate(batch):
                    tokens[row, : size[i]] = torch.tensor([*contexts[i], *completions[i]])
                tokens = tokens.to(self.device)
                lengths = torch.tensor([size[i] for i in batch], device=self.device)
                position = torch.arange(width, device=self.device).expand(len(batch), -1)
                segment = torch.where(position < lengths.unsqueeze(1), PREFIX, PAD)
                hidden = self._run(self.embedding(tokens), position, segment, position, segment, DynamicCache())
                spans = [(row, slice(len(contexts[i]) - 1, size[i] - 1)) for row, i in enumerate(batch)]
                scored = torch.cat([hidden[row, span] for row, span in spans])
                targets = torch.cat([tokens[row, span.start + 1 : span.stop + 1] for row, span in spans])
                parts = self.head.logprob(scored, targets).cpu().split([len(completions[i]) for i in batch])
                found.update(zip(batch, parts, strict=True))
        return [found[i] for i in range(len(size))]

    def _run(
        self,
        embeddings: Tensor,
        position: Tensor,
        segment: Tensor,
        key_position: Tensor,
        key_segment: Tensor,
        cache: DynamicCache,
    ) -> Tensor:
        def mask(window: int | None) -> Tensor:
            seen = visible(segment, position, key_segment, key_position, window).unsqueeze(1)
            # Additive and finite: a padded query then attends to everything evenly instead of producing NaN.
            lowest = torch.finfo(embeddings.dtype).min
            return torch.zeros(seen.shape, dtype=embeddings.dtype, device=seen.device).masked_fill(~seen, lowest)

        window = getattr(self.config, "sliding_window", None)
        kinds = sorted(set(getattr(self.config, "layer_types", None) or [])) or [
            "full_attention" if window is None else "sliding_attention"
        ]
        by_kind = {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
        masks: Any = by_kind if len(by_kind) > 1 else by_kind[kinds[0]]
        output = self.body(
            inputs_embeds=embeddings, attention_mask=masks, position_ids=position, past_key_values=cache, use_cache=True
        )
        return output.last_hidden_state

    def _check_attention(self) -> None:
        kind = getattr(self.config, "_attn_implementation", None)
        if kind not in _ATTENTION:
            raise ModelError(
                f"attention implementation {kind!r} takes no explicit mask, which the packed pass needs; load the"
                " model with"
                " attn_implementation='sdpa' (or call model.set_attn_implementation('sdpa'))"
            )
        types = set(getattr(self.config, "layer_types", None) or _LAYER_TYPES)
        strange = sorted(types - set(_LAYER_TYPES))
        if strange:
            raise ModelError(
                f"{type(self.model).__name__} has layers of type {', '.join(strange)}; only full and sliding-window"
                " attention"
                " can share a prefix between two branches exactly"
            )

    def _table(self) -> Tensor:
        if type(self.embedding) is nn.Embedding:
            return self.embedding.weight.detach()
        rows = torch.arange(self.embedding.num_embeddings, device=self.device)
        return self.embedding(rows).detach()

    def _allowed(self, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
        rows = self.table.shape[0]
        if tokenizer is None:
            special = [getattr(self.config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
            ids = [i for value in special if value is not None for i in (value if isinstance(value, list) else [value])]
            real = rows
        else:
            ids, real = list(tokenizer.all_special_ids), len(tokenizer)
        allowed = torch.arange(rows, device=self.device) < real
        allowed[[i for i in ids if i < rows]] = False
        return allowed

    def _head(self) -> Head:
        module = self.model.get_output_embeddings()
        if not isinstance(getattr(module, "weight", None), Tensor) or module.weight.ndim != 2:
            raise ModelError(f"{type(self.model).__name__} has no linear head; the loss needs logits = h W^T")
        bias = getattr(module, "bias", None)
        weight, bias = module.weight.detach(), None if bias is None else bias.detach()
        tokens = torch.arange(min(8, self.table.shape[0]), device=self.device).unsqueeze(0)
        with self.frozen(), torch.no_grad():
            own = self.model(input_ids=tokens, use_cache=False).logits[0].float()
            hidden = self.body(input_ids=tokens, use_cache=False).last_hidden_state[0]
            raw = nn.functional.linear(hidden, weight, bias).float()
        closest = float("inf")
        for scale, softcap in _transforms(self.config):
            logits = raw * scale if softcap is None else softcap * torch.tanh(raw * scale / softcap)
            difference = float((logits - own).abs().max() / own.abs().max().clamp_min(1e-6))
            if difference < (1e-4 if own.dtype == torch.float32 and self.dtype == torch.float32 else 2e-2):
                return Head(weight, bias, scale, softcap)
            closest = min(closest, difference)
        if not torch.isfinite(own).all():
            raise ModelError(
                f"{type(self.model).__name__} gives NaN or infinite logits on plain tokens; check its weights"
            )
        raise ModelError(
            f"{type(self.model).__name__} computes its logits in a way not understood here (closest form differs by"
            f" {closest:.1e}): neither plain, scaled nor soft-capped h W^T"
        )


def _transforms(config: Any) -> Iterator[tuple[float, float | None]]:
    """Candidate (scale, softcap) pairs from what configurations call them; the self-test picks the true one."""
    softcap = getattr(config, "final_logit_softcapping", None)
    scales = [1.0]
    if getattr(config, "logit_scale", None):
        scales.insert(0, float(config.logit_scale))
    if getattr(config, "logits_scaling", None):
        scales[:0] = [1.0 / float(config.logits_scaling), float(config.logits_scaling)]
    for scale in scales:
        yield scale, None if softcap is None else float(softcap)


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
