"""A file for each command: `add_parser` has its options, `execute` runs it and returns the exit status."""

from core.commands import evaluate, export, listing, predict, report, run, verify

ALL = (run, evaluate, predict, export, verify, listing, report)
