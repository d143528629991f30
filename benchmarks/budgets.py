"""``python -m benchmarks budgets``: mining and strategies in rounds against as many samples for every prompt.

On each bundled family the prompts are mined once with all rollouts. What any smaller number, and any rounds, would have
drawn are the first of these (``tests/test_budgets.py`` holds mining to that), so the table needs no other run; one is
made nevertheless, in rounds, and its bill compared with the one computed.

Solved: at least one correct rollout, in per cent of prompts with 95 % Wilson intervals. Passes: tokens decoded, and a
prompt's own for each round that it was drawn in. At equal compute: as many rollouts at most as rounds get for what the
uniform ones cost.

Strategies alike, on the prompts that 16 rollouts did not solve: one run for each number of samples, of which rounds
draw the first (``tests/test_rounds.py``), and one in rounds, whose bill is compared. Recovered, valid, admitted:
prompts with a right sample, with one whose derivation holds, with one that the guards let through. Passes are a run's
own (``metrics.json``): finding the prefixes, and tokens decoded. Read again: tokens of prompt and prefix that a further
request of a start has, which a prefix cache holds; they are not charged, as in a run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import harness
from latentrevise.data.records import Prompt, Rollout
from latentrevise.demo import BUNDLED, get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.model.compute import Compute
from latentrevise.model.loading import load_model
from latentrevise.recovery.collect import admitted, mined, results
from latentrevise.recovery.guards import wilson
from latentrevise.recovery.mined import decoded_tokens
from latentrevise.recovery.outcome import Result
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.rounds import plans
from latentrevise.recovery.settings import RoundsConfig
from latentrevise.recovery.stages import read_starts

RESULTS = Path(__file__).parent / "results" / "budgets.json"
UNIFORM = (4, 8, 16, 32)
STRATEGIES, ROLLOUTS = ("pivot-trie", "resample"), 16
SAMPLES, MOST_SAMPLES = (8, 16), (8, 12, 16, 20, 24, 32)
Mined = Mapping[str, Sequence[Rollout]]


def add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompts", type=int, default=48, help="of each family")
    group.add_argument("--most", type=int, default=128, help="rollouts mined of each prompt")
    group.add_argument("--round", type=int, default=4, help="rollouts in a round")


def drawn(rollouts: Sequence[Rollout], most: int, size: int) -> int:
    """How many of a prompt's rollouts are drawn in rounds of ``size``, ``most`` at most, until one is correct."""
    for count in range(size, most, size):
        if any(r.verdict == "correct" for r in rollouts[:count]):
            return count
    return most


def bill(prompts: Sequence[Prompt], mined: Mined, most: int, size: int) -> dict[str, Any]:
    """What rounds of ``size`` cost, up to ``most`` rollouts a prompt, and what they solve; one round is the uniform
    budget."""
    counts = {p.id: drawn(mined[p.id], most, size) for p in prompts}
    own = {name: mined[name][:count] for name, count in counts.items()}
    tokens = sum(decoded_tokens(len(r.completion_ids), r.finish_reason) for rows in own.values() for r in rows)
    read = sum(len(p.ids) * -(-counts[p.id] // size) for p in prompts)
    solved = sum(any(r.verdict == "correct" for r in rows) for rows in own.values())
    return {
        "rollouts_at_most": most,
        "rollouts": sum(counts.values()) / len(prompts),
        "passes": (tokens + read) / len(prompts),
        "solved": list(wilson(solved, len(prompts))),
    }


def compared(prompts: Sequence[Prompt], mined: Mined, most: int, size: int) -> list[dict[str, Any]]:
    """For each uniform budget: rounds with as many rollouts, and rounds at its passes."""
    caps = [bill(prompts, mined, cap, size) for cap in range(size, most + 1, size)]
    rows = []
    for n in UNIFORM:
        uniform, same = bill(prompts, mined, n, n), bill(prompts, mined, n, size)
        assert same["solved"] == uniform["solved"], "rounds change which prompts are zero-hit"
        equal = max((c for c in caps if c["passes"] <= uniform["passes"]), key=lambda c: c["rollouts_at_most"])
        cut = equal["rollouts_at_most"] == most
        rows.append({"uniform": uniform, "rounds": same, "equal_compute": equal, "ran_out_of_rollouts": cut})
    return rows


def measure(name: str, options: argparse.Namespace, place: Path) -> dict[str, Any]:
    family, began = get_family(name), time.perf_counter()
    model, tokenizer = load_model(model_dir(name), dtype="float32", device="cpu")
    rows = make_prompts(family, options.prompts, split="report", seed=0)
    whole = replace(demo_config(family), rollouts=options.most, strategies=("resample",))
    run = Recovery(model, tokenizer, whole, place / "whole", progress=False)
    checked = max(UNIFORM)
    rounds = replace(whole, rollouts=checked, mine=RoundsConfig(rounds=checked // options.round))
    in_rounds = Recovery(model, tokenizer, rounds, place / "rounds", progress=False)
    for mining in (run, in_rounds):
        with mining.session():
            mining.mine(rows)
    table = compared(run.prompts, run.rollouts(), options.most, options.round)
    spent = mined(in_rounds.job).compute.passes / len(rows)
    expected = table[UNIFORM.index(checked)]["rounds"]["passes"]
    assert spent == expected, f"{name}: rounds cost {spent} passes a prompt, not {expected}"
    strategies = strategies_compared(in_rounds, rows, place / "strategies", options.round)
    return {"prompts": len(rows), "seconds": time.perf_counter() - began, "table": table, "strategies": strategies}


def strategies_compared(
    like: Recovery, rows: Sequence[Mapping[str, Any]], place: Path, size: int
) -> dict[str, list[dict[str, Any]]]:
    """For each strategy and uniform number of samples: rounds with as many, and rounds at its passes. like: a run with
    the model and settings."""
    model, tokenizer = like.job.model, like.job.tokenizer
    base = replace(like.config, rollouts=ROLLOUTS, mine=RoundsConfig(), audit=False, equal_compute=False)
    mining = Recovery(model, tokenizer, base, place / "mined", progress=False)
    with mining.session():
        mining.mine(rows)

    def recovered(strategy: str, samples: int, rounds: int = 1) -> Recovery:
        own = replace(base, strategies=(strategy,), samples=samples, continuations=RoundsConfig(rounds=rounds))
        run = Recovery(model, tokenizer, own, place / f"{strategy}-{samples}-{rounds}", progress=False)
        run.job.take_prompts(rows)
        shutil.copytree(mining.run.path / "rollouts", run.run.path / "rollouts")
        run.recover()
        return run

    found = {}
    for strategy in STRATEGIES:
        runs = {samples: recovered(strategy, samples) for samples in MOST_SAMPLES}
        bills = {samples: strategy_bill(run, samples // size) for samples, run in runs.items()}
        found[strategy] = []
        for samples in SAMPLES:
            uniform = strategy_bill(runs[samples], 1)
            equal = max(
                (b for b in bills.values() if b["passes"] <= uniform["passes"]), key=lambda b: b["samples_at_most"]
            )
            cut = equal["samples_at_most"] == max(MOST_SAMPLES)
            found[strategy].append(
                {"uniform": uniform, "rounds": bills[samples], "equal_compute": equal, "ran_out_of_samples": cut}
            )
        most = max(SAMPLES)
        arm, own = recovered(strategy, most, most // size).collect().metrics["arms"][strategy], bills[most]
        told = arm["compute"]["per_prompt"], arm["recovered_rate"], arm["valid_rate"]
        expected = own["passes"], own["recovered"], own["valid"]
        assert told == expected, f"{strategy}: rounds came to {told}, not {expected}"
    return found


def strategy_bill(run: Recovery, rounds: int) -> dict[str, Any]:
    """What a strategy's samples, drawn at once by a run, would have cost in so many rounds, and what they recover."""
    (arm,) = run.arms()
    prompts, drawn, again, counts, total = 0, 0, 0, Counter[str](), Compute()
    for part in run.parts(arm):
        lengths = {prompt.id: len(prompt.ids) for prompt in run.job.zero_hit_at(part.rows)}
        starts, _ = read_starts(run.run, part)
        own: dict[str, list[Result]] = defaultdict(list)
        for row in results(run.job, part):
            own[row[0].prompt_id].append(row)
        total += sum((Compute(s.forward_tokens, s.backward_tokens, s.decoded_tokens) for s in starts), Compute())
        for name, plan in plans(starts, RoundsConfig(rounds=rounds)).items():
            taken, begun = list[Result](), set[str]()
            for draws in plan.rounds:
                again += sum(lengths[name] + len(d.start.plain_ids) for d in draws if d.start.start_id in begun)
                begun.update(d.start.start_id for d in draws)
                taken = own[name][: len(taken) + sum(d.n for d in draws)]
                if any(verdict.verdict == "correct" for _, _, verdict in taken):
                    break
            drawn += len(taken)
            total += Compute(decoded=sum(decoded_tokens(len(s.completion_ids), s.finish_reason) for _, s, _ in taken))
            right = [verdict for _, _, verdict in taken if verdict.verdict == "correct"]
            counts["recovered"] += bool(right)
            counts["valid"] += any(verdict.valid for verdict in right)
            counts["admitted"] += any(map(admitted, right))
        prompts += part.size
    return {
        "samples_at_most": arm.samples,
        "prompts": prompts,
        "samples": drawn / prompts,
        "passes": total.passes / prompts,
        "read_again": again / prompts,
        **{name: list(wilson(counts[name], prompts)) for name in ("recovered", "valid", "admitted")},
    }


def main(options: argparse.Namespace) -> dict[str, Any]:
    sizes = (max(UNIFORM), *MOST_SAMPLES)
    if any(n % options.round for n in (*sizes, options.most)) or options.most < max(UNIFORM):
        raise SystemExit(f"--round must divide {sizes} and --most, which must be at least {max(UNIFORM)}")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in options.families or BUNDLED:
            heading = harness.heading("budgets")
            found[name] = own = {**heading, "round": options.round, **measure(name, options, Path(place) / name)}
            print(f"\n{name}: {own['prompts']} prompts, {own['seconds']:.0f} s\n{text(own['table'])}")
            print(strategies_text(own["strategies"]), flush=True)
    if options.publish:  # the other families stay as they are
        published = json.loads(RESULTS.read_text(encoding="utf-8"))
        RESULTS.write_text(json.dumps(published | found, indent=1) + "\n", encoding="utf-8")
    return found


def text(table: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| rollouts | solved | passes, uniform | in rounds | saved | at equal compute: rollouts at most | solved |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        uniform, rounds, equal = row["uniform"], row["rounds"], row["equal_compute"]
        more = f"{equal['rollouts_at_most']}{' (all there are)' if row['ran_out_of_rollouts'] else ''}"
        lines.append(
            f"| {uniform['rollouts_at_most']} | {_share(uniform['solved'])} | {uniform['passes']:,.0f} |"
            f" {rounds['passes']:,.0f} | {1 - rounds['passes'] / uniform['passes']:.0%} | {more} |"
            f" {_share(equal['solved'])} |"
        )
    return "\n".join(lines)


def strategies_text(strategies: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = [
        "| strategy | samples | recovered | valid, admitted | in rounds | passes, uniform | in rounds | read again"
        " | at equal compute: samples at most | recovered | valid |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for strategy, table in strategies.items():
        for row in table:
            uniform, rounds, equal = row["uniform"], row["rounds"], row["equal_compute"]
            more = f"{equal['samples_at_most']}{' (all there are)' if row['ran_out_of_samples'] else ''}"
            lines.append(
                f"| {strategy} | {uniform['samples_at_most']} | {_share(uniform['recovered'])} |"
                f" {_labels(uniform)} | {_labels(rounds)} | {uniform['passes']:,.0f} | {rounds['passes']:,.0f} |"
                f" {rounds['read_again']:,.0f} | {more} | {_share(equal['recovered'])} | {_share(equal['valid'])} |"
            )
    return "\n".join(lines)


def _labels(bill: Mapping[str, Any]) -> str:
    return f"{bill['valid'][0]:.0%}, {bill['admitted'][0]:.0%}"


def _share(rate: Sequence[float]) -> str:
    return f"{rate[0]:.0%} [{rate[1]:.0%}, {rate[2]:.0%}]"
