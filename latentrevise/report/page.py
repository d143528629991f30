"""The HTML page: reads the runs, renders figures and cases, writes one file without any outside resource."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from latentrevise.data.leftovers import sweep
from latentrevise.data.storage import atomic_write
from latentrevise.errors import InputError
from latentrevise.report.audits import TradeOff, gate_text, trade_offs
from latentrevise.report.browser import Browser, browsers
from latentrevise.report.drawing import PALETTE, Group, png, styles_for, svg
from latentrevise.report.figures import figure_groups
from latentrevise.report.runs import FinishedRun
from latentrevise.report.summary import Row, number, reading_notes, rows_of
from latentrevise.report.tokens import TokenTexts


@dataclass(frozen=True)
class _PanelView:
    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class _GroupView:
    title: str
    panels: list[_PanelView]
    empty: str


@dataclass(frozen=True)
class _RunView:
    key: str
    family: str
    path: str
    info: dict[str, Any]
    seed: int
    prompts: int
    zero_hit: int
    errors: dict[str, int]
    rows: list[Row]
    side_rows: list[Row]
    solved: int
    undecided: int
    notes: list[str]
    gate: str  # empty where it was not measured
    guards: dict[str, Any] | None  # as in metrics.json; None where derivations were not checked
    trade_offs: list[TradeOff]
    groups: list[_GroupView]
    browser: Browser
    no_cases: str  # why the browser is empty
    token_problem: str

    @property
    def by_arm(self) -> dict[str, Row]:
        return {row.arm: row for row in self.rows}


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the report of one or more finished runs.

    Args:
        run_dirs: directories written by ``recover``; one section each, in this order.
        out: directory for ``report.html`` and ``figures/*.png`` (created), or the path of the HTML file (``*.html``),
            with ``figures`` beside it.

    Returns:
        The path of the HTML file. It holds its styles and figures and refers to nothing outside itself.

    Raises:
        InputError: no run directory is given.
        RunError: a run directory is missing, unfinished, damaged or of another format, or ``out`` cannot be written.
    """
    if not run_dirs:
        raise InputError(
            "nothing to report: no run directory was given; give one or more that `latentrevise recover` wrote"
        )
    page = Path(out) if Path(out).suffix == ".html" else Path(out) / "report.html"
    figures = page.parent / "figures"
    for folder in (page.parent, figures):
        sweep(folder)
    runs = [FinishedRun.open(Path(path)) for path in run_dirs]

    styles = styles_for([row.strategy for run in runs for row in rows_of(run.metrics)])
    tokens = [TokenTexts.load(run.info["model"]["path"]) for run in runs]
    shown = [[row for row in rows_of(run.metrics) if not row.is_side_arm] for run in runs]
    cases = browsers(runs, tokens, [[row.arm for row in rows] for rows in shown])
    views = []
    keys = _keys([run.family for run in runs])
    for key, run, texts, browser in zip(keys, runs, tokens, cases, strict=True):
        groups = figure_groups(run, styles)
        for group in groups:
            if group.panels:
                with atomic_write(figures / f"{key}-{group.name}.png") as temporary:
                    temporary.write_bytes(png(group))
        views.append(_view(run, key, groups, texts, browser))
    with atomic_write(page) as temporary:
        temporary.write_text(_render(views), encoding="utf-8")
    return page


def _keys(families: list[str]) -> list[str]:
    """One short name a run, fit for file names and anchors; numbered where two runs share it."""
    slugs = [re.sub(r"[^a-z0-9]+", "-", family.lower()).strip("-") or "run" for family in families]
    return [slug if slugs.count(slug) == 1 else f"{slug}-{index + 1}" for index, slug in enumerate(slugs)]


def _view(run: FinishedRun, key: str, groups: list[Group], tokens: TokenTexts, browser: Browser) -> _RunView:
    rows = rows_of(run.metrics)
    main = [row for row in rows if not row.is_side_arm]
    kept = any(run.has_arm(row.arm) for row in main)
    return _RunView(
        key=key,
        family=run.family,
        path=str(run.path),
        info=run.info,
        seed=run.info["config"]["seed"],
        prompts=run.metrics["prompts"],
        zero_hit=run.metrics["zero_hit"],
        errors=run.error_counts,
        rows=main,
        side_rows=[row for row in rows if row.is_side_arm],
        solved=run.metrics["solved"],
        undecided=run.metrics["undecided"],
        notes=reading_notes(run.metrics),
        gate="" if run.gate is None else gate_text(run.gate),
        guards=run.metrics.get("guards"),
        trade_offs=trade_offs(run.metrics),
        groups=[_group_view(key, group) for group in groups],
        browser=browser,
        no_cases="No strategy produced a continuation."
        if kept
        else "The run directory holds the metrics of the strategies, but not their rows.",
        token_problem=tokens.problem,
    )


def _group_view(key: str, group: Group) -> _GroupView:
    panels = [
        _PanelView(panel.title, panel.caption, Markup(svg(panel, group.legend, f"{key}-{group.name}-{index}")))
        for index, panel in enumerate(group.panels)
    ]
    return _GroupView(group.title, panels, group.empty)


def _render(views: list[_RunView]) -> str:
    environment = Environment(
        loader=PackageLoader("latentrevise"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    style, script = (
        environment.loader.get_source(environment, name)[0]  # type: ignore[union-attr]
        for name in ("style.css", "report.js")
    )
    # Only this one script may run, whatever the texts of a run contain.
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        runs=views,
        strategies=list(dict.fromkeys(row.arm for view in views for row in view.rows)),
        style=Markup(_variables() + style),
        script=Markup(script),
        script_hash=script_hash,
    )


def _variables() -> str:
    """The palette as CSS variables, light and dark: the page and its figures take their colours from here only."""
    light, dark = ("".join(f"--{name}:{colours[index]};" for name, colours in PALETTE.items()) for index in (0, 1))
    heat = " ".join(str(int(PALETTE["blue"][0][i : i + 2], 16)) for i in (1, 3, 5))
    return (
        f":root{{color-scheme:light dark;--heat:{heat};{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    )
