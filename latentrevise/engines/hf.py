"""Sampling with a Hugging Face model: a decoding loop of our own over the model's plain forward pass.

Why not ``model.generate``: it runs each prompt once a *sample* rather than once, computes finished sequences to the end
of the batch, copies the whole cache every step, and draws from the global random state, so that a row's result depends
on its batch. Here every row has its own stream of uniform numbers and is sampled by inverting the cumulative
distribution.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
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
from latentrevise.engines.cache import GrowingLayer
from latentrevise.engines.draw import choose, completions, ends_in_stop, uniform
from latentrevise.engines.families import Layout, families, lay_out
from latentrevise.engines.kept import Kept
from latentrevise.engines.lines import Lines, Packed, Padded, additive
from latentrevise.engines.prefixes import Shared, row_keys, shared_prefixes
from latentrevise.errors import ConfigError, ModelError, RunError
from latentrevise.model.loading import (
    cache_argument,
    check_model,
    input_embedding,
    position_limit,
    sharded,
    spread,
    unwrapped,
)
from latentrevise.model.memory import out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_MASKED = ("sdpa", "eager")  # implementations of attention that take an additive mask
_MASK = 1 << 24  # entries of one
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
        self._keeps = "logits_to_keep" in accepted
        self._kept: Kept | None = None
        self._shares = self._all_kept() and self._masks_hold()

    @property
    def limit(self) -> int | None:
        return position_limit(self.model)

    @property
    def shares_prefixes(self) -> bool:
        """See Engine: whether a position's keys and values depend on nothing but the positions up to it, all are kept,
        and the model follows a mask of ours. Not so with sliding windows and recurrent states, nor where rotary
        frequencies follow the length of the pass; there each request is run whole.
        """
        return self._shares

    def _all_kept(self) -> bool:
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
                _Row(index, sample, row_seed(seed, request.first + sample), request.length, p.max_new_tokens)
                for sample in range(p.n)
            )

        done: dict[tuple[int, int], Completion] = {}
        with evaluating(self.model), torch.inference_mode():
            for shared, rows in groups.items():
                for own in self._by_family(requests, rows):
                    for batch, completions in self._batches(requests, own, shared, progress):
                        for row, completion in zip(batch, completions, strict=True):
                            done[row.request, row.sample] = completion
        return [[done[index, sample] for sample in range(p.n)] for index, p in enumerate(per_request)]

    def update(self, model: PreTrainedModel) -> None:
        """See Engine. The engine samples from the model itself, so its own needs nothing."""
        check_model(model, self.tokenizer)
        self.model, self._embedding = model, input_embedding(model)
        if self._kept is not None:
            self._kept.forget()

    @contextmanager
    def reusing(self) -> Iterator[None]:
        """See Engine. As many positions are kept as a batch may hold, ``token_budget``."""
        if self._kept is not None or not self.shares_prefixes:
            yield
            return
        with torch.inference_mode():
            self._kept = Kept(self._empty_cache, self.token_budget)
        try:
            yield
        finally:
            self._kept = None

    def sleep(self) -> None:
        """See Engine: between calls nothing is held but the model, and that is the policy's own."""

    def _by_family(self, requests: Sequence[Request], rows: list[_Row]) -> list[list[_Row]]:
        """The rows of requests that share prefixes, families together, and the rows of those that share none. The
        longest first: if memory does not suffice, it is known at once."""
        used = list(dict.fromkeys(row.request for row in rows))
        found, shared = self._families([requests[i] for i in used])
        rank: dict[int, tuple[int, int]] = {}
        for number, family in enumerate(found):
            if len(family) > 1:
                longest = max(requests[used[i]].length for i in family)
                rank.update((used[i], (-longest, number)) for i in family)
        for i, s in enumerate(shared):
            if s.same and used[s.owner] in rank:
                rank[used[i]] = rank[used[s.owner]]
        rows.sort(key=lambda row: (rank.get(row.request, (0, 0)), -row.length, -row.most, row.request, row.sample))
        parts = [[row for row in rows if (row.request in rank) is together] for together in (True, False)]
        return [part for part in parts if part]

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
            if self._kept is not None:
                self._kept.forget()
            if progress is not None:
                progress(-reported[0], -reported[1])
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _fitting(self, rows: Sequence[_Row]) -> list[_Row]:
        """As many of the first rows as the budget holds, padded to the longest prompt and the highest limit."""
        longest = most = 0
        for count, row in enumerate(rows, 1):
            longest, most = max(longest, row.length), max(most, row.most)
            if count > 1 and count * (longest + most) > self.token_budget:
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
        used = list(dict.fromkeys(row.request for row in batch))
        lines, logits = self._begun([requests[i] for i in used], [used.index(row.request) for row in batch])
        lengths = torch.tensor([row.length for row in batch], device=device)

        most = torch.tensor([row.most for row in batch], device=device)
        count, steps, together = len(batch), max(row.most for row in batch), sharded(self.model)
        ids = torch.zeros(count, steps, dtype=torch.long, device=device)
        logprobs = torch.zeros(count, steps, device=device)
        produced = most.clone()  # tokens that are kept
        ended = torch.zeros(count, dtype=torch.bool, device=device)
        closed = torch.zeros(count, dtype=torch.bool, device=device)  # by a token behind those that are kept
        drawn = None if params.temperature == 0 else uniform(batch).to(device)
        rows = self._embedding.weight.shape[0] if self.tokenizer is None else len(self.tokenizer)
        stops = torch.tensor(stop_ids(self.model, self.tokenizer, params), dtype=torch.long, device=device)
        held = torch.arange(count, device=device)  # which row each line of the cache belongs to

        def leave(going: Tensor, step: int) -> None:
            """Keep what the rows that do not go on have run, before their lines are dropped."""
            if self._kept is None:
                return
            gone = []
            for line in (~going).nonzero()[:, 0].tolist():
                row = int(held[line])
                if (asked := requests[batch[row].request].ids) is not None:
                    gone.append((line, (*asked, *ids[row, : min(step, int(produced[row]))].tolist())))
            self._kept.take(lines, gone)

        for step in range(steps):
            normalizer = torch.logsumexp(logits, dim=-1)
            good = torch.isfinite(normalizer)
            if not good.all():
                broken = batch[int(held[~good][0])]
                raise not_finite(broken.request, step)
            tokens = choose(logits, params, None if drawn is None else drawn[held, step], rows)
            if together:
                torch.distributed.broadcast(tokens, 0)
            ids[held, step] = tokens
            logprobs[held, step] = logits.gather(1, tokens[:, None])[:, 0] - normalizer

            running = ~ended[held] & (step < most[held])
            stopping = running & torch.isin(tokens, stops)
            produced[held[stopping]] = step
            closed[held[stopping]] = True
            if params.stop or params.stop_pattern:
                stopping |= ends_in_stop(self.tokenizer, ids, held, running & ~stopping, step, params, produced)
            ended[held[stopping]] = True
            left = running & ~stopping & (step + 1 < most[held])
            remaining = int(left.sum())
            if progress is not None:
                ran = int(running.sum())
                progress(ran - remaining, ran)
                reported[0], reported[1] = reported[0] + ran - remaining, reported[1] + ran
            if remaining == 0:
                leave(left, step)
                break
            if remaining <= _COMPACT_AT * len(held):
                leave(left, step)
                keep = left.nonzero()[:, 0]
                lines.keep(keep)
                held, tokens, lengths = held[keep], tokens[keep], lengths[keep]
            lines = lines.parted()
            # A line at its limit runs along until it is dropped, but not on to positions that the model may not have.
            at = lengths + (most[held] - 1).clamp(max=step)
            logits = lines.feed(tokens, at)
        return completions(ids, logprobs, produced, ended, closed, params.logprobs)

    def _families(self, requests: list[Request]) -> tuple[list[list[int]], list[Shared]]:
        """Which of the requests share prefixes, as far as the model lets them."""
        if not self.shares_prefixes:
            shared = [Shared(i, 0, 0) for i in range(len(requests))]
        elif any(request.embeddings is not None for request in requests):
            shared = shared_prefixes(row_keys([self._embedded(request) for request in requests]))
        else:
            shared = shared_prefixes([request.ids or () for request in requests])
        return families(shared), shared

    def _begun(self, requests: list[Request], rows: list[int]) -> tuple[Lines, Tensor]:
        """The rows behind their prompts, and the next token's logits ``[B, V]``. rows: the request of each."""
        found, shared = self._families(requests)
        known: list[list[int]] = [[] for _ in requests]
        if self._kept is not None and all(request.ids for request in requests):
            known = [self._kept.known((r.ids or ())[:-1]) for r in requests]  # the last one's logits are wanted
        if any(known) or any(len(family) > 1 for family in found):
            return self._packed(requests, lay_out(found, shared, [r.length for r in requests], known), rows)
        members = [i for family in found for i in family]
        owners = [members.index(shared[i].owner) for i in rows]
        parents = torch.tensor(owners, device=self._embedding.weight.device)
        cache = self._empty_cache()
        logits, mask = self._padded(cache, [requests[i] for i in members])
        if self._shares and len(members) < len(rows):
            sees = torch.ones(len(members), cache.get_seq_length(), device=parents.device) if mask is None else mask
            return self._in_lines(cache, parents, sees[parents].bool()), logits[parents]
        cache.batch_select_indices(parents)
        return Padded(self._forward, cache, None if mask is None else mask[parents]), logits[parents]

    def _in_lines(self, cache: Cache, family: Tensor, sees: Tensor) -> Packed:
        return Packed(self._forward, self._empty_cache, cache, family, sees, self._embedding.weight.dtype)

    def _padded(self, cache: Cache, requests: list[Request]) -> tuple[Tensor, Tensor | None]:
        """Fill the cache, a line a request, padded on the left: logits ``[U, V]``, mask ``[U, L]`` (None: no pads)."""
        table = self._embedding.weight
        lengths = torch.tensor([request.length for request in requests], device=table.device)
        width = int(lengths.max())
        embeddings = torch.zeros(len(requests), width, table.shape[1], dtype=table.dtype, device=table.device)
        for line, request in zip(embeddings, requests, strict=True):
            line[width - request.length :] = self._embedded(request)
        mask = (torch.arange(width, device=table.device) >= width - lengths[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp_(min=0)
        padding = None if bool(mask.all()) else mask
        return self._forward(cache, padding, positions, inputs_embeds=embeddings)[:, 0], padding

    def _packed(self, requests: list[Request], layout: Layout, rows: list[int]) -> tuple[Lines, Tensor]:
        """See ``_begun``: a line a family, as ``layout`` says."""
        table, cache = self._embedding.weight, self._empty_cache()
        layout = layout.to(table.device)
        count, width = layout.owner.shape
        if layout.held:
            assert self._kept is not None
            self._kept.fill(cache, layout.slots)
        embeddings = torch.zeros(count, width, table.shape[1], dtype=table.dtype, device=table.device)
        for member, (line, columns) in zip(layout.members, layout.places, strict=True):
            request = requests[member]
            embeddings[line, columns] = self._embedded(request, request.length - len(columns))
        # No more of a mask at once than is cheap beside the pass; all last tokens in one pass, for their logits.
        stop, step = layout.held, max(layout.wanted, _MASK // (count * width))
        logits = torch.empty(0)
        while stop < width:
            start, stop = stop, stop + step
            if stop > width - layout.wanted:
                stop = width
            logits = self._forward(
                cache,
                additive(layout.mask(start, stop), table.dtype),
                layout.position[:, start:stop],
                layout.wanted if stop == width else 1,
                inputs_embeds=embeddings[:, start:stop],
            )
        members = torch.tensor([layout.same[i] for i in rows], device=table.device)
        family = layout.line[members]
        return self._in_lines(cache, family, layout.sees[members]), logits[family, layout.slot[members]]

    def _masks_hold(self) -> bool:
        """Whether requests packed into one line give what each gives alone: the masks are ours, and a model may read
        its own from them. Tried on a few tokens; not where processes share the weights, for one may be alone here."""
        if getattr(self.model.config.get_text_config(decoder=True), "_attn_implementation", None) not in _MASKED:
            return False
        if sharded(self.model):
            return True
        rows = self._embedding.weight.shape[0] if self.tokenizer is None else len(self.tokenizer)
        ids = spread(rows, 9, repeat=True)
        requests = [Request(ids[:6]), Request([*ids[:3], *ids[6:]])]
        shared = [Shared(0, 0, 0), Shared(0, 3, 1)]
        layout = lay_out(families(shared), shared, [6, 6], [(), ()])
        with evaluating(self.model), torch.inference_mode():
            wanted, _ = self._padded(self._empty_cache(), requests)
            try:
                _, found = self._packed(requests, layout, [0, 1])
            except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and out_of_memory(error):
                    raise
                log.info(
                    "%s takes no masks of ours (%s); requests are run one by one", type(self.model).__name__, error
                )
                return False
        off = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-6)
        return bool((off < (1e-3 if self._embedding.weight.dtype == torch.float32 else 5e-2)).all())

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

    def _forward(
        self, cache: Cache, mask: Tensor | None, positions: Tensor, count: int = 1, **inputs: Tensor
    ) -> Tensor:
        """See ``lines.Forward``; float32, on the embedding's device."""
        output = self.model(
            **inputs,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self._cache_argument: cache},
            **({"logits_to_keep": count} if self._keeps else {}),
        )
        return output.logits[:, -count:].to(self._embedding.weight.device, torch.float32)


@dataclass(frozen=True)
class _Row:
    request: int
    sample: int
    seed: int
    length: int
    most: int  # new tokens
