"""A functional training core for fully connected networks on CIFAR-10. DESIGN: imports point downward only."""

import os

# MKL then sums the products of a matrix in the same order with one thread as with two, at no cost in speed
# (tests/test_reproducible.py). It is read at the first product; elsewhere than on a CPU it says nothing.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
