"""The evidence: trainings behind docs/results.md."""
