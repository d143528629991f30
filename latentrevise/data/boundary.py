"""Where steps end in a rollout: behind a text, or behind what a regular expression finds, in the rollout as decoded.

Tokens and characters do not line up: a boundary may be spread over tokens, or end within one, and a token may be part
of a character. So ids are decoded to the text that each adds, and a step ends behind the token in which the boundary
ends. Our own decision.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING, TypedDict

from latentrevise.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEMBERED = 1 << 16  # decoded texts of two or three ids
_CHARACTER = 4  # tokens that one character takes at most: bytes of UTF-8


@dataclass(frozen=True)
class Regex:
    """A boundary by its form: a step ends where a match of ``regex`` (Python's ``re``) does.

    So ``[.!?](?=\\s)`` ends a sentence at its mark, and not ``3.5`` within. Raises ConfigError for what can't be
    compiled, and for what matches the empty text.
    """

    regex: str

    def __post_init__(self) -> None:
        told = f"prefix_boundary.regex = {self.regex!r}"
        try:
            empty = re.search(self.regex, "")
        except re.error as error:
            raise ConfigError(f"{told} is no regular expression: {error}") from error
        if empty:
            raise ConfigError(f"{told} matches the empty text, so a step would end everywhere; ask for a character")


class Stops(TypedDict):
    """How sampling stops behind a step: see ``SamplingParams``."""

    stop: tuple[str, ...]
    stop_pattern: str | None


class Boundary:
    """What ends a step under a tokenizer: a text, wherever it ends, or a ``Regex``."""

    def __init__(self, what: str | Regex, tokenizer: PreTrainedTokenizerBase) -> None:
        # The same few ids follow each other again and again in a run, and a tokenizer's call costs more than a look.
        self._decode = lru_cache(_REMEMBERED)(partial(_decoded, tokenizer))
        self._text = what if isinstance(what, str) else None
        self.stops: Stops = {"stop": (), "stop_pattern": None}
        self.stops |= {"stop": (what,)} if isinstance(what, str) else {"stop_pattern": what.regex}
        # An empty match behind a text finds it where it overlaps itself, too.
        self._pattern = re.compile(f"(?<={re.escape(what)})" if isinstance(what, str) else what.regex)

    @classmethod
    def of(cls, setting: str | Regex | Mapping[str, str] | None, tokenizer: PreTrainedTokenizerBase) -> Boundary | None:
        """What the setting ``prefix_boundary`` says, as it is or as it is recorded; None for None.

        Raises ConfigError for a text that this tokenizer never writes.
        """
        if setting is None:
            return None
        if not isinstance(setting, str):
            return cls(setting if isinstance(setting, Regex) else Regex(**setting), tokenizer)
        kept = setting.strip() or setting
        if not kept:
            raise ConfigError("prefix_boundary is an empty text, which ends everywhere; give one, or null")
        ids = tokenizer.encode(kept, add_special_tokens=False)
        if kept not in (read := "".join(pieces(partial(_decoded, tokenizer), ids))):
            raise ConfigError(
                f"prefix_boundary = {setting!r}: the tokenizer has no tokens for it (it reads {read!r}), so no rollout"
                " holds it; choose another boundary"
            )
        return cls(setting, tokenizer)

    def ends(self, ids: Sequence[int]) -> list[int]:
        """How many of the ids each step ends behind, ascending; the last step of a rollout need not be among them."""
        added = list(pieces(self._decode, ids))
        lengths = list(accumulate(map(len, added)))
        found = (match.end() for match in self._pattern.finditer("".join(added)))
        return sorted({bisect_left(lengths, end) + 1 for end in found if end})

    def closes(self, ids: Sequence[int]) -> bool:
        """Whether a step ends with these ids, whatever follows; what an expression finds may depend on that."""
        if self._text is None:
            return False
        near = ids[-_CHARACTER * (len(self._text) + 1) :]
        return self.ends(near)[-1:] == [len(near)]

    def first(self, before: Sequence[int], ids: Sequence[int], least: int = 1) -> int | None:
        """How many of ``ids`` (``least`` or more) end the step that goes on behind ``before``; None: it is open."""
        if self._text is not None:
            before = before[-_CHARACTER * (len(self._text) + 1) :]
        ends = (end - len(before) for end in self.ends((*before, *ids)))
        return next((end for end in ends if end >= least), None)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def pieces(decode: Callable[[tuple[int, ...]], str], ids: Sequence[int]) -> Iterator[str]:
    """The text that each of the ids adds to those before, special tokens included: of a character that is spread over
    tokens the last one adds it."""
    start = told = 0  # what is decoded along, since a token's text may depend on the one before; what is told already
    for end in range(1, len(ids) + 1):
        text = decode(tuple(ids[start:end]))
        if text.endswith("\ufffd") and end - told < _CHARACTER and end < len(ids):
            yield ""
            continue
        yield text[len(decode(tuple(ids[start:told]))) :]
        start, told = told, end
