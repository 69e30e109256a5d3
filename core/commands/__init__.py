"""The commands: each file has the options of one and what it does. core/cli.py lists them."""
