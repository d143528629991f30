"""Mined parts as they are counted: without the texts and log-probs, most of a part."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pyarrow.compute as pc

from latentrevise.data.parquet import read_table
from latentrevise.model.compute import Compute
from latentrevise.recovery.outcome import Mean
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.verify.verifier import understood

_COLUMNS = ("prompt_id", "verdict", "finish_reason", "extracted", "completion_ids")


class Glance(NamedTuple):
    """What is counted of a rollout. tokens: of its completion."""

    verdict: str
    finish_reason: str
    extracted: str | None
    tokens: int

    @property
    def decoded(self) -> int:
        return decoded_tokens(self.tokens, self.finish_reason)


def decoded_tokens(tokens: int, finish_reason: str) -> int:
    """Tokens that were decoded for a completion of so many: its end-of-sequence token is not among them, but was paid
    for."""
    return tokens + (finish_reason == "stop")


def glances(run: RunDirectory, parts: Iterable[int]) -> dict[str, list[Glance]]:
    """The rollouts of some mined parts, by prompt."""
    found: dict[str, list[Glance]] = defaultdict(list)
    for part in parts:
        table = read_table(run.part("rollouts", part), _COLUMNS)
        names, *columns = (table.column(name).to_pylist() for name in _COLUMNS[:4])
        lengths = pc.list_value_length(table.column("completion_ids")).to_pylist()
        for name, glance in zip(names, map(Glance, *columns, lengths), strict=True):
            found[name].append(glance)
    return found


class Mined:
    """What mining came to, counted prompt by prompt.

    prompts, solved, undecided, zero_hit: how many. verdicts: of their rollouts; unparsed: rollouts whose answer the
    verifier does not understand. compute: what the rollouts cost. failed_length: tokens of a zero-hit prompt's rollout.
    """

    def __init__(self) -> None:
        self.prompts = self.solved = self.undecided = self.unparsed = self.zero_hit = 0
        self.verdicts: Counter[str] = Counter()
        self.compute, self.failed_length = Compute(), Mean()

    def add(self, rollouts: Sequence[Glance], read: int, zero_hit: bool) -> None:
        """A prompt: its rollouts, the tokens of itself that were read for them, whether it is to be recovered."""
        own = [r.verdict for r in rollouts]
        self.prompts += 1
        self.verdicts.update(own)
        self.solved += "correct" in own
        self.undecided += "unknown" in own and "correct" not in own
        self.unparsed += sum(not understood(r.extracted) for r in rollouts)
        self.compute += Compute(forward=read, decoded=sum(r.decoded for r in rollouts))
        self.zero_hit += zero_hit
        for r in rollouts if zero_hit else ():
            self.failed_length.add(r.tokens)
