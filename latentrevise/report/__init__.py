"""The report of one or more recovery runs: a self-contained HTML page, PNG figures and the CLI's final table."""

from __future__ import annotations

from latentrevise.report.page import write_report
from latentrevise.report.summary import console_table

__all__ = ["console_table", "write_report"]
