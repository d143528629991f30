"""Prompts from files and rows: the usual formats and column names, and a reason for every row that cannot be used."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from latentrevise.data.chat import Chat, Templater, content_of, text_of
from latentrevise.data.golds import gold, is_solution
from latentrevise.data.records import Prompt, RowError
from latentrevise.data.storage import stable_hash
from latentrevise.data.tables import BadRow, plain_row, read_rows, shown
from latentrevise.errors import ConfigError, InputError
from latentrevise.verify.verifier import Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
Item = TypeVar("Item")

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
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ConfigError(f"max_prompts = {self.max_prompts}: it must be at least 1, or null to take all")

        def loaded(room: int | None) -> tuple[list[Prompt], list[RowError]]:
            limits = [limit for limit in (self.max_prompt_tokens, room) if limit is not None]
            prompts, errors = load_prompts(
                source,
                tokenizer=tokenizer,
                prompt_column=self.prompt_column,
                answer_column=self.answer_column,
                chat=self.chat,
                max_prompt_tokens=min(limits, default=None),
                instruction=self.instruction,
                chat_template_kwargs=self.chat_template_kwargs,
                verifier=verifier,
            )
            return evenly(prompts, self.max_prompts), errors

        source = list(source) if isinstance(source, Iterator) else source  # it may be read twice
        if positions is None:
            return loaded(None)
        prompts, errors = loaded(max(0, positions - (new or 1)))
        if new and not prompts and (fitting := loaded(positions - 1)[0]):
            fits = positions - max(len(prompt.ids) for prompt in fitting)
            own = ", or leave it out" if setting.endswith("max_new_tokens") else ""
            raise ConfigError(
                f"{setting} = {new} leaves no room for any prompt in the model's {positions} positions; set it to at"
                f" most {fits}{own}"
            )
        return prompts, errors


def evenly(items: Sequence[Item], most: int | None) -> list[Item]:
    """At most so many of them (None: all), spread evenly over all, in their order."""
    count = len(items) if most is None else min(len(items), most)
    return [items[i * len(items) // count] for i in range(count)]


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
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    chat: Chat = "auto",
    max_prompt_tokens: int | None = None,
    instruction: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    strict: bool = False,
    verifier: Verifier | None = None,
) -> tuple[list[Prompt], list[RowError]]:
    """The usable prompts of a file, of a folder of its shards, or of rows; and the others' errors.

    Files are JSONL, JSON, CSV, TSV or parquet, text also with ``.gz`` behind. Columns are found by name
    (PROMPT_COLUMNS, ANSWER_COLUMNS, ID_COLUMNS, the first that occurs) unless they are given. Golds are unwrapped (see
    ``golds``); a ``solution`` stays, like every cell of which the answer is a part, among the further columns. A
    prompt is text or messages, as a list or as JSON. chat: apply the tokenizer's chat template to texts too: ``auto``,
    when there is a template; a text that is in its format already is used as it is. The template is applied once,
    here; the ids are what everything else uses. instruction, chat_template_kwargs: see ``PromptSettings``. Rows without
    an id get a hash of their content; those that repeat an earlier one are told in one error together.
    verifier: checks that the golds can be parsed; one of its own, if None.

    Raises InputError when nothing can be read at all, or, with ``strict``, at the first unusable row; ConfigError for
    chat_template_kwargs that would be ignored.
    """
    rows = [(number, plain_row(row)) for number, row in read_rows(source)]
    name = str(source) if isinstance(source, (str, os.PathLike)) else "prompts"
    if not rows:
        raise InputError(f"{name} is empty; give at least one row with a prompt and an answer")
    columns = _columns([row for _, row in rows if isinstance(row, Mapping)], name, prompt_column, answer_column)
    templater = Templater(tokenizer, chat, chat_template_kwargs or {}, instruction)
    prompts: dict[int, Prompt] = {}
    errors: list[RowError] = []
    seen: dict[str, str] = {}  # what each id stands for
    copies: list[int] = []
    for number, row in rows:
        known_id: str | None = None
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
            if known_id in seen:
                if seen[known_id] == key:
                    copies.append(number)
                    continue
                raise BadRow("duplicate-id", f"id {shown(known_id)} was used before; give every row an id of its own")
            seen[known_id] = key
            if not tokenizer.encode(answer, add_special_tokens=False):
                told = f"the answer {shown(answer)} has no token under this tokenizer; correct it, or drop the row"
                raise BadRow("empty-answer", told)
            ids = templater.encode(content)
            if not ids:
                raise BadRow("empty-prompt", "the prompt has no token under this tokenizer; drop the row")
            if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
                told = (
                    f"{len(ids)} tokens are more than the {max_prompt_tokens} that fit beside max_new_tokens (or that"
                )
                told += " max_prompt_tokens allows); shorten the prompt, or change the setting"
                raise BadRow("over-long-prompt", told)
        except BadRow as error:
            errors.append(RowError(number, known_id, error.reason, str(error)))
            continue
        meta, messages = _further(row, columns), templater.messages(content)
        prompts[number] = Prompt(known_id, text, ids, answer, meta, messages)
    if copies:
        told = f"{len(copies)} rows, this one the first, repeat an earlier prompt and answer; each of those counts once"
        errors.append(RowError(copies[0], None, "repeated-prompt", told))
    for told, count in templater.notes.items():
        log.warning("%s: %d prompts %s", name, count, told)
    golds = [prompt.answer for prompt in prompts.values()]
    with nullcontext(verifier) if verifier is not None else Verifier() as judge:
        troubles = judge.check_golds(golds)
    for (number, prompt), trouble in zip(list(prompts.items()), troubles, strict=True):
        if trouble is not None:
            errors.append(RowError(number, prompt.id, "unparsable-answer", f"answer {shown(prompt.answer)}: {trouble}"))
            del prompts[number]
    errors.sort(key=lambda error: error.row)
    if strict and errors:
        raise InputError(f"{name}, row {errors[0].row}: {errors[0].message} ({errors[0].reason})")
    return list(prompts.values()), errors


def _columns(rows: list[Mapping[str, Any]], name: str, prompt: str | None, answer: str | None) -> _Columns:
    if not rows:
        return _Columns("prompt", "answer", None)  # every row is bad already, each for a reason of its own
    found = list(dict.fromkeys(key for row in rows for key in row))

    def pick(wanted: str | None, usual: tuple[str, ...], what: str) -> str:
        column = wanted or next((c for c in usual if c in found), None)
        if column is None or column not in found:
            asked = f"no column {wanted!r}" if wanted else f"no {what} column (looked for {', '.join(usual)})"
            raise InputError(f"{name}: {asked}; found {', '.join(map(str, found))}; name one with {what}_column")
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
