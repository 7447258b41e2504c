"""The OpenAPI document, from the verticals' own types and examples, and the page that shows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import fastapi_offline
import orjson
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.responses import FileResponse, Response

from plinth.pipelines.folders.archives import FILE_TYPES, FORM_TYPE, ZIP_TYPES
from plinth.pipelines.http.errors import HttpError, is_flat
from plinth.pipelines.http.record_routes import DEADLINE_HEADER
from plinth.pipelines.oip.service import MAX_PRIORITY
from plinth.pipelines.oip.tensors import DATATYPES
from plinth.verticals import Query, Vertical

Schema = dict[str, Any]
ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")
PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
}
MEANINGS = {
    400: "malformed",
    401: "the API key is missing or wrong",
    403: "sent by a page of another site, or to a name that is not this server's",
    404: "no such thing",
    408: "the body did not come, or too slowly",
    409: "the model belongs to a vertical",
    413: "too large",
    415: "wrong media type",
    422: "a field is wrong, or nothing in the upload can be used",
    429: "the queue or the places for uploads are full; see Retry-After",
    503: "cannot be done in time, or shutting down; see Retry-After",
    504: "took too long",
    507: "the disk is full",
}
_OBJECT = {"type": "object"}
_STRING = {"type": "string"}
_TEXT = {"type": ["string", "null"]}
ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["reason", "message", "field", "hint"],
            "properties": {
                "reason": {"type": "string"},
                "message": {"type": "string"},
                "field": _TEXT,
                "hint": _TEXT,
                "step": {"type": "string"},
            },
        }
    },
}
_DEADLINE = {
    "name": DEADLINE_HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 86_399_999},
    "description": "milliseconds this request may take; work that cannot make it is refused",
}
_WAIT = {
    "name": "wait",
    "in": "query",
    "required": False,
    "schema": {"type": "boolean"},
    "description": "answer when the job is finished, if that is soon enough",
}


def schemas(vertical: Vertical[Any, Any]) -> dict[str, Schema]:
    """The vertical's types by name, which begins with the vertical's own."""
    given: list[tuple[type[BaseModel], JsonSchemaMode]]
    given = [(one.given, "serialization") for one in vertical.queries()]
    _, document = models_json_schema(
        [*_types(vertical), *given],
        ref_template=f"#/components/schemas/{vertical.name}.{{model}}",
    )
    named = {f"{vertical.name}.{name}": schema for name, schema in document["$defs"].items()}
    return (
        named if vertical.request is not None else named | {_job(vertical): _job_schema(vertical)}
    )


def _types(vertical: Vertical[Any, Any]) -> list[tuple[type[BaseModel], JsonSchemaMode]]:
    given: tuple[type[BaseModel], JsonSchemaMode] = (vertical.response, "serialization")
    return [given] if vertical.request is None else [(vertical.request, "validation"), given]


def _references(vertical: Vertical[Any, Any]) -> tuple[Schema, Schema]:
    """References to the request type (a response's own for a folder vertical) and the response."""
    types = _types(vertical)
    known, _ = models_json_schema(
        types, ref_template=f"#/components/schemas/{vertical.name}.{{model}}"
    )
    return dict(known[types[0]]), dict(known[types[-1]])


def records(vertical: Vertical[Any, Any]) -> dict[str, Any]:
    """What the document says of a record route, the vertical's own example included."""
    asked, given = _references(vertical)
    example = vertical.example()
    content: dict[str, Any] = {"schema": {"oneOf": [asked, {"type": "array", "items": asked}]}}
    if hasattr(example, "model_dump_json"):
        content["example"] = orjson.loads(example.model_dump_json())
    one = {
        "type": "object",
        "oneOf": [
            {"required": ["result"], "properties": {"result": given}},
            {"required": ["error"], "properties": {"error": ERROR["properties"]["error"]}},
        ],
    }
    many = {
        "type": "object",
        "required": ["results"],
        "properties": {
            "results": {"type": "array", "items": one},
            **dict.fromkeys(("timing", "models", "precision", "degraded"), _OBJECT),
            "late": {"type": "boolean"},
        },
    }
    answer = {
        "description": "one answer, or one result or error per record of the list",
        "headers": {"x-plinth-timing": {"schema": {"type": "string"}}},
        "content": {"application/json": {"schema": {"anyOf": [given, many]}}},
    }
    return {
        "requestBody": {"required": True, "content": {"application/json": content}},
        "parameters": [_DEADLINE],
        "responses": {"200": answer, **errors(400, 408, 413, 415, 422, 504)},
    }


def _job(vertical: Vertical[Any, Any]) -> str:
    return f"{vertical.name}.Job"


def _job_schema(vertical: Vertical[Any, Any]) -> Schema:
    error = {"anyOf": [ERROR["properties"]["error"], {"type": "null"}]}
    result = {"anyOf": [_references(vertical)[1], {"type": "null"}]}
    item = {
        "type": "object",
        "required": ["id", "state", "facts", "sources", "source_count", "result", "error", "files"],
        "properties": {
            "id": {"type": "string"},
            "state": {"enum": ["waiting", "running", "done", "failed"]},
            "facts": _OBJECT,
            "sources": {"type": "array", "items": {"type": "string"}},
            "source_count": {"type": "integer"},
            "result": result,
            "error": error,
            "verdicts": _OBJECT,
            "files": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }
    return {
        "type": "object",
        "required": ["id", "vertical", "state", "url", "seconds", "progress", "error", "items"],
        "properties": {
            **dict.fromkeys(("id", "vertical", "url"), _STRING),
            "state": {"enum": ["receiving", "queued", "running", "done", "failed"]},
            "seconds": {"type": "number"},
            "progress": _OBJECT,
            "error": error,
            "retryable": {"type": "boolean"},
            "items": {"type": "array", "items": item},
        },
    }


def query(vertical: Vertical[Any, Any], asked: Query) -> dict[str, Any]:
    """What the document says of a query's route."""
    schema = asked.asked.model_json_schema()
    required, fields = schema.get("required", []), schema.get("properties", {})
    in_path = {name for name in fields if f"{{{name}}}" in asked.path}
    in_query = fields.keys() - in_path if asked.method == "GET" else set()
    parameters = [
        {
            "name": name,
            "in": "path" if name in in_path else "query",
            "required": name in in_path or name in required,
            "schema": fields[name],
        }
        for name in fields
        if name in in_path | in_query
    ]
    told: dict[str, Any] = {"parameters": parameters}
    if asked.method == "POST":
        body = {name: one for name, one in fields.items() if name not in in_path}
        content = {
            "type": "object",
            "properties": body,
            "required": [name for name in required if name in body],
            "additionalProperties": False,
        }
        told["requestBody"] = {"required": True, "content": {_JSON: {"schema": content}}}
    answer = {"description": asked.summary, **_holds(f"{vertical.name}.{asked.given.__name__}")}
    wrong = (400, 404, 408, 413, 415, 422) if asked.method == "POST" else (404, 422)
    return told | {"responses": {"200": answer, **errors(*wrong)}}


def upload(vertical: Vertical[Any, Any]) -> dict[str, Any]:
    """What the document says of an upload route."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    files = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
    form = {"schema": {"type": "object", "required": ["file"], "properties": {"file": files}}}
    content = {**dict.fromkeys((ZIP_TYPES[0], *FILE_TYPES), binary), FORM_TYPE: form}
    location = {"location": {"schema": {"type": "string"}}}
    return {
        "requestBody": {"required": True, "content": content},
        "parameters": [_WAIT],
        "responses": {
            "200": {"description": "the finished job (with wait=true)", **_holds(_job(vertical))},
            "202": {
                "description": "the job; poll its url",
                "headers": location,
                **_holds(_job(vertical)),
            },
            **errors(400, 408, 413, 415, 422, 507),
        },
    }


def job_status(vertical: Vertical[Any, Any]) -> dict[str, Any]:
    """What the document says of a job's route."""
    answer = {"description": "the job", **_holds(_job(vertical))}
    return {"responses": {"200": answer, **errors(404)}}


def job_deletion(vertical: Vertical[Any, Any]) -> dict[str, Any]:
    """What the document says of deleting a job."""
    return {"responses": {"204": {"description": "it is gone"}, **errors(404)}}


def job_retry(vertical: Vertical[Any, Any]) -> dict[str, Any]:
    """What the document says of trying again what failed of a job."""
    answer = {"description": "the job; poll its url", **_holds(_job(vertical))}
    return {"responses": {"202": answer, **errors(404, 422)}}


def job_file(vertical: Vertical[Any, Any]) -> dict[str, Any]:
    """What the document says of a file of a job."""
    answer = {"description": "the file", "content": {"*/*": {}}}
    return {"responses": {"200": answer, **errors(404)}}


def tensors(path: str, method: str) -> dict[str, Any]:
    """What the document says of a route of the Open Inference Protocol."""
    answers: dict[str, Any] = {}
    kinds: dict[str, Any] = {"application/json": {"schema": _OBJECT}}
    told: dict[str, Any] = {}
    if path.endswith("/infer"):
        kinds |= {"application/octet-stream": {}}
        schema = {"$ref": "#/components/schemas/InferRequest"}
        told["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
        answers = _flat_errors(400, 404, 408, 413, 415, 429, 503, 504)
    elif path.endswith("/index"):
        kinds = {"application/json": {"schema": {"type": "array", "items": _OBJECT}}}
        ready = {"type": "object", "properties": {"ready": {"type": "boolean"}}}
        told["requestBody"] = {"content": {"application/json": {"schema": ready}}}
        answers = _flat_errors(400, 408, 413, 415)
    elif method == "POST":
        told["requestBody"] = {"content": {"application/json": {"schema": _OBJECT}}}
        answers = _flat_errors(400, 403, 404, 408, 409, 413, 415, 503)
    elif "{model}" in path:
        answers = _flat_errors(404, 503)
    answers["200"] = {"description": "as the protocol says", "content": kinds}
    return told | {"responses": answers}


def _flat_errors(*codes: int) -> dict[str, Any]:
    """Error answers of the Open Inference Protocol: one sentence each."""
    return {
        str(code): {"description": MEANINGS.get(code, "wrong"), **_holds("Sentence")}
        for code in codes
    }


_VALUE = {"type": ["boolean", "integer", "number", "string"]}
_PARAMETERS: Schema = {"type": "object", "additionalProperties": _VALUE}
_TENSOR: Schema = {
    "type": "object",
    "required": ["name", "datatype", "shape", "data"],
    "properties": {
        "name": _STRING,
        "datatype": {"enum": [*DATATYPES]},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1},
        "parameters": _PARAMETERS,
        "data": {"type": "array", "items": {"type": ["number", "boolean", "array"]}},
    },
}
SENTENCE: Schema = {"type": "object", "required": ["error"], "properties": {"error": _STRING}}
INFER: Schema = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": _STRING,
        "parameters": {
            **_PARAMETERS,
            "properties": {
                "timeout": {"type": "integer", "minimum": 0, "description": "microseconds"},
                "priority": {"type": "integer", "minimum": 0, "maximum": MAX_PRIORITY},
                "binary_data_output": {"type": "boolean"},
            },
        },
        "inputs": {"type": "array", "items": _TENSOR, "minItems": 1},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": _STRING, "parameters": _PARAMETERS},
            },
        },
    },
}


def _holds(name: str) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}


def errors(*codes: int) -> dict[str, Any]:
    """Error answers for the document."""
    return {str(code): {"description": MEANINGS[code], **_holds("Error")} for code in codes}


def publish(app: FastAPI, verticals: Iterable[Vertical[Any, Any]], *, locked: bool) -> None:
    """Make the document of an app that has all its routes, and the page at ``/docs``.

    Args:
        app: made without docs of its own.
        verticals: whose types the routes take and give.
        locked: requests need an API key.
    """
    made = app.openapi
    components: dict[str, Any] = {
        "schemas": {"Error": ERROR, "Sentence": SENTENCE, "InferRequest": INFER}
    }
    for vertical in verticals:
        components["schemas"] |= schemas(vertical)
    if locked:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }

    def openapi() -> dict[str, Any]:
        document = made()
        document["components"] = components
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                _complete(operation, path, method, locked)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
    _add_page(app)


def _complete(operation: dict[str, Any], path: str, method: str, locked: bool) -> None:
    """Add to an operation what holds for all routes."""
    answers = operation["responses"]
    if "HTTPValidationError" in str(answers.get("422")):  # FastAPI's own, never given here
        del answers["422"]
    if path in COMMON:
        answers.update(COMMON[path])
    if path.startswith(("/health/", "/v2/health/")):
        return
    refusals = [403, 429, *([401] if locked else []), *([503] if path.startswith("/v1/") else [])]
    answers.update((_flat_errors if is_flat(path.encode()) else errors)(*refusals))
    if locked:
        operation["security"] = [{"bearer": []}, {"header": []}]


def _says(description: str, *types: str) -> dict[str, Any]:
    """An answer of these media types; JSON is an object."""
    content = {kind: {"schema": _OBJECT} if "json" in kind else {} for kind in types}
    return {"description": description, "content": content}


_JSON = "application/json"
COMMON: Mapping[str, dict[str, Any]] = {
    "/": {"200": _says("verticals and routes", _JSON, "text/html")},
    "/metrics": {"200": _says("Prometheus text format", "text/plain")},
    "/v1/status": {"200": _says("device, models, queue, utilisation", _JSON)},
    "/v2/health/ready": {
        "200": _says("send traffic", _JSON),
        "503": _says("do not", _JSON),
    },
    "/health/live": {"200": _says("the process answers", _JSON)},
    "/health/ready": {
        "200": _says("send traffic", _JSON),
        "503": _says("do not, and why", _JSON),
    },
}
"""Answers of the routes that every server has."""


def _add_page(app: FastAPI) -> None:
    """``/docs``: Swagger UI, all of it from this server, so that it shows without a network."""
    folder = Path(fastapi_offline.__file__).parent / "static"
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Plinth API",
        swagger_js_url="/docs/swagger-ui-bundle.js",
        swagger_css_url="/docs/swagger-ui.css",
        swagger_favicon_url="/docs/favicon.png",
    )
    page.headers.update(PAGE_HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return page

    @app.get("/docs/{asset}", include_in_schema=False)
    async def docs_asset(asset: str) -> Response:
        if asset not in ASSETS:
            raise HttpError("the API docs have no such file", reason="not_found", hint="see /docs")
        return FileResponse(folder / asset, headers={"cache-control": "max-age=86400"})
