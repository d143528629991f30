"""Is a prompt beyond the model, or is it the format? What the failures of a mined run are, and what to change.

Each rollout that is not correct falls under the first of these that holds: the verifier did not decide in time; it runs
on into another turn of the conversation, which is a fault of the template (its last answer may be to a question of its
own making); it was cut at ``max_new_tokens`` before it answered; it answers in another form than the one that is read;
it holds no answer; it answers, wrongly.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from latentrevise.data.records import Prompt, Rollout, read_records
from latentrevise.errors import InputError
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.verify.patterns import BOXED, NAMES, AnswerPattern

KINDS = ("timeout", "another turn", "truncated", "another form", "no answer", "wrong answer")
# Marks of turns that are special tokens are not in a completion's text; the role behind them is.
_TURN = re.compile(
    r"<\|?(im_start|im_end|user|assistant|start_header_id|eot_id|start_of_turn|end_of_turn)\|?>"
    r"|\[/?INST\]|^\s*(\[?(user|human|assistant)\]?[ \t]*(:|$)|### (Instruction|Response|Question))",
    re.IGNORECASE | re.MULTILINE,
)
_NOTABLE = 0.1  # of the failures: a kind that is rarer changes no conclusion


@dataclass(frozen=True)
class Failures:
    """kinds: see the module. named: of those in another form or without an answer, how many name the gold answer all
    the same. forms: answers in another form, by the ``answer_pattern`` that finds them, overlapping. zero_hit: prompts
    whose rollouts are all verified wrong; undecided: those without a correct one, but not all verified. format_only:
    zero-hit prompts on which no rollout gives a wrong answer of its own."""

    rollouts: int
    correct: int
    kinds: dict[str, int]
    named: int
    forms: dict[str, int]
    prompts: int
    zero_hit: int
    undecided: int
    format_only: int

    @property
    def failed(self) -> int:
        return self.rollouts - self.correct


def kind_of(rollout: Rollout, forms: Sequence[str] = ()) -> str | None:
    """One of KINDS; None of a correct rollout. forms: the other patterns that find an answer in it."""
    if rollout.verdict == "correct":
        return None
    if rollout.verdict == "unknown":
        return "timeout"
    if _TURN.search(rollout.completion):
        return "another turn"
    if rollout.extracted is not None:
        return "wrong answer"
    if rollout.finish_reason == "length":
        return "truncated"
    return "another form" if forms else "no answer"


def failures_of(prompts: Sequence[Prompt], rollouts: Sequence[Rollout], pattern: str = BOXED) -> Failures:
    """What the rollouts that are not correct are. pattern: the ``answer_pattern`` that they were read by."""
    gold = {p.id: p.answer.strip() for p in prompts}
    others = [AnswerPattern(name) for name in NAMES if name != pattern]
    counts: Counter[str | None] = Counter()
    forms: Counter[str] = Counter()
    named = 0
    by_prompt: dict[str, set[str | None]] = {}
    for r in rollouts:
        found = [other.name for other in others if other.find(r.completion)] if r.extracted is None else []
        kind = kind_of(r, found)
        counts[kind] += 1
        by_prompt.setdefault(r.prompt_id, set()).add(kind)
        if kind in ("another form", "no answer"):
            forms.update(found)
            named += _names(r.completion, gold.get(r.prompt_id, ""))
    unsolved = [kinds for kinds in by_prompt.values() if None not in kinds]
    dead = [kinds for kinds in unsolved if "timeout" not in kinds]
    return Failures(
        rollouts=len(rollouts),
        correct=counts[None],
        kinds={kind: counts[kind] for kind in KINDS},
        named=named,
        forms=dict(forms.most_common()),
        prompts=len(by_prompt),
        zero_hit=len(dead),
        undecided=len(unsolved) - len(dead),
        format_only=sum("wrong answer" not in kinds for kinds in dead),
    )


def run_diagnosis(run: str | os.PathLike[str]) -> str:
    """A few lines for a person: the failures of a mined run, and which setting to change.

    Raises RunError where there is no run, InputError where nothing was mined in it.
    """
    directory = RunDirectory(run)
    config = directory.read_header()["config"]
    if not directory.parts("rollouts"):
        raise InputError(f"{directory.path}: no rollouts in it; mine first (`latentrevise mine`, or `recover`)")
    prompts, rollouts = read_records(directory.prompts, Prompt), read_records(directory.path / "rollouts", Rollout)
    found = failures_of(prompts, rollouts, config["answer_pattern"])
    undecided = f", {found.undecided} undecided" if found.undecided else ""
    lines = [
        f"{found.rollouts} rollouts of {found.prompts} prompts: {found.correct} correct, {found.failed} not;"
        f" {found.zero_hit} prompts are zero-hit{undecided}"
    ]
    lines += [f"  {kind:<14}{count:>7}  {_share(count, found.failed)}" for kind, count in found.kinds.items()]
    if found.kinds["another form"] or found.kinds["no answer"]:
        forms = "".join(f", {count} hold one by answer_pattern={name}" for name, count in found.forms.items())
        lines.append(f"  of those in another form or without an answer {found.named} name the gold answer{forms}")
    lines.append(
        f"on {found.format_only} of the {found.zero_hit} zero-hit prompts no rollout gives a wrong answer of its own"
    )
    return "\n".join([*lines, "", *advice(found, config)])


def advice(found: Failures, config: dict) -> list[str]:  # type: ignore[type-arg]  # the settings as they were read
    """Which setting to change, the most frequent cause first; one line where it is not the format."""
    kinds, pattern, cut = found.kinds, config["answer_pattern"], config["max_new_tokens"] or "1024 unless it is set"
    likeliest = next(iter(found.forms), "")
    causes = [
        (kinds["truncated"], f"raise max_new_tokens ({cut}): rollouts are cut before they answer"),
        (
            kinds["another turn"],
            "the model goes on into another turn: set chat=always (or give the prompts as messages), or name the turn's"
            " mark in `stop`",
        ),
        (kinds["another form"], f"answers stand in another form than {pattern}: set answer_pattern={likeliest}"),
        (
            kinds["no answer"],
            f"completions end without an answer by answer_pattern={pattern}: ask for it with `instruction` or in the"
            " prompts, or set chat=always where the model was trained on a template",
        ),
        (
            kinds["timeout"],
            f"raise verify_timeout ({config['verify_timeout']} s): an undecided rollout is neither right nor wrong, and"
            " its prompt is not zero-hit",
        ),
    ]
    lines = [
        text
        for count, text in sorted(causes, key=lambda cause: -cause[0])
        if count and count >= _NOTABLE * found.failed
    ]
    if not found.failed:
        return ["nothing failed: these prompts are too easy to recover anything from"]
    return lines or ["it is not the format: nearly all failures give a wrong answer of their own"]


def _names(text: str, gold: str) -> bool:
    return bool(gold) and re.search(rf"(?<![\w.]){re.escape(gold)}(?![\w.]*\w)", text) is not None


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:5.1f} %" if whole else "    -"
