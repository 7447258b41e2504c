"""One TOML file, checked at the door.

Tables: ``[engine]``, ``[serve]`` (with ``[serve.upload]``), ``[stream]``, ``[batch]``,
``[models]`` and one ``[verticals.<name>]`` each. Every key may be overridden by an environment
variable ``PLINTH_<TABLE>__<KEY>``. Order of precedence: command line, environment, file, default.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    model_validator,
)

from plinth.engine.errors import ConfigError
from plinth.engine.tables import Table
from plinth.pipelines.config.source import Origin, Place, from_env, places, put, validated
from plinth.pipelines.lines import toml, whole
from plinth.pipelines.stream.settings import StreamConfig
from plinth.verticals import registry

DEFAULT_FILE = Path("plinth.toml")
RESERVED = ("sla", "batch_range")

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(value: object) -> object:
    """``"512 MiB"`` or ``"1.5GB"`` as a number of bytes; numbers pass through."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError("expected bytes, such as 1048576, '512MiB' or '2GB'")
    return int(float(match[1]) * _UNITS[match[2].lower()])


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class EngineConfig(Table):
    """``[engine]``: where and how models run."""

    device: str = Field(default="auto", description="`auto`, or a name such as `cpu`")
    devices: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description='a lane for each name, such as `["cuda:0", "cuda:1"]`; a name may come '
        "twice, and be of worker processes, a gang or a cluster ([scaling](scaling.md)); none: "
        "one, on `device`",
    )
    precision: str | dict[str, Any] = Field(
        default="auto",
        description="a preset, or a table of operation class to precision ([precision]"
        "(precision.md))",
    )
    backend: str = Field(
        default="auto", description="what runs models; `auto`: the fastest one that is right"
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of one forward; none: all cores"
    )
    max_queue: int = Field(
        default=4096, ge=1, description="urgent rows that may wait before new ones are refused"
    )
    memory_budget: Bytes | None = Field(
        default=None,
        ge=1 << 20,
        description="bytes all models may take together; none: a share of what is free",
    )
    evict_idle: bool = Field(
        default=False,
        description="let idle models leave the CPU's memory while others need it ([memory]"
        "(memory.md))",
    )
    latency_file: Path | None = Field(
        default=None, description="where learned costs are kept; none: forgotten at exit"
    )
    pipeline_depth: int | None = Field(
        default=None,
        ge=1,
        le=16,
        description="batches an accelerator is given before the first is done; none: 1, as on CPUs",
    )
    modes: dict[str, Any] | None = Field(
        default=None,
        description="how several lanes share work: a table of `mode`, `sync_threshold`, "
        "`pipeline_depth`, `communication_backend` ([scaling](scaling.md#modes)); none: "
        "its defaults",
    )
    hung_seconds: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="a batch in a worker process (`process:cpu`, `ray:cpu`) is never taken for "
        "hung before, nor one that a shutdown waits for",
    )
    graphs: bool | None = Field(
        default=None,
        description="replay captured forwards on an accelerator where that is faster; none: with "
        "backend `auto`",
    )
    compute_workers: int = Field(
        default=1,
        ge=0,
        le=256,
        description="processes for heavy steps of flows ([processes](processes.md)), which start "
        "with the first of them; 0: threads of this process",
    )
    compute_seconds: float = Field(
        default=900.0, gt=0, lt=86_400, description="longest time of one such step"
    )

    @model_validator(mode="after")
    def _devices_are_named_once(self) -> EngineConfig:
        if self.devices is not None and self.device != "auto":
            raise ValueError(f"device is {self.device} and devices are given: keep one of them")
        return self


class ClusterConfig(Table):
    """``[cluster]``: where lanes on other machines are placed."""

    address: str = Field(
        default="127.0.0.1:6379", description="host and port of the head of the cluster"
    )
    token_file: Path | None = Field(
        default=None,
        description="the token that every machine of the cluster has; none: that of "
        "`RAY_AUTH_TOKEN_PATH`, else `~/.ray/auth_token`",
    )
    cpus: float = Field(
        default=1.0, ge=0, le=1024, description="cores that each lane takes, fractions too"
    )
    gpus: float = Field(default=0.0, ge=0, le=64, description="the same of accelerators")
    resources: dict[str, float] = Field(
        default={}, description="others that its machine has to have, by name"
    )
    labels: dict[str, str] = Field(
        default={}, description='of its machine, such as `{ zone = "a" }`'
    )
    start_seconds: float = Field(
        default=60.0, ge=1, le=110, description="in which a lane has to be placed and to answer"
    )
    silent_seconds: float = Field(
        default=5.0,
        ge=0.5,
        le=600,
        description="a lane that says nothing at all for so long is given up, and its machine "
        "avoided for 30 s",
    )


class UploadConfig(Table):
    """``[serve.upload]``: bounds of folder verticals over HTTP."""

    max_bytes: Bytes = Field(
        default=1 << 30, ge=1, le=(1 << 32) - 1, description="bytes of one upload"
    )
    max_unpacked_bytes: Bytes = Field(default=4 << 30, ge=1, description="bytes after unpacking")
    max_files: int = Field(default=10_000, ge=1, le=65_535, description="files in one upload")
    max_ratio: float = Field(
        default=200.0, ge=1, description="unpacked bytes per packed byte of one file"
    )
    max_jobs: int = Field(
        default=16, ge=1, le=10_000, description="jobs kept, waiting ones included"
    )
    max_job_bytes: Bytes = Field(
        default=16 << 30, ge=1, description="disk all jobs together may hold"
    )
    receive_seconds: float = Field(
        default=900.0, gt=0, description="longest time a client may take to send one upload"
    )
    min_bytes_per_second: Bytes = Field(
        default=16 << 10, ge=1, description="pace below which an upload is ended"
    )
    keep_seconds: float = Field(
        default=3600.0, gt=0, description="age at which a finished job is deleted"
    )
    workers: int = Field(default=1, ge=1, le=64, description="jobs that run at the same time")
    folder: Path | None = Field(
        default=None, description="where jobs live; none: a private temp folder"
    )


class OipConfig(Table):
    """``[serve.oip]``: tensors by model name, over REST and gRPC."""

    enabled: bool = Field(default=True, description="whether there are routes under /v2")
    models: tuple[str, ...] = Field(
        default=(), description="models of the store to load beside the verticals'; `*`: all"
    )
    load_models: bool = Field(
        default=False, description="whether clients may load and unload models of the store"
    )
    max_body_bytes: Bytes = Field(
        default=64 << 20, ge=64, le=(1 << 31) - 1, description="bytes of one request's tensors"
    )
    max_work_bytes: Bytes = Field(
        default=256 << 20, ge=64, description="bytes of all requests in work together before 429"
    )


class TlsConfig(Table):
    """Files of TLS, which are read again when they change."""

    certificate: Path | None = Field(
        default=None, description="PEM file of the certificate and its chain; none: no TLS"
    )
    key: Path | None = Field(default=None, description="PEM file of the certificate's key")
    client_ca: Path | None = Field(
        default=None, description="PEM file of who signs the certificates that clients must show"
    )

    @model_validator(mode="after")
    def _tls_is_whole(self) -> TlsConfig:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("client_ca needs a certificate and a key")
        return self


class AdminConfig(Table):
    """``[serve.admin]``: metrics, status, loading and unloading, on an address of their own."""

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int | None = Field(
        default=None,
        ge=0,
        le=65_535,
        description="port to listen on, which has these routes in the place of `serve.port`; "
        "none: both are one; 0: a free one",
    )


class OidcConfig(Table):
    """``[serve.oidc]``: bearer tokens of an OpenID Connect issuer."""

    issuer: str | None = Field(
        default=None, description="the issuer's address, as its tokens have it; none: no tokens"
    )
    audience: str | None = Field(
        default=None, description="whom a token must be meant for; needed with an issuer"
    )
    keys_url: str | None = Field(
        default=None, description="where its keys are; none: as its discovery document says"
    )
    algorithms: tuple[Literal["RS256", "PS256", "ES256", "ES384", "EdDSA"], ...] = Field(
        default=("RS256", "ES256"), min_length=1, description="how tokens may be signed"
    )
    leeway_seconds: float = Field(
        default=30.0, ge=0, le=600, description="how far clocks may be apart"
    )
    refresh_seconds: float = Field(
        default=300.0, ge=10, description="age at which its keys are fetched again"
    )
    role_claim: str = Field(
        default="scope", description="claim with roles: a text or a list; dots lead into others"
    )
    roles: dict[str, Literal["read", "score", "admin"]] = Field(
        default={"plinth.read": "read", "plinth.score": "score", "plinth.admin": "admin"},
        description="role by a value of that claim; a token without one may nothing",
    )
    only_claim: str | None = Field(
        default=None, description="claim with the verticals and models it reaches; none: all"
    )
    per_second: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="requests of a subject each second; none: any number",
    )
    burst: int | None = Field(
        default=None, ge=1, description="requests of a subject at once; none: those of one second"
    )

    @model_validator(mode="after")
    def _audience_is_named(self) -> OidcConfig:
        if self.issuer is not None and not self.audience:
            raise ValueError("an issuer needs an audience: tokens for others must not do here")
        return self


class GrpcConfig(TlsConfig):
    """``[serve.grpc]``: the same over gRPC."""

    port: int | None = Field(
        default=None, ge=0, le=65_535, description="port to listen on; none: no gRPC; 0: a free one"
    )
    max_streams: int = Field(
        default=256, ge=1, description="calls in work before RESOURCE_EXHAUSTED"
    )
    max_arriving: int = Field(
        default=16,
        ge=1,
        description="open streams, and messages that take longer than 0.1 s to arrive, shared by "
        "keys; each may hold `max_body_bytes`",
    )


class ServeConfig(Table):
    """``[serve]``: the HTTP door."""

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(
        default=8000, ge=0, le=65_535, description="port to listen on; 0 takes a free one"
    )
    max_body_bytes: Bytes = Field(default=1 << 20, ge=64, description="bytes of one record request")
    max_items: int = Field(default=1024, ge=1, le=100_000, description="records in one request")
    request_timeout_seconds: float = Field(
        default=30.0, gt=0, description="longest wait for an answer"
    )
    keep_alive_seconds: int = Field(
        default=30, ge=0, description="idle time before a connection closes"
    )
    max_requests: int = Field(default=1024, ge=1, description="requests in work before 429")
    max_connections: int = Field(default=4096, ge=2, description="open connections before 503")
    announce_seconds: float = Field(
        default=0.0, ge=0, description="on SIGTERM: time to be not ready yet still serving"
    )
    drain_seconds: float = Field(
        default=20.0, ge=0, description="on SIGTERM: time for accepted work"
    )
    api_key_env: str | None = Field(
        default=None, description="environment variable that holds an API key which may do all"
    )
    keys: Path | None = Field(
        default=None,
        description="file of API keys, made by `plinth keys`; read again when it changes",
    )
    insecure: bool = Field(
        default=False, description="whether others may ask without a key at an address they reach"
    )
    request_log: Path | None = Field(
        default=None, description="file of who asked what, when, with what end; none: no log"
    )
    request_log_bytes: Bytes = Field(
        default=64 << 20, ge=4096, description="size at which a new file is begun"
    )
    request_log_files: int = Field(
        default=8, ge=1, le=1000, description="files kept, the current one included"
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description="names with a dot that the server goes by; none: on loopback none, else any; "
        "`*`: any",
    )
    cors_origins: tuple[str, ...] = Field(
        default=(),
        description="sites whose pages may ask from a browser, such as `https://desk.example`",
    )
    state_dir: Path | None = Field(
        default=None,
        description="folder that keeps the verticals' state from one run to the next, after "
        "`kill -9` too; none: lost",
    )
    web: bool = Field(default=False, description="pages for people, under `/ui`")
    upload: UploadConfig = Field(default_factory=UploadConfig)
    oip: OipConfig = Field(default_factory=OipConfig)
    grpc: GrpcConfig = Field(default_factory=GrpcConfig)
    tls: TlsConfig = Field(default_factory=TlsConfig)
    oidc: OidcConfig = Field(default_factory=OidcConfig)
    admin: AdminConfig = Field(default_factory=AdminConfig)


class BatchConfig(Table):
    """``[batch]``: the folder door."""

    input: Path | None = Field(default=None, description="folder to read; `FOLDER` of the command")
    output: Path | None = Field(default=None, description="folder to write; `--out` of the command")
    vertical: str | None = Field(
        default=None, description="who reads the folder; none: the only one that can"
    )
    workers: int = Field(default=1, ge=1, le=64, description="items inferred at the same time")
    processes: int = Field(
        default=0,
        ge=0,
        le=256,
        description="items that processes of their own have at the same time, whole on the CPU, "
        "else their heavy steps, in the place of `engine.compute_workers`; 0: in threads",
    )
    resume: bool = Field(
        default=True, description="skip what the journal in the output has as done"
    )
    retry_failed: bool = Field(default=False, description="run items again that failed before")


class ModelsConfig(Table):
    """``[models]``: where models are kept."""

    store: Path | None = Field(
        default=None,
        description="folder; none: `PLINTH_MODEL_STORE`, then `~/.local/share/plinth/models`",
    )


class SlaConfig(Table):
    """``[verticals.<name>.sla]``: what differs from the vertical's own promise."""

    deadline_ms: float | None = Field(
        default=None, description="milliseconds from arrival to answer"
    )
    quantile: float | None = Field(
        default=None, description="share of answers the promise covers, 0.5 up to 1"
    )
    on_overload: Literal["reject", "degrade", "late"] | None = Field(
        default=None, description="what happens to work that would miss"
    )
    weight: float | None = Field(
        default=None, description="share of left-over time among background work"
    )


class VerticalConfig(Table):
    """``[verticals.<name>]``: the vertical's settings, and two keys the doors own."""

    settings: dict[str, Any] = Field(default_factory=dict)
    sla: SlaConfig | None = None
    batch_range: tuple[int, int] | Literal["auto"] | None = Field(
        default=None, description="smallest and largest batch in rows, or `auto`: measured"
    )

    @model_validator(mode="before")
    @classmethod
    def _split(cls, table: Any) -> Any:
        if not isinstance(table, Mapping):
            return table
        own = {key: table[key] for key in RESERVED if key in table}
        return own | {"settings": {k: v for k, v in table.items() if k not in RESERVED}}


class Config(Table):
    """The whole file. Build it with :func:`load`."""

    engine: EngineConfig = Field(default_factory=EngineConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    serve: ServeConfig = Field(default_factory=ServeConfig)
    stream: StreamConfig | None = None
    batch: BatchConfig = Field(default_factory=BatchConfig)
    models: ModelsConfig = Field(default_factory=ModelsConfig)
    verticals: dict[str, VerticalConfig] = Field(default_factory=dict)

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def origin(self) -> Origin:
        """Where the values came from, for messages."""
        return self._origin

    def vertical(self, name: str) -> VerticalConfig:
        """The table of one vertical; an empty one when the file has none."""
        return self.verticals.get(name, VerticalConfig())

    def beside(self, path: Path) -> Path:
        """A path of the file, which starts from the file's folder."""
        folder = Path() if self.origin.file is None else self.origin.file.parent
        return folder / path.expanduser()

    def files_of(self, tls: TlsConfig) -> tuple[Path, ...]:
        """Certificate, key and, if there is one, client CA; empty without TLS."""
        files = (tls.certificate, tls.key, tls.client_ca)
        return tuple(self.beside(path) for path in files if path is not None)

    def check_access(self) -> None:
        """See that a server which others reach knows who asks, or was told not to care.

        Raises:
            ConfigError: it does not.
        """
        serve = self.serve
        if serve.api_key_env or serve.keys or serve.oidc.issuer or serve.insecure:
            return
        doors = [(serve.host, serve.tls)]
        doors += [(serve.host, serve.grpc)] if serve.grpc.port is not None else []
        doors += [(serve.admin.host, serve.tls)] if serve.admin.port is not None else []
        for host, tls in doors:
            if not is_loopback(host) and tls.client_ca is None:
                raise ConfigError(
                    f"others can reach {host}, and no key is asked for",
                    hint="set serve.keys (plinth keys add makes one), serve.api_key_env, a "
                    "client_ca for each door, or say --insecure",
                )

    def api_key(self, env: Mapping[str, str] | None = None) -> str | None:
        """The HTTP API key, read from the variable that ``serve.api_key_env`` names.

        Raises:
            ConfigError: the variable is unset or empty.
        """
        name = self.serve.api_key_env
        if name is None:
            return None
        key = (os.environ if env is None else env).get(name, "").strip()
        if not key:
            raise ConfigError(
                f"{self.origin.where(('serve', 'api_key_env'))}serve.api_key_env names the "
                f"environment variable {name}, which is not set",
                hint=f"export {name}=..., or remove api_key_env",
            )
        return key


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def find(path: Path | None, env: Mapping[str, str]) -> Path | None:
    """The file to read: the one named, ``PLINTH_CONFIG``, ``./plinth.toml``, or none."""
    if path is None and env.get("PLINTH_CONFIG"):
        path = Path(env["PLINTH_CONFIG"])
    if path is None:
        return DEFAULT_FILE if DEFAULT_FILE.is_file() else None
    if not path.is_file():
        raise ConfigError(f"there is no config file {path}", hint="check --config or PLINTH_CONFIG")
    return path


def load(
    path: Path | None = None,
    *,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Read, merge and check the configuration.

    Args:
        path: a TOML file; without it ``PLINTH_CONFIG``, then ``./plinth.toml``, then defaults.
        env: environment to read overrides from; the process's own by default.
        overrides: dotted key to value, from the command line; ``None`` values are left out.

    Raises:
        ConfigError: names the file and line (or variable), the key, the nearest known key.
    """
    env = os.environ if env is None else env
    file = find(path, env)
    text = _read(file) if file else ""
    try:
        data = toml(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: {error}", hint="see https://toml.io for the syntax") from None
    variables: dict[Place, str] = {}
    for place, name, value in from_env(env):
        put(data, place, value, name)
        variables[place] = name
    for key, value in (overrides or {}).items():
        if value is not None:
            put(data, tuple(key.split(".")), value, "the command line")
    origin = Origin(file, dict(places(text)), variables)
    config = validated(Config, data, (), origin)
    config._origin = origin
    _check_verticals(config)
    return config


def _check_verticals(config: Config) -> None:
    """Whatever a command runs, the name of a vertical that is not installed stops it."""
    named: list[tuple[str, Place]] = [(name, ("verticals", name)) for name in config.verticals]
    if config.batch.vertical is not None:
        named.append((config.batch.vertical, ("batch", "vertical")))
    installed = registry.names()
    for name, place in named:
        if name not in installed:
            error = registry.unknown(name)
            raise ConfigError(f"{config.origin.where(place)}{error.message}", hint=error.hint)


def _read(file: Path) -> str:
    try:
        return whole(file).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
