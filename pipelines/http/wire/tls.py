"""TLS by the standard library (OpenSSL): sockets that read and write as plain ones do.

Certificates are read again when their files change; connections that are open keep theirs.
"""

from __future__ import annotations

import logging
import socket
import ssl
from pathlib import Path

from plinth.engine import ConfigError
from plinth.pipelines.live.tables import Marks

log = logging.getLogger("plinth.tls")


class TlsSocket:
    """A non-blocking TLS connection with the methods of a socket that a connection uses.

    Args:
        plug: accepted, non-blocking.
        context: of the server.
    """

    __slots__ = ("_open", "_tls")

    def __init__(self, plug: socket.socket, context: ssl.SSLContext) -> None:
        self._tls = context.wrap_socket(plug, server_side=True, do_handshake_on_connect=False)
        self._open = False

    def fileno(self) -> int:
        """See socket."""
        return self._tls.fileno()

    def getsockname(self) -> tuple[str, int]:
        """See socket."""
        name: tuple[str, int] = self._tls.getsockname()
        return name

    def getpeername(self) -> tuple[str, int]:
        """See socket."""
        name: tuple[str, int] = self._tls.getpeername()
        return name

    def recv(self, size: int, flags: int = 0) -> bytes:
        """What is there, at most ``size`` bytes: all of it, however many records it came in.

        Raises:
            BlockingIOError: nothing is there.
            OSError: the handshake failed, or the connection broke.
        """
        if flags:  # a look whether more comes: bytes of TLS itself say nothing of it
            raise BlockingIOError
        parts: list[bytes] = []
        count = 0
        while count < size:
            try:
                if not self._open:
                    self._tls.do_handshake()
                    self._open = True
                part = self._tls.recv(size - count)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if not parts:
                    raise BlockingIOError from None
                break
            if not part:
                break
            parts.append(part)
            count += len(part)
        return b"".join(parts)

    def send(self, data: bytes) -> int:
        """Bytes that were taken.

        Raises:
            BlockingIOError: none.
            OSError: the connection broke, or there is none yet.
        """
        if not self._open:
            raise ConnectionError("the handshake is not over")
        try:
            return self._tls.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def shutdown(self, how: int) -> None:
        """Say that no more is sent."""
        try:
            self._tls.unwrap()
        except (ssl.SSLError, ValueError, OSError):
            self._tls.shutdown(how)  # the other side has not said so yet

    def close(self) -> None:
        """See socket."""
        self._tls.close()


class TlsFiles:
    """A server's certificate, in files that may change.

    Args:
        files: certificate and key; and who signs the certificates that clients must show.

    Raises:
        ConfigError: one cannot be read, or they do not go together.
    """

    def __init__(self, files: tuple[Path, ...]) -> None:
        self._files = files
        self._marks = Marks(*files)
        self._context = self._read()

    def _read(self) -> ssl.SSLContext:
        certificate, key, *ca = self._files
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(certificate, key)
            if ca:
                context.load_verify_locations(ca[0])
                context.verify_mode = ssl.CERT_REQUIRED
        except OSError as error:  # ssl.SSLError is one
            reason = getattr(error, "reason", None) or error.strerror
            raise ConfigError(
                f"TLS with {', '.join(map(str, self._files))}: {reason}",
                hint="they are PEM files: a certificate with its chain, its key without a "
                "password, and who signs the clients' certificates",
            ) from None
        return context

    def wrap(self, plug: socket.socket) -> TlsSocket:
        """A connection that was accepted, with the certificate in force."""
        return TlsSocket(plug, self._context)

    def look(self) -> None:
        """Read files again that changed; where they are wrong, what was in force stays."""
        if not self._marks.changed():
            return
        try:
            self._context = self._read()
        except ConfigError as error:
            log.error("the certificate in force stays: %s", error)
        else:
            log.info("took over %s", self._files[0])


def tls_files(files: tuple[Path, ...]) -> TlsFiles | None:
    """The certificate in these files; ``None``: there are none.

    Raises:
        ConfigError: a file is wrong.
    """
    return TlsFiles(files) if files else None
