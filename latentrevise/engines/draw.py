"""What a batch draws: each row's own random numbers, the token they choose, where texts stop, the completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from latentrevise.engines.base import Completion, SamplingParams, stops_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Row(Protocol):
    """seed: of the row's own stream; most: new tokens."""

    @property
    def seed(self) -> int: ...
    @property
    def most(self) -> int: ...


def choose(logits: Tensor, params: SamplingParams, uniform: Tensor | None, rows: int) -> Tensor:
    """One token id a row of ``logits [B, V]``, among the first ``rows``. uniform: ``[B]``; None: the most probable."""
    if rows < logits.shape[1]:
        logits = logits.clone()
        logits[:, rows:] = -torch.inf
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


def uniform(batch: Sequence[Row]) -> Tensor:
    """``[B, steps]`` in [0, 1): each row's own stream, zeros behind its end."""
    streams = [torch.rand(row.most, generator=torch.Generator().manual_seed(row.seed)) for row in batch]
    return nn.utils.rnn.pad_sequence(streams, batch_first=True)


def ends_in_stop(
    tokenizer: PreTrainedTokenizerBase | None,
    ids: Tensor,
    held: Tensor,
    candidates: Tensor,
    step: int,
    params: SamplingParams,
    produced: Tensor,
) -> Tensor:
    """Which lines' text now stops them. Their ``produced`` is set; the token that completed it is kept."""
    assert tokenizer is not None
    found = torch.zeros_like(candidates)
    # A token is seldom less than a character; some more for those that are, and for the marks around words.
    # An expression may look back as far as it likes.
    tail = step + 1 if params.stop_pattern else max(len(s) for s in params.stop) + 8
    for line in candidates.nonzero()[:, 0].tolist():
        text = tokenizer.decode(ids[held[line], max(0, step + 1 - tail) : step + 1])
        if stops_text(params, str(text)):
            found[line] = True
            produced[held[line]] = step + 1
    return found


def completions(
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
