"""The command line `optjax`: `generate`, `score`, `convert`, `info` and `plan`.

Only what was asked for goes to standard output; notes and errors go to standard error. Exit status: 0, or 1 where
something failed, 2 where the command makes no sense, 3 where what was planned does not fit, 130 after Ctrl-C, 141 where
the reader of a pipe went away.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from optjax.cli import terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. ``argv`` without the program's name; by default the process's."""
    with terminal.usable_streams():
        return _run(list(sys.argv[1:] if argv is None else argv))


def _run(words: list[str]) -> int:
    try:
        from optjax.cli.arguments import parse

        arguments = parse(words)
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except SystemExit as exit:  # argparse, after --help, --version or a usage error
        return exit.code if isinstance(exit.code, int) else 1
    except KeyboardInterrupt:
        terminal.note("")
        return 130
    except BrokenPipeError:
        terminal.silence_stdout()
        return 141
    except Exception as error:
        if "--debug" in words or os.environ.get("OPTJAX_DEBUG", "0") not in ("", "0"):
            raise
        return terminal.report(error)
