"""Time, memory and FLOPs of models side by side: ``python -m benchmarks.speed``."""
