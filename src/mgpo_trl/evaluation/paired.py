"""Paired statistics: two results on the same questions.

Worked example: three questions, A right on [1, 1, 0], B on [0, 1, 0]. The difference A - B is 1/3; with deviations
[2/3, -1/3, -1/3] its standard error is sqrt(6/9) / 3 = 0.272. One question is discordant, won by A: McNemar's exact
p-value is min(1, 2 * 0.5 ** 1) = 1.
"""

import math
from fractions import Fraction
from typing import Any

from .metrics import ClusterMean

Z_95 = 1.959963984540054
"""Half-width of a 95 % normal interval in standard errors."""


class PairedDifference:
    """Running difference of two 0/1 results over the same questions, with a standard error robust to clusters."""

    def __init__(self) -> None:
        self._mean = ClusterMean()
        self.only_first = 0
        """Pairs that only the first has right."""
        self.only_second = 0
        """Pairs that only the second has right."""

    def add(self, cluster: str, first: bool, second: bool) -> None:
        """Count one pair."""
        self._mean.add(cluster, float(first) - float(second))
        self.only_first += first and not second
        self.only_second += second and not first

    def summary(self) -> dict[str, Any]:
        """Difference, standard error, 95 % interval, number of pairs, discordant pairs and McNemar's exact p-value."""
        difference, stderr = self._mean.mean, self._mean.stderr
        interval = None if stderr is None else [difference - Z_95 * stderr, difference + Z_95 * stderr]
        return {
            "difference": difference,
            "stderr": stderr,
            "interval_95": interval,
            "n": self._mean.n,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "mcnemar_p": mcnemar_p(self.only_first, self.only_second),
        }


def mcnemar_p(only_first: int, only_second: int) -> float:
    """
    Two-sided exact p-value of McNemar's test: that of a fair coin with so many heads among the discordant pairs.

    Args:
        only_first (`int`), only_second (`int`): Pairs that only one of the two has right.

    Returns:
        `float`: 1.0 where nothing is discordant. It takes pairs for independent; with clusters, read the interval.
    """
    n, least = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    tail = Fraction(sum(math.comb(n, k) for k in range(least + 1)), 2**n)
    return float(min(Fraction(1), 2 * tail))
