"""The tables of ``optjax score``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from optjax.cli.tokens import quoted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from optjax.cli.score_input import Item
    from optjax.cli.tokens import TokenNames
    from optjax.scoring import Score

# Terminal colours from improbable to probable, and the probability from which each holds.
_STYLES = ((0.5, "green"), (0.1, ""), (0.01, "yellow"), (0.0, "red"))


def print_tokens(item: Item, score: Score, names: TokenNames) -> None:
    """A line for each token: its log-probability, its probability, and the alternatives."""
    from rich.text import Text

    console, table = _console(), _table()
    table.add_column("token")
    table.add_column("log p", justify="right")
    table.add_column("p", justify="right")
    if score.top_ids is not None:
        table.add_column("rather", overflow="fold")
    for i, logprob in enumerate(score.token_logprobs.tolist()):
        name = names.shown(int(score.ids[i]))
        if math.isnan(logprob):
            table.add_row(Text(name), "–", "")
            continue
        cells = [Text(name), f"{logprob:.3f}", percent(math.exp(logprob))]
        if score.top_ids is not None and score.top_logprobs is not None:
            pairs = zip(score.top_ids[i].tolist(), score.top_logprobs[i].tolist(), strict=True)
            cells.append(Text("  ".join(f"{names.shown(j)} {percent(math.exp(x))}" for j, x in pairs)))
        table.add_row(*cells, style=next(style for p, style in _STYLES if math.exp(logprob) >= p))
    console.print(table)
    console.print(summary(item, score), style="dim")


def summary(item: Item, score: Score) -> str:
    """The figures of a whole text."""
    n = int((~np.isnan(score.token_logprobs)).sum())
    if not n:
        return "nothing predicts a first token"
    bits = -score.logprob / math.log(2) / len(item.text.encode())
    greedy = "; greedy decoding would say the same" if score.is_greedy else ""
    return (
        f"log p {score.logprob:.3f} in {n} token{'s' if n > 1 else ''}, perplexity "
        f"{math.exp(-score.logprob / n):,.2f}, {bits:.3f} bits per byte{greedy}"
    )


def print_comparison(found: Sequence[tuple[Item, Score]]) -> None:
    """Continuations of one prompt, a line each."""
    from rich.text import Text

    console, table = _console(), _table()
    table.add_column("continuation", overflow="fold")
    for title in ("tokens", "log p", "per token", "share", "greedy"):
        table.add_column(title, justify="right")
    totals = np.array([score.logprob for _, score in found])
    shares = np.exp(totals - np.logaddexp.reduce(totals))
    for (item, score), share in zip(found, shares, strict=True):
        n = len(score.ids)
        figures = (str(n), f"{score.logprob:.3f}", f"{score.logprob / n:.3f}", percent(share))
        style = "bold" if share == shares.max() else ""
        table.add_row(Text(quoted(item.text)), *figures, "yes" if score.is_greedy else "", style=style)
    console.print(table)
    console.print("share: of the probability of those shown here", style="dim")


def percent(p: float) -> str:
    """Two digits that count: 12%, 1.2%, 0.012%."""
    if p >= 0.1:
        return f"{100 * p:.0f}%"
    return f"{100 * p:.1e}%" if p < 1e-5 else f"{100 * p:.2g}%"


def _console() -> Console:
    from rich.console import Console

    # A pipe has no width: nothing is wrapped or cut there.
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 1000)


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
