"""Is a prompt beyond the model, or is it the format? What the failures of a mined run are, and what to change.

Each rollout that is not correct falls under the first of these that holds: the verifier did not decide in time; it was
cut at ``max_new_tokens``; it holds no answer where the verifier looks; it answers, wrongly. Of those without an answer
it is said how many name the gold answer all the same, how many hold an answer in another form, and how many run on into
another turn of the conversation, which is a fault of the template.
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

KINDS = ("timeout", "truncated", "no answer", "wrong answer")
_TURN = re.compile(
    r"<\|?(im_start|im_end|user|assistant|start_header_id|eot_id|start_of_turn|end_of_turn)\|?>"
    r"|\[/?INST\]|^\s*(\[?(user|human|assistant)\]?\s*:|### (Instruction|Response|Question))",
    re.IGNORECASE | re.MULTILINE,
)
_OTHER_FORM = re.compile(r"(final answer|answer is|answer:|####|<answer>)", re.IGNORECASE)
_NOTABLE = 0.1  # of the failures: a kind that is rarer changes no conclusion


@dataclass(frozen=True)
class Failures:
    """kinds: see the module. named, other_form, turns: among those without an answer, overlapping. zero_hit: prompts
    without a correct rollout; format_only: those of them on which no rollout gives a wrong answer of its own."""

    rollouts: int
    correct: int
    kinds: dict[str, int]
    named: int
    other_form: int
    turns: int
    prompts: int
    zero_hit: int
    format_only: int

    @property
    def failed(self) -> int:
        return self.rollouts - self.correct


def kind_of(rollout: Rollout) -> str | None:
    """One of KINDS; None of a correct rollout."""
    if rollout.verdict == "correct":
        return None
    if rollout.verdict == "unknown":
        return "timeout"
    if rollout.extracted is not None:
        return "wrong answer"
    return "truncated" if rollout.finish_reason == "length" else "no answer"


def failures_of(prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Failures:
    """What the rollouts that are not correct are."""
    gold = {p.id: p.answer.strip() for p in prompts}
    kinds = [kind_of(r) for r in rollouts]
    silent = [r for r, kind in zip(rollouts, kinds, strict=True) if kind == "no answer"]
    by_prompt: dict[str, set[str | None]] = {}
    for r, kind in zip(rollouts, kinds, strict=True):
        by_prompt.setdefault(r.prompt_id, set()).add(kind)
    dead = [found for found in by_prompt.values() if None not in found]
    counts = Counter(kinds)
    return Failures(
        rollouts=len(rollouts),
        correct=counts[None],
        kinds={kind: counts[kind] for kind in KINDS},
        named=sum(_names(r.completion, gold.get(r.prompt_id, "")) for r in silent),
        other_form=sum(bool(_OTHER_FORM.search(r.completion)) for r in silent),
        turns=sum(bool(_TURN.search(r.completion)) for r in silent),
        prompts=len(by_prompt),
        zero_hit=len(dead),
        format_only=sum("wrong answer" not in found for found in dead),
    )


def run_diagnosis(run: str | os.PathLike[str]) -> str:
    """A few lines for a person: the failures of a mined run, and which setting to change.

    Raises RunError where there is no run, InputError where nothing was mined in it.
    """
    directory = RunDirectory(run)
    config = directory.read_header()["config"]
    if not directory.parts("rollouts"):
        raise InputError(f"{directory.path}: no rollouts in it; mine first (`latentrevise mine`, or `recover`)")
    found = failures_of(read_records(directory.prompts, Prompt), read_records(directory.path / "rollouts", Rollout))
    lines = [
        f"{found.rollouts} rollouts of {found.prompts} prompts: {found.correct} correct, {found.failed} not;"
        f" {found.zero_hit} prompts are zero-hit"
    ]
    lines += [f"  {kind:<14}{count:>7}  {_share(count, found.failed)}" for kind, count in found.kinds.items()]
    if found.kinds["no answer"]:
        lines.append(
            f"  of those without an answer: {found.named} name the gold answer, {found.other_form} hold an answer in"
            f" another form, {found.turns} run on into another turn"
        )
    lines.append(
        f"on {found.format_only} of the {found.zero_hit} zero-hit prompts no rollout gives a wrong answer of its own"
    )
    return "\n".join([*lines, "", *advice(found, config)])


def advice(found: Failures, config: dict) -> list[str]:  # type: ignore[type-arg]  # the settings as they were read
    """Which setting to change, the most frequent cause first; one line where it is not the format."""
    silent = found.kinds["no answer"]
    cut, late = config.get("max_new_tokens"), config.get("verify_timeout")
    causes = [
        (found.kinds["truncated"], f"raise max_new_tokens ({cut}): rollouts are cut before they answer"),
        (
            found.turns,
            "the model goes on into another turn: set chat=true (or give the prompts as messages), or name the turn's"
            " mark in `stop`",
        ),
        (
            silent - found.turns,
            "completions end without \\boxed{}: ask for it with `instruction` or in the prompts, or set chat=true where"
            " the model was trained on a template",
        ),
        (
            found.kinds["timeout"],
            f"raise verify_timeout ({late} s): an undecided rollout is neither right nor wrong, and its prompt is not"
            " zero-hit",
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
