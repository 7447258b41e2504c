"""Which series of a path is meant: the only one, or the one that was named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plinth.engine.errors import InputError
from plinth.verticals.medical.dicom.discover import Scan, Series, scan
from plinth.verticals.medical.volumes.volume import Issue

LISTED = 5
"""Series that a message names one by one."""


def choose(
    what: str | Path | Series, wanted: str | Series | None
) -> tuple[Series, tuple[Issue, ...]]:
    """The one series meant, and notes on what was left out beside it.

    A path with one stack of slices means that stack, whatever localisers lie beside it; with
    several, one must be named.

    Args:
        what: a path, or a series from ``discover``.
        wanted: which series of the path: itself, its id, its UID or the end of its UID.

    Raises:
        InputError: nothing there, no volume, or several series: the message lists them.
    """
    if isinstance(what, Series):
        return _loadable(what), ()
    if isinstance(wanted, Series):
        return _loadable(wanted), ()
    found = scan(what)
    chosen = _only(found, what) if wanted is None else _named(found, wanted, what)
    return _loadable(chosen), _others(found, chosen)


def listing(series: Sequence[Series]) -> str:
    """The first few series, and how many more there are."""
    lines = [one.describe() for one in series[:LISTED]]
    more = len(series) - len(lines)
    if more:
        lines.append(f"and {more} more{_own_uids(series)}")
    return "; ".join(lines) or "none"


def _own_uids(series: Sequence[Series]) -> str:
    """A hint at what makes many series of one: every image with a series UID of its own."""
    lone = sum(len(one.frames) == 1 for one in series)
    return f" ({lone} of a single image: each has a series of its own)" if lone > LISTED else ""


def _loadable(series: Series) -> Series:
    if series.problem is not None:
        raise InputError(
            f"no volume can be made of series {series.describe()}",
            field=series.frames[0].header.source.name,
            hint="choose another series",
            reason="not_a_volume",
        )
    return series


def _named(found: Scan, wanted: str, where: object) -> Series:
    exact = [one for one in found.series if wanted in (one.id, one.uid)]
    matches = exact or [one for one in found.series if one.uid.endswith(wanted)]
    if len(matches) != 1:
        few = "no series" if not matches else f"{len(matches)} series"
        raise InputError(
            f"{few} of {where} answer to {wanted!r}; there are: {listing(found.series)}",
            field="series",
            hint="give the id at the start of a line",
            reason="no_such_series" if not matches else "several_series",
        )
    return matches[0]


def _only(found: Scan, where: object) -> Series:
    candidates = [one for one in found.series if one.volumetric]
    if not candidates:
        candidates = [one for one in found.series if one.problem is None] or list(found.series)
    if not candidates:
        raise _nothing(found, where)
    main = candidates[0]
    if len(candidates) > 1 and main.problem is not None:
        raise InputError(
            f"{where} holds {len(found.series)} series, and none makes a volume: "
            f"{listing(found.series)}",
            field=main.frames[0].header.source.name,
            hint="give the original images of a scan",
            reason="not_a_volume",
        )
    minor = all(one.same_series(main) and _minor(one, main) for one in candidates[1:])
    if len(candidates) > 1 and not minor:
        raise InputError(
            f"{where} holds {len(found.series)} series: {listing(found.series)}",
            field="series",
            hint='choose one by its id: load(path, series="...")',
            reason="several_series",
        )
    return main


def _minor(one: Series, main: Series) -> bool:
    """A few stray images of another orientation or size, beside a much larger stack."""
    return one.part is None and len(one.frames) <= max(3, len(main.frames) // 10)


def _nothing(found: Scan, where: object) -> InputError:
    damaged = [one for one in found.ignored if one.damaged]
    reasons = {one.reason for one in found.ignored}
    why = damaged[0].reason if damaged else ", ".join(sorted(reasons)[:3]) or "it is empty"
    reason = "damaged" if damaged else "not_dicom" if reasons == {"not DICOM"} else "no_images"
    return InputError(
        f"{where} holds no DICOM images: {why}",
        field=str(where),
        hint="give a folder, zip, DICOMDIR or file with DICOM images",
        reason=reason,
    )


def _others(found: Scan, chosen: Series) -> tuple[Issue, ...]:
    others = sum(
        one is not chosen and (one.part is not None or not one.same_series(chosen))
        for one in found.series
    )
    if not others:
        return ()
    return (Issue("left_out", f"{others} other series at this path were not loaded"),)
