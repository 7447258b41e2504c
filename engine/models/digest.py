"""One number for all that decides what a module computes: weights, code, structure, attributes."""

from __future__ import annotations

import dis
import hashlib
import sys
import types
import uuid
import weakref
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import PurePath
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, fx, nn

from plinth.engine.mapped import Pages

_SIMPLE = (type(None), type(...), bool, int, float, complex, str, bytes, Enum, PurePath)
_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_LIBRARIES = ("torch", "numpy", "builtins")
_VERSIONED = {*_LIBRARIES, *sys.stdlib_module_names}
_OPAQUE: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def digest(value: Any) -> str:
    """SHA-256 over everything a module, or another object, holds.

    Covered are parameters, buffers (also those that are not saved), plain attributes of the
    module and its parts, the bytecode of their classes and functions with their defaults,
    closures and simple globals. What cannot be read, such as a lock or another library's
    handle, counts as equal only to itself, so that two modules with one digest compute the
    same, given one version of Python and of their libraries.
    """
    found = _Hash()
    try:
        found.add(value)
    except RecursionError:
        return hashlib.sha256(_token(value).encode()).hexdigest()
    return found.sha.hexdigest()


def structure_digest(module: nn.Module) -> str | None:
    """A digest of all that :func:`digest` covers but the values of tensors; ``None``: not readable.

    Modules of one structure run the same operations on tensors of the same sizes.
    """
    return _whole(_Hash(values=False), module)


def lasting_digest(value: Any) -> str | None:
    """A digest that means the same in every process, or ``None`` where there can be none.

    Besides what :func:`digest` covers, it follows functions, classes, containers and modules of
    any name that a function uses, into every module but those of torch, NumPy and Python, which
    their versions stand for. Whatever cannot be read, and an import inside a function, gives
    ``None``.
    """
    return _whole(_Hash(lasting=True), value)


def _whole(found: _Hash, value: Any) -> str | None:
    """The digest of a value of which all could be read, else ``None``."""
    try:
        found.add(value)
    except RecursionError:
        return None
    return None if found.opaque else found.sha.hexdigest()


class _Hash:
    def __init__(self, *, lasting: bool = False, values: bool = True) -> None:
        self.sha = hashlib.sha256()
        self.opaque = False
        self._lasting = lasting
        self._values = values
        self._libraries = _VERSIONED if lasting else set(_LIBRARIES)
        self._seen: dict[int, int] = {}
        self._classes: set[type] = set()
        self._held: list[Any] = []  # ids stay those of living objects

    def add(self, value: Any) -> None:
        if isinstance(value, (*_SIMPLE, *_TORCH)):
            self._say(type(value).__qualname__, repr(value))
            return
        if id(value) in self._seen:
            self._say("again", str(self._seen[id(value)]))
            return
        self._seen[id(value)] = len(self._seen)
        self._held.append(value)
        self._say(type(value).__module__, type(value).__qualname__)
        self._compound(value)

    def _say(self, *words: str) -> None:
        for word in words:
            text = word.encode(errors="surrogatepass")
            self.sha.update(b"%d:" % len(text) + text)

    def _compound(self, value: Any) -> None:
        if isinstance(value, Tensor) and value.layout is torch.strided:
            self._tensor(value)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            self._say(str(value.dtype), str(value.shape))
            self.sha.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, Mapping):
            self._say(str(len(value)))
            for key, part in value.items():
                self.add(key)
                self.add(part)
        elif isinstance(value, list | tuple):
            self._say(str(len(value)))
            for part in value:
                self.add(part)
        elif isinstance(value, set | frozenset) and all(isinstance(v, _SIMPLE) for v in value):
            self._say(*sorted(map(repr, value)))
        elif isinstance(value, type):
            self._class(value)
        else:
            self._object(value)

    def _tensor(self, value: Tensor) -> None:
        self._say(str(value.dtype), str(tuple(value.shape)))
        if not self._values:
            self._say(str(value.device), str(value.stride()), str(value.requires_grad))
            return
        host = value.detach().cpu().contiguous()
        if host.numel():
            self.sha.update(host.reshape(-1).view(torch.uint8).numpy().data)
            Pages([host]).give_back()  # it was read to be counted

    def _object(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, fx.GraphModule):
            self._say(value.code)
            self.add([dict(value.named_children()), _held(value)])
            if self._lasting:
                targets = [node.target for node in value.graph.nodes]
                self.add([each for each in targets if isinstance(each, types.FunctionType)])
        elif isinstance(value, types.MethodType):
            self.add(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, weakref.ref):  # recurrent layers keep some of their weights
            self.add(value())
        elif isinstance(value, partial):
            self.add([value.func, value.args, value.keywords])
        elif isinstance(value, types.BuiltinFunctionType | types.ModuleType):
            self._say(value.__name__)
        elif hasattr(value, "__dict__") and not _is_native(type(value)):
            self._class(type(value))
            self.add(dict(vars(value)))
        else:
            self.opaque = True
            self._say(_token(value))

    def _class(self, kind: type) -> None:
        for base in kind.__mro__:
            self._say(base.__module__, base.__qualname__)
            if self._is_library(base.__module__) or base in self._classes:
                continue
            self._classes.add(base)
            for name, part in sorted(vars(base).items()):
                inner = getattr(part, "__func__", getattr(part, "fget", part))
                if isinstance(inner, (*_SIMPLE, types.FunctionType, Tensor)) or (
                    self._lasting and not name.startswith("__")
                ):
                    self._say(name)
                    self.add(inner)

    def _function(self, value: types.FunctionType) -> None:
        self._say(value.__module__ or "", value.__qualname__)
        if self._is_library(value.__module__ or ""):
            return
        self._code(value.__code__)
        self.add([value.__defaults__, value.__kwdefaults__])
        for cell in value.__closure__ or ():
            self.add(_content(cell))
        if self._lasting:
            self._named(value.__code__, value.__globals__)
            return
        for name in value.__code__.co_names:
            part = value.__globals__.get(name)
            ours = isinstance(part, types.FunctionType) and part.__module__ == value.__module__
            if ours or isinstance(part, (*_SIMPLE, Tensor)):
                self.add(part)

    def _named(self, code: types.CodeType, names: Mapping[str, Any]) -> None:
        """Whatever the names of a code, and of the codes inside it, stand for."""
        self.opaque |= any(each.opname == "IMPORT_NAME" for each in dis.get_instructions(code))
        for name in code.co_names:
            part = names.get(name)
            self.add(part)
            if isinstance(part, types.ModuleType) and not self._is_library(part.__name__):
                self._named(code, vars(part))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._named(constant, names)

    def _is_library(self, module: str) -> bool:
        return module.partition(".")[0] in self._libraries

    def _code(self, code: types.CodeType) -> None:
        self.sha.update(code.co_code)
        self._say(*code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            else:
                self.add(constant)


def _held(graph: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors of a graph module itself; its code says the rest."""
    own = dict(value for value in vars(graph).items() if isinstance(value[1], Tensor))
    return {**own, **graph._parameters, **graph._buffers}


def _is_native(kind: type) -> bool:
    """Whether an instance may hold more than its ``__dict__`` shows."""
    if issubclass(kind, nn.Module):
        return issubclass(kind, torch.jit.ScriptModule)
    return any(base.__flags__ & (1 << 9) == 0 and base is not object for base in kind.__mro__)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


def _token(value: Any) -> str:
    """A word for an object that cannot be read: its own while it lives, nobody else's ever."""
    try:
        return _OPAQUE.setdefault(value, uuid.uuid4().hex)
    except TypeError:  # it cannot be hashed or weakly held
        return uuid.uuid4().hex
