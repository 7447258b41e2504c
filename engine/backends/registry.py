"""Discovery: which backends are installed, and which of them can be used here.

A backend is found through the entry-point group ``plinth.backends``; those of Plinth take the
same road. One that cannot be imported is listed with its reason and stops nobody else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from plinth.engine.backends.base import Availability, Backend
from plinth.engine.errors import ConfigError, nearest

GROUP = "plinth.backends"


@dataclass(frozen=True, slots=True)
class Listing:
    """One line of ``plinth backends``.

    Args:
        name: name of the entry point and of the setting.
        distribution: the installed distribution it comes from.
        automatic: whether ``"auto"`` tries it.
        version: of what runs; ``None`` when it cannot be used.
        reason: why it cannot be used; ``None`` when it can.
    """

    name: str
    distribution: str
    automatic: bool
    version: str | None
    reason: str | None


@cache
def _found() -> tuple[dict[str, Backend], dict[str, Listing]]:
    """The backends that could be imported, and a line for every one that could not."""
    good: dict[str, Backend] = {}
    bad: dict[str, Listing] = {}
    owners: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        name, owner = entry.name, _owner(entry)
        twin = owners.setdefault(name, entry)
        if twin.value != entry.value:  # one that is installed twice is one
            good.pop(name, None)
            why = f"two distributions bring it: {_owner(twin)} and {owner}; uninstall one"
            bad[name] = Listing(name, owner, False, None, why)
        elif name not in good and name not in bad:
            try:
                good[name] = _made(entry)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody else's code
                why = str(error) if isinstance(error, ConfigError) else _why(entry, error)
                bad[name] = Listing(name, owner, False, None, why)
    return good, bad


def _made(entry: EntryPoint) -> Backend:
    made = entry.load()()
    if not isinstance(made, Backend):
        needed = "name, automatic, available(), supports(), compile()"
        raise ConfigError(f"{entry.value!r} is not a backend: it needs {needed}")
    if made.name != entry.name:
        raise ConfigError(f"{entry.value!r} calls itself {made.name!r}, its entry {entry.name!r}")
    return made


def _why(entry: EntryPoint, error: BaseException) -> str:
    return f"{entry.value!r} cannot be imported: {type(error).__name__}: {error}"


def _owner(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown"


def backends() -> dict[str, Backend]:
    """The backends by name that could be imported, those that are not available included."""
    return _found()[0]


def find(name: str) -> Backend:
    """A backend that can be used here.

    Raises:
        ConfigError: there is none of that name, or it cannot be used; says why.
    """
    good, bad = _found()
    if not good:
        raise ConfigError(
            "no execution backend is installed, not even those of Plinth",
            hint="install Plinth itself: pip install -e . in a checkout, again after an update",
        )
    if name in bad:
        raise ConfigError(f"backend {name} cannot be used: {bad[name].reason}")
    if name not in good:
        raise ConfigError(f"there is no backend {name!r}", hint=nearest(name, ("auto", *good)))
    reason = good[name].available().reason
    if reason is not None:
        raise ConfigError(f"backend {name} cannot be used: {reason}", hint="use backend auto")
    return good[name]


def automatic() -> tuple[list[Backend], dict[str, str]]:
    """The backends that ``"auto"`` tries, eager first; and why others are not tried."""
    usable = [backend for backend in backends().values() if backend.automatic]
    reasons = {b.name: why for b in usable if (why := b.available().reason) is not None}
    tried = [backend for backend in usable if backend.name not in reasons]
    return sorted(tried, key=lambda backend: (backend.name != "eager", backend.name)), reasons


def listings() -> list[Listing]:
    """Every installed backend by name, with its version or the reason why it cannot be used."""
    good, bad = _found()
    owners = {entry.name: _owner(entry) for entry in entry_points(group=GROUP)}
    lines = dict(bad)
    for name, backend in good.items():
        found = _availability(backend)
        lines[name] = Listing(name, owners[name], backend.automatic, found.version, found.reason)
    return [lines[name] for name in sorted(lines)]


def _availability(backend: Backend) -> Availability:
    try:
        return backend.available()
    except Exception as error:  # noqa: BLE001 - somebody else's code
        return Availability(None, f"available() raised {type(error).__name__}: {error}")
