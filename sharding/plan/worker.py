"""A process that compiles: a request in JSON on standard input, the answer in JSON in the file that it names.

``python -m optjax.sharding.plan.worker``, started by `asking.ask` with the environment that the compilers need.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from optjax.config import OPTConfig

from .compiling import compile_job, to_json
from .hardware import parse_topology


def main() -> None:
    request: dict[str, Any] = json.load(sys.stdin)
    made: dict[str, Any]
    try:
        compiled = compile_job(
            OPTConfig.from_dict(request["config"]),
            parse_topology(request["topology"]),
            job=request["job"],
            mesh=request["mesh"],
            rules=request["rules"],
            options=request["options"],
            save=request["save"],
        )
        made = {"programs": [to_json(each) for each in compiled]}
    except Exception as error:
        traceback.print_exc()
        kind = type(error).__name__
        text = str(error) if kind in ("ValueError", "ImportError") else f"{kind}: {str(error)[:2000]}"
        made = {"kind": kind, "error": text}
    partial = Path(sys.argv[1] + ".partial")
    partial.write_text(json.dumps(made), encoding="utf-8")
    partial.rename(sys.argv[1])


if __name__ == "__main__":
    main()
