"""What the API docs say of the routes, from the verticals' own types and examples."""

from __future__ import annotations

from typing import Any

import orjson

from plinth.pipelines.folders.archives import FORM_TYPE, ZIP_TYPES
from plinth.pipelines.http.record_routes import DEADLINE_HEADER
from plinth.verticals import Vertical


def schemas(vertical: Vertical[Any, Any]) -> dict[str, Any]:
    """The vertical's types by name, which begins with the vertical's own."""
    assert vertical.request is not None
    template = f"#/components/schemas/{vertical.name}.{{model}}"
    asked = vertical.request.model_json_schema(ref_template=template)
    given = vertical.response.model_json_schema(ref_template=template, mode="serialization")
    found = {**asked.pop("$defs", {}), **given.pop("$defs", {})}
    found |= {vertical.request.__name__: asked, vertical.response.__name__: given}
    return {f"{vertical.name}.{name}": schema for name, schema in found.items()}


def records(vertical: Vertical[Any, Any]) -> dict[str, Any]:
    """What the API docs say of a record route, the vertical's own example included."""
    assert vertical.request is not None
    one, many = (
        f"#/components/schemas/{vertical.name}.{kind.__name__}"
        for kind in (vertical.request, vertical.response)
    )
    example = vertical.example()
    results = {
        "type": "object",
        "properties": {
            "results": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"result": {"$ref": many}, "error": {"type": "object"}},
                },
            },
            **{key: {"type": "object"} for key in ("timing", "models", "degraded")},
            "late": {"type": "boolean"},
        },
    }
    content: dict[str, Any] = {
        "schema": {"oneOf": [{"$ref": one}, {"type": "array", "items": {"$ref": one}}]},
    }
    if hasattr(example, "model_dump_json"):
        content["example"] = orjson.loads(example.model_dump_json())
    return {
        "requestBody": {"required": True, "content": {"application/json": content}},
        "parameters": [DEADLINE_PARAMETER],
        "responses": {
            "200": {
                "description": "one answer, or one result or error per record of the list",
                "headers": {"x-plinth-timing": {"schema": {"type": "string"}}},
                "content": {"application/json": {"schema": {"oneOf": [{"$ref": many}, results]}}},
            },
            **errors(400, 413, 415, 422, 429, 503, 504),
        },
    }


DEADLINE_PARAMETER = {
    "name": DEADLINE_HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "number", "exclusiveMinimum": 0},
    "description": "milliseconds this request may take; work that cannot make it is refused",
}
ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "required": ["reason", "message"],
            "properties": {
                key: {"type": ["string", "null"]} for key in ("reason", "message", "field", "hint")
            },
        }
    },
}
MEANINGS = {
    400: "malformed",
    404: "no such thing",
    413: "too large",
    415: "wrong media type",
    422: "a field is wrong",
    429: "the queue is full; see Retry-After",
    503: "cannot be done in time, or shutting down; see Retry-After",
    504: "took too long",
}


def errors(*codes: int) -> dict[str, Any]:
    """Error answers for the API docs."""
    schema = {"$ref": "#/components/schemas/Error"}
    return {
        str(code): {
            "description": MEANINGS[code],
            "content": {"application/json": {"schema": schema}},
        }
        for code in codes
    }


def uploads() -> dict[str, Any]:
    """What the API docs say of an upload route."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {
        "schema": {
            "type": "object",
            "properties": {
                "file": {"type": "array", "items": {"type": "string", "format": "binary"}}
            },
        }
    }
    content = dict.fromkeys((ZIP_TYPES[0], "application/dicom"), binary)
    return {
        "requestBody": {"required": True, "content": {**content, FORM_TYPE: form}},
        "parameters": [
            {
                "name": "wait",
                "in": "query",
                "required": False,
                "schema": {"type": "boolean"},
                "description": "answer when the job is finished, if that is soon enough",
            }
        ],
        "responses": {
            "200": {"description": "the finished job (with wait=true)"},
            "202": {"description": "the job; poll its url"},
            **errors(400, 413, 415, 422, 429, 503),
        },
    }
