"""The training study's cells as tables and a figure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.training_plan import ARMS, COSTS, METRICS, PUBLISHED, Sizes, defined
from latentrevise.data.storage import atomic_write
from latentrevise.recovery.guards import bootstrap_mean


def rates(cells: Sequence[Mapping[str, Any]], hard: set[str]) -> dict[str, dict[str, float]]:
    """``hard pass@1`` and so on -> prompt -> the mean over the cells that judged it."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        for prompt, counts in cell.get("scores", {}).items():
            for metric, value in METRICS.items():
                found[f"{'hard' if prompt in hard else 'solved'} {metric}"][prompt].append(value(*counts))
    return {key: {prompt: fmean(values) for prompt, values in own.items()} for key, own in found.items()}


def pool(
    cells: Sequence[Mapping[str, Any]], hard: set[str], plan: Mapping[str, Sequence[str]] = ARMS
) -> dict[str, Any]:
    """The cells of one family as one table, a row an arm of ``plan``; gains are over the first arm of the same
    training, prompt by prompt. A rival without a cell has no row."""
    arms: dict[str, dict[str, Any]] = {}
    for kind, (first, *_) in plan.items():
        base = rates([c for c in cells if (c["kind"], c["arm"]) == (kind, first)], hard)
        for arm in plan[kind]:
            own = [c for c in cells if (c["kind"], c["arm"]) == (kind, arm)]
            if not own and defined(kind, arm):
                continue
            found = rates(own, hard)
            for key in [key for key in found if key in base and arm != first]:
                found[f"{key} gain"] = {p: v - base[key][p] for p, v in found[key].items() if p in base[key]}
            arms[arm] = {
                "kind": kind,
                "p": {key: sign_flip(list(of.values())) for key, of in found.items() if key.endswith(" gain")},
                "rates": {key: bootstrap_mean(list(of.values())) for key, of in found.items() if of},
                "runs": [fmean(rates([c], hard)["hard valid@1"].values()) for c in own if "scores" in c],
                "means": {key: fmean(c[key] for c in own) for key in COSTS if own and all(key in c for c in own)},
                "zero_hit": [fmean(step) for step in zip(*(c.get("zero_hit", ()) for c in own), strict=True)],
            }
    judged = {prompt for c in cells for prompt in c.get("scores", ())}
    return {"hard": len(judged & hard), "solved": len(judged - hard), "arms": arms}


def sign_flip(differences: Sequence[float], draws: int = 4000, seed: int = 0) -> float:
    """Two-sided p of a paired test: how often a mean as far from 0 comes up when each difference has a random sign."""
    values = np.asarray(differences, dtype=float)
    if not values.any():
        return 1.0
    signs = np.random.default_rng(seed).integers(0, 2, (draws, len(values))) * 2 - 1
    return float((1 + (np.abs(signs @ values) >= abs(values.sum()) - 1e-12).sum()) / (draws + 1))


def comparison(document: Mapping[str, Any]) -> str:
    """The paper's own comparison, its figures beside ours, per cent; of the families that have all of its arms."""
    found = {name: pooled["arms"] for name, pooled in document["families"].items()}
    families = {name: arms for name, arms in found.items() if all(arms.get(arm, {}).get("rates") for arm in PUBLISHED)}
    if not families:
        return ""
    head = "".join(f" {name}: pass@1 / pass@8 | gain of pass@1 | valid@1 |" for name in families)
    lines = [
        "**The paper's comparison**. Theirs: pass@1 / pass@32 over four benchmarks (DAPO on other prompts). Ours: hard",
        "prompts; gains over SFT on ordinary rows, over plain GRPO.",
        "",
        f"| training | paper, 1.5B | paper, 8B |{head}",
        "|" + "---|" * (3 + 3 * len(families)),
    ]
    for arm, published in PUBLISHED.items():
        cells = [f"{f[0]:.2f} / {f[1]:.2f}" if f else "-" for f in published]
        for arms in families.values():
            rates, key = arms[arm]["rates"], "hard pass@1 gain"
            one, eight, valid = (100 * rates[f"hard {metric}"][0] for metric in ("pass@1", "pass@8", "valid@1"))
            gain = f"{100 * rates[key][0]:+.1f}{_chance(arms[arm], key)}" if key in rates else "-"
            cells += [f"{one:.1f} / {eight:.1f}", gain, f"{valid:.1f}"]
        kind = next(arms[arm]["kind"] for arms in families.values())
        lines.append(f"| {kind} `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines)


SHOWN = (  # the arms that docs/training.md has; all are on the site's page of all rows
    "start",
    "ordinary",
    "fresh-resampled",
    "latent",
    "pivot",
    "step-checked",
    "grpo",
    "grpo + latent",
    "grpo + pivot",
    "grpo = pivot",
)


def table(family: str, pooled: dict[str, Any], sizes: Sizes) -> str:
    """A Markdown table of all arms, per cent."""

    def had(row: dict[str, Any]) -> str:
        means = row["means"]
        if row["zero_hit"]:
            shares = quarters(row["zero_hit"])
            return f"zero-hit {shares[0]:.0f} → {shares[-1]:.0f}"
        if "different" not in means:
            return "-"
        valid = f" ({means['valid_rows']:.3g} valid)" if "valid_rows" in means else ""
        return f"{means['different']:.3g} of {sizes.rows} rows{valid}"

    keys = ("hard pass@1", "hard pass@8", "solved valid@1")
    lines = [
        f"**{family}** ({pooled['hard']} hard and {pooled['solved']} solved prompts)",
        "",
        f"| arm | its data | hard valid@1 | gain | by run | {' | '.join(keys)} |",
        "|" + "---|" * (len(keys) + 5),
    ]
    for arm, row in pooled["arms"].items():
        runs = " / ".join(f"{100 * v:.1f}" for v in row["runs"])
        first, *others = (_rate(row, key) for key in ("hard valid@1", *keys))
        gain = _rate(row, "hard valid@1 gain") + _chance(row, "hard valid@1 gain")
        lines.append(f"| {row['kind']} `{arm}` | {had(row)} | {first} | {gain} | {runs} | {' | '.join(others)} |")
    return "\n".join(lines)


def tables(document: Mapping[str, Any]) -> str:
    """All arms of the study's document: the paper's comparison, a table a family, from which code the cells come."""
    sizes = Sizes(**document["sizes"])
    found = [table(name, of, sizes) for name, of in document["families"].items()]
    return "\n\n".join([*filter(None, [comparison(document)]), *found, _commits(document)])


def brief(document: Mapping[str, Any]) -> str:
    """What the study's document says, as it stands in docs/: the arms that decide, the families side by side."""
    families = document["families"]
    kinds = {arm: row["kind"] for pooled in families.values() for arm, row in pooled["arms"].items()}
    heads = [f"{name} ({pooled['hard']} hard, {pooled['solved']} solved)" for name, pooled in families.items()]
    lines = [f"| arm | {' | '.join(heads)} |", "|" + "---|" * (1 + len(heads))]
    for arm in (arm for arm in SHOWN if arm in kinds):
        cells = (_cell(pooled["arms"].get(arm, {"rates": {}})) for pooled in families.values())
        lines.append(f"| {kinds[arm]} `{arm}` | {' | '.join(cells)} |")
    said = "Hard valid@1 [95 %]; gain (p); solved valid@1. Per cent."
    return "\n\n".join([said, "\n".join(lines), _commits(document)])


def _cell(row: Mapping[str, Any]) -> str:
    if "hard valid@1" not in row["rates"]:
        return "-"
    gain = row["rates"].get("hard valid@1 gain")
    told = f"{100 * gain[0]:+.1f}{_chance(row, 'hard valid@1 gain')}" if gain else "-"
    solved = row["rates"].get("solved valid@1")
    return f"{_rate(row, 'hard valid@1')}; {told}; " + (f"{100 * solved[0]:.1f}" if solved else "-")


def _rate(row: Mapping[str, Any], key: str) -> str:
    found = row["rates"].get(key)
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in found)) if found else "-"


def _chance(row: Mapping[str, Any], key: str) -> str:
    """The p of a gain, where the cells were made with one."""
    p = row.get("p", {}).get(key)
    return "" if p is None else " (p < 0.001)" if p < 0.001 else f" (p {p:.2g})"


def _commits(document: Mapping[str, Any]) -> str:
    return harness.provenance("cells", document.get("commits", {harness.NOT_RECORDED: document["cells"]["done"]}))


def quarters(shares: Sequence[float]) -> list[float]:
    """Of the steps: the mean of each quarter, per cent. One step has few groups."""
    return [100 * float(part.mean()) for part in np.array_split(np.array(shares), min(4, len(shares)))]


def figure(study: dict[str, dict[str, Any]], path: Path) -> None:
    """A row a family: rates on hard and on solved prompts with intervals, and the zero-hit groups over training."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from latentrevise.report.drawing import CYCLE, INK, MARKERS, MUTED, RC, RIGHT, WRONG

    with mpl.rc_context(RC):
        drawing = Figure(figsize=(15, 4.6 * len(study)), layout="constrained")
        panels = drawing.subplots(len(study), 3, squeeze=False)
        for (family, pooled), (*rated, trained) in zip(study.items(), panels, strict=True):
            arms = pooled["arms"]
            for axes, part in zip(rated, ("hard", "solved"), strict=True):
                for metric, colour, shift in (("pass@1", WRONG, -0.15), ("valid@1", RIGHT, 0.15)):
                    known = [(y, row["rates"].get(f"{part} {metric}")) for y, row in enumerate(arms.values())]
                    found = [[y + shift, *(100 * v for v in rate)] for y, rate in known if rate]
                    y, p, low, high = np.array(found).reshape(-1, 4).T
                    axes.hlines(y, low, high, color=colour, linewidth=1.3)
                    axes.plot(p, y, "o", color=colour, markersize=5, label=metric)
                kinds = [row["kind"] for row in arms.values()]
                for place in (y - 0.5 for y in range(1, len(arms)) if kinds[y] != kinds[y - 1]):
                    axes.axhline(place, color=MUTED, linewidth=0.6)
                labels = [arm if row["kind"] == "start" else f"{row['kind']} {arm}" for arm, row in arms.items()]
                axes.set_yticks(range(len(arms)), labels)
                axes.set(ylim=(len(arms) - 0.5, -0.5), xlabel="%", title=f"{family}: {pooled[part]} {part} prompts")
            trained_arms = [arm for arm, row in arms.items() if row["kind"] == "rlvr"]
            for arm, colour, marker in zip(trained_arms, (INK, *CYCLE), MARKERS, strict=False):
                if shares := arms[arm]["zero_hit"]:
                    means = quarters(shares)
                    trained.plot(range(1, len(means) + 1), means, color=colour, marker=marker, label=arm)
            trained.set(xlabel="quarter of the steps", ylabel="%", title=f"{family}: zero-hit groups while training")
            trained.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawing.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
        drawing.legend(*panels[0, 2].get_legend_handles_labels(), loc="outside upper right", ncols=6)
        with atomic_write(path) as temporary:
            drawing.savefig(temporary, format="png", dpi=130, facecolor="white", metadata={"Software": None})
