"""The commands: each file has the options of one (`add_parser`) and does it (`execute`)."""

from core.commands import evaluate, export, listing, predict, report, run, verify

ALL = (run, evaluate, predict, export, verify, listing, report)
