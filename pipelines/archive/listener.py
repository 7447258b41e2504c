"""The C-STORE door (PS3.4 B, PS3.8): pynetdicom's server, with bounds before anybody is known."""

from __future__ import annotations

import io
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from socketserver import BaseServer
from types import TracebackType
from typing import Any, Protocol, Self, cast

from pydicom import dcmread
from pynetdicom import (
    AE,
    ALL_TRANSFER_SYNTAXES,
    AllStoragePresentationContexts,
    evt,
)
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification
from pynetdicom.transport import (
    AssociationSocket,
    RequestHandler,
    ThreadedAssociationServer,
)

from plinth.engine import ConfigError, PlinthError
from plinth.pipelines.archive.dimse import silence
from plinth.pipelines.archive.settings import Listen
from plinth.pipelines.config.settings import TlsConfig
from plinth.pipelines.folders.storage import StorageError
from plinth.verticals.medical.source import MALFORMED

log = logging.getLogger("plinth.archive")

MAX_PDU = 256 << 10
"""Bytes of one message unit that we ask for."""
MAX_UNIT = 2 << 20
"""Bytes of one message unit that we read: a request names many transfer syntaxes."""
SPARE = 4
"""Connections beyond the associations, which are told that there are too many."""
PIECE = 64 << 10

NAMED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
NUMBER, NAME = ("PatientID", "IssuerOfPatientID"), ("PatientName", "PatientBirthDate")
SUCCESS, OUT_OF_RESOURCES, MISMATCH, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xA900, 0xC000
"""Status of C-STORE (PS3.4 B.2.3)."""


class Keeper(Protocol):
    """Where images outlive this process; what it raises is told to the sender."""

    def kept(self, study_uid: str, image_uid: str) -> bytes | None:
        """The image as it is here, if it is."""

    def put(self, study_uid: str, image_uid: str, content: bytes) -> object:
        """Keep an image; when this returns, it is on disk."""

    def sending(self, study_uid: str, series_uid: str) -> float:
        """A caller begins to send images of a series; returns when."""

    def ended(self, study_uid: str, series_uid: str, since: float, *, whole: bool) -> None:
        """A caller sends no more of a series, because that was all or not."""


@dataclass(slots=True)
class _Sent:
    """What one caller has sent: since when, by study and series; of which an image was not kept.

    ``socket.received`` counts the bytes that came since its last message was whole.
    """

    socket: _Socket
    since: dict[tuple[str, str], float] = field(default_factory=dict)
    lost: set[tuple[str, str]] = field(default_factory=set)


class _Socket(AssociationSocket):  # type: ignore[misc]
    """A socket that reads no unit and no message larger than allowed, nor waits longer."""

    max_message = 1 << 30
    idle_seconds = 30.0
    received = 0

    def recv(self, nr_bytes: int) -> bytearray:
        """Read exactly so many bytes, or raise OSError, which ends the connection."""
        self.received += nr_bytes
        if nr_bytes > MAX_UNIT or self.received > self.max_message + MAX_UNIT:
            raise OSError("more bytes than this door takes")
        plug = cast(socket.socket, self.socket)
        found = bytearray()
        until = time.monotonic() + self.idle_seconds
        while len(found) < nr_bytes:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            plug.settimeout(left)
            piece = plug.recv(min(PIECE, nr_bytes - len(found)))
            if not piece:
                break
            found += piece
        plug.settimeout(self.idle_seconds)
        return found


class _Handler(RequestHandler):  # type: ignore[misc]
    server: _Server

    def handle(self) -> None:
        """Shake hands within bounds, then start the association."""
        try:
            self.request.settimeout(self.server.settings.idle_seconds)
            if isinstance(self.request, ssl.SSLSocket):
                self.request.do_handshake()
        finally:
            self.server.strangers.release()
        super().handle()

    def _create_association(self) -> Any:
        assoc = super()._create_association()
        bounded = assoc.dul.socket
        bounded.__class__ = _Socket  # a second one would tell the state machine twice
        bounded.max_message = self.server.settings.max_object_bytes
        bounded.idle_seconds = self.server.settings.idle_seconds
        return assoc


class _Server(ThreadedAssociationServer):  # type: ignore[misc]
    """Counts connections before they ask for anything; hands of TLS are shaken on their threads."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *given: Any, settings: Listen, **named: Any) -> None:
        self.settings = settings
        self.strangers = threading.BoundedSemaphore(settings.max_associations + SPARE)
        super().__init__(*given, request_handler=_Handler, **named)

    def get_request(self) -> tuple[socket.socket, Any]:
        plug, address = cast(socket.socket, self.socket).accept()
        if self.ssl_context is None:
            return plug, address
        wrapped = self.ssl_context.wrap_socket(
            plug, server_side=True, do_handshake_on_connect=False
        )
        return wrapped, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        if len(self.active_associations) >= self.settings.max_associations + SPARE:
            return False
        return self.strangers.acquire(blocking=False)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a connection ended before it asked for anything")

    def shutdown(self) -> None:
        """End the loop, and close the door."""
        BaseServer.shutdown(self)
        self.server_close()


class Listener:
    """Takes images by C-STORE and answers C-ECHO, on threads of its own.

    Args:
        settings: ``[listen]``.
        keeper: gets the images.
        reported: what an archive says of the storage commitment that it was asked for.

    Raises:
        ConfigError: the address is taken, or a certificate cannot be read.
    """

    def __init__(
        self, settings: Listen, keeper: Keeper, reported: Callable[[Any], Any] | None = None
    ) -> None:
        silence()
        self._keeper, self._needs_release = keeper, settings.needs_release
        self._sent: dict[Any, _Sent] = {}
        handlers: list[tuple[Any, Any]] = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_C_ECHO, _echo),
            (evt.EVT_REJECTED, _rejected),
            (evt.EVT_RELEASED, lambda event: self._ended(event.assoc, whole=True)),
            (evt.EVT_ABORTED, self._aborted),
        ]
        entity = AE(ae_title=settings.title)
        entity.require_called_aet = True
        entity.require_calling_aet = [] if "*" in settings.callers else list(settings.callers)
        entity.maximum_associations = settings.max_associations
        entity.maximum_pdu_size = MAX_PDU
        entity.network_timeout = entity.dimse_timeout = settings.idle_seconds
        entity.acse_timeout = settings.idle_seconds
        entity.add_supported_context(Verification)
        for context in AllStoragePresentationContexts:
            entity.add_supported_context(str(context.abstract_syntax), ALL_TRANSFER_SYNTAXES)
        if reported is not None:  # the archive calls, and stays the provider of the service
            entity.add_supported_context(StorageCommitmentPushModel, scu_role=False, scp_role=True)
            handlers.append((evt.EVT_N_EVENT_REPORT, reported))
        try:
            self._server = entity.make_server(
                (settings.host, settings.port),
                ssl_context=_tls(settings.tls),
                evt_handlers=handlers,
                server_class=_Server,
                settings=settings,
            )
        except OSError as error:
            raise ConfigError(
                f"listen: {settings.host}:{settings.port} cannot be used: {error.strerror}",
                hint="choose another port, or stop what has it",
            ) from None
        self.port: int = self._server.server_address[1]
        self._entity = entity
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="plinth-listen", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Take no more; images on their way are not answered, so that they are sent again."""
        self._server.shutdown()
        for association in self._server.active_associations:
            association.abort()
        self._thread.join()

    def _store(self, event: Any) -> int:
        """One image: kept on disk before it is answered."""
        plug = event.assoc.dul.socket
        plug.received = 0
        request = event.request
        content: bytes = event.encoded_dataset()
        try:
            (study, series, image), owner = _said(content)
        except MALFORMED:
            return NOT_UNDERSTOOD
        if not study or image != str(request.AffectedSOPInstanceUID):
            return MISMATCH  # a result could not be filed in a study without a UID
        before = self._keeper.kept(study, image)
        if before is not None and _said(before)[1] != owner:
            log.error(
                "an image was not taken: its UIDs are those of another patient's image that is here"
            )
            return MISMATCH
        sent = self._sent.setdefault(event.assoc, _Sent(plug))
        try:
            if (study, series) not in sent.since:
                sent.since[study, series] = self._keeper.sending(study, series)
            self._keeper.put(study, image, content)
        except StorageError as error:
            sent.lost.add((study, series))
            log.warning("an image was not taken: %s", error.message)
            return OUT_OF_RESOURCES
        except PlinthError as error:
            log.error("an image was not taken: %s", error.message)
            return NOT_UNDERSTOOD
        return SUCCESS

    def _aborted(self, event: Any) -> None:
        """An association ended without a release: in silence it may have been all, else not."""
        sent = self._sent.get(event.assoc)
        if sent is not None:
            silent = event.assoc.dul.idle_timer_expired() and sent.socket.received == 0
            self._ended(event.assoc, whole=silent or not self._needs_release)

    def _ended(self, association: Any, *, whole: bool) -> None:
        """Tell what became of all that an association has brought."""
        sent = self._sent.pop(association, None)
        if sent is None:
            return
        try:
            for (study, series), since in sent.since.items():
                all_kept = (study, series) not in sent.lost
                self._keeper.ended(study, series, since, whole=whole and all_kept)
        except StorageError as error:
            log.error("how a transfer ended cannot be kept: %s", error.message)


def _echo(event: Any) -> int:
    event.assoc.dul.socket.received = 0
    return SUCCESS


def _said(content: bytes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The identifiers of an image, and whose it is: by number, by name where there is none."""
    wanted = [*NAMED, *NUMBER, *NAME]
    header = dcmread(io.BytesIO(content), stop_before_pixels=True, specific_tags=wanted)

    def told(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(header.get(one) or "") for one in names)

    return told(NAMED), told(NUMBER) if header.get("PatientID") else told(NAME)


def _rejected(event: Any) -> None:
    log.warning("a caller was refused: its AE title, the title it calls, or too many callers")


def _tls(settings: TlsConfig) -> ssl.SSLContext | None:
    if settings.certificate is None or settings.key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.certificate, settings.key)
        if settings.client_ca is not None:
            context.load_verify_locations(settings.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"listen.tls: certificate, key or client_ca cannot be used: {error.strerror or error}",
            hint="give PEM files that this user may read",
        ) from None
    return context
