"""The report's figures: each panel is drawn once, into a themed inline SVG for the page and into a PNG for papers.

One palette serves both. Panels are drawn in its light colours; in the SVG every colour of the palette becomes the CSS
variable of its name, so that the page's dark theme reaches into the figures.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from latentrevise.report.summary import CONTROL_STRATEGY, Rate, Row, number

# Okabe and Ito's colour-blind-safe hues, darkened until each has a contrast of at least 3 against the paper; the second
# colour is the same hue for the dark theme. Strategies differ in marker shape too, verdicts in their sign.
PALETTE: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#15181b"),
    "ink": ("#1b2025", "#e4e7ea"),
    "muted": ("#59636d", "#a0aab4"),
    "rule": ("#d8dde2", "#363e46"),
    "control": ("#6d767f", "#98a2ac"),
    "blue": ("#0072b2", "#5aaae2"),
    "vermillion": ("#c8500b", "#f0894a"),
    "green": ("#00805f", "#3dbd94"),
    "purple": ("#a0529a", "#d896d2"),
    "ochre": ("#946a00", "#dcab3c"),
    "sky": ("#2f8fc4", "#8fcff4"),
}
INK, MUTED, RULE = (PALETTE[name][0] for name in ("ink", "muted", "rule"))
CYCLE = [PALETTE[name][0] for name in ("vermillion", "blue", "green", "purple", "ochre", "sky")]
MARKERS = ("s", "o", "^", "D", "v", "P", "X")
RIGHT, WRONG = PALETTE["blue"][0], PALETTE["vermillion"][0]
WIDTH, HEIGHT = 4.7, 3.3  # inches; at which 10.5 pt text is readable when a phone shows the panel 360 px wide
RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "latentrevise",
}


Series = tuple[str, str, Sequence["Rate | float | None"]]  # label, colour, one value a category


@dataclass(frozen=True)
class Panel:
    """One axes: its heading, what it shows (caption, also the text alternative) and how to draw it."""

    title: str
    caption: str
    draw: Callable[[Axes], None]
    height: float = HEIGHT
    values: tuple[float, ...] | None = None  # what is drawn, where a panel of zeros alone would say nothing

    @property
    def says_something(self) -> bool:
        return self.values is None or any(self.values)


@dataclass(frozen=True)
class Group:
    """Panels that belong together and share a legend; one PNG. A group without panels says why in ``empty``."""

    name: str
    title: str
    panels: list[Panel]
    legend: list[Any] = field(default_factory=list)
    empty: str = ""


@dataclass(frozen=True)
class Style:
    """Colour and marker of a strategy, the same in every figure of a report."""

    colour: str
    marker: str


def styles_for(strategies: Sequence[str]) -> dict[str, Style]:
    """Styles by order of first appearance; plain resampling is always the grey one."""
    others = [name for name in dict.fromkeys(strategies) if name != CONTROL_STRATEGY]
    styles = {
        name: Style(CYCLE[index % len(CYCLE)], MARKERS[index % len(MARKERS)]) for index, name in enumerate(others)
    }
    styles[CONTROL_STRATEGY] = Style(PALETTE["control"][0], "o")
    return styles


def svg(panel: Panel, legend: Sequence[Any], key: str) -> str:
    """The panel as an inline SVG element whose ids start with ``key`` and whose colours are CSS variables."""
    buffer = io.StringIO()
    with mpl.rc_context(RC):
        figure = _figure([panel], legend)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), key, f"{panel.title}. {panel.caption}")


def png(group: Group) -> bytes:
    """All panels of the group side by side, 200 dpi, on white."""
    buffer = io.BytesIO()
    with mpl.rc_context(RC):
        figure = _figure(group.panels, group.legend, titles=True)
        figure.savefig(buffer, format="png", dpi=200, facecolor=PALETTE["paper"][0], metadata={"Software": None})
    return buffer.getvalue()


def _figure(panels: Sequence[Panel], legend: Sequence[Any], titles: bool = False) -> Figure:
    legend_rows = -(-len(legend) // (2 * len(panels)))
    height = max(panel.height for panel in panels) + 0.24 * legend_rows + (0.25 if titles else 0.0)
    figure = Figure(figsize=(WIDTH * len(panels), height), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel.draw(axes)
        if titles:
            axes.set_title(panel.title, loc="left", fontsize=11.5)
    if legend:
        figure.legend(handles=list(legend), loc="outside upper left", ncols=2 * len(panels))
    return figure


def _inline(text: str, key: str, label: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
    for name, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{name})")
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None, "matplotlib always writes a view box"
    label = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return re.sub(r"<svg[^>]*>", lambda _: f'<svg {view_box[0]} role="img" aria-label="{label}">', text, count=1)


def _percent_axis(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def handles(names: Sequence[str], styles: dict[str, Style], line: Literal["-", "none"] = "none") -> list[Line2D]:
    return [
        Line2D([], [], color=styles[name].colour, marker=styles[name].marker, linestyle=line, label=name, markersize=6)
        for name in names
    ]


def patches(series: list[Series]) -> list[Patch]:
    return [Patch(color=colour, label=label) for label, colour, _ in series]


def bar_height(categories: int, series: int) -> float:
    return max(1.6, 0.8 + categories * (0.22 * series + 0.16))


def draw_recovery(
    axes: Axes,
    points: list[tuple[Row, Rate | None]],
    curve: list[dict[str, Any]],
    key: str,
    styles: dict[str, Style],
) -> None:
    known = [(point["tokens"], Rate.read(point[key])) for point in curve]
    line = [(tokens, rate) for tokens, rate in known if rate is not None]
    if line:
        tokens, grey = [tokens for tokens, _ in line], styles[CONTROL_STRATEGY].colour
        axes.plot(tokens, [rate.value for _, rate in line], color=grey, linewidth=1.4)
        low, high = [rate.low for _, rate in line], [rate.high for _, rate in line]
        axes.fill_between(tokens, low, high, color=grey, alpha=0.18, linewidth=0)
    for row, rate in points:
        if rate is not None:
            axes.errorbar(
                [row.per_prompt],
                [rate.value],
                yerr=[[rate.value - rate.low], [rate.high - rate.value]],
                color=styles[row.strategy].colour,
                marker=styles[row.strategy].marker,
                markersize=6.5,
                linestyle="none",
                elinewidth=1.3,
                capsize=3,
            )
    axes.set_xscale("log")
    amounts = [row.per_prompt for row, _ in points] + [tokens for tokens, _ in line]
    axes.set_xlim(min(amounts) / 1.4, max(amounts) * 1.4)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.xaxis.set_minor_formatter(FuncFormatter(_minor_label(min(amounts), max(amounts))))
    axes.tick_params(axis="x", which="minor", labelcolor=INK, pad=5)
    axes.set_ylim(0, None)
    _percent_axis(axes.yaxis)
    axes.set_xlabel("token passes a prompt (log scale)")


def _minor_label(low: float, high: float) -> Callable[[float, int | None], str]:
    """Label 2 and 5 between the decades only where the axis spans less than two of them."""
    wanted = (2, 5) if high / low < 100 else ()

    def label(value: float, _: int | None) -> str:
        digit = round(value / 10 ** np.floor(np.log10(value)))
        return number(value) if digit in wanted else ""

    return label


def draw_bars(axes: Axes, categories: list[str], series: list[Series]) -> None:
    """Horizontal grouped bars, first category on top; the value stands at each bar's end, intervals are drawn."""
    width = 0.8 / len(series)
    highest = 0.0
    for index, (_, colour, values) in enumerate(series):
        for row, value in enumerate(values):
            y = row + (index - (len(series) - 1) / 2) * width
            if value is None:
                _beside(axes, 0.0, y, "–", MUTED)
                continue
            share = end = value.value if isinstance(value, Rate) else value
            axes.barh(y, share, height=width * 0.86, color=colour)
            if isinstance(value, Rate):
                axes.plot([value.low, value.high], [y, y], color=INK, linewidth=1.1)
                end = value.high
            _beside(axes, end, y, f"{100 * share:.1f}", INK)
            highest = max(highest, end)
    axes.set_yticks(range(len(categories)), categories)
    axes.set_ylim(len(categories) - 0.5, -0.5)
    axes.set_xlim(0, max(highest * 1.2, 0.01))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    _percent_axis(axes.xaxis)


def _beside(axes: Axes, x: float, y: float, text: str, colour: str, coordinates: Any = "data") -> None:
    """A label just right of a point."""
    axes.annotate(
        text,
        (x, y),
        xycoords=coordinates,
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        fontsize=9.5,
    )


def draw_curves(axes: Axes, curves: dict[str, np.ndarray], unit: str, styles: dict[str, Style]) -> None:
    values = np.concatenate([curve.ravel() for curve in curves.values()])
    if values.min() > 0 and values.max() / values.min() > 50:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for name, (low, middle, high) in curves.items():
        style, steps = styles[name], np.arange(len(middle))
        axes.fill_between(steps, low, high, color=style.colour, alpha=0.15, linewidth=0)
        axes.plot(steps, middle, color=style.colour, marker=style.marker, markersize=3.5, linewidth=1.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel(unit)


def percentiles(values: Counter[int], wanted: Sequence[float]) -> list[float]:
    """As ``numpy.percentile`` of all values, from how often each occurs."""
    ordered = np.array(sorted(values))
    ends = np.cumsum([values[value] for value in ordered.tolist()])
    at = np.array(wanted) / 100 * (ends[-1] - 1)
    below, above = (ordered[np.searchsorted(ends, places, side="right")] for places in (np.floor(at), np.ceil(at)))
    return list(below + (above - below) * (at - np.floor(at)))


def draw_boxes(axes: Axes, boxes: list[tuple[str, str, Counter[int]]]) -> None:
    """values: how often each occurs."""
    for row, (_, colour, values) in enumerate(boxes):
        low, first, middle, third, high = percentiles(values, [5, 25, 50, 75, 95])
        axes.plot([low, high], [row, row], color=colour, linewidth=1.2)
        axes.barh(row, third - first, left=first, height=0.52, color=colour, alpha=0.3, linewidth=0)
        axes.plot([middle, middle], [row - 0.3, row + 0.3], color=colour, linewidth=2)
        _beside(axes, 1.0, row, f"n = {number(values.total())}", MUTED, coordinates=("axes fraction", "data"))
    axes.set_yticks(range(len(boxes)), [name for name, _, _ in boxes])
    axes.set_ylim(len(boxes) - 0.5, -0.5)
    axes.set_xlim(0, None)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("tokens")
