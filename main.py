"""The command line. core/commands/ has a file for each command; `run` is the default."""

import os
import signal
import sys

ROOT = os.path.dirname(os.path.realpath(__file__))
if sys.flags.safe_path:  # PYTHONSAFEPATH or python -P: this folder is not in the path
    sys.path.insert(0, ROOT)

from core.signals import Stop, end_process

stop = Stop()
if __name__ == "__main__":  # from here on, a signal ends the process without a traceback
    stop.install()

import atexit
from pathlib import Path

from core import cli, terminal
from core.errors import UserError
from core.plan import Project
from experiments import ABLATIONS, DEFAULT, FORMER_NAMES, SEARCHES, SUITES

PROJECT = Project(Path(ROOT), SUITES, ABLATIONS, DEFAULT, FORMER_NAMES, SEARCHES)


def main(argv: list[str]) -> int:
    """Run a command. Returns its exit status: 2 after an error that the user can mend, 130 after a stop."""
    terminal.open_standard_streams()
    stop.install()
    stop.importing = False
    try:
        args = cli.parse(argv, PROJECT)
        terminal.console.stderr = getattr(args, "json", False)  # stdout has the results alone
        terminal.console.quiet = getattr(args, "quiet", False)
        status = args.execute(args, PROJECT, stop)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (UserError, OSError) as error:
        terminal.fail(error)
        return 2
    except KeyboardInterrupt:
        terminal.warn("stopped")
        return 130


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if status == 130:  # skip the cleanup of Python, which takes a second after a compilation
        atexit._run_exitfuncs()
        end_process(signal.SIGINT)
    sys.exit(status)
