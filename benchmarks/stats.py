"""Medians and paired ratios of repeated measurements."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Spread:
    """The median of some figures, with the least and the greatest."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        if self.low == self.high:
            return format(self.median, spec)
        return f"{self.median:{spec}} ({self.low:{spec}}-{self.high:{spec}})"


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError if there are none."""
    if not values:
        raise ValueError("no value to take the median of")
    return Spread(median(values), min(values), max(values))


def paired_ratios(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Spread | None:
    """The spread of ours / theirs, round by round; a round that misses one of the two does not count.

    A machine that is slow in one round is slow for both, so the ratio within a round varies less than either figure.
    """
    ratios = [a / b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return spread(ratios) if ratios else None


def off_by_more(values: dict[str, float], tolerance: float) -> dict[str, float]:
    """Name -> distance from the median of all, signed, for each value further from it than `tolerance`.

    NaN is off whatever the tolerance; it is left out of the median.
    """
    finite = [value for value in values.values() if value == value]
    if not finite:
        return dict(values)
    middle = median(finite)
    return {name: value - middle for name, value in values.items() if not abs(value - middle) <= tolerance}


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, linear between two; raises ValueError if there are none."""
    if not values:
        raise ValueError("no value to take a percentile of")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
