"""One self-contained page about a run: what was recorded, how it moved, which average is best."""

from polyak.report._page import write_report

__all__ = ["write_report"]
