"""Bearer tokens for Kafka (SASL/OAUTHBEARER), from a file that somebody else renews."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

from kafka.errors import KafkaError
from kafka.net.sasl.oauth import AbstractTokenProvider

from plinth.engine import ConfigError
from plinth.pipelines.lines import whole

MAX_BYTES = 65_536
READ_AGAIN_S = 300.0
"""A client that asks for the life of a token hears so much at most: then the file is read anew."""


class TokenFile(AbstractTokenProvider):  # type: ignore[misc]
    """The token in a file, read anew for every connection.

    Args:
        path: of the file; whoever renews the token puts another file in its place.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def token(self) -> str:
        """The token as it is now.

        Raises:
            KafkaError: the file cannot be read, or holds no token; its content is not told.
        """
        try:
            text = whole(self._path, MAX_BYTES).decode("ascii").strip()
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            raise KafkaError(f"no token can be read from {self._path}: {error}") from None
        if not text or len(text.split()) > 1:
            raise KafkaError(f"{self._path} must hold one token of at most {MAX_BYTES} characters")
        return text

    def with_end(self, _: str = "") -> tuple[str, float]:
        """The token, and when it is to be asked for again: seconds since 1970."""
        token = self.token()
        return token, min(_end(token), time.time() + READ_AGAIN_S)


def _end(token: str) -> float:
    """When a JSON Web Token ends; never, where it does not say or is none."""
    try:
        payload = token.split(".")[1]
        told = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return float(told["exp"])
    except (IndexError, ValueError, KeyError, TypeError):
        return float("inf")
