"""Paired differences between two networks trained with the same seeds, with Student's t distribution."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

# 97.5 % quantiles of Student's t distribution with 1, 2, ... degrees of freedom.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def paired_differences(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """First minus second, for each seed that both have.

    Args:
        first, second: Seed -> value.
    """
    return [first[seed] - second[seed] for seed in sorted(set(first) & set(second))]


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of at least two differences, and half the width of its 95 % confidence interval."""
    return mean(differences), half_width(stdev(differences), len(differences))


def half_width(deviation: float, count: int) -> float:
    """Half the width of the 95 % interval of a mean of 2 to 16 values with this standard deviation."""
    return QUANTILES[count - 2] * deviation / count**0.5


def count_needed(deviation: float, difference: float) -> int | None:
    """Smallest number of values whose interval is no wider than ``difference`` on either side; None: more than 16."""
    counts = range(2, len(QUANTILES) + 2)
    return next((count for count in counts if half_width(deviation, count) <= difference), None)
