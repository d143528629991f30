"""The report's figures: which panels a run has, and what they show. How they are drawn: ``drawing``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from latentrevise.recovery.guards import MarkerCounts
from latentrevise.report.drawing import (
    INK,
    PALETTE,
    RIGHT,
    WRONG,
    Group,
    Panel,
    Series,
    Style,
    bar_height,
    draw_bars,
    draw_boxes,
    draw_curves,
    draw_recovery,
    handles,
    patches,
)
from latentrevise.report.runs import FinishedRun
from latentrevise.report.summary import CONTROL_STRATEGY, Rate, Row, rows_of


def figure_groups(run: FinishedRun, styles: dict[str, Style]) -> list[Group]:
    """All figures of one run, in the order of the page."""
    rows = [row for row in rows_of(run.metrics) if not row.is_side_arm]
    groups = [
        _recovery_group(run, rows, styles),
        _target_group(run, rows),
        _length_group(run, rows, styles),
        _trace_group(run, rows, styles),
        _marker_group(run, rows, styles),
        _guard_group(run, rows, styles),
    ]
    return [_without_zeros(group) for group in groups]


def _without_zeros(group: Group) -> Group:
    """A panel of zeros alone is left out, and said."""
    panels = [panel for panel in group.panels if panel.says_something]
    if len(panels) == len(group.panels):
        return group
    left_out = ", ".join(panel.title.lower() for panel in group.panels if not panel.says_something)
    told = f"Left out, since every value is 0: {left_out}."
    return replace(group, panels=panels, empty=f"{group.empty} {told}".strip())


def _numbers(values: Iterable[Rate | float | None]) -> tuple[float, ...]:
    return tuple(value.value if isinstance(value, Rate) else value for value in values if value is not None)


# --- recovery against compute -----------------------------------------------------------------------------------------


def _recovery_group(run: FinishedRun, rows: list[Row], styles: dict[str, Style]) -> Group:
    shown = [row for row in rows if row.per_prompt]
    curve = run.metrics["control_curve"]
    title = "Recovery against compute"
    if not shown:
        return Group("recovery", title, [], empty="No strategy was run on a zero-hit prompt.")
    panels = [
        Panel(
            "Right answer",
            "Zero-hit prompts with at least one right answer, against compute; bars: 95\u00a0% Wilson intervals"
            + ("; line: plain resampling with more samples." if curve else "."),
            partial(
                draw_recovery,
                points=[(row, row.recovered) for row in shown],
                curve=curve,
                key="recovered_rate",
                styles=styles,
            ),
            values=_numbers([*(row.recovered for row in shown), *(p["recovered_rate"][0] for p in curve)]),
        )
    ]
    if run.metrics["derivations_checked"]:
        panels.append(
            Panel(
                "Right answer with a valid derivation",
                "The same, counting only continuations whose every checked step holds.",
                partial(
                    draw_recovery,
                    points=[(row, row.valid) for row in shown],
                    curve=curve,
                    key="valid_rate",
                    styles=styles,
                ),
                values=_numbers([*(row.valid for row in shown), *(p["valid_rate"][0] for p in curve)]),
            )
        )
    legend: list[Any] = handles([row.strategy for row in shown], styles)
    if curve:
        legend.append(Line2D([], [], color=styles[CONTROL_STRATEGY].colour, label="resampling, more samples"))
    return Group("recovery", title, panels, legend)


# --- bars: targets, guards, markers -----------------------------------------------------------------------------------


def _target_group(run: FinishedRun, rows: list[Row]) -> Group:
    shown = [row for row in rows if row.wrong_target is not None]
    title = "Right target against wrong target"
    if not shown:
        return Group("targets", title, [], empty="Wrong targets were not tried: selectivity is not known.")
    series: list[Series] = [
        ("right answer", RIGHT, [row.recovered for row in shown]),
        ("wrong answer", WRONG, [row.wrong_target for row in shown]),
    ]
    if run.metrics["derivations_checked"]:
        series.insert(1, ("valid derivation", PALETTE["green"][0], [row.valid for row in shown]))
    panel = Panel(
        "Share of prompts on which the target is reached",
        "How often the right answer is reached, and how often a random wrong one: by the same procedure aimed at it, "
        "or by chance where a strategy does not read the answer. 95\u00a0% Wilson intervals.",
        partial(draw_bars, categories=[row.strategy for row in shown], series=series),
        height=bar_height(len(shown), len(series)),
        values=_numbers(value for _, _, values in series for value in values),
    )
    return Group("targets", title, [panel], patches(series))


def _guard_group(run: FinishedRun, rows: list[Row], styles: dict[str, Style]) -> Group:
    guards = {row.strategy: run.metrics["arms"][row.arm]["guards"] for row in rows}
    guards = {name: values for name, values in guards.items() if any(guard["of"] for guard in values.values())}
    title = "Guard rejections"
    if not guards:
        return Group(
            "guards", title, [], empty="No continuation reached the right answer: the guards had nothing to judge."
        )
    codes = list(dict.fromkeys(code for values in guards.values() for code in values))
    series: list[Series] = [
        (name, styles[name].colour, [values[code]["rejected"] / values[code]["of"] for code in codes])
        for name, values in guards.items()
    ]
    panel = Panel(
        "Right answers rejected, by guard",
        "Share of the continuations with the right answer that each guard kept out of the training data.",
        partial(draw_bars, categories=codes, series=series),
        height=bar_height(len(codes), len(series)),
        values=_numbers(value for _, _, values in series for value in values),
    )
    return Group("guards", title, [panel], patches(series))


def _marker_group(run: FinishedRun, rows: list[Row], styles: dict[str, Style]) -> Group:
    failed = MarkerCounts()
    for text in run.failed_texts():
        failed.add(text)
    base: list[tuple[str, str, dict[str, float]]] = [("failed rollouts", INK, failed.shares)] if failed.texts else []
    panels: list[Panel] = []
    legend: dict[str, Patch] = {}
    for key, heading in (("all", "All continuations"), ("recovered", "Continuations with the right answer")):
        counts = {row.arm: run.metrics["arms"][row.arm] for row in rows}
        shares = [
            (row.strategy, styles[row.strategy].colour, counts[row.arm]["markers"][key])
            for row in rows
            if (counts[row.arm]["correct_samples"] if key == "recovered" else row.samples_per_prompt)
        ]
        if not shares:
            continue
        words = list(shares[0][2])
        series: list[Series] = [
            (name, colour, [found[word] for word in words]) for name, colour, found in base + shares
        ]
        if not any(share for _, _, values in series for share in values):
            continue
        legend |= {name: Patch(color=colour, label=name) for name, colour, _ in series}
        panels.append(
            Panel(
                heading,
                "Share of the texts with a word of reconsideration, by kind of word.",
                partial(draw_bars, categories=words, series=series),
                height=bar_height(len(words), len(series)),
            )
        )
    empty = "" if panels else "No text contains a word of reconsideration."
    return Group("markers", "Reflection markers", panels, list(legend.values()), empty)


# --- traces -----------------------------------------------------------------------------------------------------------

TRACES = (
    ("loss", "Objective", "nats", "The objective at each iterate, the start included."),
    ("gap", "Frank-Wolfe gap", "nats", "What the linear model still promises, summed over the positions."),
    ("step", "Step size", "", "Mean gamma of a Frank-Wolfe step, or the rate of an entropic one."),
    ("entropy", "Entropy of the mixtures", "nats", "Mean entropy of the positions' mixtures; 0: one token a position."),
)


def _trace_group(run: FinishedRun, rows: list[Row], styles: dict[str, Style]) -> Group:
    traces = {row.strategy: run.traces(row.arm) for row in rows}
    traces = {name: values for name, values in traces.items() if values}
    title = "Optimisation"
    if not traces:
        return Group(
            "optimisation", title, [], empty="No strategy of this run optimises a prefix: there are no traces."
        )
    panels = []
    for key, heading, unit, caption in TRACES:
        found = {name: _quartiles([trace[key] for trace in values]) for name, values in traces.items()}
        curves = {name: curve for name, curve in found.items() if curve is not None}
        if curves:
            panels.append(
                Panel(
                    heading,
                    caption + " Line: median over starts; band: quartiles.",
                    partial(draw_curves, curves=curves, unit=unit, styles=styles),
                    height=2.9,
                )
            )
    return Group("optimisation", title, panels, handles(list(traces), styles, line="-"))


def _quartiles(series: list[list[float]]) -> np.ndarray | None:
    """``[3, K]``: the quartiles at each step, over the starts that got that far; None without any number."""
    present = [np.array(values, dtype=float) for values in series if values]
    if not present:
        return None
    padded = np.full((len(present), max(map(len, present))), np.nan)
    for row, values in enumerate(present):
        padded[row, : len(values)] = values
    return np.nanpercentile(padded, [25, 50, 75], axis=0)


# --- lengths ----------------------------------------------------------------------------------------------------------


def _length_group(run: FinishedRun, rows: list[Row], styles: dict[str, Style]) -> Group:
    title = "Lengths"
    boxes: list[tuple[str, str, Counter[int]]] = []
    failed = run.failed_lengths()
    if failed:
        boxes.append(("failed rollouts", INK, failed))
    for row in rows:
        if not run.has_arm(row.arm):
            continue
        lengths = run.hit_lengths(row.arm)
        by_validity = {True: ", valid", False: ", not valid", None: ""}
        for valid, suffix in by_validity.items():
            if values := lengths[valid]:
                boxes.append((row.strategy + suffix, styles[row.strategy].colour, values))
    if not boxes:
        return Group("lengths", title, [], empty="The run directory holds no rollouts and no recovered continuations.")
    panel = Panel(
        "Tokens after the prompt",
        "Failed rollouts of the zero-hit prompts, and recovered trajectories (prefix and continuation). "
        "Line: median; box: quartiles; whiskers: 5th to 95th percentile; n on the right.",
        partial(draw_boxes, boxes=boxes),
        height=max(1.7, 0.8 + 0.3 * len(boxes)),
    )
    empty = "" if len(boxes) > 1 or not failed else "No continuation was recovered: only failed rollouts are shown."
    return Group("lengths", title, [panel], empty=empty)
