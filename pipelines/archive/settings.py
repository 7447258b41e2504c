"""The file of ``plinth archive``: where images come from, what is done with which, where it goes.

One TOML file, checked at the door; paths in it start from its folder. Passwords and tokens stand
in environment variables, never in the file.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from plinth.engine import ConfigError
from plinth.engine.tables import Table
from plinth.pipelines.config.settings import Bytes, TlsConfig, is_loopback
from plinth.pipelines.config.source import Origin, places, validated
from plinth.pipelines.lines import toml, whole

EXAMPLE = """\
folder = "./archive"              # what came in, the queue, the results; survives a restart

[listen]                          # scanners and archives send here by C-STORE
title = "PLINTH"                  # our AE title: what they call
host = "127.0.0.1"                # the address of this machine that they reach
port = 11112
callers = ["ORTHANC"]             # AE titles that may send
quiet_seconds = 20                # nothing new for so long: the study is complete

[poll]                            # and what an archive has is fetched by QIDO and WADO
url = "http://127.0.0.1:8042/dicom-web"
every_seconds = 60
days = 2                          # studies of today and the day before

[send]                            # results go here by STOW; [store] has it by C-STORE
url = "http://127.0.0.1:8042/dicom-web"

[analyses.lungs]                  # any name; the settings are those of [verticals.medical]
vertical = "medical"
contours = true

[[rules]]                         # which series get which analysis; every line has to hold
analysis = "lungs"
modality = "CT"
body_part = ["CHEST", "THORAX", "LUNG*"]
description = ["*", "!*scout*"]   # any text, but not one with "scout" in it
kernel = ["B30*", "STANDARD", "FC0*"]
thickness_mm = [0.5, 3.0]
min_images = 30
"""
"""What ``plinth archive example`` prints."""

_TITLE = re.compile(r"[ -\[\]-~]{1,16}")


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]


def _patterns(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Patterns that something can fit."""
    wanted = [one for one in patterns if not one.startswith("!")]
    barred = {one[1:].casefold() for one in patterns if one.startswith("!")}
    if not patterns or not all(one.removeprefix("!").strip() for one in patterns):
        raise ValueError("an empty pattern fits nothing: leave the key out, or write *")
    if "*" in barred or (wanted and barred.issuperset(map(str.casefold, wanted))):
        raise ValueError("nothing can fit: what begins with ! takes away all that may fit")
    return patterns


Patterns = Annotated[Names, AfterValidator(_patterns)]
AnalysisName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")]
"""It is the name of a folder of results too."""


def _title(title: str) -> str:
    if not _TITLE.fullmatch(title) or not title.strip():
        raise ValueError("expected an AE title: 1 to 16 characters of ASCII without backslash")
    return title.strip()


class Listen(Table):
    """``[listen]``: the C-STORE door.

    Args:
        title: our AE title; who calls another one is refused.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        callers: AE titles that may send; ``*`` for any, on loopback alone.
        quiet_seconds: a study to which nothing came for so long is complete.
        tls: certificate and key, and who signs the callers' certificates.
        max_associations: connections at the same time.
        max_object_bytes: bytes of one image.
        idle_seconds: a caller that says nothing for so long is hung up on; and the longest time
            that one message unit may take to come.
        needs_release: what a caller sent that ends without a release, other than by silence, is
            not analysed before it is sent again; false for callers that never release.
    """

    title: str = "PLINTH"
    host: str = "127.0.0.1"
    port: int = Field(default=11112, ge=0, le=65_535)
    callers: Names = Field(min_length=1)
    quiet_seconds: float = Field(default=20.0, gt=0, le=86_400)
    tls: TlsConfig = TlsConfig()
    max_associations: int = Field(default=10, ge=1, le=500)
    max_object_bytes: Bytes = Field(default=1 << 30, ge=1 << 10)
    idle_seconds: float = Field(default=30.0, gt=0, le=3600)
    needs_release: bool = True

    _check_title = field_validator("title")(_title)

    @field_validator("callers")
    @classmethod
    def _titles(cls, callers: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(one if one == "*" else _title(one) for one in callers)

    @model_validator(mode="after")
    def _known_callers(self) -> Listen:
        if "*" in self.callers and not is_loopback(self.host) and self.tls.client_ca is None:
            raise ValueError("callers = '*' needs a host of loopback, or tls.client_ca")
        return self


class Web(Table):
    """A DICOMweb service (PS3.18).

    Args:
        url: its root, such as ``https://pacs.example/dicom-web``.
        user_env: variables of the environment with user and password, ``NAME:NAME``.
        token_env: variable of the environment with a bearer token.
        ca: PEM file of who signs its certificate; none: those the system trusts.
        timeout_seconds: longest silence of the service.
    """

    url: str = Field(pattern=r"https?://[^\s?#]+")
    user_env: str | None = Field(default=None, pattern=r"\w+:\w+")
    token_env: str | None = Field(default=None, pattern=r"\w+")
    ca: Path | None = None
    timeout_seconds: float = Field(default=30.0, gt=0, le=3600)


class Peer(Table):
    """``[store]``: where results go by C-STORE, if the archive has no STOW.

    Args:
        title: AE title of the archive.
        host: its address.
        port: its port.
        caller: our AE title.
        tls: speak TLS.
        ca: PEM file of who signs its certificate; none: those the system trusts.
        certificate: PEM file of ours, if it wants one.
        key: PEM file of our certificate's key.
        timeout_seconds: longest silence of the archive.
        commitment: ask it to commit itself to keep each result, if it offers that; a result counts
            as sent once it has.
        commitment_seconds: longest time until its report, by our association or ``[listen]``.
    """

    title: str
    host: str
    port: int = Field(ge=1, le=65_535)
    caller: str = "PLINTH"
    tls: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    timeout_seconds: float = Field(default=30.0, gt=0, le=3600)
    commitment: bool = False
    commitment_seconds: float = Field(default=60.0, gt=0, le=3600)

    _check_titles = field_validator("title", "caller")(_title)

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Peer:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        if not self.tls and (self.ca or self.certificate):
            raise ValueError("ca and certificate need tls = true")
        return self


class Poll(Web):
    """``[poll]``: series that match the rules are fetched.

    Args:
        every_seconds: between two looks.
        days: only studies of the last so many days; 0: all of the archive.
        quiet_seconds: a series whose number of images stays the same for so long is complete.
        max_object_bytes: bytes of one image.
    """

    every_seconds: float = Field(default=60.0, gt=0, le=86_400)
    days: int = Field(default=2, ge=0)
    quiet_seconds: float = Field(default=20.0, ge=0, le=86_400)
    max_object_bytes: Bytes = Field(default=1 << 30, ge=1 << 10)


class Analysis(Table):
    """``[analyses.<name>]``: a vertical that reads folders, and its settings.

    Args:
        vertical: its name; all other keys are its settings.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    vertical: str = "medical"


class Rule(Table):
    """``[[rules]]``: series for which all of it holds get the analysis.

    A text is a pattern: ``*`` stands for anything, case does not count; a list is any of them,
    and what begins with ``!`` may not fit. What a series does not say fits no pattern but ``*``.

    Args:
        analysis: name of a table in ``[analyses]``.
        modality: CT, MR, PT.
        kernel: Convolution Kernel (0018,1210).
        thickness_mm: least and largest Slice Thickness (0018,0050), both included.
        body_part: Body Part Examined (0018,0015).
        description: Series Description (0008,103E).
        study_description: Study Description (0008,1030).
        min_images: fewer images are no volume.
    """

    analysis: str
    modality: Patterns = ("*",)
    kernel: Patterns = ("*",)
    thickness_mm: tuple[float, float] | None = None
    body_part: Patterns = ("*",)
    description: Patterns = ("*",)
    study_description: Patterns = ("*",)
    min_images: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> Rule:
        if self.thickness_mm is not None and not 0 <= self.thickness_mm[0] <= self.thickness_mm[1]:
            raise ValueError("thickness_mm: expected two numbers from 0 on, the smaller one first")
        return self


class Archive(Table):
    """The whole file.

    Args:
        folder: what came in, the queue and the results.
        listen: the C-STORE door; none: nobody can send.
        poll: an archive to fetch from; none: only what is sent.
        send: where results go by STOW.
        store: where they go by C-STORE instead; neither: they stay in the folder.
        analyses: by name.
        rules: in order; a series gets each analysis that a rule gives it, once.
        max_bytes: disk that images which came in may take; beyond it senders are told to wait.
        keep_days: days after which images and results of a finished study are deleted.
    """

    folder: Path
    listen: Listen | None = None
    poll: Poll | None = None
    send: Web | None = None
    store: Peer | None = None
    analyses: dict[AnalysisName, Analysis] = Field(min_length=1)
    rules: tuple[Rule, ...]
    max_bytes: Bytes = Field(default=100 << 30, ge=1 << 20)
    keep_days: float = Field(default=7.0, gt=0, le=3650)

    @model_validator(mode="after")
    def _whole(self) -> Archive:
        if self.listen is None and self.poll is None:
            raise ValueError("nothing can come in: add [listen] or [poll]")
        if self.send is not None and self.store is not None:
            raise ValueError("results go to one archive: give [send] or [store], not both")
        if not self.rules:
            raise ValueError("no series would be analysed: add [[rules]]")
        for rule in self.rules:
            if rule.analysis not in self.analyses:
                raise ValueError(
                    f"a rule asks for analysis {rule.analysis!r}, which has no table; there are: "
                    f"{', '.join(self.analyses)}"
                )
        return self


def read(path: Path) -> Archive:
    """The checked file.

    Args:
        path: a TOML file.

    Raises:
        ConfigError: names file, line and key, and what was expected.
    """
    try:
        text = whole(path).decode("utf-8-sig")
        data = toml(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"{path}: {getattr(error, 'strerror', None) or error}",
            hint="plinth archive example prints a whole one",
        ) from None
    for table, keys in ((data, ("folder",)), *_tables(data)):
        for key in keys:
            if isinstance(table.get(key), str):
                table[key] = str(path.parent / table[key])
    return validated(Archive, data, (), Origin(path, dict(places(text))))


def _tables(data: dict[str, Any]) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """Tables with paths in them."""
    found: list[tuple[dict[str, Any], tuple[str, ...]]] = []
    for name in ("poll", "send"):
        if isinstance(data.get(name), dict):
            found.append((data[name], ("ca",)))
    if isinstance(data.get("store"), dict):
        found.append((data["store"], ("ca", "certificate", "key")))
    listen = data.get("listen")
    if isinstance(listen, dict) and isinstance(listen.get("tls"), dict):
        found.append((listen["tls"], ("certificate", "key", "client_ca")))
    return found


def secret(variable: str) -> str:
    """The value of an environment variable.

    Raises:
        ConfigError: it is not set.
    """
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ConfigError(
            f"the environment variable {variable} is not set", hint=f"export {variable}=..."
        )
    return value
