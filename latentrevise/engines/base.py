"""What an engine is: requests in, sampled completions out, from token ids or from embeddings alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from latentrevise.errors import ConfigError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from latentrevise.records import FinishReason

Progress = Callable[[int, int], None]
"""Called with the numbers of sequences and of tokens that were finished since the last call."""


@dataclass(frozen=True, eq=False)
class Request:
    """What to continue: exactly one of ``ids`` (tokens) and ``embeddings`` (``[L, d]``, any floating dtype).

    Embeddings are as the model's embedding module outputs them. seed: of this request's samples; without it they follow
    from the parameters' seed and the request's place in the list.
    """

    ids: Sequence[int] | None = None
    embeddings: Tensor | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if (self.ids is None) == (self.embeddings is None):
            raise InputError(
                "a request needs exactly one of ids and embeddings; pass one of them and leave out the other"
            )


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    n: samples a request. temperature: 0 is greedy decoding. top_p: keep the smallest set of tokens with at least this
    mass; top_k: keep the k most probable (None: all); ties stay in. max_new_tokens: the end-of-sequence token counts.
    stop_token_ids: beside the model's own. stop: strings; a completion ends with the token that completes one, which is
    kept. seed: see Request. logprobs: return them.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    max_new_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: bool = True

    def __post_init__(self) -> None:
        checks = {
            "n": (self.n >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "stop": (all(self.stop), "non-empty strings"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ConfigError(f"SamplingParams.{name} = {getattr(self, name)!r}: it must be {wanted}")


@dataclass(frozen=True)
class Completion:
    """One sample.

    ids: the sampled tokens, without the end-of-sequence (or stop) token that ended them. logprobs: one an id, nats,
    under the model's own distribution (temperature 1, nothing filtered), however it was sampled; None if not asked for.
    finish_reason: ``stop``, or ``length`` if max_new_tokens came first.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason


class Engine(Protocol):
    """Samples completions. For each request, in order, the list of its ``n`` completions.

    ``params``: one for all requests, or one each. The same requests and seeds give the same completions. Raises
    InputError before anything is computed if a request cannot be served (its index is named), and ModelError on logits
    that are not numbers.
    """

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Progress | None = None,
    ) -> list[list[Completion]]: ...
