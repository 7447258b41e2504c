"""The base of tables that people write: settings, rules, mappings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError


class Table(BaseModel):
    """Base of every table: unknown keys are refused, values do not change, numbers are numbers.

    Pydantic reads ``true`` as 1 where a number is wanted, so that ``review_threshold = true`` would
    let every payment pass; and ``nan`` is neither above nor below any limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_word_for_a_number(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        numbers = _numbers(cls)
        fields = [(name, value) for name, value in given.items() if name in numbers]
        if wrong := [found for name, value in fields for found in _words(value, (name,))]:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return given


def _words(value: Any, at: tuple[int | str, ...]) -> Iterator[InitErrorDetails]:
    """Each true and false in a value, as what is wrong with it."""
    if isinstance(value, bool):
        told = {"word": str(value).lower()}
        kind = PydanticCustomError("no_number", "expected a number, not {word}", told)
        yield {"type": kind, "loc": at, "input": value}
    elif isinstance(value, dict | list | tuple):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, one in inner:
            yield from _words(one, (*at, name))


@lru_cache(maxsize=1024)
def _numbers(table: type[BaseModel]) -> frozenset[str]:
    """Names, in files too, of the fields that take numbers."""
    fields = [(name, field) for name, field in table.model_fields.items() if _are_numbers(field)]
    return frozenset(one for name, field in fields for one in (name, field.alias or name))


def _are_numbers(field: FieldInfo) -> bool:
    """Whether a field takes numbers, but no truth, and no tables, which look at their own."""
    kinds = list(_kinds(field.annotation))
    others = any(kind in (bool, Any) or _is_table(kind) for kind in kinds)
    return not others and any(kind in (int, float, Decimal) for kind in kinds)


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _kinds(annotation: Any) -> Iterable[Any]:
    inner = get_args(annotation)
    if not inner:
        yield annotation
    for one in inner:
        yield from _kinds(one)
