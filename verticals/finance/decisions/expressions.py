"""Conditions over payments, written as text: checked before they run, and run on many rows at once.

The grammar is a small part of Python's: comparisons (which may be chained), ``and``, ``or``,
``not``, ``in``, the four arithmetic operators, numbers, quoted texts and names. Everything has a
kind (number, condition or text) and kinds never mix, so that a slip of the pen is an error and
no rule that is always false.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from plinth.engine.errors import ConfigError

Kind = Literal["number", "condition", "text"]
Column = npt.NDArray[Any]
Possible = Callable[[Any], str | None]
"""Of a name: why none of its values ever is this text or number, or ``None``: one may be."""
MAX_LENGTH = 1000
"""Characters of one condition."""
WORD = r"[!-~]+"
"""What texts of payments are: anything else would equal none of them."""
MAX_DEPTH = 30
"""Levels of brackets and operators within each other."""

_INVERSE: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda one, other: _quotient(one, other),
}


class Rows(Protocol):
    """What a condition is evaluated on."""

    def __len__(self) -> int:
        """How many rows."""
        ...

    def column(self, name: str) -> Column:
        """Values of a known name: numbers, booleans, or texts (objects; ``None`` where absent)."""
        ...


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a condition.

    Args:
        kind: of its value.
        value: of rows; NaN where a number is not defined.
        computed: by arithmetic, so that it may be NaN.
    """

    kind: Kind
    value: Callable[[Rows], Any]
    computed: bool = False


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition that was checked.

    Args:
        text: as it was written.
    """

    text: str
    _part: _Part

    def __call__(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Which rows it holds for, bool (n,).

        A comparison with a division by zero holds for none, and its opposite holds for none.
        """
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            found = self._part.value(rows)
        return np.broadcast_to(np.asarray(found, dtype=bool), (len(rows),))


def condition(
    text: str,
    names: Mapping[str, Kind],
    lists: Mapping[str, Collection[str]] | None = None,
    possible: Mapping[str, Possible] | None = None,
) -> Condition:
    """Read a condition.

    Args:
        text: such as ``amount > 500 and (night or card_count_1h >= 4)``.
        names: what it may speak of, and the kind of each.
        lists: collections of texts that may stand behind ``in``, by name.
        possible: of names whose values have a form: what is wrong with a text or number that one
            is compared with, or ``None``.

    Raises:
        ConfigError: says at which character, what was expected and the nearest known name.
    """
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"it has {len(text)} characters, at most {MAX_LENGTH} are taken")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        at = getattr(error, "offset", None)
        where = f"at character {at}: " if at else ""
        raise ConfigError(
            f"{where}this is no condition", hint="such as: amount > 500 and night"
        ) from None
    part = _Reader(names, lists or {}, possible or {}).read(tree.body, 0)
    if part.kind != "condition":
        raise ConfigError(
            f"it is a {part.kind}, expected a condition", hint="such as: amount > 500 and night"
        )
    return Condition(text, part)


@dataclass(frozen=True, slots=True)
class _Reader:
    names: Mapping[str, Kind]
    lists: Mapping[str, Collection[str]]
    possible: Mapping[str, Possible]

    def read(self, node: ast.expr, depth: int, *, opposite: bool = False) -> _Part:
        """What a node says, or the opposite of a condition.

        A ``not`` goes down to the comparisons, since what is not defined is neither true nor false.
        """
        if depth > MAX_DEPTH:
            raise _wrong(node, f"more than {MAX_DEPTH} levels within each other")
        match node:
            case ast.Constant():
                return _either(_constant(node), opposite)
            case ast.Name(id=name):
                return _either(self._name(node, name), opposite)
            case ast.BoolOp(op=op, values=values):
                parts = [self._of(one, "condition", depth, opposite=opposite) for one in values]
                return _joined(parts, every=isinstance(op, ast.And) is not opposite)
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                return self._of(inner, "condition", depth, opposite=not opposite)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                part = self._of(inner, "number", depth)
                return _Part("number", lambda rows: -part.value(rows), part.computed)
            case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _ARITHMETIC:
                return self._arithmetic(left, _ARITHMETIC[type(operation)], right, depth)
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self._compare([left, *others], ops, depth, opposite)
        raise _wrong(node, "this is not part of the language")

    def _of(self, node: ast.expr, kind: Kind, depth: int, *, opposite: bool = False) -> _Part:
        part = self.read(node, depth + 1, opposite=opposite)
        if part.kind != kind:
            raise _wrong(node, f"expected a {kind}, this is a {part.kind}")
        return part

    def _name(self, node: ast.expr, name: str) -> _Part:
        kind = self.names.get(name)
        if kind is None:
            if name in self.lists:
                raise _wrong(node, f"{name} is a list, which stands behind 'in' only")
            near = get_close_matches(name, list(self.names), n=1)
            raise _wrong(
                node,
                f"{name} is not known" + (f", did you mean {near[0]}?" if near else ""),
                hint=f"known are {', '.join(sorted(self.names))}",
            )
        return _Part(kind, lambda rows: rows.column(name))

    def _arithmetic(
        self, left: ast.expr, operation: Callable[[Any, Any], Any], right: ast.expr, depth: int
    ) -> _Part:
        one, other = self._of(left, "number", depth), self._of(right, "number", depth)

        def value(rows: Rows) -> Any:
            first, second = one.value(rows), other.value(rows)
            try:
                return operation(first, second)
            except (ZeroDivisionError, OverflowError):  # two constants
                return float("nan")

        return _Part("number", value, computed=True)

    def _compare(
        self, nodes: Sequence[ast.expr], ops: Sequence[ast.cmpop], depth: int, opposite: bool
    ) -> _Part:
        pairs = [
            self._pair(left, _INVERSE.get(type(op)) if opposite else type(op), right, depth)
            for left, op, right in zip(nodes, ops, nodes[1:], strict=False)
        ]
        return pairs[0] if len(pairs) == 1 else _joined(pairs, every=not opposite)

    def _pair(
        self, left: ast.expr, op: type[ast.cmpop] | None, right: ast.expr, depth: int
    ) -> _Part:
        if op in (ast.In, ast.NotIn):
            return self._member(left, right, op is ast.In, depth)
        compare = None if op is None else _COMPARISONS.get(op)
        if compare is None:
            raise _wrong(left, "'is' is not part of the language", hint="use == or in")
        one = self.read(left, depth + 1)
        if one.kind == "condition":
            raise _wrong(left, "a condition is not compared", hint="write it, or 'not' before it")
        other = self._of(right, one.kind, depth)
        self._see_possible(left, right, _value_of(right))
        self._see_possible(right, left, _value_of(left))
        if one.kind == "text" and op not in (ast.Eq, ast.NotEq):
            raise _wrong(left, "texts are compared by ==, != and in alone")
        if op is ast.NotEq and (one.computed or other.computed):
            compare = _differ  # every other comparison with NaN is false by itself
        return _Part("condition", lambda rows: compare(one.value(rows), other.value(rows)))

    def _member(self, left: ast.expr, right: ast.expr, wanted: bool, depth: int) -> _Part:
        text, members = self._of(left, "text", depth), self._list(right)
        self._see_possible(left, right, *members)

        def value(rows: Rows) -> Any:
            found = np.asarray(text.value(rows), dtype=object)
            held = [(one in members) is wanted for one in found.reshape(-1).tolist()]
            return np.array(held, dtype=bool).reshape(found.shape)

        return _Part("condition", value)

    def _see_possible(self, name: ast.expr, where: ast.expr, *values: str | float | None) -> None:
        """Refuse what a name never is, which would make the comparison hold never, or always."""
        check = self.possible.get(name.id) if isinstance(name, ast.Name) else None
        if check is None:
            return
        for value in values:
            if value is not None and (why := check(value)) is not None:
                raise _wrong(where, f"{ast.unparse(name)} never is that: {why}")

    def _list(self, node: ast.expr) -> frozenset[str]:
        if isinstance(node, ast.Name):
            if node.id not in self.lists:
                near = get_close_matches(node.id, list(self.lists), n=1)
                raise _wrong(
                    node,
                    f"there is no list {node.id}" + (f", did you mean {near[0]}?" if near else ""),
                    hint="write it under [lists]",
                )
            return frozenset(self.lists[node.id])
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            texts = [one.value for one in node.elts if isinstance(one, ast.Constant)]
            if len(texts) == len(node.elts) and all(isinstance(one, str) for one in texts):
                return frozenset(_possible(node, str(one)) for one in texts)
        raise _wrong(node, "expected a list of quoted texts, or the name of a list")


def _value_of(node: ast.expr) -> str | float | None:
    """Of a text, or of a number with its sign, that is written out; else ``None``."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value_of(node.operand)
        return -value if isinstance(value, int | float) else None
    found = node.value if isinstance(node, ast.Constant) else None
    return found if isinstance(found, str | int | float) else None


def _possible(node: ast.expr, text: str) -> str:
    if not re.fullmatch(WORD, text):
        raise _wrong(node, "no payment has a text with spaces or other signs than ASCII, or empty")
    return text


def _constant(node: ast.Constant) -> _Part:
    value: Any = node.value
    if isinstance(value, bool):
        return _Part("condition", lambda rows: value)
    if isinstance(value, str):
        _possible(node, value)
        return _Part("text", lambda rows: value)
    if isinstance(value, int | float) and abs(value) < 1e15 and isfinite(value):
        number = float(value)
        return _Part("number", lambda rows: number)
    raise _wrong(node, "expected a number below 1e15 or a quoted text")


def _either(part: _Part, opposite: bool) -> _Part:
    if not opposite or part.kind != "condition":
        return part
    return _Part("condition", lambda rows: np.logical_not(part.value(rows)))


def _joined(parts: Sequence[_Part], *, every: bool) -> _Part:
    join = np.logical_and if every else np.logical_or

    def value(rows: Rows) -> Any:
        found = parts[0].value(rows)
        for part in parts[1:]:
            found = join(found, part.value(rows))
        return found

    return _Part("condition", value)


def _quotient(one: Any, other: Any) -> Any:
    """NaN where a number is divided by zero, of the type that it has elsewhere."""
    found = one / other
    if not isinstance(other, np.ndarray):
        return found
    return np.where(other == 0, found.dtype.type(np.nan), found)


def _differ(one: Any, other: Any) -> Any:
    """Whether two numbers differ; false where one is NaN."""
    return (one != other) & (one == one) & (other == other)


def _wrong(node: ast.expr, what: str, hint: str | None = None) -> ConfigError:
    return ConfigError(f"at character {node.col_offset + 1}: {what}", hint=hint)
