"""Time, memory and work of models side by side: ``python -m benchmarks.speed``."""
