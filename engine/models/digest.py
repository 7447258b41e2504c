"""One number for all that decides what a module computes: weights, code, structure, attributes."""

from __future__ import annotations

import hashlib
import types
import uuid
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import PurePath
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, fx, nn

_SIMPLE = (type(None), bool, int, float, complex, str, bytes, Enum, PurePath)
_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_LIBRARIES = ("torch", "numpy", "builtins")
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


class _Hash:
    def __init__(self) -> None:
        self.sha = hashlib.sha256()
        self._seen: dict[int, int] = {}
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
        host = value.detach().cpu().contiguous()
        self._say(str(host.dtype), str(tuple(host.shape)))
        if host.numel():
            self.sha.update(host.reshape(-1).view(torch.uint8).numpy().data)

    def _object(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, fx.GraphModule):
            self._say(value.code)
            self.add([dict(value.named_children()), _held(value)])
        elif isinstance(value, types.MethodType):
            self.add(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, partial):
            self.add([value.func, value.args, value.keywords])
        elif isinstance(value, types.BuiltinFunctionType | types.ModuleType):
            self._say(value.__name__)
        elif hasattr(value, "__dict__") and not _is_native(type(value)):
            self._class(type(value))
            self.add(dict(vars(value)))
        else:
            self._say(_token(value))

    def _class(self, kind: type) -> None:
        for base in kind.__mro__:
            self._say(base.__module__, base.__qualname__)
            if base.__module__.partition(".")[0] in _LIBRARIES or id(base) in self._seen:
                continue
            self._seen[id(base)] = len(self._seen)
            for name, part in sorted(vars(base).items()):
                inner = getattr(part, "__func__", getattr(part, "fget", part))
                if isinstance(inner, (*_SIMPLE, types.FunctionType, Tensor)):
                    self._say(name)
                    self.add(inner)

    def _function(self, value: types.FunctionType) -> None:
        self._say(value.__module__ or "", value.__qualname__)
        if (value.__module__ or "").partition(".")[0] in _LIBRARIES:
            return
        self._code(value.__code__)
        self.add([value.__defaults__, value.__kwdefaults__])
        for cell in value.__closure__ or ():
            self.add(_content(cell))
        for name in value.__code__.co_names:
            part = value.__globals__.get(name)
            ours = isinstance(part, types.FunctionType) and part.__module__ == value.__module__
            if ours or isinstance(part, (*_SIMPLE, Tensor)):
                self.add(part)

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
