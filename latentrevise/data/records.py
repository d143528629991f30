"""What a run reads and writes, and how: dataclasses to parquet and JSONL, atomically.

A dataclass is the only description of its file: the parquet schema is derived from the field types, so a column cannot
drift away from the code. Nothing here is ever pickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pyarrow as pa

from latentrevise.data.parquet import GROUP, read_table, table_writer
from latentrevise.data.storage import stable_hash
from latentrevise.errors import InputError
from latentrevise.verify.verifier import VerdictName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]
PrefixRendering = Literal["original", "argmax", "continuation"]

Record = TypeVar("Record")


def _column(name: str) -> Any:
    return field(metadata={"column": name})


@dataclass(frozen=True)
class Prompt:
    """A prompt as it is fed (``ids``, chat template included) and its gold answer.

    text: what a reader sees. messages: a conversation as it was given, each with a role and a content; none for a text.
    meta: further columns.
    """

    id: str = _column("prompt_id")
    text: str = _column("prompt")
    ids: tuple[int, ...] = _column("prompt_ids")
    answer: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """Its messages; those of a text are one, the user's."""
        return self.messages or [{"role": "user", "content": self.text}]


@dataclass(frozen=True)
class Rollout:
    """One completion of a prompt and its verdict. ``sampling_logprobs``: nats, temperature 1, unfiltered, one an id."""

    prompt_id: str
    sample_id: str
    completion_ids: tuple[int, ...]
    completion: str
    extracted: str | None
    verdict: VerdictName
    finish_reason: FinishReason
    sampling_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Start:
    """What a strategy proposes to sample from.

    target: the answer aimed at. prefix_ids: the failed rollout's own prefix (empty: from the prompt). plain_ids: the
    tokens that stand for what is fed. latent: the mixture (``start_id`` in the atoms file) is fed, not ``plain_ids``.
    greedy: continue with the most probable token instead of sampling. context_ids: fed in place of the prompt (empty:
    the prompt is). rounds: ``n`` continuations so many times over, until one is correct.
    forward_tokens, backward_tokens, decoded_tokens, seconds: what finding the start took. trace: the objective over
    the steps, or which tokens were chosen and why.
    """

    start_id: str
    prompt_id: str
    parent_sample_id: str | None
    target: str
    prefix_ids: tuple[int, ...]
    plain_ids: tuple[int, ...]
    latent: bool
    greedy: bool
    n: int
    forward_tokens: int
    backward_tokens: int
    decoded_tokens: int
    seconds: float
    trace: dict[str, Any] | None = None
    context_ids: tuple[int, ...] = ()
    rounds: int = 1


@dataclass(frozen=True)
class Sample:
    """One continuation sampled from a start. ``seconds``: this sample's share of the batch's time."""

    start_id: str
    prompt_id: str
    sample_id: str
    completion_ids: tuple[int, ...]
    completion: str
    finish_reason: FinishReason
    sampling_logprobs: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What is known about a sample.

    hits_target: it gives the answer its start aimed at. hits_wrong: it gives the prompt's wrong target (of the audit).
    valid: its derivation was checked and holds (None: the task can't check).
    steps: ``{"text", "ok"}`` for each step of the derivation. guard: reason codes of the guards that rejected it.
    plain_logprobs: of the continuation behind the plain tokens, nats, one an id. signals: what the guards judged it by
    (see ``audit.signals``); with them the thresholds can be swept afterwards.
    """

    sample_id: str
    start_id: str
    prompt_id: str
    extracted: str | None
    verdict: VerdictName
    hits_target: bool
    hits_wrong: bool
    valid: bool | None
    steps: list[dict[str, Any]]
    guard: str | None
    plain_logprobs: tuple[float, ...] | None
    signals: dict[str, Any] | None = None


@dataclass(frozen=True)
class Trajectory:
    """One recovered trajectory: prompt, prefix and continuation, everything a trainer or an auditor needs.

    start_id: what it was sampled from; under it the revised prefix's mixture stands in the atoms file.
    prefix_ids: the failed rollout's own prefix. plain_prefix_ids: the prefix as the row renders it, see
        prefix_rendering: ``original`` (prefix_ids), ``argmax`` (heaviest atoms), ``continuation`` (context only, masked
        in training).
    completion_ids, completion: the sampled continuation, without the end-of-sequence token.
    sampling_logprobs: of the continuation behind what was fed (perhaps a mixture); plain_logprobs: behind
        plain_prefix_ids. Both in nats at temperature 1, unfiltered, one an id. A trainer that corrects off-policy data
        needs the second.
    valid: the derivation was checked and holds; None: the task cannot check. reward: 1.0 for correct.
    backend: the kernel implementation that revised (``auto``: the dispatch chose; ``none``:
    nothing was revised). config_hash: of the run's settings. rank: the place that the run's ``select`` gives it among
    its strategy's trajectories for this prompt, from 0.
    """

    prompt_id: str
    sample_id: str
    start_id: str
    parent_sample_id: str | None
    strategy: str
    prompt: str
    prompt_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...]
    plain_prefix_ids: tuple[int, ...]
    prefix_rendering: PrefixRendering
    completion_ids: tuple[int, ...]
    completion: str
    answer: str
    extracted_answer: str | None
    verdict: VerdictName
    valid: bool | None
    reward: float
    finish_reason: FinishReason
    model: str
    seed: int
    temperature: float
    top_p: float
    steps: list[dict[str, Any]]
    trace: dict[str, Any] | None
    sampling_logprobs: tuple[float, ...]
    plain_logprobs: tuple[float, ...] | None
    backend: str
    config_hash: str
    rank: int = 0


@dataclass(frozen=True)
class RowError:
    """An input row that was left out. ``reason`` is a code to count by, ``message`` says what to do."""

    row: int
    id: str | None
    reason: str
    message: str


def original_prefix(prefix_ids: Sequence[int], plain_ids: Sequence[int]) -> tuple[int, ...]:
    """The ``original`` rendering of a prefix: the failed tokens where a revision replaced them one by one; a prefix
    that was extended or written anew has no other text than its own."""
    return tuple(prefix_ids if len(prefix_ids) == len(plain_ids) else plain_ids)


def shared_head(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with alike."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(others)))


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def row_seed(run_seed: int, *parts: str | int) -> int:
    """The seed of one row, in ``[0, 2**63)``. It depends on ``parts`` only: no batch or order changes a row's draws."""
    return int(stable_hash([run_seed, *parts]), 16) >> 1


def write_records(path: str | os.PathLike[str], rows: Iterable[Record], cls: type[Record] | None = None) -> None:
    """Write dataclass rows to one parquet file, in groups of ``GROUP`` rows, of which no more than one is held.
    ``cls`` is needed only when there may be no rows."""
    left = iter(rows)
    group = list(islice(left, GROUP))
    if cls is None:
        if not group:
            raise ValueError("write_records needs cls to write a file without rows")
        cls = type(group[0])
    with table_writer(path, schema(cls)) as out:
        while group:
            out.write(_table(group, cls))
            group = list(islice(left, GROUP))


def _table(rows: Sequence[Any], cls: type) -> pa.Table:
    arrays = [
        pa.array([_store(getattr(row, c.attribute), c.json) for row in rows], type=c.arrow) for c in _columns(cls)
    ]
    return pa.Table.from_arrays(arrays, schema=schema(cls))


def read_records(path: str | os.PathLike[str], cls: type[Record]) -> list[Record]:
    """The rows of one parquet file, or of all ``*.parquet`` files of a folder in the order of their names.

    Temporary files of a writer that died are not looked at. Columns that ``cls`` doesn't know are ignored. Raises
    InputError if there is nothing to read, or if the file doesn't hold ``cls``.
    """
    path = Path(path)
    if path.is_dir():
        parts = sorted(p for p in path.glob("*.parquet") if not p.name.startswith("."))
        return [row for part in parts for row in read_records(part, cls)]
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a parquet file of {cls.__name__} rows or a folder of them")
    return records_of(read_table(path), cls, path)


def records_of(table: pa.Table, cls: type[Record], path: str | os.PathLike[str]) -> list[Record]:
    """The rows of a table that was read from ``path``. Raises InputError where it doesn't hold ``cls``."""
    columns = _columns(cls)
    missing = [c.name for c in columns if c.name not in table.column_names]
    if missing:
        raise InputError(
            f"{path}: no column {', '.join(missing)}, so these are not {cls.__name__} rows (found:"
            f" {', '.join(table.column_names)}); was it written by another version?"
        )
    try:
        values = [[_load(v, c) for v in table.column(c.name).cast(c.arrow).to_pylist()] for c in columns]
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"{path}: a column does not hold what {cls.__name__} rows need ({error})") from error
    names = [c.attribute for c in columns]
    return [cls(**dict(zip(names, row, strict=True))) for row in zip(*values, strict=True)]


def schema(cls: type) -> pa.Schema:
    """The parquet schema of a record class. Lists are int32 and float32; dictionaries are JSON text."""
    return pa.schema([pa.field(c.name, c.arrow, nullable=c.nullable) for c in _columns(cls)])


@dataclass(frozen=True)
class _Column:
    attribute: str
    name: str
    arrow: pa.DataType
    nullable: bool
    json: bool
    as_tuple: bool


def _columns(cls: Any) -> tuple[_Column, ...]:
    hints = typing.get_type_hints(cls)
    return tuple(_describe(f, hints[f.name]) for f in dataclasses.fields(cls))


_ARROW: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    tuple[int, ...]: pa.list_(pa.int32()),
    tuple[float, ...]: pa.list_(pa.float32()),
    tuple[str, ...]: pa.list_(pa.string()),
}


def _describe(f: dataclasses.Field[Any], hint: Any) -> _Column:
    nullable = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [a for a in typing.get_args(hint) if a is not type(None)]
        nullable = len(members) < len(typing.get_args(hint))
        hint = members[0] if len(members) == 1 else hint
    if typing.get_origin(hint) is Literal and all(isinstance(v, str) for v in typing.get_args(hint)):
        hint = str
    is_json = typing.get_origin(hint) in (dict, list)
    arrow = pa.string() if is_json else _ARROW.get(hint)
    if arrow is None:
        raise TypeError(f"field {f.name}: no column type for {hint}")
    return _Column(f.name, f.metadata.get("column", f.name), arrow, nullable, is_json, typing.get_origin(hint) is tuple)


def _store(value: Any, as_json: bool) -> Any:
    if as_json and value is not None:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    return value


def _load(value: Any, column: _Column) -> Any:
    if value is None:
        return None
    if column.json:
        return json.loads(value)
    return tuple(value) if column.as_tuple else value
