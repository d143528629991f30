"""Sampling with a Hugging Face model: a decoding loop of our own over the model's plain forward pass.

Why not ``model.generate``: it runs each prompt once a *sample* rather than once, computes finished sequences to the end
of the batch, copies the whole cache every step, and draws from the global random state, so that a row's result depends
on its batch. Here every row has its own stream of uniform numbers and is sampled by inverting the cumulative
distribution.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from latentrevise.data.records import row_seed
from latentrevise.engines.base import (
    Completion,
    Progress,
    Request,
    SamplingParams,
    check,
    each,
    evaluating,
    not_finite,
    stop_ids,
)
from latentrevise.engines.cache import GrowingLayer, gathered, roomy, stored
from latentrevise.engines.prefixes import Shared, row_keys, shared_prefixes
from latentrevise.errors import ConfigError, ModelError, RunError
from latentrevise.model.loading import cache_argument, check_model, input_embedding, position_limit, sharded, unwrapped
from latentrevise.model.memory import out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COMPACT_AT = 0.8  # share of a batch still running at which the finished rows' cache is dropped: a copy of what stays


class HFEngine:
    """Batched sampling in this process; see Engine for the contract.

    model: a causal LM of transformers; it is put in eval mode for each call and left as it was. tokenizer: needed for
    stop strings, and to keep ids that it cannot decode (padding rows of the table) from being sampled. max_rows,
    token_budget: sequences, and tokens with padding and all that may be generated, in one batch; where memory runs out,
    half as many sequences are tried. Leading positions that requests of a batch share are computed once, see prefixes.

    Weights may be spread over processes by FSDP2: all must then ask for the same, and all get the tokens that the first
    one samples, since a step takes all of them.

    The global random state is neither read nor changed. On one machine the same list of requests gives the same
    completions; a row's random numbers do not depend on the other rows, but the last bits of its logits may.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_rows: int = 512,
        token_budget: int = 65536,
    ) -> None:
        if max_rows < 1 or token_budget < 1:
            raise ConfigError(f"max_rows = {max_rows}, token_budget = {token_budget}: both must be at least 1")
        check_model(model, tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.token_budget = token_budget
        self._embedding = input_embedding(model)
        inner = unwrapped(model)
        accepted = inspect.signature(inner.forward).parameters
        if "position_ids" not in accepted:
            raise ModelError(
                f"{type(inner).__name__}.forward takes no position_ids, so ragged batches cannot be sampled from it;"
                " use a model with rotary or learned positions"
            )
        self._cache_argument = cache_argument(inner)
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @property
    def limit(self) -> int | None:
        return position_limit(self.model)

    @property
    def shares_prefixes(self) -> bool:
        """See Engine: whether a position's keys and values depend on nothing but the positions up to it, and all are
        kept. Not so with sliding windows and recurrent states, nor where rotary frequencies follow the length of the
        pass; there each request is run whole.
        """
        config = self.model.config
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        varying = {rope.get("rope_type"), rope.get("type")} & {"dynamic", "longrope"}
        layers = DynamicCache(config=config).layers
        return bool(layers) and not varying and all(type(layer) is DynamicLayer for layer in layers)

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """See Engine. Raises RunError if even one sequence does not fit into memory, or a batch of a sharded model."""
        per_request, limit = each(requests, params), self.limit
        for index, (request, p) in enumerate(zip(requests, per_request, strict=True)):
            check(index, request, p, table=self._embedding.weight, limit=limit, tokenizer=self.tokenizer)

        groups: dict[SamplingParams, list[_Row]] = {}
        for index, (request, p) in enumerate(zip(requests, per_request, strict=True)):
            seed = request.seed if request.seed is not None else row_seed(p.seed, index)
            rows = groups.setdefault(replace(p, n=1, seed=0, max_new_tokens=1), [])
            rows.extend(
                _Row(index, sample, row_seed(seed, sample), request.length, p.max_new_tokens) for sample in range(p.n)
            )

        done: dict[tuple[int, int], Completion] = {}
        with evaluating(self.model), torch.inference_mode():
            for shared, rows in groups.items():
                # The longest first: if memory does not suffice, it is known at once.
                rows.sort(key=lambda row: (-row.length, -row.most, row.request, row.sample))
                for batch, completions in self._batches(requests, rows, shared, progress):
                    for row, completion in zip(batch, completions, strict=True):
                        done[row.request, row.sample] = completion
        return [[done[index, sample] for sample in range(p.n)] for index, p in enumerate(per_request)]

    def update(self, model: PreTrainedModel) -> None:
        """See Engine. The engine samples from the model itself, so its own needs nothing."""
        check_model(model, self.tokenizer)
        self.model, self._embedding = model, input_embedding(model)

    def sleep(self) -> None:
        """See Engine: between calls nothing is held but the model, and that is the policy's own."""

    def _batches(
        self, requests: Sequence[Request], rows: list[_Row], params: SamplingParams, progress: Progress | None
    ) -> Iterator[tuple[list[_Row], list[Completion]]]:
        max_rows, position = self.max_rows, 0
        while position < len(rows):
            batch = self._fitting(rows[position : position + max_rows])
            reported = [0, 0]
            try:
                completions = self._sample(requests, batch, params, progress, reported)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if sharded(self.model):  # the other processes would go on with more rows
                    raise RunError(
                        f"memory does not suffice for {len(batch)} sequences of a sharded model; make the engine with a"
                        " lower max_rows or token_budget"
                    ) from error
                if len(batch) == 1:
                    raise RunError(
                        f"memory does not suffice for one sequence of {batch[0].length} + {batch[0].most}"
                        " tokens; lower max_new_tokens, load the model in bfloat16, or use a larger machine"
                    ) from error
                max_rows = len(batch) // 2
            else:
                yield batch, completions
                position += len(batch)
                continue
            # Behind the except clause, for the traceback there holds on to the batch's tensors.
            if progress is not None:
                progress(-reported[0], -reported[1])
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _fitting(self, rows: Sequence[_Row]) -> list[_Row]:
        """As many of the first rows as the budget holds, padded to the longest prompt and the highest limit."""
        most = 0
        for count, row in enumerate(rows, 1):
            most = max(most, row.most)
            if count > 1 and count * (rows[0].length + most) > self.token_budget:
                return list(rows[: count - 1])
        return list(rows)

    def _sample(
        self,
        requests: Sequence[Request],
        batch: list[_Row],
        params: SamplingParams,
        progress: Progress | None,
        reported: list[int],
    ) -> list[Completion]:
        device = self._embedding.weight.device
        unique = list(dict.fromkeys(row.request for row in batch))
        logits, cache, mask, lengths, lines = self._prefill([requests[i] for i in unique])
        place = dict(zip(unique, lines.tolist(), strict=True))
        parents = torch.tensor([place[row.request] for row in batch], device=device)
        logits, lengths = logits[parents], lengths[parents]
        mask = None if mask is None else mask[parents]
        cache.batch_select_indices(parents)

        most = torch.tensor([row.most for row in batch], device=device)
        count, steps, together = len(batch), max(row.most for row in batch), sharded(self.model)
        ids = torch.zeros(count, steps, dtype=torch.long, device=device)
        logprobs = torch.zeros(count, steps, device=device)
        produced = most.clone()  # tokens that are kept
        ended = torch.zeros(count, dtype=torch.bool, device=device)
        closed = torch.zeros(count, dtype=torch.bool, device=device)  # by a token behind those that are kept
        uniform = None if params.temperature == 0 else _uniform(batch).to(device)
        stops = torch.tensor(stop_ids(self.model, self.tokenizer, params), dtype=torch.long, device=device)
        held = torch.arange(count, device=device)  # which row each line of the cache belongs to
        for step in range(steps):
            normalizer = torch.logsumexp(logits, dim=-1)
            good = torch.isfinite(normalizer)
            if not good.all():
                broken = batch[int(held[~good][0])]
                raise not_finite(broken.request, step)
            tokens = self._choose(logits, params, None if uniform is None else uniform[held, step])
            if together:
                torch.distributed.broadcast(tokens, 0)
            ids[held, step] = tokens
            logprobs[held, step] = logits.gather(1, tokens[:, None])[:, 0] - normalizer

            running = ~ended[held] & (step < most[held])
            stopping = running & torch.isin(tokens, stops)
            produced[held[stopping]] = step
            closed[held[stopping]] = True
            if params.stop:
                stopping |= self._ends_in_stop(ids, held, running & ~stopping, step, params.stop, produced)
            ended[held[stopping]] = True
            left = running & ~stopping & (step + 1 < most[held])
            remaining = int(left.sum())
            if progress is not None:
                ran = int(running.sum())
                progress(ran - remaining, ran)
                reported[0], reported[1] = reported[0] + ran - remaining, reported[1] + ran
            if remaining == 0:
                break
            if remaining <= _COMPACT_AT * len(held):
                keep = left.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                held, tokens, lengths = held[keep], tokens[keep], lengths[keep]
                mask = None if mask is None else mask[keep]
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(held), 1)], dim=1)
            # A line at its limit runs along until it is dropped, but not on to positions that the model may not have.
            at = lengths + (most[held] - 1).clamp(max=step)
            logits = self._forward(cache, mask, at[:, None], input_ids=tokens[:, None])
        return _completions(ids, logprobs, produced, ended, closed, params.logprobs)

    def _prefill(self, requests: list[Request]) -> tuple[Tensor, Cache, Tensor | None, Tensor, Tensor]:
        """Next token's logits ``[U, V]``, cache, mask ``[U, L]`` (None: nothing is padded), lengths ``[U]``, and the
        line of each request ``[len(requests)]``: equal requests have one."""
        device = self._embedding.weight.device
        shared = [Shared(i, 0, 0) for i in range(len(requests))]
        if self.shares_prefixes:
            if any(request.embeddings is not None for request in requests):
                shared = shared_prefixes(row_keys([self._embedded(request) for request in requests]))
            else:
                shared = shared_prefixes([request.ids or () for request in requests])
        kept = [i for i, s in enumerate(shared) if not s.same]
        place = {i: line for line, i in enumerate(kept)}
        lines = torch.tensor([place[s.owner if s.same else i] for i, s in enumerate(shared)], device=device)
        lengths = torch.tensor([requests[i].length for i in kept], device=device)
        width = int(lengths.max())
        mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        padding = None if bool((lengths == width).all()) else mask
        if not any(shared[i].length for i in kept):
            logits, cache = self._run([requests[i] for i in kept], [0] * len(kept), None)
            return logits, cache, padding, lengths, lines

        logits = torch.empty(0)
        whole: list[tuple[Tensor, Tensor]] = []  # keys and values of every line, padded on the left
        for part in self._parts(requests, kept, shared):
            at = torch.tensor([place[i] for i in part], device=device)
            taken = [shared[i].length for i in part]
            behind = None
            if most := max(taken):
                owners = torch.tensor([place[shared[i].owner] for i in part], device=device)
                reused = torch.tensor(taken, device=device)
                slots = width - lengths[owners] + reused
                slots = (slots[:, None] + torch.arange(-most, 0, device=device)).clamp(min=0)
                behind = [(gathered(k, owners, slots), gathered(v, owners, slots)) for k, v in whole]
            part_logits, cache = self._run([requests[i] for i in part], taken, behind)
            if not whole:
                logits = part_logits.new_empty(len(kept), part_logits.shape[1])
                whole = [(roomy(k, len(kept), width), roomy(v, len(kept), width)) for k, v in stored(cache)]
            logits[at] = part_logits
            reused, own = torch.tensor(taken, device=device), cache.get_seq_length()
            offset = torch.arange(width, device=device) - width + lengths[at][:, None]  # position of each slot
            source = torch.where(
                offset < reused[:, None], most - reused[:, None] + offset, own - lengths[at][:, None] + offset
            ).clamp(min=0)
            every = torch.arange(len(part), device=device)
            for (keys, values), (k, v) in zip(stored(cache), whole, strict=True):
                k[at.to(k.device)] = gathered(keys, every, source)
                v[at.to(v.device)] = gathered(values, every, source)
        cache = self._empty_cache()
        for index in range(len(whole)):
            cache.update(*whole.pop(0), index)  # freed before the next layer's buffer is made
        return logits, cache, padding, lengths, lines

    def _parts(self, requests: list[Request], kept: list[int], shared: list[Shared]) -> Iterator[list[int]]:
        """Requests that are run together: of one level, and as many as the token budget holds."""
        order = sorted(kept, key=lambda i: (shared[i].level, shared[i].length - requests[i].length, i))
        part: list[int] = []
        for i in order:
            trial = [*part, i]
            width = max(shared[j].length for j in trial) + max(requests[j].length - shared[j].length for j in trial)
            if part and (shared[i].level != shared[part[0]].level or len(trial) * width > self.token_budget):
                yield part
                trial = [i]
            part = trial
        yield part

    def _run(
        self, requests: list[Request], taken: list[int], behind: list[tuple[Tensor, Tensor]] | None
    ) -> tuple[Tensor, Cache]:
        """Logits ``[U, V]`` and cache of the requests' positions from ``taken`` on, behind the keys and values there
        are (both padded on the left)."""
        device, dtype = self._embedding.weight.device, self._embedding.weight.dtype
        before = torch.tensor(taken, device=device)
        own = torch.tensor([request.length for request in requests], device=device) - before
        most, width = max(taken), int(own.max())
        embeddings = torch.zeros(len(requests), width, self._embedding.weight.shape[1], dtype=dtype, device=device)
        for i, (request, start) in enumerate(zip(requests, taken, strict=True)):
            embeddings[i, width - (request.length - start) :] = self._embedded(request, start)
        new = (torch.arange(width, device=device) >= width - own[:, None]).long()
        old = (torch.arange(most, device=device) >= most - before[:, None]).long()
        positions = (before[:, None] + new.cumsum(1) - 1).clamp_(min=0)
        mask = torch.cat([old, new], dim=1)
        cache = self._empty_cache()
        for index, (keys, values) in enumerate(behind or ()):
            cache.update(keys, values, index)
        return self._forward(cache, None if bool(mask.all()) else mask, positions, inputs_embeds=embeddings), cache

    def _embedded(self, request: Request, start: int = 0) -> Tensor:
        """The request's rows from ``start`` on, as the model reads them."""
        device, dtype = self._embedding.weight.device, self._embedding.weight.dtype
        if request.embeddings is not None:
            return request.embeddings[start:].to(device, dtype)
        return self._embedding(torch.tensor(list(request.ids or ())[start:], device=device))

    def _empty_cache(self) -> Cache:
        cache = DynamicCache(config=self.model.config)
        # Only plain layers; a sliding window's are short already.
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    def _forward(self, cache: Cache, mask: Tensor | None, positions: Tensor, **inputs: Tensor) -> Tensor:
        """Logits ``[B, V]`` of the last position, float32 on the embedding's device."""
        output = self.model(
            **inputs,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self._cache_argument: cache},
            **self._last_only,
        )
        return output.logits[:, -1].to(self._embedding.weight.device, torch.float32)

    def _choose(self, logits: Tensor, params: SamplingParams, uniform: Tensor | None) -> Tensor:
        """One token id a row of ``logits [B, V]``."""
        if self.tokenizer is not None and len(self.tokenizer) < logits.shape[1]:
            logits = logits.clone()
            logits[:, len(self.tokenizer) :] = -torch.inf
        if uniform is None:
            return logits.argmax(dim=-1)
        probs = torch.softmax(logits / params.temperature, dim=-1)
        if params.top_k is not None and params.top_k < probs.shape[1]:
            least = probs.topk(params.top_k, dim=-1).values[:, -1:]
            probs = probs.masked_fill(probs < least, 0.0)
        if params.top_p < 1:
            ordered = probs.sort(dim=-1, descending=True).values
            before = ordered.cumsum(dim=-1) - ordered
            inside = before < params.top_p * ordered.sum(dim=-1, keepdim=True)
            least = ordered.masked_fill(~inside, torch.inf).amin(dim=-1, keepdim=True)
            probs = probs.masked_fill(probs < least, 0.0)
        cumulative = probs.cumsum(dim=-1)
        total = cumulative[:, -1:]
        # Strictly below the total, or rounding could land behind the last token that has any probability.
        target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(cumulative, target, right=True)[:, 0]

    def _ends_in_stop(
        self, ids: Tensor, held: Tensor, candidates: Tensor, step: int, stop: tuple[str, ...], produced: Tensor
    ) -> Tensor:
        """Which lines' text now holds a stop string. Their ``produced`` is set; the token that completed it is kept."""
        assert self.tokenizer is not None
        found = torch.zeros_like(candidates)
        # A token is seldom less than a character; some more for those that are, and for the marks around words.
        tail = max(len(s) for s in stop) + 8
        for line in candidates.nonzero()[:, 0].tolist():
            text = self.tokenizer.decode(ids[held[line], max(0, step + 1 - tail) : step + 1])
            if any(s in text for s in stop):
                found[line] = True
                produced[held[line]] = step + 1
        return found


@dataclass(frozen=True)
class _Row:
    request: int
    sample: int
    seed: int
    length: int
    most: int  # new tokens


def _uniform(batch: list[_Row]) -> Tensor:
    """``[B, steps]`` in [0, 1): each row's own stream, zeros behind its end."""
    streams = [torch.rand(row.most, generator=torch.Generator().manual_seed(row.seed)) for row in batch]
    return nn.utils.rnn.pad_sequence(streams, batch_first=True)


def _completions(
    ids: Tensor, logprobs: Tensor, produced: Tensor, ended: Tensor, closed: Tensor, with_logprobs: bool
) -> list[Completion]:
    rows = zip(*(t.tolist() for t in (ids, logprobs, produced, ended, closed)), strict=True)
    return [
        Completion(
            tuple(i[:n]),
            tuple(p[:n]) if with_logprobs else None,
            "stop" if stopped else "length",
            (i[n], p[n]) if by_token else None,
        )
        for i, p, n, stopped, by_token in rows
    ]
