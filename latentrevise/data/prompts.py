"""Prompts from files and rows: the usual formats and column names, and a reason for every row that cannot be used."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from latentrevise.data.records import Prompt, RowError, stable_hash
from latentrevise.errors import InputError
from latentrevise.verify.verifier import Verifier, last_boxed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_COLUMNS = ("prompt", "problem", "question", "messages")
ANSWER_COLUMNS = ("answer", "ground_truth", "final_answer", "solution", "label", "reward_model")
ID_COLUMNS = ("id", "prompt_id", "unique_id")
Chat = Literal["auto", "always", "never"]


class _BadRow(Exception):
    """A row that is left out: a reason code and a message."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """How prompts are read, wherever they are: by a recovery, a trainer, an evaluation.

    chat: whether prompts go through the tokenizer's chat template: ``auto`` when it has one. prompt_column,
    answer_column: where the usual names don't find them. max_prompt_tokens: longer prompts are left out, as are those
    that leave no room for a completion. instruction: put behind each prompt (behind the last message of a
    conversation), a blank line between: the verifier reads an answer only in ``\\boxed{}``, so a model must know to
    give it there.
    """

    chat: Chat = "auto"
    prompt_column: str | None = None
    answer_column: str | None = None
    max_prompt_tokens: int | None = None
    instruction: str = ""

    def load(
        self,
        source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        room: int | None,
        verifier: Verifier | None = None,
    ) -> tuple[list[Prompt], list[RowError]]:
        """``load_prompts`` by these settings. room: tokens that a prompt may have beside its completion, if known."""
        limits = [limit for limit in (self.max_prompt_tokens, room) if limit is not None]
        return load_prompts(
            source,
            tokenizer=tokenizer,
            prompt_column=self.prompt_column,
            answer_column=self.answer_column,
            chat=self.chat,
            max_prompt_tokens=min(limits, default=None),
            instruction=self.instruction,
            verifier=verifier,
        )


@dataclass(frozen=True)
class _Columns:
    prompt: str
    answer: str
    id: str | None

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
    strict: bool = False,
    verifier: Verifier | None = None,
) -> tuple[list[Prompt], list[RowError]]:
    """The usable prompts of a file (``.jsonl``, ``.json``, ``.parquet``, ``.csv``) or of rows, and the others' errors.

    Columns are found by name (PROMPT_COLUMNS, ANSWER_COLUMNS, ID_COLUMNS, the first that occurs) unless they are
    given; a ``solution`` stands for its last ``\\boxed{}`` and stays, like every cell of which the answer is a part,
    among the further columns; nested golds of verl (``reward_model.ground_truth``) are read. A prompt is text or a
    list of messages. chat: apply the tokenizer's chat template to texts too: ``auto``, when there is a template. It
    is applied once, here; the ids are what everything else uses. instruction: see ``PromptSettings``. Rows without an
    id get a hash of their content.
    verifier: checks that the golds can be parsed; one of its own, if None.

    Raises InputError when nothing can be read at all, or, with ``strict``, at the first unusable row.
    """
    rows = list(_rows(source))
    name = str(source) if isinstance(source, (str, os.PathLike)) else "prompts"
    if not rows:
        raise InputError(f"{name} is empty; give at least one row with a prompt and an answer")
    columns = _columns([row for _, row in rows if isinstance(row, Mapping)], name, prompt_column, answer_column)
    prompts: dict[int, Prompt] = {}
    errors: list[RowError] = []
    seen: set[str] = set()
    for number, row in rows:
        known_id: str | None = None
        try:
            if isinstance(row, _BadRow):
                raise row
            if not _is_text(row):
                raise _BadRow("bad-text", "it holds half of a surrogate pair, which is no character; repair the file")
            if columns.id and row.get(columns.id) is not None:
                known_id = str(row[columns.id])
            prompt = _prompt(row, columns, known_id, tokenizer, chat, max_prompt_tokens, instruction)
            if prompt.id in seen:
                raise _BadRow("duplicate-id", f"id {prompt.id!r} was used before; give every row an id of its own")
        except _BadRow as error:
            errors.append(RowError(number, known_id, error.reason, str(error)))
            continue
        seen.add(prompt.id)
        prompts[number] = prompt
    golds = [prompt.answer for prompt in prompts.values()]
    with nullcontext(verifier) if verifier is not None else Verifier() as judge:
        troubles = judge.check_golds(golds)
    for (number, prompt), trouble in zip(list(prompts.items()), troubles, strict=True):
        if trouble is not None:
            errors.append(RowError(number, prompt.id, "unparsable-answer", f"answer {prompt.answer!r}: {trouble}"))
            del prompts[number]
    errors.sort(key=lambda error: error.row)
    if strict and errors:
        raise InputError(f"{name}, row {errors[0].row}: {errors[0].message} ({errors[0].reason})")
    return list(prompts.values()), errors


def _rows(source: str | os.PathLike[str] | Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Any]]:
    """Numbered rows (lines from 1, other rows from 0); a line that cannot be read comes as a ``_BadRow``."""
    if not isinstance(source, (str, os.PathLike)):
        for number, row in enumerate(source):
            yield (
                number,
                row if isinstance(row, Mapping) else _BadRow("not-a-row", "the row is not a mapping of columns"),
            )
        return
    path = Path(source)
    if not path.is_file():
        raise InputError(f"prompt file {path} does not exist or is no file; check the path")
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"prompt file {path} ends in {path.suffix!r}; give a {', '.join(readers)} file, or rename it to what it is"
        )
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise InputError(
            f"prompt file {path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        ) from error
    except csv.Error as error:
        raise InputError(f"prompt file {path} is not readable CSV ({error}); quote its cells, or give JSONL") from error
    except OSError as error:
        raise InputError(f"prompt file {path} can't be read ({error.strerror or error})") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                yield number, _BadRow("bad-json", f"line {number} is not JSON ({error.msg} at column {error.colno})")
                continue
            yield number, row if isinstance(row, dict) else _BadRow("not-a-row", f"line {number} is not a JSON object")


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"prompt file {path} is not JSON ({error.msg} at line {error.lineno}); if it holds one object a line,"
            " name it"
            " .jsonl"
        ) from error
    if isinstance(content, dict):
        content = next(
            (content[key] for key in ("data", "prompts", "rows") if isinstance(content.get(key), list)), content
        )
    if not isinstance(content, list):
        raise InputError(f"prompt file {path} holds no list of rows; give a list, or an object with one under 'data'")
    for number, row in enumerate(content):
        yield number, row if isinstance(row, dict) else _BadRow("not-a-row", f"row {number} is not a JSON object")


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines)):
            if None in row or None in row.values():
                yield (
                    number,
                    _BadRow("bad-csv", f"row {number} has more or fewer cells than the header; quote the commas"),
                )
            else:
                yield number, row


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, partitioning=None)
    except pa.ArrowInvalid as error:
        raise InputError(f"prompt file {path} is not readable parquet ({error})") from error
    yield from enumerate(table.to_pylist())


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
    )


def _prompt(
    row: Mapping[str, Any],
    columns: _Columns,
    known_id: str | None,
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    longest: int | None,
    instruction: str,
) -> Prompt:
    content = row.get(columns.prompt)
    if content is None or (isinstance(content, (str, list, tuple)) and not content):
        raise _BadRow("empty-prompt", f"column {columns.prompt!r} is empty")
    text = content if isinstance(content, str) else _messages_text(content, columns.prompt)
    if not text.strip():
        raise _BadRow("empty-prompt", f"column {columns.prompt!r} holds only white space")
    if instruction:
        behind = f"\n\n{instruction}"
        text += behind
        last = content[-1]
        content = text if isinstance(content, str) else [*content[:-1], {**last, "content": last["content"] + behind}]
    answer = _answer(row, columns.answer)
    if not tokenizer.encode(answer, add_special_tokens=False):
        raise _BadRow("empty-answer", f"the answer {answer!r} has no token under this tokenizer")
    ids = _encode(content, tokenizer, chat)
    if not ids:
        raise _BadRow("empty-prompt", "the prompt has no token under this tokenizer")
    if longest is not None and len(ids) > longest:
        raise _BadRow("over-long-prompt", f"{len(ids)} tokens are more than the {longest} that fit; shorten the prompt")
    meta = {key: value for key, value in row.items() if key not in columns.used}
    if isinstance(row[columns.answer], str) and row[columns.answer].strip() != answer:
        meta[columns.answer] = row[columns.answer]  # a solution, of which the answer is a part
    # As JSON, for it is stored so; NaN, which some tables use for an empty cell, is null there.
    messages = [] if isinstance(content, str) else [dict(message) for message in content]
    meta, messages = json.loads(json.dumps([meta, messages], default=str), parse_constant=lambda _: None)
    return Prompt(known_id or stable_hash([text, answer]), text, ids, answer, meta, messages)


def _messages_text(messages: Any, column: str) -> str:
    if not isinstance(messages, (list, tuple)) or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise _BadRow(
            "bad-messages", f"column {column!r} holds neither text nor messages with a role and a text content"
        )
    if messages[-1]["role"] == "assistant":
        raise _BadRow("bad-messages", f"column {column!r} ends with the assistant's message; end it with the user's")
    return "\n".join(m["content"] for m in messages)


def _encode(content: Any, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[int, ...]:
    if isinstance(content, str) and (chat == "never" or (chat == "auto" and not tokenizer.chat_template)):
        return tuple(tokenizer.encode(content))
    if not tokenizer.chat_template:
        raise _BadRow(
            "no-chat-template",
            "the prompt needs a chat template and the tokenizer has none; give plain text, with chat=never",
        )
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else [dict(m) for m in content]
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except (TemplateError, TypeError, ValueError) as error:  # templates refuse roles and orders that they do not know
        raise _BadRow("chat-template", f"the tokenizer's chat template refuses the messages ({error})") from error
    return tuple(encoded["input_ids"])


def _answer(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, Mapping):
        value = value.get("ground_truth")
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if value is None or value != value or isinstance(value, (list, tuple, Mapping)) or not str(value).strip():
        raise _BadRow("missing-answer", f"column {column!r} holds no answer")
    text = str(value).strip()
    if column == "solution":
        boxed = last_boxed(text)
        if boxed is None:
            raise _BadRow("missing-answer", "the solution has no \\boxed{} answer")
        return boxed
    # GSM8K: the solution, this mark, the answer.
    text = text.rsplit("####", 1)[-1].strip()
    if not text:
        raise _BadRow("missing-answer", f"column {column!r} ends behind its ####; give the answer there")
    return text


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True
