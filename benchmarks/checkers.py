"""The arithmetic checker on right derivations and on mutated ones: what it keeps, and what it catches of each mutation.

Three sources. ``own``: worked solutions of the package's word problems. ``gsm_symbolic``: those of reasoning-gym, where
it is installed (extra ``real``), as they come: some of them round down or use numbers that their question lacks.
``rollouts``: what the taught model wrote (``--runs``: run directories of ``python -m benchmarks recovery --families
gsm``); right are those whose equations are the needed ones, in a reading of their plain form that shares nothing with
the checker. Of each, what ``check`` says (question and answer alone) and ``check_against`` (a worked solution, too).
"""

from __future__ import annotations

import argparse
import operator
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.recovery_strata import finished
from latentrevise.checkers.arithmetic import check, check_against
from latentrevise.data.records import Prompt, Rollout, Sample, read_records
from latentrevise.data.storage import write_json
from latentrevise.demo import wordproblems
from latentrevise.errors import InputError
from latentrevise.recovery.guards import wilson
from latentrevise.recovery.rundir import RunDirectory

_NUMBER = r"[$€£]?\d[\d.,]*\d|[$€£]?\d"
_EQUATION = re.compile(rf"(?:{_NUMBER})\s*[-+*/x×÷]\s*(?:{_NUMBER})\s*=\s*(?:{_NUMBER})")
_PLAIN = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")
_VALUE = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
ROWS = 400
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/checkers.json"


@dataclass(frozen=True)
class Row:
    """A question, the parts of its right derivation, its answer; solution: a worked one, where it is another text."""

    question: str
    steps: tuple[str, ...]
    answer: str
    solution: str


def own(seed: int) -> Iterator[Row]:
    """Problems of 3 to 8 steps."""
    rng = random.Random(f"checkers/{seed}")
    for _ in range(ROWS):
        question, problem = wordproblems.sample(rng, rng.randint(3, 8))
        steps = tuple(f"{left} {sign} {right} = {result}. " for left, sign, right, result in problem.equations)
        yield Row(question, steps, str(problem.answer), problem.derivation)


def gsm_symbolic(seed: int) -> Iterator[Row]:
    """Those of reasoning-gym: a line a step."""
    import reasoning_gym

    for row in reasoning_gym.create_dataset("gsm_symbolic", size=ROWS, seed=seed):
        text = row["metadata"]["answer_cot"].rsplit("####", 1)[0]
        yield Row(row["question"], tuple(text.splitlines(keepends=True)), str(row["answer"]), text)


def rollouts(runs: Sequence[Path]) -> Iterator[Row]:
    """Mined rollouts and the samples of resampling whose equations are true, each needed one among them, and no other;
    every text once."""
    for run in runs:
        prompts = {prompt.id: prompt.text for prompt in read_records(RunDirectory(run).prompts, Prompt)}
        written: list[Rollout | Sample] = [*read_records(run / "rollouts", Rollout)]
        for arm in ("resample", "resample@equal"):
            for part in RunDirectory(run).parts("samples", arm):
                written += read_records(part, Sample)
        for prompt, text in dict.fromkeys((row.prompt_id, row.completion) for row in written):
            problem = wordproblems.parse(prompts[prompt])
            found = [(int(a), sign, int(b), int(c)) for a, sign, b, c in _PLAIN.findall(text)]
            true = all(b and _VALUE[sign](a, b) == c for a, sign, b, c in found)
            if true and {_unordered(e) for e in found} == {_unordered(e) for e in problem.equations}:
                steps = tuple(re.findall(r"[^.]*\.\s*", text[: text.rfind("The answer")]))
                yield Row(prompts[prompt], steps, str(problem.answer), problem.derivation)


def _unordered(equation: tuple[int, str, int, int]) -> tuple[Any, ...]:
    left, sign, right, result = equation
    return (*(sorted((left, right)) if sign in "+*" else (left, right)), sign, result)


def _places(steps: Sequence[str]) -> list[int]:
    return [i for i, step in enumerate(steps) if _EQUATION.search(step)]


def flipped(row: Row, rng: random.Random) -> list[str]:
    """One digit of one equation is another."""
    at = rng.choice(_places(row.steps))
    step, whole = row.steps[at], rng.choice(list(_EQUATION.finditer(row.steps[at])))
    place = rng.choice([i for i in range(*whole.span()) if step[i].isdigit()])
    digit = rng.choice([d for d in "123456789" if d != step[place]])
    return [*row.steps[:at], step[:place] + digit + step[place + 1 :], *row.steps[at + 1 :]]


def dropped(row: Row, rng: random.Random) -> list[str]:
    """One step with an equation is missing."""
    at = rng.choice(_places(row.steps))
    return [*row.steps[:at], *row.steps[at + 1 :]]


def swapped(row: Row, rng: random.Random) -> list[str]:
    """Two neighbouring steps in the other order; no fault where neither needs the other."""
    at = rng.choice(_places(row.steps)[:-1])
    return [*row.steps[:at], *row.steps[at + 1 : at + 2], row.steps[at], *row.steps[at + 2 :]]


def pasted(row: Row, rng: random.Random) -> list[str]:
    """In the last equation's place one that comes to the answer from nowhere."""
    at, n = _places(row.steps)[-1], rng.randint(1001, 1999)
    answer = row.answer.replace(",", "")
    made = f"{Decimal(answer) + n} - {n} = {answer}. "
    return [*row.steps[:at], made, *row.steps[at + 1 :]]


MUTATIONS: dict[str, Callable[[Row, random.Random], list[str]]] = {
    each.__name__: each for each in (flipped, dropped, swapped, pasted)
}


def measure(rows: Sequence[Row], seed: int = 0) -> dict[str, Any]:
    """What is kept of the rows and caught of each mutation, ``[rate, low, high]``, by ``check`` and ``check_against``;
    and why rows are turned away. Mutated are the rows that are kept and have two equations or more."""
    found: dict[str, Any] = {"rows": len(rows)}
    for way in ("alone", "against"):

        def valid(row: Row, steps: Sequence[str], way: str = way) -> Any:
            text = "".join(steps)
            if way == "alone":
                return check(row.question, "", text, row.answer)
            return check_against(row.question, "", text, row.answer, row.solution)

        verdicts = [valid(row, row.steps) for row in rows]
        reasons = [verdict.reason for verdict in verdicts if verdict.reason]
        kept = [r for r, verdict in zip(rows, verdicts, strict=True) if verdict.valid and len(_places(r.steps)) > 1]
        found[way] = {
            "kept": wilson(len(rows) - len(reasons), len(rows)),
            "turned_away": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
            "mutated": len(kept),
        }
        for name, mutate in MUTATIONS.items():
            rng = random.Random(f"{name}/{seed}")
            caught = sum(not valid(row, mutate(row, rng)).valid for row in kept)
            found[way][name] = wilson(caught, len(kept))
    return found


def main(options: argparse.Namespace) -> dict[str, Any]:
    """``python -m benchmarks checkers [--runs DIR ...]``."""
    seed, runs = (options.seeds or [1])[0], [run.name for run in options.runs or ()]
    sources = {"own": list(own(seed))}
    if find_spec("reasoning_gym"):
        sources["gsm_symbolic"] = list(gsm_symbolic(seed))
    if options.runs:
        sources["rollouts"] = list(rollouts(finished(options.runs)))
        if not sources["rollouts"]:
            told = ", ".join(map(str, options.runs))
            raise InputError(f"{told}: no right rollout in it; give runs of the study of --families gsm")
    document = {
        "name": "checkers",
        "command": " ".join(["python -m benchmarks checkers", *(["--runs", *runs] if runs else [])]),
        "commit": harness.commit(),
        "sources": {name: measure(rows) for name, rows in sources.items()},
    }
    print(table(document))
    if options.publish:
        write_json(RESULTS, document)
    return document


def table(document: dict[str, Any]) -> str:
    """A Markdown table, a row a source and way of checking."""
    lines = [f"| derivations | checked | right ones kept % | {' | '.join(f'{name} %' for name in MUTATIONS)} |"]
    lines.append("|---" * (3 + len(MUTATIONS)) + "|")
    for source, found in document["sources"].items():
        for way, told in (("alone", "by question and answer"), ("against", "with a worked solution")):
            kept, low, high = (100 * x for x in found[way]["kept"])
            caught = " | ".join(f"{100 * found[way][name][0]:.1f}" for name in MUTATIONS)
            lines.append(f"| {source} ({found['rows']}) | {told} | {kept:.1f} [{low:.0f}, {high:.0f}] | {caught} |")
    return "\n".join(lines)
