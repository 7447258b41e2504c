"""Where payments are made, and how fast somebody would have to be."""

from __future__ import annotations

from collections.abc import Sequence
from math import asin, cos, radians, sin, sqrt

from plinth.verticals.finance.features.timeline import HOUR

EARTH_KM = 6_371.0
MIN_GAP = 1_000
"""Milliseconds; payments nearer in time count as this far apart for a speed."""
Place = tuple[float, float]
"""Latitude and longitude, degrees."""


def speed(places: Sequence[Place | None], times: Sequence[int], start: int, end: int) -> float:
    """Kilometres per hour to the last entry of a window from the newest before it with a place.

    Args:
        places, times: of the timeline.
        start, end: of the window; ``end - 1`` is the payment itself.
    """
    here = places[end - 1]
    if here is None:
        return 0.0
    for at in range(end - 2, start - 1, -1):
        there = places[at]
        if there is not None:
            hours = max(times[end - 1] - times[at], MIN_GAP) / HOUR
            return distance(here, there) / hours
    return 0.0


def distance(one: Place, other: Place) -> float:
    """Kilometres along the great circle (haversine: R. W. Sinnott, Sky and Telescope 68, 1984)."""
    (lat, lon), (lat2, lon2) = (tuple(map(radians, place)) for place in (one, other))
    half = sin((lat2 - lat) / 2) ** 2 + cos(lat) * cos(lat2) * sin((lon2 - lon) / 2) ** 2
    return 2 * EARTH_KM * asin(min(1.0, sqrt(half)))
