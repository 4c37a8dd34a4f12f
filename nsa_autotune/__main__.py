"""`python -m nsa_autotune` is `nsa-autotune`."""

from __future__ import annotations

import signal
import sys

EXIT_INTERRUPTED = 130


def run() -> None:
    """The entry point of the installed script; SIGTERM ends it as Ctrl-C does, with everything stored."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from .cli.app import main  # takes a second, in which Ctrl-C may come too

        code = main()
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    run()
