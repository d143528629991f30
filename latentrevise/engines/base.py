"""What an engine is: requests in, sampled completions out, from token ids or from embeddings alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from latentrevise.config import at_least_one, require
from latentrevise.errors import ConfigError, InputError, ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from latentrevise.data.records import FinishReason

Progress = Callable[[int, int], None]
"""Called with the numbers of sequences and of tokens that were finished since the last call."""


@dataclass(frozen=True, eq=False)
class Request:
    """What to continue: exactly one of ``ids`` (tokens) and ``embeddings`` (``[L, d]``, any floating dtype).

    Embeddings are as the model's embedding module outputs them. seed: of this request's samples; without it they follow
    from the parameters' seed and the request's place in the list. first: the index of its first sample: those that are
    drawn in several calls, each from where the last one ended, are those of one call.
    """

    ids: Sequence[int] | None = None
    embeddings: Tensor | None = None
    seed: int | None = None
    first: int = 0

    def __post_init__(self) -> None:
        if (self.ids is None) == (self.embeddings is None):
            raise InputError(
                "a request needs exactly one of ids and embeddings; pass one of them and leave out the other"
            )

    @property
    def length(self) -> int:
        """Positions of the prompt."""
        return len(self.embeddings if self.embeddings is not None else self.ids or ())


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    n: samples a request. temperature: 0 is greedy decoding. top_p: keep the smallest set of tokens with at least this
    mass; top_k: keep the k most probable (None: all); ties stay in. max_new_tokens: the end-of-sequence token counts.
    stop_token_ids: beside the model's own. stop: strings; a completion ends with the token that completes one, which is
    kept. stop_pattern: a regular expression; a completion ends with the first token behind a match, which is kept: what
    follows a match may decide on it. seed: see Request. logprobs: return them.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    max_new_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    stop_pattern: str | None = None
    seed: int = 0
    logprobs: bool = True

    def __post_init__(self) -> None:
        at_least_one(self, "n", "max_new_tokens")
        require(
            self,
            temperature=(self.temperature >= 0, "0 (greedy) or more"),
            top_p=(0 < self.top_p <= 1, "in (0, 1]"),
            top_k=(self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            stop=(all(self.stop), "non-empty strings"),
        )


@dataclass(frozen=True)
class Completion:
    """One sample.

    ids: the sampled tokens, without the end-of-sequence (or stop) token that ended them. logprobs: one an id, nats,
    under the model's own distribution (temperature 1, nothing filtered), however it was sampled; None if not asked for.
    finish_reason: ``stop``, or ``length`` if max_new_tokens came first. end: the token that ended it and its log-prob;
    None where none did (``length``, a stop string).
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason
    end: tuple[int, float] | None = None


class Engine(Protocol):
    """Samples completions from the policy."""

    @property
    def limit(self) -> int | None:
        """Positions that a prompt and its completion may take together; None: not known."""
        ...

    @property
    def shares_prefixes(self) -> bool:
        """Whether leading tokens that requests share are computed once. Where not, each request is charged for all."""
        ...

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """For each request, in order, the list of its ``n`` completions.

        ``params``: one for all requests, or one each. The same requests and seeds give the same completions. Raises
        InputError before anything is computed if a request cannot be served (its index is named), and ModelError on
        logits that are not numbers. No request is held on to.
        """
        ...

    def reusing(self) -> AbstractContextManager[None]:
        """While it is open, what requests of tokens and their completions have run need not be run again for a later
        call that begins alike. The weights must not change meanwhile but by ``update``. The same calls, from its
        opening on, give the same completions."""
        ...

    def update(self, model: PreTrainedModel) -> None:
        """Sample from the weights that ``model`` has now: the policy after a training step."""
        ...

    def sleep(self) -> None:
        """Give up memory that only sampling needs, as far as there is any; the next ``generate`` takes it again."""
        ...


def each(requests: Sequence[Request], params: SamplingParams | Sequence[SamplingParams]) -> list[SamplingParams]:
    """The parameters of each request. Raises InputError if there are not as many."""
    if isinstance(params, SamplingParams):
        return [params] * len(requests)
    if len(params) != len(requests):
        raise InputError(f"{len(requests)} requests but {len(params)} parameters; give one for all, or one each")
    return list(params)


def check(
    index: int,
    request: Request,
    params: SamplingParams,
    *,
    table: Tensor,
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Raises InputError, with the request's index, for what a model with this table ``[V, d]`` and this many positions
    cannot continue; ConfigError for stop strings without a tokenizer."""
    rows, width = table.shape
    if request.embeddings is not None:
        found = request.embeddings
        if found.ndim != 2 or found.shape[1] != width:
            raise InputError(
                f"request {index}: embeddings of shape {tuple(found.shape)}, but the model takes [L, {width}];"
                " make them with this model's embedding module"
            )
        if not found.is_floating_point():
            raise InputError(f"request {index}: embeddings of type {found.dtype}; give floating numbers, or pass ids")
        # In the type they are fed in: what is finite in float32 may not be in float16.
        if not torch.isfinite(found.to(table.dtype)).all():
            raise InputError(f"request {index}: the embeddings hold NaN or infinity; find out where they come from")
    else:
        bad = next((i for i in request.ids or () if not 0 <= i < rows), None)
        if bad is not None:
            raise InputError(
                f"request {index}: token {bad}, but the model's table has rows 0 to {rows - 1}; encode with the"
                " model's own tokenizer"
            )
    length = request.length
    if length == 0:
        raise InputError(f"request {index}: it is empty; give at least one token (a beginning-of-sequence token, say)")
    if limit is not None and length + params.max_new_tokens > limit:
        raise InputError(
            f"request {index}: {length} tokens and up to {params.max_new_tokens} new ones, but the model has"
            f" {limit} positions; lower max_new_tokens or shorten the request"
        )
    if (params.stop or params.stop_pattern) and tokenizer is None:
        raise ConfigError("SamplingParams.stop needs a tokenizer; pass one to the engine, or use stop_token_ids")


def stops_text(params: SamplingParams, text: str) -> bool:
    """Whether a completion of this text has come to one of its stop strings, or past its ``stop_pattern``."""
    if any(stop in text for stop in params.stop):
        return True
    if params.stop_pattern is None:
        return False
    text = text.rstrip("\ufffd")  # the beginning of a character says nothing yet
    return any(0 < match.end() < len(text) for match in re.finditer(params.stop_pattern, text))


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, params: SamplingParams) -> list[int]:
    """Ids that end a completion: the model's, the tokenizer's and those of the parameters, ascending."""
    # A model around several parts (Gemma 3) may name it in the config of the part that decodes, or in none.
    configs = (model.generation_config, model.config, model.config.get_text_config(decoder=True))
    own = [getattr(config, "eos_token_id", None) for config in configs]
    if tokenizer is not None:
        own.append(tokenizer.eos_token_id)
    found = set(params.stop_token_ids)
    for value in own:
        found.update([] if value is None else [value] if isinstance(value, int) else value)
    return sorted(found)


def not_finite(index: int, token: int) -> ModelError:
    return ModelError(
        f"request {index}, token {token}: the model's logits are not finite; check its weights, and load it in bfloat16"
        " or float32 if it is in float16"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; each module is left as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
