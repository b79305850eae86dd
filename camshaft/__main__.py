"""`camshaft` on the command line, also as `python -m camshaft`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line in sys.argv and exits with its code."""
    from .cli.app import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
