"""``python -m benchmarks rejection``: would stopping hopeless samples early pay?

Zero-hit prompts of the bundled families (the first 16 rollouts failed) are sampled on, as plain resampling does. Behind
each step of each sample the gold answer is scored, ``log p(answer | template)``, nats. A policy stops a sample whose
score is below a threshold: after one step, the k-th, or after every one (``floor``: the least that recovered ones had
there). Thresholds are chosen on one half of the prompts and judged on the other, both ways round. Recovered: right
answer, valid derivation. Charged: what was decoded, and for each look the scored tokens behind a cached sample.

    saved   share of the passes that are not spent, looks charged; negative: they cost more than they save
    lost    share of the recovered samples that are stopped
    yield   recovered samples a pass, over those without a policy; with a 95 % interval by resampling prompts
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import harness
from latentrevise.data.boundary import Boundary
from latentrevise.data.records import Prompt, Rollout
from latentrevise.demo import BUNDLED, Family, get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.model.branches import Branch, score_branches
from latentrevise.model.loading import load_model
from latentrevise.recovery.mined import decoded_tokens
from latentrevise.recovery.pipeline import Recovery

RESULTS = Path(__file__).parent / "results" / "rejection.json"
MINED = 16  # rollouts that all fail, of a zero-hit prompt
QUANTILES = (0.0, 0.1, 0.25)  # of the recovered samples that a threshold gives up where it is chosen
STEPS = 6  # after which a single look is tried
RESAMPLED = 400  # times


@dataclass(frozen=True)
class Watched:
    """A sample: its passes, whether it was recovered, (tokens so far, score) behind each of its steps, and what a look
    costs."""

    prompt: str
    passes: int
    recovered: bool
    scores: tuple[tuple[int, float], ...]
    look: int


Policy = Mapping[int, float]
"""Step (from 0) to the score below which a sample is stopped there."""


def spent(sample: Watched, policy: Policy) -> tuple[int, bool]:
    """Passes under a policy, and whether the sample is stopped."""
    looks = 0
    for step, (tokens, score) in enumerate(sample.scores):
        if step in policy:
            looks += sample.look
            if score < policy[step]:
                return tokens + looks, True
    return sample.passes + looks, False


def chosen(samples: Sequence[Watched], step: int | None, quantile: float) -> Policy:
    """The policy that gives up this share of the recovered samples; step None: looks behind every step."""
    own: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        for k, (_, score) in enumerate(sample.scores):
            if sample.recovered and step in (None, k):
                own[k].append(score)
    return {k: sorted(scores)[int(quantile * len(scores))] for k, scores in own.items()}


def judged(folds: Sequence[tuple[Sequence[Watched], Policy]]) -> dict[str, Any]:
    """What policies do to the samples beside them."""
    by_prompt: dict[str, list[float]] = {}  # passes without and with, recovered without and with
    for samples, policy in folds:
        for sample in samples:
            passes, stopped = spent(sample, policy)
            row = by_prompt.setdefault(sample.prompt, [0.0] * 4)
            for i, value in enumerate((sample.passes, passes, sample.recovered, sample.recovered and not stopped)):
                row[i] += value

    def ratio(rows: Sequence[Sequence[float]]) -> float | None:
        before, after, had, kept = (sum(column) for column in zip(*rows, strict=True))
        return kept / after / (had / before) if had and after else None

    rows, draw = list(by_prompt.values()), random.Random(0)
    again = sorted(r for _ in range(RESAMPLED) if (r := ratio(draw.choices(rows, k=len(rows)))) is not None)
    before, after, had, kept = (sum(column) for column in zip(*rows, strict=True))
    return {
        "saved": 1 - after / before,
        "lost": 1 - kept / had,
        "yield": ratio(rows),
        "interval": [again[int(0.025 * len(again))], again[int(0.975 * len(again))]],
    }


def watched(
    run: Recovery, family: Family, prompts: Sequence[Prompt], rollouts: Mapping[str, Sequence[Rollout]]
) -> list[Watched]:
    """The later rollouts of the zero-hit prompts, scored behind each step; the answer's own step is none of them."""
    steps, template = Boundary(";", run.job.tokenizer), run.job.template_ids
    found = []
    for prompt in prompts:
        if any(r.verdict == "correct" for r in rollouts[prompt.id][:MINED]):
            continue
        answer = tuple(run.job.tokenizer.encode(prompt.answer, add_special_tokens=False))
        own = rollouts[prompt.id][MINED:]
        trunks = [(*prompt.ids, *r.completion_ids) for r in own]
        places = [steps.ends(r.completion_ids) for r in own]
        branches = [
            Branch(t, len(prompt.ids) + at, (*template, *answer), len(template))
            for t, ats in enumerate(places)
            for at in ats
        ]
        scores = iter(score_branches(run.job.policy, trunks, branches, 16384).total.tolist())
        for rollout, ats in zip(own, places, strict=True):
            right = rollout.verdict == "correct"
            valid = right and family.check(prompt.text, "", rollout.completion, prompt.answer).valid
            seen = tuple((at, next(scores)) for at in ats)
            passes = decoded_tokens(len(rollout.completion_ids), rollout.finish_reason)
            found.append(Watched(prompt.id, passes, bool(valid), seen, len(template) + len(answer) - 1))
    return found


def measure(name: str, options: argparse.Namespace, place: Path) -> dict[str, Any]:
    family = get_family(name)
    model, tokenizer = load_model(model_dir(name), dtype="float32", device="cpu")
    config = replace(demo_config(family), rollouts=options.mined_each, strategies=("resample",))
    run = Recovery(model, tokenizer, config, place, progress=False)
    with run.session():
        run.mine(make_prompts(family, options.hard, split="report", seed=0))
    samples = watched(run, family, run.prompts, run.rollouts())
    names = sorted({sample.prompt for sample in samples})
    halves = [[s for s in samples if names.index(s.prompt) % 2 == half] for half in (0, 1)]

    def both(choose: Callable[[Sequence[Watched]], Policy]) -> dict[str, Any]:
        return judged([(halves[1], choose(halves[0])), (halves[0], choose(halves[1]))])

    rows = [
        {"after": "every step" if step is None else step + 1, "gives_up": quantile}
        | both(lambda own, step=step, quantile=quantile: chosen(own, step, quantile))  # type: ignore[misc]
        for step in (*range(STEPS), None)
        for quantile in QUANTILES
    ]
    recovered = sum(s.recovered for s in samples)
    return {"zero_hit": len(names), "samples": len(samples), "recovered": recovered, "policies": rows}


def add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hard", type=int, default=64, help="prompts of each family, of which the zero-hit ones count")
    group.add_argument(
        "--mined-each", type=int, default=128, help="rejection: rollouts of each, the first 16 for mining"
    )


def main(options: argparse.Namespace) -> dict[str, Any]:
    document: dict[str, Any] = {
        **harness.heading("rejection"),
        "families": {},
    }
    with tempfile.TemporaryDirectory() as place:
        for name in options.families or BUNDLED:
            document["families"][name] = found = measure(name, options, Path(place) / name)
            print(f"\n{name}: {text(found)}", flush=True)
    if options.publish:
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def text(found: Mapping[str, Any]) -> str:
    lines = [
        f"{found['zero_hit']} zero-hit prompts, {found['samples']} samples, {found['recovered']} recovered",
        "| look after step | gives up | saved | lost | yield |",
        "|---|---|---|---|---|",
    ]
    for row in found["policies"]:
        low, high = row["interval"]
        lines.append(
            f"| {row['after']} | {row['gives_up']:.0%} | {row['saved']:.0%} | {row['lost']:.0%} |"
            f" {row['yield']:.2f} [{low:.2f}, {high:.2f}] |"
        )
    return "\n".join(lines)
