"""A file for each command: `add_parser` has its options, `execute` runs it and returns the exit status."""

from core.commands import clean, compare, diff, evaluate, export, listing, predict, report, run, search, verify

ALL = (run, compare, search, evaluate, predict, export, verify, listing, diff, report, clean)
