"""The Open Inference Protocol v2 over REST, with the binary tensor extension.

Bodies are what the protocol says, errors too: ``{"error": "what is wrong and what to do"}``.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from plinth.engine import InputError, PlinthError
from plinth.pipelines.http.app import json
from plinth.pipelines.http.body import Headers, chunks, headers_of, media_type, refuse_packed
from plinth.pipelines.http.disconnect import cancel_on_disconnect
from plinth.pipelines.http.errors import error_response
from plinth.pipelines.http.health import Health
from plinth.pipelines.http.openapi import tensors as documented
from plinth.pipelines.http.record_routes import answer_fields
from plinth.pipelines.oip.service import ModelService, check_parameters, less
from plinth.pipelines.oip.tensors import NAMES as DATATYPE_NAMES
from plinth.pipelines.oip.tensors import (
    TensorHeader,
    from_bytes,
    from_json,
    header_of,
    to_bytes,
    to_json,
)
from plinth.pipelines.records import late_at_door
from plinth.verticals.double_keys import refuse_double_keys

HEADER_LENGTH = "inference-header-content-length"
_TYPES = ("application/json", "application/octet-stream")
_ASIDE = 1 << 20  # bytes from which a body is read on another thread
_SMALL = 64 << 10  # bytes of a body that asks for no inference

Handler = Callable[..., Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for inference, read whole.

    Args:
        id: of the request, "" without one.
        parameters: of the request.
        inputs: header and values of each input, in order; not read yet.
        outputs: names of the outputs to send, none: all; with whether each goes as raw bytes.
        binary: whether outputs go as raw bytes where nothing else is said.
    """

    id: str
    parameters: Mapping[str, object]
    inputs: Sequence[tuple[TensorHeader, bytes | memoryview | object]]
    outputs: Mapping[str, bool]
    binary: bool

    def rows(self) -> dict[str, Tensor]:
        """The inputs by name.

        Raises:
            InputError: other values than the headers say.
        """
        return {
            header.name: from_bytes(header, data)
            if isinstance(data, memoryview)
            else from_json(header, data)
            for header, data in self.inputs
        }


def read(body: bytes | bytearray, declared: bytes | None, max_json: int, most: int) -> Asked:
    """A request from its body.

    Args:
        body: JSON, then the raw bytes of the tensors that have no ``data``.
        declared: bytes of the JSON, as the header says; ``None``: all of the body.
        max_json: bytes that the JSON may have.
        most: bytes that a tensor may have.

    Raises:
        InputError: what is wrong, and with which tensor.
    """
    view = memoryview(body)
    length = _header_length(declared, len(body))
    if length > max_json:
        raise InputError(
            f"the JSON has {length:,} bytes, at most {max_json:,} are taken",
            hint="send tensors as binary data, or raise serve.max_body_bytes",
            reason="body_too_large",
        )
    told = _object("the body", _loaded(view[:length]))
    parameters = _object("parameters", told.get("parameters") or {})
    binary = _flag("parameters.binary_data_output", parameters.get("binary_data_output"), False)
    inputs, rest = [], view[length:]
    for given in _list("inputs", told.get("inputs")):
        header, data, rest = _input(_object("an input", given), rest, most)
        inputs.append((header, data))
    if len(rest):
        raise InputError(f"{len(rest):,} bytes follow that belong to no input", field="inputs")
    names = [header.name for header, _ in inputs]
    if len(set(names)) < len(names):
        raise InputError("an input stands more than once", field="inputs")
    asked = told.get("id") or ""
    if not isinstance(asked, str) or len(asked) > 1024:
        raise InputError("the id is no string of at most 1,024 characters", field="id")
    outputs = _outputs(told.get("outputs") or [], binary)
    return Asked(asked, parameters, inputs, outputs, binary)


def _header_length(declared: bytes | None, whole: int) -> int:
    if declared is None:
        return whole
    if not declared.isdigit() or len(declared) > 12 or int(declared) > whole:
        raise InputError(
            f"{HEADER_LENGTH} is no number of bytes up to the body's {whole:,}",
            field=HEADER_LENGTH,
            reason="bad_header",
        )
    return int(declared)


def _loaded(raw: memoryview) -> object:
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InputError(
            f"the body is not JSON: {error.msg} at byte {error.pos}",
            hint=f"where binary tensors follow, {HEADER_LENGTH} says how long the JSON is",
            reason="malformed_json",
        ) from None
    refuse_double_keys(bytes(raw), _without_numbers(found))
    return found


def _without_numbers(found: object) -> object:
    """A request without the values of its tensors of numbers, which have no keys to be twice there.

    Of those that have some all the same, the raw body has more quotation marks than this.
    """
    if not isinstance(found, dict) or not isinstance(found.get("inputs"), list):
        return found
    inputs = [
        each | {"data": []}
        if isinstance(each, dict) and each.get("datatype") != "BYTES" and "data" in each
        else each
        for each in found["inputs"]
    ]
    return found | {"inputs": inputs}


def _object(what: str, given: object) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InputError(f"{what} is no JSON object", field=what, reason="malformed_request")
    return given


def _list(what: str, given: object) -> list[Any]:
    if not isinstance(given, list):
        raise InputError(f"{what} is no list", field=what, reason="malformed_request")
    return given


def _flag(what: str, given: object, default: bool) -> bool:
    if given is None:
        return default
    if not isinstance(given, bool):
        raise InputError(f"{what} is neither true nor false", field=what, reason="bad_parameter")
    return given


def _input(
    given: dict[str, Any], rest: memoryview, most: int
) -> tuple[TensorHeader, memoryview | object, memoryview]:
    """Header and values of an input, and the raw bytes that are left for the others."""
    header = header_of(given.get("name"), given.get("datatype"), given.get("shape"), most)
    parameters = _object(f"{header.name}.parameters", given.get("parameters") or {})
    check_parameters(parameters)
    size = parameters.get("binary_data_size")
    if size is None:
        return header, given.get("data"), rest
    if type(size) is not int or not 0 <= size <= len(rest):
        raise InputError(
            f"input {header.name}: binary_data_size is no number of bytes up to the "
            f"{len(rest):,} that are left",
            field=header.name,
            hint=f"the raw bytes follow the JSON, whose length {HEADER_LENGTH} says",
            reason="wrong_size",
        )
    if "data" in given:
        raise InputError(
            f"input {header.name} has both data and binary_data_size", field=header.name
        )
    return header, rest[:size], rest[size:]


def _outputs(given: object, binary: bool) -> dict[str, bool]:
    outputs: dict[str, bool] = {}
    for one in _list("outputs", given):
        told = _object("an output", one)
        name = told.get("name")
        if not isinstance(name, str):
            raise InputError("an output has no name", field="outputs", reason="malformed_request")
        parameters = _object("an output's parameters", told.get("parameters") or {})
        check_parameters(parameters)
        outputs[name] = _flag("binary_data", parameters.get("binary_data"), binary)
    return outputs


def written(
    about: dict[str, Any], outputs: Mapping[str, Tensor], binary: Mapping[str, bool]
) -> tuple[list[bytes | memoryview], int | None]:
    """The body of an answer in pieces, and the bytes of its JSON where raw bytes follow.

    Raises:
        InputError: a value that JSON does not have.
    """
    raw: list[memoryview] = []
    told = []
    for name, is_binary in binary.items():
        tensor = outputs[name]
        one: dict[str, Any] = {
            "name": name,
            "datatype": DATATYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
        }
        if is_binary:
            raw.append(to_bytes(tensor))
            one["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            one["data"] = to_json(tensor, name)
        told.append(one)
    head = orjson.dumps({**about, "outputs": told})
    return [head, *raw], len(head) if raw else None


class TensorRoutes:
    """The routes under ``/v2``.

    Args:
        service: the models.
        health: of the server.
        max_json: bytes that the JSON of a request may have.
        seconds: longest wait for an answer.
    """

    def __init__(
        self, service: ModelService, health: Health, max_json: int, seconds: float
    ) -> None:
        self._service = service
        self._health = health
        self._max_json = max_json
        self._seconds = seconds

    def add_to(self, app: FastAPI) -> None:
        """Give an app the routes."""
        one, versioned = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
        for path, method, handler, summary in (
            ("/v2", "GET", self.server, "The server and what it can do"),
            ("/v2/health/live", "GET", self.live, "The process answers"),
            ("/v2/health/ready", "GET", self.ready, "Send traffic here"),
            ("/v2/models/stats", "GET", self.statistics, "Statistics of all models"),
            (one, "GET", self.metadata, "What a model takes and gives"),
            (versioned, "GET", self.metadata, "What a model takes and gives"),
            (f"{one}/ready", "GET", self.model_ready, "The model answers"),
            (f"{versioned}/ready", "GET", self.model_ready, "The model answers"),
            (f"{one}/config", "GET", self.config, "The model's configuration"),
            (f"{versioned}/config", "GET", self.config, "The model's configuration"),
            (f"{one}/stats", "GET", self.statistics, "Counts and times of a model"),
            (f"{versioned}/stats", "GET", self.statistics, "Counts and times of a model"),
            (f"{one}/infer", "POST", self.infer, "Outputs for rows of tensors"),
            (f"{versioned}/infer", "POST", self.infer, "Outputs for rows of tensors"),
            ("/v2/repository/index", "POST", self.index, "Models loaded and in the store"),
            ("/v2/repository/models/{model}/load", "POST", self.load, "Load a model"),
            ("/v2/repository/models/{model}/unload", "POST", self.unload, "Unload a model"),
        ):
            app.add_api_route(
                path,
                _told(handler),
                methods=[method],
                summary=summary,
                tags=["open inference protocol"],
                response_model=None,
                openapi_extra=documented(path, method),
            )

    async def server(self, request: Request) -> Response:
        """Name, version and extensions."""
        return json(self._service.server_metadata())

    async def live(self, request: Request) -> Response:
        """The process answers."""
        return json({"live": True})

    async def ready(self, request: Request) -> Response:
        """Whether to send traffic here."""
        fine = not self._health.reasons
        return json({"ready": fine}, 200 if fine else 503)

    async def metadata(self, request: Request) -> Response:
        """What a model takes and gives."""
        return json(self._service.metadata(*_model(request)))

    async def model_ready(self, request: Request) -> Response:
        """Whether a model answers."""
        name, version = _model(request)
        fine = self._service.is_ready(name, version)
        return json({"name": name, "ready": fine}, 200 if fine else 503)

    async def config(self, request: Request) -> Response:
        """A model's configuration."""
        return json(self._service.model_config(*_model(request)))

    async def statistics(self, request: Request) -> Response:
        """Counts and times of a model, or of all."""
        return json(self._service.statistics(*_model(request)))

    async def index(self, request: Request) -> Response:
        """Models loaded and in the store."""
        ready = (await self._small(request)).get("ready")
        return json(self._service.index(ready_only=_flag("ready", ready, False)))

    async def load(self, request: Request) -> Response:
        """Load a model of the store."""
        parameters = (await self._small(request)).get("parameters") or {}
        if parameters:
            raise InputError(
                "a model is loaded as it is in the store, without parameters",
                field="parameters",
                hint="leave config and files out",
                reason="bad_parameter",
            )
        await self._service.load(_model(request)[0])
        return json({})

    async def unload(self, request: Request) -> Response:
        """Let a model answer no more."""
        await self._small(request)
        await self._service.unload(_model(request)[0])
        return json({})

    async def _small(self, request: Request) -> dict[str, Any]:
        """The JSON object of a request that may have no body."""
        headers = headers_of(request.scope)
        _check_type(headers)
        body = await self._body(request, headers, _SMALL)
        return _object("the body", _loaded(memoryview(body))) if body else {}

    async def infer(self, request: Request) -> Response:
        """Run a model on rows of tensors."""
        begun, headers = time.perf_counter(), headers_of(request.scope)
        waited = request.scope["state"].get("waited", 0.0)
        _check_type(headers)
        spec = self._service.spec(*_model(request))
        most = self._service.config.max_body_bytes
        declared = headers.get(b"content-length", b"")
        with self._service.budget.reserve(int(declared) if declared.isdigit() else most):
            body = await self._body(request, headers, most)
            read_at = time.perf_counter()
            length = headers.get(HEADER_LENGTH.encode())
            asked = read(body, length, self._max_json, most)
            self._service.check_counts(spec, len(asked.inputs), len(asked.outputs))
            names = self._service.wanted(spec, [*asked.outputs])
            promise = self._service.promise(spec.name, asked.parameters)
            rows = await asyncio.to_thread(asked.rows) if len(body) > _ASIDE else asked.rows()
            decoded = time.perf_counter()
            with cancel_on_disconnect(request.receive, self._seconds):
                sla = less(promise, waited + decoded - read_at)
                answer = await self._service.infer(spec, rows, sla)
            encoding = time.perf_counter()
            about = {"model_name": spec.name, "model_version": spec.version}
            about |= {"id": asked.id} if asked.id else {}
            binary = {name: asked.outputs.get(name, asked.binary) for name in names}
            pieces, length_of_json = written(about, answer.value, binary)
            now, timing = time.perf_counter(), answer.timing
            timing.decode, timing.encode = decoded - begun, now - encoding
            timing.total = waited + now - begun
            seconds = waited + now - read_at
            answer.late = answer.late or late_at_door(answer, promise, seconds)
            return _answer(pieces, length_of_json, answer_fields(answer))

    async def _body(self, request: Request, headers: Headers, most: int) -> bytearray:
        body = bytearray()
        async for chunk in chunks(request.receive, headers, most, self._seconds):
            body += chunk
        return body


def _answer(
    pieces: Sequence[bytes | memoryview], length: int | None, fields: list[tuple[bytes, bytes]]
) -> Response:
    response = Response(b"".join(pieces))
    if length is not None:
        fields = [(b"content-type", b"application/octet-stream"), *fields[1:]]
        fields.append((HEADER_LENGTH.encode(), b"%d" % length))
    response.raw_headers = [*response.raw_headers, *fields]
    return response


def _model(request: Request) -> tuple[str, str]:
    return request.path_params.get("model", ""), request.path_params.get("version", "")


def _check_type(headers: Headers) -> None:
    """Refuse what a page of another site could send without being asked, and packed bodies."""
    refuse_packed(headers)
    if b"content-type" in headers:
        media_type(headers, _TYPES)


def _told(handler: Handler) -> Handler:
    """A handler whose errors are what the protocol says."""

    @functools.wraps(handler)
    async def told(request: Request) -> Response:
        try:
            return await handler(request)
        except PlinthError as error:
            return error_response(error, flat=True)

    return told
