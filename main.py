"""The command line. core/commands/ has a file for each command; `run` is the default."""

import os
import signal
import sys

ROOT = os.path.dirname(os.path.realpath(__file__))
if sys.flags.safe_path:  # PYTHONSAFEPATH or python -P: this folder is not in the path
    sys.path.insert(0, ROOT)

from core.signals import Stop, end_process

stop = Stop()
if __name__ == "__main__":  # until there is something to stop, a signal ends the process without a traceback
    stop.install()

import atexit
from pathlib import Path

from core import cli, terminal
from core.errors import UserError
from core.plan import Project
from experiments import ABLATIONS, DEFAULT, FORMER_NAMES, SUITES

PROJECT = Project(Path(ROOT), SUITES, ABLATIONS, DEFAULT, FORMER_NAMES)


def main(argv: list[str]) -> int:
    """Do what the words of a command line ask for; returns the exit status: 2 where it cannot be done, 130 where it was
    stopped."""
    terminal.open_standard_streams()
    stop.install()
    stop.importing = False
    try:
        args = cli.parse(argv, PROJECT)
        status = args.execute(args, PROJECT, stop)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has seen enough
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
    if status == 130:  # stopped: it would take Python a second to clear away what a compiler has left
        atexit._run_exitfuncs()
        end_process(signal.SIGINT)
    sys.exit(status)
