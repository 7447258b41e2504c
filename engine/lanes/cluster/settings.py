"""The cluster that an engine's lanes run in: where it is, and where in it they may be."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plinth.distribution import DISTRIBUTION
from plinth.engine.errors import ConfigError, nearest

PORT = 6379
TOKEN_FILE = Path("~/.ray/auth_token")
"""Where Ray itself looks for the token."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the lanes of a cluster are placed, each in an actor of its own.

    Args:
        address: host and port of its head.
        token_file: the token that everybody in the cluster has; ``None``: that of the environment
            (``RAY_AUTH_TOKEN_PATH``), else ``~/.ray/auth_token``.
        cpus: cores that each lane takes of its node; fractions are allowed.
        gpus: the same of accelerators.
        resources: other resources that its node has to have, such as ``{"scanner": 1}``.
        labels: of its node, such as ``{"zone": "a"}``.
        start_seconds: in which an actor has to be placed and to answer.
        silent_seconds: an actor that answers nothing at all for so long is given up, and with it
            its machine for a while.

    Raises:
        ConfigError: an impossible value.
    """

    address: str = f"127.0.0.1:{PORT}"
    token_file: Path | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    start_seconds: float = 60.0
    silent_seconds: float = 5.0

    def __post_init__(self) -> None:
        split_address(self.address)
        for name, low, high in (
            ("cpus", 0.0, 1024.0),
            ("gpus", 0.0, 64.0),
            ("start_seconds", 1.0, 110.0),
            ("silent_seconds", 0.5, 600.0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ConfigError(f"cluster.{name} is {value!r}, expected {low:g} to {high:g}")
        for name, each in self.resources.items():
            if not isinstance(each, int | float) or not 0 < each <= 1e6:
                raise ConfigError(f"cluster.resources.{name} is {each!r}, expected a number over 0")
        for name, label in self.labels.items():
            if not isinstance(label, str):
                raise ConfigError(f"cluster.labels.{name} is {label!r}, expected a word")

    @classmethod
    def of(cls, table: Cluster | Mapping[str, Any] | None) -> Cluster:
        """The settings from their table.

        Raises:
            ConfigError: an unknown key, or an impossible value.
        """
        if isinstance(table, Cluster):
            return table
        known = [each.name for each in fields(cls)]
        given = dict(table or {})
        for key in given:
            if key not in known:
                raise ConfigError(f"cluster.{key} is unknown", hint=nearest(key, known))
        if isinstance(given.get("token_file"), str):
            given["token_file"] = Path(given["token_file"])
        return cls(**given)

    @property
    def loopback(self) -> bool:
        """Whether its head listens on this machine alone."""
        return is_loopback(split_address(self.address)[0])

    def token(self) -> Path:
        """The file of its token.

        Raises:
            ConfigError: there is none, or others may read it.
        """
        path = self.token_path()
        try:
            found = path.stat()
        except OSError as error:
            raise ConfigError(
                f"there is no token of the cluster at {path}: {error.strerror}",
                hint="plinth cluster start makes one; copy it here, or name it: cluster.token_file",
            ) from None
        if found.st_mode & 0o077:
            raise ConfigError(
                f"{path} can be read by others than its owner", hint=f"chmod 600 {path}"
            )
        return path

    def token_path(self) -> Path:
        """Where its token is looked for."""
        named = self.token_file or os.environ.get("RAY_AUTH_TOKEN_PATH") or TOKEN_FILE
        return Path(named).expanduser().absolute()

    def told(self) -> dict[str, Any]:
        """What the process that talks to the cluster is told."""
        host, port = split_address(self.address)
        return {
            **asdict(self),
            "address": f"{host}:{port}",
            "host": host,
            "port": port,
            "environment": environment(self.token(), self.loopback),
        }


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``"host:port"``; without a port, Ray's own.

    Raises:
        ConfigError: it is none.
    """
    host, _, port = address.rpartition(":") if ":" in address else (address, "", str(PORT))
    if not host or not port.isdigit() or not 0 < int(port) < 65_536:
        raise ConfigError(
            f"cluster.address is {address!r}, expected host:port", hint=f"127.0.0.1:{PORT}"
        )
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def environment(token: Path, loopback: bool) -> dict[str, str]:
    """The variables under which every process of a cluster runs.

    Args:
        token: the file of its token.
        loopback: it listens on this machine alone. Ray puts an outside address in the place of
            127.0.0.1, except where it has no clusters; this tells it that this is such a place.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_open_telemetry": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if loopback else "1",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
    }


def need_ray() -> None:
    """Refuse lanes of a cluster where Ray is not installed.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("ray") is None:
        raise ConfigError(
            "lanes of a cluster need Ray, which is not installed",
            hint=f"pip install '{DISTRIBUTION}[cluster]'",
        )
