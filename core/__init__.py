"""A functional training core for fully connected networks on CIFAR-10. DESIGN: imports point downward only."""
