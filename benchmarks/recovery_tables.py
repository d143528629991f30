"""The recovery study as tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from latentrevise.data.records import atomic_write


def table(family: str, pooled: dict[str, Any]) -> str:
    """A Markdown table, best valid rate first."""

    def rate(r: Sequence[float]) -> str:
        return f"{100 * r[0]:.1f} [{100 * r[1]:.0f}, {100 * r[2]:.0f}]"

    def number(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines = [
        f"**{family}** ({pooled['zero_hit']} zero-hit of {pooled['mined']} mined prompts, {len(pooled['units'])} runs)",
        "",
        "| strategy | valid derivation % | by model | at its passes | at its seconds | right answer % | wrong target % "
        "| selectivity | passes | seconds | admitted rows (valid) |",
        "|---" * 11 + "|",
    ]
    for name, row in sorted(pooled["strategies"].items(), key=lambda item: -item[1]["valid"][0]):
        models = " / ".join(f"{100 * v:.0f}" for v in row["valid_by_model"].values())
        seconds = rate(row["equal_seconds"]["valid"]) if "equal_seconds" in row else "-"  # not in files of before
        wrong = "-" if row["wrong_target"] is None else f"{100 * row['wrong_target'][0]:.1f}"
        lines.append(
            f"| `{name}` | {rate(row['valid'])} | {models} | {rate(row['equal_compute']['valid'])} |"
            f" {seconds} | {rate(row['answer'])} | {wrong} | {number(row['selectivity'], 2)} |"
            f" {row['passes']:.0f} | {row['seconds']:.2f} | {row['admitted']} ({row['admitted_valid']}) |"
        )
    return "\n".join(lines)


def tables(document: dict[str, Any]) -> str:
    """What a study's document says, as it stands in docs/: a table a family, and from which code the runs come."""
    commits = document.get("commits", {harness.NOT_RECORDED: len(document["units"])})
    found = [table(family, pooled) for family, pooled in document["families"].items()]
    return "\n\n".join([*found, harness.provenance("runs", commits)])


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
