"""What a list of times says: its middle, its spread, and how well the middle is known."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# The median is between the least and the largest of five samples in 94 of 100 cases, of six in 97.
ENOUGH = 6


@dataclass(frozen=True)
class Summary:
    """Of the samples of one row, in their unit.

    Attributes:
        median; q1, q3: quartiles; p10, p90: the tenths at both ends.
        low, high: between them the median of many more samples would lie, with 95 % confidence, if the
            machine stayed as it was (order statistics); of fewer than ENOUGH samples just the range.
        outliers: how many lie more than 1.5 times the quartiles' distance outside the quartiles.
        count: how many there are.
    """

    median: float
    q1: float
    q3: float
    p10: float
    p90: float
    low: float
    high: float
    outliers: int
    count: int

    @property
    def few(self) -> bool:
        """Whether there are too few samples for an interval of 95 %."""
        return self.count < ENOUGH

    @property
    def spread(self) -> float:
        """Half of what is between the quartiles, of few samples between the extremes, over the median."""
        whole = self.high - self.low if self.few else self.q3 - self.q1
        return whole / 2 / self.median

    @property
    def noisy(self) -> bool:
        """Whether they are spread so far that the median says little."""
        return self.spread > 0.125


def summarise(samples: Sequence[float]) -> Summary:
    """The summary of one or more samples."""
    ordered = sorted(samples)
    q1, q3, p10, p90 = (quantile(ordered, q) for q in (0.25, 0.75, 0.1, 0.9))
    reach = 1.5 * (q3 - q1)
    n = len(ordered)
    skipped = max(math.floor((n - 1.96 * math.sqrt(n)) / 2) - 1, 0)
    return Summary(
        median=statistics.median(ordered),
        q1=q1,
        q3=q3,
        p10=p10,
        p90=p90,
        low=ordered[skipped],
        high=ordered[n - 1 - skipped],
        outliers=sum(not q1 - reach <= t <= q3 + reach for t in ordered),
        count=n,
    )


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of sorted samples, between two of them by linear interpolation."""
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
