"""``python -m benchmarks budgets``: mining in rounds against the same number of rollouts for every prompt.

On each bundled family the prompts are mined once with all rollouts. What any smaller number, and any rounds, would have
drawn are the first of these (``tests/test_budgets.py`` holds mining to that), so the table needs no other run; one is
made nevertheless, in rounds, and its bill compared with the one computed.

Solved: at least one correct rollout, in per cent of prompts with 95 % Wilson intervals. Passes: tokens decoded, and a
prompt's own for each round that it was drawn in. At equal compute: as many rollouts at most as rounds get for what the
uniform ones cost.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import harness
from latentrevise.data.records import Prompt, Rollout
from latentrevise.demo import BUNDLED, get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.model.loading import load_model
from latentrevise.recovery.collect import mined
from latentrevise.recovery.guards import wilson
from latentrevise.recovery.mined import decoded_tokens
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.settings import MineConfig

RESULTS = Path(__file__).parent / "results" / "budgets.json"
UNIFORM = (4, 8, 16, 32)
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
    rounds = replace(whole, rollouts=checked, mine=MineConfig(rounds=checked // options.round))
    in_rounds = Recovery(model, tokenizer, rounds, place / "rounds", progress=False)
    for mining in (run, in_rounds):
        with mining.session():
            mining.mine(rows)
    table = compared(run.prompts, run.rollouts(), options.most, options.round)
    spent = mined(in_rounds.job).compute.passes / len(rows)
    expected = table[UNIFORM.index(checked)]["rounds"]["passes"]
    assert spent == expected, f"{name}: rounds cost {spent} passes a prompt, not {expected}"
    return {"prompts": len(rows), "seconds": time.perf_counter() - began, "table": table}


def main(options: argparse.Namespace) -> dict[str, Any]:
    if max(UNIFORM) % options.round or options.most % options.round or options.most < max(UNIFORM):
        raise SystemExit(f"--round must divide {max(UNIFORM)} and --most, which must be at least {max(UNIFORM)}")
    document: dict[str, Any] = {
        **harness.heading("budgets"),
        "round": options.round,
        "families": {},
    }
    with tempfile.TemporaryDirectory() as place:
        for name in options.families or BUNDLED:
            document["families"][name] = found = measure(name, options, Path(place) / name)
            print(f"\n{name}: {found['prompts']} prompts, {found['seconds']:.0f} s\n{text(found['table'])}", flush=True)
    if options.publish:
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


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


def _share(rate: Sequence[float]) -> str:
    return f"{rate[0]:.0%} [{rate[1]:.0%}, {rate[2]:.0%}]"
