"""The numbers of a run as rows and sentences: for the HTML table, the console table and the reading notes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

CONTROL_STRATEGY = "resample"


@dataclass(frozen=True)
class Rate:
    """A share of prompts with its 95 % interval; fractions of one, not per cent."""

    value: float
    low: float
    high: float

    @classmethod
    def read(cls, value: list[float] | None) -> Rate | None:
        """From metrics.json: ``[rate, low, high]`` or null."""
        return None if value is None else cls(*value)

    @property
    def percent(self) -> str:
        return f"{100 * self.value:.1f}"

    @property
    def interval(self) -> str:
        return f"{100 * self.low:.1f}–{100 * self.high:.1f}"

    def overlaps(self, other: Rate) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Resampling:
    """Plain resampling at what a strategy took."""

    recovered: Rate
    valid: Rate | None
    note: str

    @classmethod
    def read(cls, value: dict[str, Any] | None) -> Resampling | None:
        """From metrics.json, where there is such a control."""
        if not value:
            return None
        short = f"; equal: {value['wanted']}" if value["wanted"] > value["samples"] else ""
        note = f"{value['samples']} samples{short}"
        return cls(Rate(*value["recovered_rate"]), Rate.read(value["valid_rate"]), note)

    @property
    def both(self) -> str:
        """Right answer and valid derivation, in per cent."""
        return f"{self.recovered.percent} / {self.valid.percent if self.valid else '–'}"


@dataclass(frozen=True)
class Row:
    """One arm of metrics.json, ready to be shown. A wrong-target arm has a rate, its compute, and nothing else."""

    arm: str
    strategy: str
    target: str
    prompts: int
    samples_per_prompt: float
    recovered_count: int
    recovered: Rate
    valid_count: int | None
    valid: Rate | None
    wrong_target: Rate | None
    selectivity: float | None
    compute: dict[str, float]
    control: Resampling | None
    seconds: float
    control_seconds: Resampling | None

    @classmethod
    def read(cls, arm: str, values: dict[str, Any]) -> Row:
        return cls(
            arm=arm,
            strategy=values["strategy"],
            target=values["target"],
            prompts=values["prompts"],
            samples_per_prompt=values["samples_per_prompt"],
            recovered_count=values["recovered"],
            recovered=Rate(*values["recovered_rate"]),
            valid_count=values.get("valid"),
            valid=_rate(values, "valid_rate"),
            wrong_target=_rate(values, "wrong_target_rate"),
            selectivity=values.get("selectivity"),
            compute=values["compute"],
            control=Resampling.read(values.get("control")),
            seconds=values["seconds"],
            control_seconds=Resampling.read(values.get("control_seconds")),
        )

    @property
    def per_prompt(self) -> float:
        """Token passes a prompt."""
        return self.compute["per_prompt"]

    @property
    def is_side_arm(self) -> bool:
        """A control pool or a wrong-target run: it has a table of its own, its rates are columns of the main one."""
        return self.target != "gold" or "@" in self.arm


def _rate(values: dict[str, Any], key: str) -> Rate | None:
    return Rate.read(values.get(key))


def rows_of(metrics: dict[str, Any]) -> list[Row]:
    """The strategies' rows, in the order of metrics.json, side arms (``x@wrong``, ``resample@equal``) included."""
    return [Row.read(arm, values) for arm, values in metrics["arms"].items()]


def number(value: float) -> str:
    """A count or an amount, with thin spaces between thousands."""
    text = f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:,.1f}"
    return text.replace(",", "\u202f")


def reading_notes(metrics: dict[str, Any]) -> list[str]:
    """What the numbers of one run say and do not say. Every sentence is a comparison made here, from the metrics."""
    rows = [row for row in rows_of(metrics) if not row.is_side_arm]
    if not metrics["zero_hit"]:
        return ["No prompt was zero-hit, so there was nothing to recover."]
    if not rows:
        return ["No strategy was run on the zero-hit prompts."]
    notes = []
    empty = [row.arm for row in rows if row.recovered_count == 0]
    if empty:
        notes.append(f"No prompt was recovered by {_join(empty)}.")
    if metrics["derivations_checked"]:
        best, rate = max(((row, row.valid) for row in rows if row.valid), key=lambda pair: pair[1].value)
        if rate.value > 0:
            control = best.control
            against = (
                f"; plain resampling at equal compute ({control.note}): {control.valid.percent}\u00a0%"
                if control and control.valid
                else ""
            )
            notes.append(
                f"Highest rate with a valid derivation: {best.arm}, {rate.percent}\u00a0% "
                f"(95\u00a0% interval {rate.interval}){against}."
            )
        for row in rows:
            if row.valid_count is not None and row.recovered_count and row.valid_count < row.recovered_count / 2:
                notes.append(
                    f"{row.arm} is right on {row.recovered_count} prompts, on {row.valid_count} of them with a valid "
                    "derivation: most of its right answers do not follow from what it wrote."
                )
    else:
        notes.append(
            "Derivations could not be checked in this run. The rates count right answers only; "
            "they cannot tell a derivation from an answer that was steered in."
        )
    for row in rows:
        right, wrong = row.recovered, row.wrong_target
        steered = f"{row.arm}@wrong" in metrics["arms"]  # the others hit a wrong target by chance only
        if steered and wrong and right.value > 0 and right.overlaps(wrong):
            notes.append(
                f"{row.arm} reaches a random wrong answer as often as the right one, within the intervals "
                f"({wrong.percent}\u00a0% and {right.percent}\u00a0%): its rate by answer is no evidence of reasoning."
            )
    return notes


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def console_table(metrics: dict[str, Any]) -> Table:
    """The final table of a run for the terminal; fits 80 columns.

    Args:
        metrics: the content of metrics.json.

    Returns:
        A rich table, one entry a strategy: rates in per cent with their 95 % interval below, compute in token passes a
        prompt (forward 1, backward 2, decoded 1, cached 0). Wrong-target arms and the control pool are columns.
    """
    table = Table(
        title=escape(metrics.get("family") or ""),
        caption=f"{metrics['zero_hit']} zero-hit prompts of {metrics['prompts']}; per cent of them, 95 % intervals. "
        "wrong: a random wrong answer is reached; ratio: right over wrong; passes: token passes a prompt; "
        "equal: resampling at equal passes, below at equal seconds (answer / valid)",
        caption_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("strategy", no_wrap=True)
    for heading in ("answer", "valid", "wrong", "ratio", "passes", "equal", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [row for row in rows_of(metrics) if not row.is_side_arm]
    for row in rows:
        controls = [control.both if control else "–" for control in (row.control, row.control_seconds)]
        table.add_row(
            row.arm,
            *(
                f"{rate.percent}\n{rate.interval}" if rate else "–"
                for rate in (row.recovered, row.valid, row.wrong_target)
            ),
            "–" if row.selectivity is None else f"{row.selectivity:.1f}",
            number(row.per_prompt),
            "\n".join(controls),
            number(row.seconds),
        )
    if not rows:
        table.add_row("no strategy was run", *[""] * 7)
    return table
