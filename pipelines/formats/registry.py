"""The Confluent wire format: messages whose schemas come from a Schema Registry over HTTP."""

from __future__ import annotations

import base64
import http.client
import logging
import os
import ssl
import time
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, urlsplit

import orjson
from pydantic import Field, field_validator

from plinth.engine import ConfigError, InputError, PlinthError
from plinth.engine.tables import Table

HEAD = 5
"""Bytes before the value: zero, then the id of the schema, most significant byte first."""
MAX_REFERENCES = 100
"""Other schemas that one schema may need, theirs included."""
HOLD_S = 10.0
"""Seconds after which no further schema is asked for in one go; a reader has more to do."""
NOT_FOUND = 404
_HINTS = {401: ": see username and password_env", 403: ": see username and password_env"}

log = logging.getLogger("plinth.formats")


class RegistryConfig(Table):
    """``[format.registry]``.

    Args:
        url: of the registry, ``http://`` or ``https://``, a path before the API's is kept.
        username: for basic authentication.
        password_env: environment variable that holds the password.
        cafile: PEM file of who signed its certificate; default: those the system trusts.
        timeout_s: longest wait for one answer.
        max_schemas: kept at most, by last use.
        max_schema_bytes: a larger answer is refused.
        retry_s: an id that the registry did not know is asked for again after so long.
    """

    url: str
    username: str | None = None
    password_env: str = "PLINTH_REGISTRY_PASSWORD"  # noqa: S105 - the name of a variable
    cafile: Path | None = None
    timeout_s: float = Field(default=3.0, gt=0, le=60)
    max_schemas: int = Field(default=1_000, ge=1, le=100_000)
    max_schema_bytes: int = Field(default=1 << 20, ge=100, le=64 << 20)
    retry_s: float = Field(default=30.0, gt=0)

    @field_validator("url")
    @classmethod
    def _plain(cls, url: str) -> str:
        parts = urlsplit(url)
        try:
            wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
        except ValueError:
            wrong = True
        if wrong:
            raise ValueError("expected http://host:port or https://host:port")
        if parts.username or parts.query or parts.fragment:
            raise ValueError("the name goes into username, the password into password_env")
        return url.rstrip("/")


class RegistryAway(PlinthError):
    """The registry does not answer: the message is not at fault, and is to be offered again."""

    reason = "registry"


class Decoded(NamedTuple):
    """A value, and the full name of its type, empty where that has none."""

    value: Any
    type: str = ""


class Schemas(Protocol):
    """What reads the values of one kind of schema.

    Attributes:
        kind: as the registry names it.
        word: for people.
        query: of the requests, so that schemas come in the form that is read.
    """

    kind: str
    word: str
    query: str

    def parsed(self, found: dict[str, Any], name: str, named: dict[str, Any]) -> Any:
        """A schema from an answer of the registry; raises whatever is wrong with it.

        Args:
            found: the answer.
            name: by which others refer to it.
            named: holds what it refers to, and then itself too.
        """

    def read(self, schema: Any, body: bytes) -> Decoded:
        """The value in what follows the schema's id; raises whatever is wrong with it."""


class SchemaRegistry:
    """Reads messages by the schemas that they name; each schema is asked for once.

    Args:
        config: where the registry is.
        schemas: reads values.

    Raises:
        ConfigError: the password is not there.
    """

    def __init__(self, config: RegistryConfig, schemas: Schemas) -> None:
        self._reader = schemas
        self._config = config
        self._schemas: OrderedDict[int, Any] = OrderedDict()
        self._unknown: OrderedDict[int, tuple[float, str]] = OrderedDict()
        self._answers: dict[str, dict[str, Any]] = {}
        self._headers = {"Accept": "application/vnd.schemaregistry.v1+json"}
        if config.username is not None:
            password = os.environ.get(config.password_env)
            if not password:
                raise ConfigError(
                    f"the environment variable {config.password_env} is not set",
                    hint="put the registry's password there, or name another with password_env",
                )
            pair = base64.b64encode(f"{config.username}:{password}".encode()).decode()
            self._headers["Authorization"] = f"Basic {pair}"

    def prepare(self, raws: Iterable[bytes | None]) -> None:
        """Have the schemas of these messages, as far as the registry has them.

        Raises:
            RegistryAway: it does not answer, or not as a registry does, or takes long; what it
                gave so far is kept, so that another call gets further.
        """
        until = time.monotonic() + HOLD_S
        for number in {_id(raw) for raw in raws if raw is not None and _wired(raw)}:
            if number in self._schemas:
                self._schemas.move_to_end(number)
            elif not self._is_unknown(number):
                self._learn(number, until)

    def decode(self, raw: bytes) -> Decoded:
        """The value of a message whose schema is known.

        Raises:
            InputError: not in the wire format, of no known schema, or not of that schema.
            RegistryAway: the schema was not known yet, and the registry does not answer.
        """
        if not _wired(raw):
            raise InputError(
                "the message is not in the Confluent wire format",
                reason=f"not_{self._reader.word.lower()}",
                hint="it begins with a zero byte and four bytes of schema id; for JSON set "
                "type = 'json' in [format]",
            )
        self.prepare((raw,))
        number = _id(raw)
        schema = self._schemas.get(number)
        if schema is None:
            why = self._unknown.get(number, (0.0, "is not known to the registry"))[1]
            raise InputError(f"schema {number} {why}", reason="unknown_schema")
        try:
            return self._reader.read(schema, raw[HEAD:])
        except Exception as error:  # noqa: BLE001 - a hostile message may raise anything in there
            log.debug("schema %d: %s", number, type(error).__name__)
            raise self._damaged(number) from None

    def _damaged(self, number: int) -> InputError:
        return InputError(
            f"the message is not a value of schema {number}",
            reason=f"malformed_{self._reader.word.lower()}",
            hint="was it written with another schema than the one it names?",
        )

    def _is_unknown(self, number: int) -> bool:
        at, _ = self._unknown.get(number, (None, ""))
        return at is not None and time.monotonic() - at < self._config.retry_s

    def _learn(self, number: int, until: float) -> None:
        found = self._get(f"/schemas/ids/{number}{self._reader.query}", until)
        if found is None:
            return self._refuse(number, "is not known to the registry")
        if found.get("schemaType", "AVRO") != self._reader.kind:
            return self._refuse(number, f"is no schema of {self._reader.word}")
        try:
            named: dict[str, Any] = {}
            self._referenced(found, named, [MAX_REFERENCES], until)
            schema = self._reader.parsed(found, f"schema {number}", named)
        except RegistryAway:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the registry holds
            log.warning("schema %d cannot be used: %s", number, type(error).__name__)
            return self._refuse(number, "cannot be read")
        self._unknown.pop(number, None)
        self._answers.clear()
        self._schemas[number] = schema
        if len(self._schemas) > self._config.max_schemas:
            self._schemas.popitem(last=False)
        return None

    def _refuse(self, number: int, why: str) -> None:
        self._answers.clear()
        self._unknown[number] = time.monotonic(), why
        self._unknown.move_to_end(number)
        if len(self._unknown) > self._config.max_schemas:
            self._unknown.popitem(last=False)

    def _referenced(
        self, found: dict[str, Any], named: dict[str, Any], left: list[int], until: float
    ) -> None:
        """Parse the schemas that one refers to, theirs first."""
        for reference in found.get("references") or ():
            if reference["name"] in named:
                continue
            left[0] -= 1
            if left[0] < 0:
                raise ValueError("too many references")
            subject = quote(reference["subject"], safe="")
            path = f"/subjects/{subject}/versions/{int(reference['version'])}"
            other = self._get(path + self._reader.query, until)
            if other is None:
                raise ValueError("a reference is not known")
            self._referenced(other, named, left, until)
            self._reader.parsed(other, reference["name"], named)

    def _get(self, path: str, until: float) -> dict[str, Any] | None:
        """One answer; ``None`` for not found. It is kept until the schema is known or refused.

        Raises:
            RegistryAway: anything else than an answer in time.
        """
        if path not in self._answers:
            if time.monotonic() > until:
                raise self._away(f"it took longer than {HOLD_S:g} s for a few; asking goes on")
            if (answer := self._ask(path)) is None:
                return None
            self._answers[path] = answer
        return self._answers[path]

    def _ask(self, path: str) -> dict[str, Any] | None:
        config, until = self._config, time.monotonic() + self._config.timeout_s
        parts = urlsplit(config.url)
        try:
            connection = self._connection(parts.hostname or "", parts.port, parts.scheme)
            try:
                connection.request("GET", parts.path + path, headers=self._headers)
                response = connection.getresponse()
                body = b""
                while part := response.read1(65_536):
                    body += part
                    if len(body) > config.max_schema_bytes or time.monotonic() > until:
                        raise self._away("its answer is too large or too slow")
            finally:
                connection.close()
            if response.status == NOT_FOUND and _says_unknown(body):
                return None
            if response.status != 200:
                told = ": give the address that it leads to" if response.status < 400 else ""
                told = _HINTS.get(response.status, told)
                raise self._away(f"it answers {response.status}{told}")
            found = orjson.loads(body)
        except (OSError, http.client.HTTPException, orjson.JSONDecodeError) as error:
            raise self._away(type(error).__name__) from None
        if not isinstance(found, dict) or not isinstance(found.get("schema"), str):
            raise self._away("its answer is not one of a schema registry")
        return found

    def _connection(self, host: str, port: int | None, scheme: str) -> http.client.HTTPConnection:
        if scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=self._config.timeout_s)
        cafile = str(self._config.cafile) if self._config.cafile else None
        context = ssl.create_default_context(cafile=cafile)
        return http.client.HTTPSConnection(
            host, port, timeout=self._config.timeout_s, context=context
        )

    def _away(self, why: str) -> RegistryAway:
        return RegistryAway(
            f"no schema from the registry at {self._config.url}: {why}",
            hint="check [format.registry] of the mapping, and that the registry runs",
        )


def _says_unknown(body: bytes) -> bool:
    """Whether a registry answers (40403: no such schema), not whoever stands before it."""
    try:
        code = orjson.loads(body).get("error_code")
    except (orjson.JSONDecodeError, AttributeError):
        return False
    return isinstance(code, int) and 40_400 < code < 40_500


def _wired(raw: bytes) -> bool:
    return len(raw) > HEAD and raw[0] == 0


def _id(raw: bytes) -> int:
    return int.from_bytes(raw[1:HEAD], "big")


def zigzag(body: bytes, at: int) -> tuple[int, int]:
    """A whole number of at most five bytes as Avro and Protobuf write it, and where it ends.

    Raises:
        ValueError: there is none.
    """
    found = shift = 0
    for place in range(at, min(at + 5, len(body))):
        found |= (body[place] & 0x7F) << shift
        shift += 7
        if body[place] < 0x80:
            return (found >> 1) ^ -(found & 1), place + 1
    raise ValueError("no number")
