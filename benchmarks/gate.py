"""``python -m benchmarks gate``: the implicit-value gate on the bundled families, before any strategy runs.

What ``latentrevise audit --gate-only`` measures on prompts of one's own. AUC: within a prompt, of branches that succeed
over those that fail, by the answer's score behind the branch and by the branch's own log-probability; mean over
prompts with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.recovery import publish
from latentrevise.data.storage import write_json
from latentrevise.demo import BUNDLED, get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.model.loading import load_model
from latentrevise.recovery.pipeline import Recovery

RESULTS = Path(__file__).parent / "results" / "gate.json"
PAGE = Path(__file__).parent.parent / "docs" / "audits.md"
PROMPTS = 192  # mined of each family


def measure(name: str, prompts: int, out: Path) -> dict[str, Any]:
    model, tokenizer = load_model(model_dir(name), dtype="float32", device="cpu")
    recovery = Recovery(model, tokenizer, demo_config(get_family(name)), out, progress=False)
    with recovery.session():
        recovery.mine(make_prompts(get_family(name), prompts, split="report", seed=0))
        return recovery.gate()


def main(options: argparse.Namespace) -> dict[str, Any]:
    document = {**harness.heading("gate"), "mined": options.mined or PROMPTS, "families": {}}
    with tempfile.TemporaryDirectory() as place:
        for name in options.families or BUNDLED:
            document["families"][name] = measure(name, document["mined"], Path(place) / name)
    print(table(document))
    if options.publish:
        write_json(RESULTS, document)
        publish(table(document), PAGE, "gate")
    return document


def table(document: dict[str, Any]) -> str:
    """A row a signal, and what the gate recommends."""
    found = document["families"]
    heads = [f"{name} ({gate['prompts_with_both']} prompts)" for name, gate in found.items()]
    lines = [f"| AUC of | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for told, signal in (("the answer's score", "value"), ("the branch's own log-probability", "prior")):
        cells = ("{:.2f} [{:.2f}, {:.2f}]".format(*gate["auc"][signal]) for gate in found.values())
        lines.append(f"| {told} | {' | '.join(cells)} |")
    advised = (", ".join(f"`{name}`" for name in gate["recommended"]) or "nothing" for gate in found.values())
    return "\n".join([*lines, f"| recommended | {' | '.join(advised)} |"])
