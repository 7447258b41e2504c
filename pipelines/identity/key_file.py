"""A file of API keys, of which it has hashes alone; read again when it changes.

A key has 256 random bits, so its SHA-256 cannot be turned back, and a slow hash would only make
every request slow.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hmac
import json
import logging
import os
import re
import secrets
import tomllib
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import Counter
from pydantic import Field, field_validator

from plinth.engine import ConfigError
from plinth.engine.files import replace_file
from plinth.engine.metrics import REGISTRY
from plinth.engine.tables import Table
from plinth.pipelines.config.source import Origin, places, validated
from plinth.pipelines.identity.callers import Bucket, Caller, Role, digest_of
from plinth.pipelines.lines import toml, whole
from plinth.pipelines.live.tables import Marks

log = logging.getLogger("plinth.keys")

MAX_BYTES = 16 << 20
"""Of a file of keys."""
PREFIX = "plinth_"
"""What keys begin with, so that tools which look for lost secrets know one."""
RELOADS = Counter(
    "plinth_key_file_reloads_total",
    "Times that the file of keys was read again because it changed; outcome: taken, or wrong.",
    ("outcome",),
    registry=REGISTRY,
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HEX = re.compile(r"[0-9a-f]{64}")
_HEAD = (
    "# API keys of Plinth by their SHA-256. `plinth keys` writes this file: comments do not stay."
)


class KeyTable(Table):
    """``[keys.<name>]``: one key."""

    sha256: str = Field(description="hash of the key, in hexadecimal")
    role: Role = Field(default="score", description="`read`, `score` or `admin`")
    only: tuple[str, ...] = Field(default=(), description="verticals and models; none: all")
    per_second: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="requests each second, on average; none: any number",
    )
    burst: int | None = Field(
        default=None, ge=1, description="requests at once; none: those of one second"
    )
    made: datetime.datetime | None = Field(default=None, description="when")
    expires: datetime.datetime | None = Field(
        default=None, description="when it is not valid any more; none: never"
    )

    @field_validator("sha256")
    @classmethod
    def _is_hash(cls, value: str) -> str:
        if _HEX.fullmatch(value) is None:
            raise ValueError("expected 64 hexadecimal digits, as `plinth keys add` writes them")
        return value

    @field_validator("expires")
    @classmethod
    def _has_zone(cls, value: datetime.datetime | None) -> datetime.datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("expected a time with its zone, such as 2027-01-01T00:00:00Z")
        return value

    def caller(self, name: str) -> Caller:
        """Whom the key stands for."""
        bucket = Bucket.of(self.per_second, self.burst)
        expires = None if self.expires is None else self.expires.timestamp()
        return Caller(name, self.role, self.only, bucket, expires)


class KeyFile(Table):
    """The whole file."""

    keys: dict[str, KeyTable] = Field(default_factory=dict)

    @field_validator("keys")
    @classmethod
    def _have_names(cls, value: dict[str, KeyTable]) -> dict[str, KeyTable]:
        for name in value:
            check_name(name)
        return value


def check_name(name: str) -> None:
    """Raises ValueError where a key cannot have this name."""
    if _NAME.fullmatch(name) is None:
        raise ValueError("a name has 1 to 64 letters, digits and . _ @ -, and begins with no sign")


def read(path: Path) -> KeyFile:
    """The keys of a file.

    Raises:
        ConfigError: names file, line and key, and what was expected.
    """
    try:
        raw = whole(path, MAX_BYTES)
    except OSError as error:
        raise ConfigError(
            f"cannot read the keys in {path}: {error.strerror}",
            hint=f"make one with plinth keys add NAME --file {path}",
        ) from None
    return _parsed(path, raw)


def _parsed(path: Path, raw: bytes) -> KeyFile:
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES >> 20} MiB")
    try:
        text = raw.decode()
        data = toml(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        told = error if isinstance(error, tomllib.TOMLDecodeError) else "it is not UTF-8"
        raise ConfigError(f"{path}: {told}", hint="see https://toml.io for the syntax") from None
    return validated(KeyFile, data, (), Origin(path, dict(places(text))))


class FileKeys:
    """The keys of a file that may change.

    Args:
        path: of the file.

    Raises:
        ConfigError: it cannot be read, or is wrong.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marks = Marks(path)
        self._callers: dict[bytes, tuple[bytes, Caller]] = {}
        self._take(read(path))

    def of(self, digest: bytes) -> Caller | None:
        """Whose key has this SHA-256, which cannot be chosen so as to learn others; no wait."""
        known, caller = self._callers.get(digest, (b"", None))
        return caller if hmac.compare_digest(digest, known) else None

    def look(self) -> None:
        """Read the file again if it changed; where it is wrong, what was in force stays."""
        if not self._marks.changed():
            return
        try:
            found = read(self._path)
        except ConfigError as error:
            RELOADS.labels("wrong").inc()
            log.error("the keys in force stay: %s", error)
            return
        self._take(found)
        RELOADS.labels("taken").inc()
        log.info("took over %d keys from %s", len(found.keys), self._path)

    def _take(self, file: KeyFile) -> None:
        before = {caller.name: caller.bucket for _, caller in self._callers.values()}
        callers = {}
        for name, table in file.keys.items():
            caller, digest = table.caller(name), bytes.fromhex(table.sha256)
            kept = before.get(name)
            if kept and caller.bucket and kept.per_second == caller.bucket.per_second:
                caller.bucket = kept if kept.burst == caller.bucket.burst else caller.bucket
            callers[digest] = (digest, caller)
        self._callers = callers


# -- what the command does -------------------------------------------------------------------------
def add(path: Path, name: str, table: dict[str, object]) -> str:
    """Make a key and keep its hash; the key is kept nowhere.

    Args:
        path: of the file, which may not be there yet.
        name: whose key it is.
        table: fields of :class:`KeyTable` but ``sha256`` and ``made``; ``None`` is left out.

    Returns:
        The key.

    Raises:
        ConfigError: the name is taken or no name, a field or the file is wrong.
    """
    key = PREFIX + secrets.token_urlsafe(32)
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    fields = {k: v for k, v in table.items() if v is not None}
    fields |= {"sha256": digest_of(key.encode()).hex(), "made": now}
    made = validated(KeyFile, {"keys": {name: fields}}, (), Origin())
    with _changing(path) as keys:
        if name in keys:
            raise ConfigError(
                f"{path} has a key of that name",
                hint="choose another name; revoke the old key when nobody uses it any more",
            )
        keys |= made.keys
    return key


def revoke(path: Path, name: str) -> None:
    """Forget a key.

    Raises:
        ConfigError: there is none of that name, or the file is wrong.
    """
    with _changing(path) as keys:
        if name not in keys:
            raise ConfigError(
                f"{path} has no key of that name", hint=f"it has {', '.join(keys) or 'none'}"
            )
        del keys[name]


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[dict[str, KeyTable]]:
    """The keys of a file, written whole at the end; one command at a time."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"cannot open the folder {path.parent}: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = dict(read(path).keys) if path.exists() else {}
        yield keys
        try:
            _write(path, keys)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    finally:
        os.close(folder)


def _write(path: Path, keys: dict[str, KeyTable]) -> None:
    lines = [_HEAD]
    for name, table in keys.items():
        lines += ["", f'[keys."{name}"]']
        for key, value in table.model_dump(exclude_none=True).items():
            told = value.isoformat() if isinstance(value, datetime.datetime) else json.dumps(value)
            if value != ():
                lines.append(f"{key} = {told}")
    raw = ("\n".join(lines) + "\n").encode()
    _parsed(path, raw)  # what could not be read is not written
    if path.exists():  # and stays that of the server, whoever changes it
        before = path.stat()
        replace_file(path, raw, before.st_mode & 0o777, (before.st_uid, before.st_gid))
    else:
        replace_file(path, raw, 0o600)
