"""One self-contained page about a run: what was recorded, how it moved, which average is best."""

from polyak.report.page import refuse_output, write_report

__all__ = ["refuse_output", "write_report"]
