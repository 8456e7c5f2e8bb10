"""``quantcli`` and ``python -m quantcli``.

The modules that the command line is made of take a moment to load, and Ctrl-C in it would end in a
traceback; so it is caught before they are.
"""

from __future__ import annotations

import signal
import sys

from quantcli.cli import sign_of_life
from quantcli.cli.completion import answers_completion
from quantcli.cli.stopping import quit_early


def main() -> None:
    """The console script."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, quit_early)
    if answers_completion():
        return
    sign_of_life.show_soon(sys.argv[1:])
    from quantcli.cli import app

    app.main()


if __name__ == "__main__":
    main()
