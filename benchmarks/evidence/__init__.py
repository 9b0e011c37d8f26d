"""The evidence: the trainings behind docs/results.md."""
