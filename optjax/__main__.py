"""``python -m optjax``: the same as the command ``optjax``."""

import sys

from optjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
