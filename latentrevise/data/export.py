"""A finished run to a trainer's file, some rows at a time: the formats are in ``formats``."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pyarrow as pa

from latentrevise.data import formats
from latentrevise.data.boundary import Boundary
from latentrevise.data.formats import FORMATS, Row
from latentrevise.data.parquet import GROUP, TableFile, table_writer
from latentrevise.data.records import Prompt, Rollout, Sample, Start, Trajectory, Verdict, read_records
from latentrevise.data.remote import is_url, sent
from latentrevise.data.storage import read_signed, write_jsonl
from latentrevise.data.stored import Stored
from latentrevise.errors import ConfigError, InputError, ModelError
from latentrevise.verify.patterns import BOXED, AnswerPattern

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")


def export_run(
    run: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    strategy: str | None = None,
    valid_only: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> int:
    """Write the trajectories of a finished run to ``out`` (``.jsonl`` or ``.parquet``, also a URL) in one of FORMATS.

    strategy: only this one's. valid_only: only those whose derivation was checked and holds. tokenizer: by default
    the one of the run's model. Returns the number of rows. Raises ConfigError, InputError, ModelError or RunError.
    """
    if is_url(out):
        with sent(out) as local:
            return export_run(run, to, local, strategy=strategy, valid_only=valid_only, tokenizer=tokenizer)
    run, out = Path(run).expanduser(), Path(out).expanduser()
    if to not in FORMATS:
        raise ConfigError(f"export format {to!r}: choose one of {', '.join(FORMATS)}")
    wanted = (".parquet",) if to.startswith("verl") else (".jsonl", ".parquet")
    if out.suffix not in wanted:
        raise ConfigError(f"{out}: {to} is written as {' or '.join(wanted)}; name the file accordingly")
    if not (run / "trajectories.parquet").is_file():
        raise InputError(f"{run}: no trajectories.parquet in it; give the directory of a finished run")
    header = read_signed(run / "run.json", "restore it, or recover into a new directory")
    chosen = _Chosen(run, strategy, valid_only)
    chosen.check()
    making = _Making(run, chosen, header["config"], tokenizer or _tokenizer(header["model"]["path"]))
    makers: dict[str, Callable[[], Iterator[Row]]] = {
        "trl-sft": making.sft,
        "trl-pref": making.preferences,
        "trl-step-pref": making.step_preferences,
        "trl-groups": making.groups,
        "messages": making.messages,
        "verl-sft": making.messages,
        "verl-rl": partial(making.rl, for_verl=True),
        "prefix-rl": making.prefixes,
        "rl": making.rl,
    }
    return _write(out, makers[to])


def _write(out: Path, rows: Callable[[], Iterator[Row]]) -> int:
    if out.suffix == ".jsonl":
        return write_jsonl(out, rows())
    # What type a column has may show in a late row alone, so all are made once to know it and once to be written.
    schemas = (pa.Table.from_pylist(some).schema for some in _batches(rows()))
    schema = pa.unify_schemas(list(dict.fromkeys(schemas)) or [pa.schema([])], promote_options="permissive")
    with table_writer(out, schema) as file:
        for some in _batches(rows()):
            file.write(pa.Table.from_pylist(some, schema=schema))
    return file.rows


class _Chosen:
    """The trajectories of a run that are exported."""

    def __init__(self, run: Path, strategy: str | None, valid_only: bool) -> None:
        self.path, self.strategy, self.valid_only = run / "trajectories.parquet", strategy, valid_only

    def takes(self, strategy: str, valid: bool | None) -> bool:
        return self.strategy in (None, strategy) and (valid is True or not self.valid_only)

    def check(self) -> None:
        """Raises InputError where there is none."""
        strategies, valid = Counter[str](), 0
        left = False
        for _, name, holds in self._names():
            strategies[name] += 1
            valid += holds is True
            left = left or self.takes(name, holds)
        if not left:
            raise InputError(
                f"{self.path.parent}: none of its {strategies.total()} trajectories is left (strategies there:"
                f" {', '.join(sorted(strategies)) or 'none'}; {valid} valid); relax --strategy or --valid-only, or"
                " recover more prompts"
            )

    def __iter__(self) -> Iterator[Trajectory]:
        return (t for t in Stored(self.path, Trajectory) if self.takes(t.strategy, t.valid))

    def first(self) -> dict[str, int]:
        """Of each prompt, where its first one lies."""
        found: dict[str, int] = {}
        for place, (prompt, strategy, valid) in enumerate(self._names()):
            if self.takes(strategy, valid):
                found.setdefault(prompt, place)
        return found

    def _names(self) -> Iterator[tuple[str, str, bool | None]]:
        columns = ("prompt_id", "strategy", "valid")
        with TableFile(self.path) as file:
            for table in file.groups(columns):
                yield from zip(*(table[name].to_pylist() for name in columns), strict=True)


class _InOrder(Generic[Item]):
    """What belongs to prompts, from files in the order of the prompts: asked for in that order, as trajectories of one
    strategy are, it is read once for each, and no more than one prompt's is held."""

    def __init__(self, stream: Callable[[], Iterator[Item]], name: Callable[[Item], str]) -> None:
        self._stream, self._name = stream, name
        self._left: Iterator[tuple[str, list[Item]]] = iter(())
        self._last: tuple[str, list[Item]] | None = None

    def take(self, names: set[str]) -> dict[str, list[Item]]:
        found = dict([self._last] if self._last is not None and self._last[0] in names else [])
        ends = 0
        while len(found) < len(names) and ends < 2:
            self._last = next(self._left, None)
            if self._last is None:
                ends, self._left = ends + 1, ((key, list(own)) for key, own in groupby(self._stream(), self._name))
            elif self._last[0] in names:
                found[self._last[0]] = self._last[1]
        return found


class _Making:
    """The rows of each format, as they come."""

    def __init__(self, run: Path, chosen: _Chosen, settings: Row, tokenizer: PreTrainedTokenizerBase) -> None:
        self.run, self.chosen, self.settings, self.tokenizer = run, chosen, settings, tokenizer
        self.stop = settings.get("stop", ())

    def _rollouts(self) -> _InOrder[Rollout]:
        return _InOrder(lambda: _mined(self.run, self.settings), lambda rollout: rollout.prompt_id)

    def _prompts(self) -> _InOrder[Prompt]:
        return _InOrder(lambda: iter(Stored(self.run / "prompts.parquet", Prompt)), lambda prompt: prompt.id)

    def _conversations(self, prompts: _InOrder[Prompt], some: list[Trajectory]) -> formats.Conversations:
        return {name: own[0].conversation for name, own in prompts.take({t.prompt_id for t in some}).items()}

    def _first(self) -> Iterator[Trajectory]:
        """The first trajectory of each prompt."""
        rows, first = Stored(self.chosen.path, Trajectory), self.chosen.first()
        return (rows[place] for place in first.values())

    def sft(self) -> Iterator[Row]:
        for some in _batches(self.chosen):
            yield from formats.sft_rows(some, self.tokenizer, self.stop)

    def preferences(self) -> Iterator[Row]:
        rollouts = self._rollouts()
        for some in _batches(self.chosen):
            own = rollouts.take({t.prompt_id for t in some})
            yield from formats.preference_rows(some, [r for rows in own.values() for r in rows], self.tokenizer)

    def step_preferences(self) -> Iterator[Row]:
        failed = _failed_branches(self.run, self.settings)
        return iter(formats.step_preference_rows(self.chosen, failed, self.tokenizer))

    def groups(self) -> Iterator[Row]:
        first, rows, rollouts = self.chosen.first(), Stored(self.chosen.path, Trajectory), self._rollouts()
        decided = (r for r in _mined(self.run, self.settings) if r.verdict != "unknown")
        size = max((sum(1 for _ in own) for _, own in groupby(decided, lambda r: r.prompt_id)), default=0)
        for prompts in _batches(Stored(self.run / "prompts.parquet", Prompt)):
            own = rollouts.take({prompt.id for prompt in prompts})
            flat = [r for found in own.values() for r in found]
            recovered = [rows[place] for place in sorted(first[p.id] for p in prompts if p.id in first)]
            yield from formats.group_rows(recovered, flat, prompts, self.tokenizer, self.stop, size)

    def messages(self) -> Iterator[Row]:
        prompts = self._prompts()
        for some in _batches(self.chosen):
            yield from formats.message_rows(some, self._conversations(prompts, some), self.tokenizer)

    def rl(self, for_verl: bool = False) -> Iterator[Row]:
        prompts, count = self._prompts(), 0
        for some in _batches(self._first()):
            known = self._conversations(prompts, some)
            if for_verl:
                yield from formats.verl_rl_rows(some, known, self.tokenizer, count)
            else:
                yield from formats.rl_rows(some, known)
            count += len(some)

    def prefixes(self) -> Iterator[Row]:
        boundary = Boundary.of(self.settings.get("prefix_boundary"), self.tokenizer)
        pattern = AnswerPattern(self.settings.get("answer_pattern", BOXED))
        for stage in range(formats.STAGES):
            for some in _batches(self._first()):
                rows = formats.prefix_rows(some, self.tokenizer, boundary, pattern)
                yield from (row for row in rows if row["stage"] == stage)


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    some = []
    for item in items:
        some.append(item)
        if len(some) == GROUP:
            yield some
            some = []
    if some:
        yield some


def _mined(run: Path, settings: Row) -> Iterator[Rollout]:
    """The rollouts of a run, a prompt's one behind another: the parts of ``chunk`` prompts together, one a round."""
    chunks = -(-len(Stored(run / "prompts.parquet", Prompt)) // settings.get("chunk", 1))
    parts: dict[int, list[Path]] = defaultdict(list)
    for path in sorted((run / "rollouts").glob("part-*.parquet"), key=_number):
        parts[_number(path) % chunks].append(path)
    for chunk in sorted(parts):
        own: dict[str, list[Rollout]] = defaultdict(list)
        for rollout in (r for path in parts[chunk] for r in read_records(path, Rollout)):
            own[rollout.prompt_id].append(rollout)
        yield from chain.from_iterable(own.values())


def _number(part: Path) -> int:
    return int(part.stem.removeprefix("part-"))


def _failed_branches(run: Path, settings: Row) -> Iterator[tuple[str, str, Sequence[int]]]:
    """The rollouts of a run that were verified wrong, and the continuations behind their starts' plain tokens."""
    for r in _mined(run, settings):
        if r.verdict == "wrong":
            yield r.prompt_id, r.sample_id, r.completion_ids
    for part in sorted((run / "samples").glob("*/part-*.parquet")):
        places = [run / stage / part.parent.name / part.name for stage in ("starts", "verdicts")]
        starts = {s.start_id: s for s in read_records(places[0], Start)}
        wrong = {v.sample_id for v in read_records(places[1], Verdict) if v.verdict == "wrong"}
        for s in read_records(part, Sample):
            if s.sample_id in wrong:
                yield s.prompt_id, s.sample_id, (*starts[s.start_id].plain_ids, *s.completion_ids)


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: the tokenizer of this run's model cannot be loaded ({error}); restore it, or name its place"
            " with --model (in Python: pass a tokenizer)"
        ) from error
