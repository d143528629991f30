"""Prompts from files and rows: the usual formats and column names, and a reason for every row that cannot be used."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from latentrevise.data.chat import Chat, Templater, content_of, text_of
from latentrevise.data.golds import gold, is_solution
from latentrevise.data.records import Prompt, RowError
from latentrevise.data.remote import fetched, is_url
from latentrevise.data.storage import stable_hash
from latentrevise.data.tables import BadRow, plain_row, read_rows, shown
from latentrevise.errors import ConfigError, InputError
from latentrevise.verify.verifier import Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
Item = TypeVar("Item")
_CHECKED = 1024  # golds that the verifier gets at a time
_HELD = 4096  # prompts, of which some are chosen

PROMPT_COLUMNS = ("prompt", "problem", "question", "messages")
ANSWER_COLUMNS = (
    "answer",
    "ground_truth",
    "final_answer",
    "expected_answer",
    "solution",
    "label",
    "reward_model",
)
ID_COLUMNS = ("id", "prompt_id", "unique_id")


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """How prompts are read, wherever they are: by a recovery, a trainer, an evaluation.

    chat: whether prompts go through the tokenizer's chat template: ``auto`` when it has one. prompt_column,
    answer_column: where the usual names don't find them. max_prompt_tokens: longer prompts are left out, as are those
    that leave no room for a completion. max_prompts: at most so many usable prompts are taken, spread evenly over all
    (None: all). instruction: put behind each prompt (behind the last message of a conversation), a blank line between:
    the verifier reads an answer only in ``\\boxed{}``, so a model must know to give it there. chat_template_kwargs:
    what the chat template reads beside the messages (``enable_thinking: false``); one that it does not read is refused.
    """

    chat: Chat = "auto"
    prompt_column: str | None = None
    answer_column: str | None = None
    max_prompt_tokens: int | None = None
    max_prompts: int | None = None
    instruction: str = ""
    chat_template_kwargs: dict = field(default_factory=dict)  # type: ignore[type-arg]  # whatever a template reads

    def load(
        self,
        source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        positions: int | None,
        new: int | None = None,
        verifier: Verifier | None = None,
        *,
        setting: str = "max_new_tokens",
    ) -> tuple[list[Prompt], list[RowError]]:
        """``load_prompts`` by these settings.

        positions: that the model has for a prompt and its completion, if known. new: those that a completion gets, as
        ``setting`` says; None where the user did not set it, so that each gets what its prompt leaves. Raises
        ConfigError where that many leave no room for any of the prompts, or where ``max_prompts`` is below 1.
        """
        errors: list[RowError] = []
        return list(self.stream(source, errors, tokenizer, positions, new, verifier, setting=setting)), errors

    def stream(
        self,
        source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
        errors: list[RowError],
        tokenizer: PreTrainedTokenizerBase,
        positions: int | None,
        new: int | None = None,
        verifier: Verifier | None = None,
        *,
        setting: str = "max_new_tokens",
    ) -> Iterator[Prompt]:
        """The same, a prompt at a time, see ``iter_prompts``; with ``max_prompts`` four times as many are held."""
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ConfigError(f"max_prompts = {self.max_prompts}: it must be at least 1, or null to take all")
        rows = list(source) if isinstance(source, Iterator) else source  # they may be read twice

        def read(room: int | None, told: list[RowError]) -> Iterator[Prompt]:
            limits = [limit for limit in (self.max_prompt_tokens, room) if limit is not None]
            return iter_prompts(
                rows,
                told,
                tokenizer=tokenizer,
                prompt_column=self.prompt_column,
                answer_column=self.answer_column,
                chat=self.chat,
                max_prompt_tokens=min(limits, default=None),
                instruction=self.instruction,
                chat_template_kwargs=self.chat_template_kwargs,
                verifier=verifier,
            )

        usable = read(None if positions is None else max(0, positions - (new or 1)), errors)
        none = True
        for prompt in usable if self.max_prompts is None else spread(usable, self.max_prompts)[0]:
            none = False
            yield prompt
        if not none or positions is None or not new:
            return
        fitting = min((positions - len(prompt.ids) for prompt in read(positions - 1, [])), default=None)
        if fitting is not None:
            own = ", or leave it out" if setting.endswith("max_new_tokens") else ""
            raise ConfigError(
                f"{setting} = {new} leaves no room for any prompt in the model's {positions} positions; set it to at"
                f" most {fitting}{own}"
            )


def evenly(items: Sequence[Item], most: int | None) -> list[Item]:
    """At most so many of them (None: all), spread evenly over all, in their order."""
    count = len(items) if most is None else min(len(items), most)
    return [items[i * len(items) // count] for i in range(count)]


def spread(items: Iterable[Item], most: int) -> tuple[list[Item], int]:
    """At most so many of a stream, spread over all, in their order; and how many there were. As ``evenly``, but that
    of a long stream only every second, fourth, ... item is chosen from."""
    kept: list[Item] = []
    stride, count = 1, 0
    for count, item in enumerate(items, 1):
        if (count - 1) % stride == 0:
            kept.append(item)
        if len(kept) > max(4 * most, _HELD):
            kept, stride = kept[::2], 2 * stride
    return evenly(kept, most), count


@dataclass(frozen=True)
class _Columns:
    prompt: str
    answer: str
    id: str | None
    named: bool = False  # the user chose the answer's

    @property
    def used(self) -> set[str]:
        return {self.prompt, self.answer} | ({self.id} if self.id else set())


def load_prompts(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]], *, strict: bool = False, **settings: Any
) -> tuple[list[Prompt], list[RowError]]:
    """The usable prompts of ``iter_prompts``, which has the settings, and the others' errors.

    Raises, besides, InputError at the first unusable row with ``strict``.
    """
    errors: list[RowError] = []
    prompts = list(iter_prompts(source, errors, **settings))
    if strict and errors:
        raise InputError(f"{_name(source)}, row {errors[0].row}: {errors[0].message} ({errors[0].reason})")
    return prompts, errors


def iter_prompts(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    errors: list[RowError],
    *,
    tokenizer: PreTrainedTokenizerBase,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    chat: Chat = "auto",
    max_prompt_tokens: int | None = None,
    instruction: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    verifier: Verifier | None = None,
) -> Iterator[Prompt]:
    """The usable prompts of a file, of a folder of its shards, or of rows, one at a time. ``errors``, an empty list,
    has the errors of the others, by row, once the last prompt was given.

    Files are JSONL, JSON, CSV, TSV or parquet, text also with ``.gz`` behind; they are read twice, the first time for
    their columns, and little more is held of them than ids (of JSON and a parquet row group, all). Columns are found by
    name (PROMPT_COLUMNS, ANSWER_COLUMNS, ID_COLUMNS, the first that occurs) unless they are given. Golds are unwrapped
    (see ``golds``); a ``solution`` stays, like every cell of which the answer is a part, among the further columns. A
    prompt is text or messages, as a list or as JSON. chat: apply the tokenizer's chat template to texts too: ``auto``,
    when there is a template; a text that is in its format already is used as it is. The template is applied once, here;
    the ids are what everything else uses. instruction, chat_template_kwargs: see ``PromptSettings``. Rows without an id
    get a hash of their content; those that repeat an earlier one are told in one error together. verifier: checks that
    the golds can be parsed; one of its own, if None.

    Raises InputError when nothing can be read at all; ConfigError for chat_template_kwargs that would be ignored.
    """
    name = _name(source)
    templater = Templater(tokenizer, chat, chat_template_kwargs or {}, instruction)
    with (
        fetched(source) if is_url(source) else nullcontext(source) as place,
        nullcontext(verifier) if verifier is not None else Verifier() as judge,
    ):
        first: Iterable[tuple[int, Any]] = read_rows(place)
        again: Iterable[tuple[int, Any]] = read_rows(place, told=False)
        if not isinstance(place, (str, os.PathLike)):
            first = again = list(first)  # they are held elsewhere, and may be read once
        columns = _columns(first, name, prompt_column, answer_column)
        read = _Reader(columns, templater, tokenizer, max_prompt_tokens, errors).read(again)
        while batch := list(islice(read, _CHECKED)):
            troubles = judge.check_golds([prompt.answer for _, prompt in batch])
            for (number, prompt), trouble in zip(batch, troubles, strict=True):
                if trouble is None:
                    yield prompt
                else:
                    why = f"answer {shown(prompt.answer)}: {trouble}"
                    errors.append(RowError(number, prompt.id, "unparsable-answer", why))
    errors.sort(key=lambda error: error.row)
    for told, count in templater.notes.items():
        log.warning("%s: %d prompts %s", name, count, told)


def _name(source: object) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else "prompts"


class _Reader:
    """Prompts of rows; the errors of those that cannot be used go to ``errors``."""

    def __init__(
        self,
        columns: _Columns,
        templater: Templater,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int | None,
        errors: list[RowError],
    ) -> None:
        self.columns, self.templater, self.tokenizer = columns, templater, tokenizer
        self.max_prompt_tokens, self.errors = max_prompt_tokens, errors
        self.seen: dict[str, str] = {}  # what each id stands for
        self.copies: list[int] = []

    def read(self, rows: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Prompt]]:
        for number, row in rows:
            if (prompt := self._prompt(number, plain_row(row))) is not None:
                yield number, prompt
        if self.copies:
            told = (
                f"{len(self.copies)} rows, this one the first, repeat an earlier prompt and answer; each of those"
                " counts once"
            )
            self.errors.append(RowError(self.copies[0], None, "repeated-prompt", told))

    def _prompt(self, number: int, row: Any) -> Prompt | None:
        known_id: str | None = None
        columns, templater = self.columns, self.templater
        try:
            if isinstance(row, BadRow):
                raise row
            if columns.id and row.get(columns.id) is not None:
                known_id = str(row[columns.id])
            content = templater.asked(content_of(row.get(columns.prompt), columns.prompt))
            answer = gold(row, columns.answer, columns.named)
            text = text_of(content)
            key = stable_hash([text, answer])
            known_id = known_id or key
            if known_id in self.seen:
                if self.seen[known_id] == key:
                    self.copies.append(number)
                    return None
                raise BadRow("duplicate-id", f"id {shown(known_id)} was used before; give every row an id of its own")
            self.seen[known_id] = key
            ids = self._ids(content, answer)
        except BadRow as error:
            self.errors.append(RowError(number, known_id, error.reason, str(error)))
            return None
        return Prompt(known_id, text, ids, answer, _further(row, columns), templater.messages(content))

    def _ids(self, content: Any, answer: str) -> tuple[int, ...]:
        """A prompt's tokens. Raises BadRow where it, or its answer, has none, or it has too many."""
        if not self.tokenizer.encode(answer, add_special_tokens=False):
            told = f"the answer {shown(answer)} has no token under this tokenizer; correct it, or drop the row"
            raise BadRow("empty-answer", told)
        ids = self.templater.encode(content)
        if not ids:
            raise BadRow("empty-prompt", "the prompt has no token under this tokenizer; drop the row")
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            told = (
                f"{len(ids)} tokens are more than the {self.max_prompt_tokens} that fit beside max_new_tokens (or that"
                " max_prompt_tokens allows); shorten the prompt, or change the setting"
            )
            raise BadRow("over-long-prompt", told)
        return ids


def _columns(rows: Iterable[tuple[int, Any]], source: str, prompt: str | None, answer: str | None) -> _Columns:
    found: dict[str, None] = {}
    some = usable = False
    for _, row in rows:
        some = True
        if isinstance(row, Mapping) and not (usable and all(str(key) in found for key in row)):
            cells = plain_row(row)
            if not isinstance(cells, BadRow):
                found.update(dict.fromkeys(cells))
                usable = True
    if not some:
        raise InputError(f"{source} is empty; give at least one row with a prompt and an answer")
    if not usable:
        return _Columns("prompt", "answer", None)  # every row is bad already, each for a reason of its own

    def pick(wanted: str | None, usual: tuple[str, ...], what: str) -> str:
        column = wanted or next((c for c in usual if c in found), None)
        if column is None or column not in found:
            asked = f"no column {wanted!r}" if wanted else f"no {what} column (looked for {', '.join(usual)})"
            raise InputError(f"{source}: {asked}; found {', '.join(map(str, found))}; name one with {what}_column")
        return column

    return _Columns(
        pick(prompt, PROMPT_COLUMNS, "prompt"),
        pick(answer, ANSWER_COLUMNS, "answer"),
        next((c for c in ID_COLUMNS if c in found), None),
        named=answer is not None,
    )


def _further(row: Mapping[str, Any], columns: _Columns) -> dict[str, Any]:
    """The other columns, and a solution, of which the answer is a part; as JSON, for they are stored so."""
    found = {key: value for key, value in row.items() if key not in columns.used}
    if is_solution(row[columns.answer]):
        found[columns.answer] = row[columns.answer]
    return dict(json.loads(json.dumps(found, default=str), parse_constant=lambda _: None))
