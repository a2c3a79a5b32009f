"""The figures of `bench.decode_cpu` as tables: on the terminal, and as Markdown with the machine and the versions."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = {
    "optjax": "optjax",
    "optjax-int8": "optjax, int8",
    "torch": "transformers, torch",
    "flax": "FlaxOPT.generate",
    "flax-jit": "FlaxOPT in a jax.jit",
    "ctranslate2": "CTranslate2",
    "ctranslate2-int8": "CTranslate2, int8",
}
COLUMNS = (
    "",
    "first token, ms",
    "decoding, tokens/s",
    "of the limit",
    "all, s",
    "optjax: all",
    "optjax: decoding",
    "peak, MB",
    "first call, s",
    "same tokens",
)


def machine() -> dict[str, str]:
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "processor": cpu,
        "cores": str(os.cpu_count()),
        "memory": f"{memory / 2**20:.0f} GiB",
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def available_memory() -> int:
    """Bytes that programs can have without swapping."""
    found = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")), "0")
    return int(found) * 1024


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


@dataclass
class Outcome:
    results: list[dict[str, Any]]
    arguments: dict[str, Any]
    machine: dict[str, str] = field(default_factory=machine)


def show(outcome: Outcome) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(_setting(outcome), highlight=False)
    for title, rows in _tables(outcome):
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(COLUMNS):
            table.add_column(name, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def markdown(outcome: Outcome) -> str:
    given = outcome.arguments
    options = f"--sizes {' '.join(given['sizes'])} --batches {' '.join(map(str, given['batches']))}"
    how = "greedy" if given["beams"] == 1 else f"the best of {given['beams']} beams"
    if given["beams"] > 1:
        options += f" --beams {given['beams']}"
    if given.get("guess", "none") != "none":
        options += f" --guess {given['guess']}"
        who = "prompt lookup" if given["guess"] == "lookup" else "an assistant of two thin layers"
        how += f", tokens guessed by {who}, where every guess is right"
    options += " --int8" if given.get("int8") else ""
    options += " --in-turn" if given.get("in_turn") else ""
    if given["rounds"]:
        options += f" --rounds {given['rounds']}"
    precision = "float32, or int8 where it is named" if given.get("int8") else "float32"
    turns = " One side's process at a time." if given.get("in_turn") else ""
    lines = [
        "# Decoding on a CPU",
        "",
        f"    python -m bench.decode_cpu {options} --prompt {given['prompt']} --new {given['new']} "
        f"--threads {given['threads']} --save",
        "",
        _setting(outcome),
        "",
        f"Random weights in {precision}, {how}, every token made. Medians of the rounds.{turns} "
        "*All*: from the prompt to the last token, in a second or later call. *Of the limit*: the decoding speed "
        "beside what memory allows, weights "
        "and cache read once a step at the speed of a plain streaming read. *optjax*: how many times as fast optjax "
        "is. *Peak*: memory resident at most, of the whole process, in the measured calls. *First call*: of all "
        "tokens, compilation included. *FlaxOPT.generate* traces and compiles its loop at every call; in a `jax.jit` "
        "of the caller's it does so once for each shape and number of tokens.",
    ]
    for title, rows in _tables(outcome):
        lines += ["", f"## {title}", "", "| " + " | ".join(COLUMNS) + " |", "|-" + "|-:" * (len(COLUMNS) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _setting(outcome: Outcome) -> str:
    given, about = outcome.arguments, outcome.machine
    versions = dict.fromkeys(f"{NAMES[r['side']].split(',')[0]} {r['version']}" for r in outcome.results)
    return (
        f"{about['processor']}, {about['cores']} cores, {about['memory']}; {given['threads']} threads each. "
        f"Prompts of {given['prompt']} tokens, {given['new']} new ones. {'; '.join(versions)}; "
        f"Python {about['python']}. {about['date']}."
    )


def _tables(outcome: Outcome) -> Iterator[tuple[str, list[list[str]]]]:
    for (size, batch), group in groupby(outcome.results, key=lambda r: (r["size"], r["batch"])):
        results = list(group)
        base = next((r for r in results if r["side"].startswith("optjax")), results[0])
        limit = base["limit"]
        title = f"OPT-{size}, batch {batch}: memory allows {limit:.0f} tokens/s, {1e3 * batch / limit:.1f} ms a step"
        yield title, [_row(result, base) for result in results]


def _row(r: dict[str, Any], base: dict[str, Any]) -> list[str]:
    whole = median(other / own for other, own in zip(r["all_tokens"], base["all_tokens"], strict=False))
    itself = r is base
    return [
        NAMES[r["side"]],
        f"{1e3 * median(r['one_token']):.0f}",
        f"{r['decoding']:.1f}",
        f"{r['decoding'] / r['limit']:.0%}",
        f"{median(r['all_tokens']):.2f}",
        "" if itself else f"{whole:.2f}×",
        "" if itself else f"{base['decoding'] / r['decoding']:.2f}×",
        f"{r['peak'] / 1e6:.0f}",
        f"{r['first_call']:.1f}",
        f"{r['same_tokens']:.0%}",
    ]
