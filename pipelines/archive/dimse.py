"""Results to an archive without STOW: C-STORE (PS3.4 B), and storage commitment (PS3.4 J)."""

from __future__ import annotations

import io
import logging
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    generate_uid,
)
from pynetdicom import AE, _config, build_context, evt
from pynetdicom.sop_class import (
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)

from plinth.engine import ConfigError
from plinth.pipelines.archive.dicomweb import BUSY, NotWanted, Unreachable
from plinth.pipelines.archive.settings import Peer

log = logging.getLogger("plinth.archive")

SUCCESS, DUPLICATE, NO_SUCH_ARGUMENT = 0x0000, 0x0111, 0x0114
WARNINGS = range(0xB000, 0xC000)
"""Status of C-STORE (PS3.4 B.2.3): it was stored, with something changed or left out."""
PENDING = {0xFF00, 0xFF01}
COMMITTED = 1
"""Event Type of a report in which nothing failed (PS3.4 J.3.3)."""
MAX_REPORTS = 64
"""Requests for commitment that wait at the same time."""


def silence() -> None:
    """pynetdicom's messages quote data sets, and its default handlers log whole requests."""
    _config.LOG_HANDLER_LEVEL = "none"
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)


@dataclass(slots=True)
class _Report:
    """What the archive says of one request for commitment, once it does."""

    image: str
    arrived: threading.Event = field(default_factory=threading.Event)
    failure: int | None = None


class DicomPeer:
    """Sends to one archive; each message on an association of its own.

    Args:
        settings: ``[store]``.

    Raises:
        ConfigError: a certificate cannot be read.
    """

    def __init__(self, settings: Peer) -> None:
        silence()
        self._settings = settings
        self._tls = _tls(settings)
        self._lock = threading.Lock()
        self._reports: dict[str, _Report] = {}
        self._offers = True

    def has(self, study: str, series: str, image: str) -> bool:
        """Whether the archive has an image, by C-FIND; ``False`` where it does not say.

        Storing an object again under its own UID is no second object.

        Raises:
            Unreachable: the archive cannot answer.
        """
        model = StudyRootQueryRetrieveInformationModelFind
        wanted = Dataset()
        wanted.QueryRetrieveLevel = "IMAGE"
        wanted.StudyInstanceUID, wanted.SeriesInstanceUID = study, series
        wanted.SOPInstanceUID = image
        with self._associated([build_context(model)]) as link:
            if not _takes(link, model):
                return False
            found = False
            for status, answer in link.send_c_find(wanted, model):
                if "Status" not in status:
                    raise Unreachable("the archive does not answer C-FIND")
                if status.Status in PENDING and answer is not None:
                    found = found or answer.get("SOPInstanceUID") == image
            return found

    def store(self, content: bytes) -> None:
        """Store one object, in its own transfer syntax.

        Raises:
            Unreachable: the archive cannot take it now.
            NotWanted: it will not take it.
        """
        image = dcmread(io.BytesIO(content))
        kind, syntax = UID(image.SOPClassUID), UID(image.file_meta.TransferSyntaxUID)
        syntaxes = [syntax]
        if not syntax.is_compressed:
            syntaxes = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
        with self._associated([build_context(kind, one) for one in syntaxes]) as link:
            if not _takes(link, kind):
                raise NotWanted(f"the archive takes no {kind.name} in {syntax.name}")
            try:
                status = link.send_c_store(image)
            except (ValueError, RuntimeError) as error:
                raise Unreachable(f"{type(error).__name__} while sending") from None
        _judge(status, "store it")

    def confirm(self, kind: str, image: str) -> None:
        """Have the archive commit itself to keep an object, if that is wanted and it offers it.

        Args:
            kind: SOP Class UID.
            image: SOP Instance UID.

        Raises:
            Unreachable: it does not, or says nothing in time; it may later.
        """
        if not (self._settings.commitment and self._offers):
            return
        transaction = generate_uid()
        report = _Report(image)
        with self._lock:
            if len(self._reports) >= MAX_REPORTS:
                raise Unreachable("too many requests for storage commitment wait")
            self._reports[transaction] = report
        try:
            with self._associated([build_context(StorageCommitmentPushModel)]) as link:
                if not _takes(link, StorageCommitmentPushModel):
                    self._offers = False
                    log.warning("the archive offers no storage commitment: none is asked for")
                    return
                status, _ = link.send_n_action(
                    _request(transaction, kind, image),
                    1,
                    StorageCommitmentPushModel,
                    StorageCommitmentPushModelInstance,
                )
                _judge(status, "commit itself")
                if not report.arrived.wait(self._settings.commitment_seconds):
                    raise Unreachable("no report on storage commitment came in time")
        finally:
            with self._lock:
                del self._reports[transaction]
        if report.failure is not None:
            raise Unreachable(f"the archive does not commit itself (reason {report.failure:#06x})")

    def reported(self, event: Any) -> tuple[int, None]:
        """N-EVENT-REPORT, on our association or by the door: who waits for it goes on."""
        told = event.event_information
        with self._lock:
            report = self._reports.get(str(told.get("TransactionUID", "")))
        if report is None:
            return NO_SUCH_ARGUMENT, None
        failed = {
            str(one.get("ReferencedSOPInstanceUID", "")): int(one.get("FailureReason", 0x0110))
            for one in told.get("FailedSOPSequence") or []
        }
        kept = {
            str(one.get("ReferencedSOPInstanceUID", ""))
            for one in told.get("ReferencedSOPSequence") or []
        }
        if event.event_type != COMMITTED or report.image not in kept:
            report.failure = failed.get(report.image, 0x0110)
        report.arrived.set()
        return SUCCESS, None

    @contextmanager
    def _associated(self, contexts: list[Any]) -> Iterator[Any]:
        settings = self._settings
        entity = AE(ae_title=settings.caller)
        entity.acse_timeout = entity.dimse_timeout = settings.timeout_seconds
        entity.network_timeout = entity.connection_timeout = settings.timeout_seconds
        link = entity.associate(
            settings.host,
            settings.port,
            contexts=[*contexts, build_context(Verification)],
            ae_title=settings.title,
            tls_args=None if self._tls is None else (self._tls, settings.host),
            evt_handlers=[(evt.EVT_N_EVENT_REPORT, self.reported)],
        )
        if not link.is_established:
            why = (
                "refuses our AE title, or the title we call" if link.is_rejected else "is not there"
            )
            raise Unreachable(f"the archive {why}")
        try:
            yield link
        finally:
            if link.is_established:
                link.release()


def _takes(link: Any, kind: UID) -> bool:
    return any(context.abstract_syntax == kind for context in link.accepted_contexts)


def _request(transaction: UID, kind: str, image: str) -> Dataset:
    """Action Information of a request for commitment (PS3.4 table J.3-1)."""
    referenced, request = Dataset(), Dataset()
    referenced.ReferencedSOPClassUID, referenced.ReferencedSOPInstanceUID = kind, image
    request.TransactionUID, request.ReferencedSOPSequence = transaction, [referenced]
    return request


def _judge(status: Dataset, what: str) -> None:
    code = status.get("Status")
    if code is None:
        raise Unreachable(f"the archive did not say whether it can {what}")
    if code in (SUCCESS, DUPLICATE) or code in WARNINGS:
        return
    if code in BUSY:
        raise Unreachable(f"the archive could not {what} (status {code:#06x})")
    raise NotWanted(f"the archive does not {what} (status {code:#06x})")


def _tls(settings: Peer) -> ssl.SSLContext | None:
    if not settings.tls:
        return None
    try:
        context = ssl.create_default_context(cafile=settings.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if settings.certificate is not None:
            context.load_cert_chain(settings.certificate, settings.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"store: ca, certificate or key cannot be used: {error.strerror or error}",
            hint="give PEM files that this user may read",
        ) from None
    return context
