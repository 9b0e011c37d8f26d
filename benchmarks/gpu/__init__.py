"""Correctness and speed on a GPU that is there for minutes; without one, what a training iteration would launch."""
