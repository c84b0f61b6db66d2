"""The command `tmexport`, which is `python -m tmexport`."""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command. Ctrl-C while it is imported ends it as it would end any program, without a traceback; the runner
    answers it from then on.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tmexport.cli import main as run

    run()


if __name__ == "__main__":
    main()
