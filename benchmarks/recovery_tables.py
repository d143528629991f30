"""The recovery study as tables and figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.recovery_strata import BEYOND, FAR
from latentrevise.data.storage import atomic_write

SHOWN = {  # what docs/recovery.md has of a study; all rows of all studies are on the site's page of all rows
    "gsm": (
        *("branch-checked", "step-checked", "branch-mass", "latent", "latent-random"),
        *("resample-rho0.8", "resample"),
    ),
    "recovery": (
        "hint",
        "pivot-pair",
        "pivot",
        "pivot-trie",
        "latent-plausible",
        "branch-mass",
        "resample",
        "latent",
        "latent-random",
    ),
}
PICTURED = (*SHOWN, "variants")  # whose figure it has


def table(family: str, pooled: dict[str, Any]) -> str:
    """A Markdown table, best valid rate first."""
    rows = pooled["strategies"]
    several = any(len(row["valid_by_model"]) > 1 for row in rows.values())
    timed = all("equal_seconds" in row for row in rows.values())  # not in files of before
    heads = ["strategy", "valid derivation %", *["by model"] * several, "at its passes", *["at its seconds"] * timed]
    heads += ["right answer %", "wrong target %", "passes", "seconds"]
    strata = pooled.get("strata")  # not in files of before
    hard = _hard(strata) if strata else {}
    heads += [f"beyond {rollouts} further rollouts ({prompts}): right, valid %" for rollouts, prompts in hard.values()]
    heads.append("admitted (valid)")
    lines = [
        f"**{family}** ({pooled['zero_hit']} zero-hit of {pooled['mined']} prompts, runs: {len(pooled['units'])})",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["valid"][0]):
        cells = [f"`{name}`", _rate(row["valid"])]
        if several:
            cells.append(" / ".join(f"{100 * v:.0f}" for v in row["valid_by_model"].values()))
        cells.append(_rate(row["equal_compute"]["valid"]))
        if timed:
            cells.append(_rate(row["equal_seconds"]["valid"]))
        cells += [_rate(row["answer"]), _percent(row["wrong_target"]), f"{row['passes']:.0f}", f"{row['seconds']:.2f}"]
        cells += [_of_stratum(strata, stratum, name) for stratum in hard]
        lines.append(f"| {' | '.join(cells)} | {row['admitted']} ({row['admitted_valid']}) |")
    return "\n".join(lines)


def tables(document: dict[str, Any]) -> str:
    """All rows of a study's document: a table a family, and from which code the runs come."""
    return "\n\n".join(
        [table(family, pooled) for family, pooled in document["families"].items()] + [_commits(document)]
    )


def brief(document: dict[str, Any]) -> str:
    """What a study's document says, as it stands in docs/: the rows that decide, several families side by side. Per
    cent of zero-hit prompts: valid derivations [95 %]; resampling at as many passes; right answers; wrong target."""
    families = document["families"]
    shown = SHOWN[document["name"]]
    names = tuple(name for name in shown if all(name in pooled["strategies"] for pooled in families.values()))
    if len(families) == 1:
        return "\n".join([_by_strata(*families.values(), names), "", _commits(document)])
    rows = {name: [pooled["strategies"][name] for pooled in families.values()] for name in names}
    heads = [f"{family} ({pooled['zero_hit']})" for family, pooled in families.items()]
    lines = [f"| strategy | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name, own in sorted(rows.items(), key=lambda item: -sum(row["valid"][0] for row in item[1])):
        lines.append(f"| `{name}` | {' | '.join(map(_cell, own))} |")
    return "\n".join([*lines, "", _commits(document)])


def _by_strata(pooled: dict[str, Any], names: Sequence[str]) -> str:
    """One family. Per cent of zero-hit prompts with a valid derivation, then with a right answer: [95 %]; resampling at
    as many passes; in as many seconds. Valid ones less resampling's in as many seconds. Then wrong targets, and right
    and valid ones of the prompts that are hard."""
    strata, rows, gains = pooled["strata"], pooled["strategies"], pooled["gains"]
    hard = _hard(strata)
    heads = ["strategy", f"valid ({pooled['zero_hit']})", "gain in valid", "right", "wrong target"]
    heads += [f"{n} rollouts fail ({prompts}): right, valid" for n, prompts in hard.values()]
    lines = [f"| {' | '.join(heads)} | seconds |", "|---" * (1 + len(heads)) + "|"]
    for name in sorted(names, key=lambda name: (-rows[name]["valid"][0], -rows[name]["answer"][0])):
        row = rows[name]
        cells = [
            f"{_whole(row[key])}; {_percent(row['equal_compute'][key])}; {_percent(row['equal_seconds'][key])}"
            for key in ("valid", "answer")
        ]
        cells.insert(1, "{:+.0f} [{:+.0f}, {:+.0f}]".format(*(100 * v for v in gains[name]["valid"])))
        cells += [_percent(row["wrong_target"]), *(_of_stratum(strata, stratum, name) for stratum in hard)]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {row['seconds']:.1f} |")
    return "\n".join(lines)


def _hard(strata: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """The strata of hard prompts: how many rollouts fail besides the mined ones, and how many prompts that are."""
    found = {BEYOND: "rollouts", FAR: "far_rollouts"}
    return {name: (strata[key], strata["prompts"].get(name, 0)) for name, key in found.items() if key in strata}


def _of_stratum(strata: dict[str, Any], stratum: str, name: str) -> str:
    """Right answers and valid derivations among its prompts."""
    row = strata.get(stratum, {}).get(name)
    return f"{_percent(row['answer'])}, {_percent(row['valid'])}" if row else "-"


def _whole(rate: Sequence[float]) -> str:
    return "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * v for v in rate))


def _cell(row: dict[str, Any]) -> str:
    others = (row["equal_compute"]["valid"], row["answer"], row["wrong_target"])
    return f"{_whole(row['valid'])}; {'; '.join(map(_percent, others))}"


def _rate(rate: Sequence[float]) -> str:
    return f"{100 * rate[0]:.1f} [{100 * rate[1]:.0f}, {100 * rate[2]:.0f}]"


def _percent(rate: Sequence[float] | None) -> str:
    return "-" if rate is None else f"{100 * rate[0]:.0f}"


def _commits(document: dict[str, Any]) -> str:
    return harness.provenance("runs", document.get("commits", {harness.NOT_RECORDED: len(document["units"])}))


def shown_families(results: Path) -> dict[str, dict[str, Any]]:
    """The families of all published studies that docs/recovery.md shows, those on real text first."""
    documents = [json.loads((results / f"{name}.json").read_text(encoding="utf-8")) for name in SHOWN]
    return {family: pooled for document in documents for family, pooled in document["families"].items()}


def summary(study: dict[str, dict[str, Any]]) -> str:
    """A short Markdown table, a row a family: the published method, the strategy with most valid derivations that reads
    no reference solution, and plain resampling at that one's compute. Valid derivations, right answers behind them."""
    lines = [
        "| family (zero-hit) | the published method | the best strategy | resampling at its compute |",
        "|---|---|---|---|",
    ]
    for family, pooled in study.items():
        rows = pooled["strategies"]
        best = max((name for name in rows if name != "hint"), key=lambda name: rows[name]["valid"][0])
        cells = [_both(rows[name]["valid"], rows[name]["answer"]) for name in ("latent", best)]
        control = rows[best]["equal_compute"]
        lines.append(
            f"| {family} ({pooled['zero_hit']}) | {cells[0]} | `{best}` {cells[1]} |"
            f" {_both(control['valid'], control['answer'])} |"
        )
    return "\n".join(lines)


def _both(valid: Sequence[float], answer: Sequence[float]) -> str:
    return f"{100 * valid[0]:.0f} % ({100 * answer[0]:.0f} %)"


def guard_figure(study: dict[str, dict[str, Any]], path: Path) -> None:
    """What the guards let through against what they keep, a line a family."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from latentrevise.report.drawing import RC, styles_for

    styles = styles_for(list(study))
    with mpl.rc_context(RC):
        drawing = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = drawing.subplots()
        axes.axhline(2, color="0.7", linewidth=1, linestyle=":")
        axes.axvline(80, color="0.7", linewidth=1, linestyle=":")
        for family, pooled in study.items():
            points = sorted((100 * p["kept"][0], 100 * p["contamination"][0]) for p in pooled["guards"])
            style = styles[family]
            axes.plot(*zip(*points, strict=True), color=style.colour, marker=style.marker, markersize=4, label=family)
        axes.set(
            xlim=(0, 102),
            ylim=(0, None),
            xlabel="valid samples kept, %",
            ylabel="invalid among the admitted, %",
            title="Guards: chosen on one set of prompts, measured on the others",
        )
        axes.legend(frameon=False)
        with atomic_write(path) as temporary:
            drawing.savefig(temporary, format="png", dpi=160, facecolor="white", metadata={"Software": None})


def figure(study: dict[str, dict[str, Any]], path: Path) -> None:
    """Valid recovery against compute, a panel a family: strategies with intervals, plain resampling as a line."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    from latentrevise.report.drawing import RC, styles_for

    styles = styles_for([name for pooled in study.values() for name in pooled["strategies"]])
    with mpl.rc_context(RC):
        drawing = Figure(figsize=(5.2 * len(study), 5.0), layout="constrained")
        for axes, (family, pooled) in zip(
            drawing.subplots(1, len(study), squeeze=False)[0], study.items(), strict=True
        ):
            curve, labels = pooled["resampling"], dict[tuple[float, float], list[str]]()
            grey = styles["resample"].colour
            axes.plot([p["passes"] for p in curve], [100 * p["valid"] for p in curve], color=grey, label="resampling")
            for name, row in pooled["strategies"].items():
                p, low, high = (100 * v for v in row["valid"])
                style = styles[name]
                axes.errorbar(
                    row["passes"],
                    p,
                    [[p - low], [high - p]],
                    fmt=style.marker,
                    color=style.colour,
                    markersize=5,
                    linewidth=1,
                )
                if p >= 10:  # the others lie on one another; the table has them
                    place = next((q for q in labels if abs(q[1] - p) < 2 and 0.9 < q[0] / row["passes"] < 1.1), None)
                    labels.setdefault(place or (row["passes"], p), []).append(name)
            for place, names in labels.items():
                label = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
                axes.annotate(label, place, xytext=(5, 3), textcoords="offset points", fontsize=8)
            axes.set(
                xscale="log",
                ylim=(-2, 102),
                title=f"{family}: {pooled['zero_hit']} zero-hit prompts",
                xlabel="token passes a prompt",
                ylabel="prompts with a valid derivation, %",
            )
            axes.xaxis.set_major_formatter(FuncFormatter(lambda passes, _: f"{passes:,.0f}"))
        with atomic_write(path) as temporary:
            drawing.savefig(temporary, format="png", dpi=160, facecolor="white", metadata={"Software": None})
