"""The audits of a run as tables: the gate, what the strategies' answers are worth, what the guards are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from latentrevise.report.summary import rows_of


@dataclass(frozen=True)
class TradeOff:
    """One combination of guards: shares in per cent, and the thresholds as text."""

    kept: float
    contamination: float
    thresholds: str


def trade_offs(metrics: Mapping[str, Any]) -> list[TradeOff]:
    """The best combinations of guards measured in a run, the purest first; empty where nothing could be checked."""
    points = (metrics.get("guards") or {}).get("trade_off", [])
    return [TradeOff(100 * p["kept"], 100 * p["contamination"], _thresholds(p["thresholds"])) for p in points]


def best_below(points: list[TradeOff], contamination: float) -> TradeOff | None:
    """The one that keeps most with at most this share of invalid derivations (per cent) among what it admits."""
    return max((p for p in points if p.contamination <= contamination), key=lambda p: p.kept, default=None)


def _thresholds(values: Mapping[str, float]) -> str:
    return ", ".join(f"{code} {value:.3g}" for code, value in values.items()) or "none"


def gate_text(gate: Mapping[str, Any]) -> str:
    """The gate in a few lines."""
    lines = [
        f"implicit value: {gate['prompts']} solved prompts, {gate['branches']} branches,"
        f" {gate['prompts_with_both']} prompts with branches of both kinds"
    ]
    if gate["prompts_with_both"]:
        rates = (f"{name} {mean:.2f} [{low:.2f}, {high:.2f}]" for name, (mean, low, high) in gate["auc"].items())
        lines.append("AUC within a prompt: " + "; ".join(rates))
        lines.append(
            f"scoring a branch takes {gate['scoring_tokens']:.0f} token passes, continuing it"
            f" {gate['continuation_tokens']:.0f}"
        )
    lines.append(f"recommended: {', '.join(gate['recommended']) or 'nothing yet'} ({gate['reason']})")
    return "\n".join(lines)


def audit_table(metrics: Mapping[str, Any]) -> Table:
    """What each strategy's right answers are worth; shares in per cent."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    table.caption = (
        "per cent. valid: of the right answers, with a derivation that holds; admitted: of the right answers, by the"
        " guards; invalid: of the admitted, without one; gap: plain minus sampling log-prob, nats a token; longer:"
        " against the failed rollouts; wait, check: of the right answers, with such a word"
    )
    for heading in ("strategy", "right", "valid", "admitted", "invalid", "gap", "longer", "wait", "check"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right", no_wrap=True)
    for row in rows_of(dict(metrics)):
        arm = metrics["arms"][row.arm]
        if row.is_side_arm:
            continue
        count, guarded, length = arm["correct_samples"], arm.get("guarded"), arm["length"]
        longer = None if not length["recovered_mean"] else length["recovered_mean"] / max(length["failed_mean"], 1e-9)
        table.add_row(
            row.arm,
            str(count),
            _percent(guarded["valid"] / count if guarded and count else None),
            _percent(arm["admitted"] / count if count else None),
            _percent(guarded["contamination"][0] if guarded and guarded["admitted"] else None),
            "–" if arm["reliance"] is None else f"{arm['reliance']:+.2f}",
            "–" if longer is None else f"{longer:.2f}x",
            *(_percent(arm["markers"]["recovered"][kind] if count else None) for kind in ("wait", "check")),
        )
    return table


def guard_table(metrics: Mapping[str, Any]) -> Table | None:
    """Each guard alone at 5 % of the valid samples lost, and the trade-off of all together; None without a checker."""
    guards = metrics.get("guards")
    if not guards or not guards["valid"]:
        return None
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    table.caption = (
        f"per cent of {guards['valid']} valid and {guards['invalid']} invalid samples with the right answer. As set:"
        f" {_percent(1 - guards['false_reject'][0])} of the valid and {_percent(guards['false_accept'][0])} of the"
        f" invalid ones are admitted; {_percent(guards['contamination'][0])} of the admitted are invalid"
    )
    for heading in ("guards", "kept", "invalid", "thresholds"):
        table.add_column(heading, justify="right" if heading in ("kept", "invalid") else "left")
    for code, points in guards["curves"].items():
        point = min((p for p in points if p["kept"] >= 0.95), key=lambda p: p["false_accept"], default=points[0])
        kept, accepted = point["kept"] * guards["valid"], point["false_accept"] * guards["invalid"]
        share = accepted / (kept + accepted) if kept + accepted else 0.0
        table.add_row(f"{code} alone", _percent(point["kept"]), _percent(share), f"{point['threshold']:.3g}")
    for each in trade_offs(metrics):
        table.add_row("together", f"{each.kept:.1f}", f"{each.contamination:.1f}", each.thresholds)
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
