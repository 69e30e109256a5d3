"""Benchmarks of the step, the epoch and what surrounds them; README.md says how to run them."""
