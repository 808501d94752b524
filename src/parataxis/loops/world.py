"""The world of a loop: what it reaches and may change, so that it can be put back before every pass.

A loop may append to a list, count on an object, scale an array or a parameter in place, take from a queue. Its Python
runs several times, so everything that it reaches is noted before the first pass and put back before each pass and
before the unmodified loop runs: what is left behind is then what one run leaves.

Reached are arguments, closures, the owner of a method, and the globals that code names, as deep as their parts are
plain: containers, tensors, arrays, generators of random numbers, classes and objects of somebody's own. Small tensors
are copied at once; of larger ones (parameters) a copy is made when something is about to write to them, see
:meth:`World.about_to_write`. What cannot be put back (iterators, files, sockets) is listed in ``obstacles``.
"""

from __future__ import annotations

import dis
import io
import random
import socket
import sys
import types
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import lru_cache, partial
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .content import sample_of

__all__ = ["Change", "World", "named_globals"]

PLAIN = frozenset(
    {bool, int, float, complex, str, bytes, type(None), type(...), range, slice, torch.dtype, torch.device, torch.Size}
)
SETTINGS = (bool, int, float, str, type(None))
# Objects of these packages are not looked into, except modules: their state is their own affair.
LIBRARIES = sys.stdlib_module_names | {
    *("PIL", "accelerate", "huggingface_hub", "matplotlib", "numpy", "pandas", "parataxis", "pytest", "_pytest"),
    *("safetensors", "scipy", "sklearn", "tokenizers", "torch", "torchvision", "tqdm", "transformers"),
}
STATEFUL = (types.SimpleNamespace,)  # of the standard library, besides containers
STATEFUL_MODULES = frozenset({"queue", "argparse", "collections"})
LARGE = 1 << 20  # elements of tensors of which no copy is made before something writes to them
LARGE_PARAMETER = 1 << 12  # the same for parameters, of which there are many
MOST_OBJECTS = 200_000  # looked at
HIDDEN = frozenset({"_compiled_call_impl", "__builtins__"})  # where stubs are put
MISSING = object()
CODE = (types.FunctionType, classmethod, staticmethod, property, types.GetSetDescriptorType, types.MemberDescriptorType)
# Of a module's buffers the type is one of its own from torch 2.5 on.
TENSORS = (Tensor, nn.Parameter, getattr(nn.parameter, "Buffer", nn.Parameter))
RANDOM = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


class Change(NamedTuple):
    """Something that differs from what was noted.

    Attributes:
        name: Of the place, for people.
        place: The place.
        key: Where in it; None for all of it.
    """

    name: str
    place: Any
    key: Any


class World:
    """What can be reached from some objects, as it was when this was made.

    Args:
        roots: (name, object) to begin with; names are for messages.
        ignore: Class of values that others put in places and take away again.
        skipped: What networks write by themselves, of another world.

    Attributes:
        obstacles: Names of what cannot be put back.
        skipped: (id, key) of what networks write by themselves: it is not put back.
        random: Generators of random numbers, of torch, numpy and Python; their states are not kept here.
    """

    def __init__(
        self, roots: Iterable[tuple[str, Any]], ignore: type = Enum, skipped: set[tuple[int, Any]] | None = None
    ) -> None:
        self.obstacles: list[str] = []
        self.random: list[Any] = []
        self._ignore = ignore
        self._places: list[Any] = []
        self._tensors: list[_Tensor] = []
        self._by_storage: dict[int, list[_Tensor]] = {}
        self.skipped: set[tuple[int, Any]] = set() if skipped is None else skipped
        seen: dict[int, Any] = {}  # holds what it has seen, so that no other object gets its address
        self._ends: list[int] = []  # of the places behind each root
        for root in roots:
            stack = [root]
            while stack and len(seen) < MOST_OBJECTS:
                name, value = stack.pop()
                if type(value) in PLAIN or id(value) in seen:
                    continue
                seen[id(value)] = value
                stack += self._look(name, value)
            self._ends.append(len(self._places))

    def _look(self, name: str, value: Any) -> Iterable[tuple[str, Any]]:
        """Note a value; return what it holds, by names."""
        if isinstance(value, Tensor):
            return self._note_tensor(name, value)
        if isinstance(value, RANDOM):
            self.random.append(value)
        elif isinstance(value, np.ndarray):
            return self._note(_Array(name, value)) if value.flags.writeable else ()
        elif isinstance(value, types.FunctionType):
            return self._look_at_function(name, value)
        elif isinstance(value, types.MethodType):
            return [(_owner_name(name), value.__self__), (name, value.__func__)]
        elif isinstance(value, partial):
            return [(name, value.func), *_items(name, value.args), *((k, v) for k, v in value.keywords.items())]
        elif isinstance(value, type):
            named = not _is_library(value.__module__) and not issubclass(value, Enum)
            return self._note(_Class(name, value)) if named else ()
        elif isinstance(value, (tuple, frozenset)):
            return _items(name, value)
        elif isinstance(value, (io.StringIO, io.BytesIO)):
            return self._note(_Buffer(name, value))
        elif (obstacle := _obstacle(name, value)) is not None:
            self.obstacles.append(obstacle)
        else:
            return [*self._look_at_container(name, value), *self._look_at_object(name, value)]
        return ()

    def _look_at_container(self, name: str, value: Any) -> Iterable[tuple[str, Any]]:
        if isinstance(value, dict):
            return self._note(_Mapping(name, value))
        if isinstance(value, (list, deque, set, bytearray, array)):
            return self._note(_Sequence(name, value))
        return ()

    def _look_at_object(self, name: str, value: Any) -> Iterable[tuple[str, Any]]:
        kind = type(value)
        module = getattr(kind, "__module__", None) or ""
        if isinstance(value, nn.Module):
            # A network reads the globals that its own code names.
            forward = getattr(kind, "forward", None)
            code = [] if _is_library(module) or not isinstance(forward, types.FunctionType) else [(name, forward)]
            return [*code, *self._note(_Attributes(name, value.__dict__))]
        known = isinstance(value, STATEFUL) or module.split(".")[0] in STATEFUL_MODULES
        wrapped = getattr(value, "__dict__", {}).get("__wrapped__")
        if wrapped is not None and module.startswith("parataxis."):  # a stub
            return [(name, wrapped)]
        if isinstance(value, types.ModuleType) or (_is_library(module) and not known):
            return ()
        held: list[tuple[str, Any]] = [] if known else [(kind.__name__, kind)]
        if isinstance(getattr(value, "__dict__", None), dict):
            held += self._note(_Attributes(name, value.__dict__))
        slots = [slot for base in kind.__mro__ for slot in _slots(base)]
        return held + list(self._note(_Slots(name, value, slots))) if slots else held

    def _look_at_function(self, name: str, value: types.FunctionType) -> Iterable[tuple[str, Any]]:
        held: list[tuple[str, Any]] = []
        for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            held += self._note(_Cell(variable, cell))
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        held += [("a default argument", default) for default in defaults]
        if isinstance(wrapped := value.__dict__.get("__wrapped__"), types.FunctionType):
            held.append((name, wrapped))
        if not _is_library(value.__module__ or "") and "site-packages" not in value.__code__.co_filename:
            names = [n for n in named_globals(value) if not isinstance(value.__globals__[n], types.ModuleType)]
            held += self._note(_Globals(name, value.__globals__, names)) if names else []
            held += self._note(_Attributes(name, value.__dict__)) if value.__dict__ else []
        return held

    def _note(self, place: Any) -> Iterable[tuple[str, Any]]:
        self._places.append(place)
        held: Iterable[tuple[str, Any]] = place.held()
        return held

    def _note_tensor(self, name: str, value: Tensor) -> Iterable[tuple[str, Any]]:
        tensor = _Tensor(name, value)
        self._tensors.append(tensor)
        if tensor.storage is not None:
            self._by_storage.setdefault(tensor.storage, []).append(tensor)
        return () if tensor.grad is None else [(f"{name}.grad", tensor.grad)]

    def about_to_write(self, value: Any) -> None:
        """Keep a copy of the tensors that share memory with this one: something is about to write to it."""
        for tensor in self._by_storage.get(_storage(value) or 0, ()):
            tensor.keep()
            tensor.written = True

    def skip(self, change: Change) -> None:
        """Leave a place alone from now on: a network writes there by itself, and does not read it."""
        self.skipped.add((id(change.place.owner), change.key))

    def changes(self, *, thorough: bool = False) -> Iterator[Change]:
        """Yield what is not as it was noted.

        Args:
            thorough: Whether to compare the content of buffers, too: batch normalisation writes to its running
                statistics without a trace in their version.
        """
        for place in self._places:
            if place.changed():
                for key in place.differences():
                    ignored = key in HIDDEN or isinstance(place.get(key), self._ignore)
                    if not ignored and not self._skips(place, key):
                        yield Change(place.describe(key), place, key)
        for tensor in self._tensors:
            changed = tensor.changed() or (thorough and tensor.differs())
            if changed and not self._skips(tensor, None):
                yield Change(tensor.name, tensor, None)

    def restore(self, *, everything: bool = False) -> bool:
        """Put everything back; return whether nothing was lost.

        Args:
            everything: Also what networks write by themselves.
        """
        for place in self._places:
            if place.changed():
                for key in place.differences():
                    ignored = key in HIDDEN or isinstance(place.get(key), self._ignore)
                    if not ignored and (everything or not self._skips(place, key)):
                        place.put_back(key)
        tensors = [t for t in self._tensors if everything or not self._skips(t, None)]
        lost = [tensor for tensor in tensors if not tensor.restore()]
        return not lost

    def is_lost(self) -> bool:
        """Return whether something has been written that :meth:`restore` cannot put back."""
        return not all(tensor.is_whole() for tensor in self._tensors)

    def settings(self) -> int:
        """Return a number that is another one where a plain value behind the first root is."""
        places = self._places[: self._ends[0]] if self._ends else []
        held = (
            (place.describe(key), value.__qualname__ if isinstance(value, type) else value)
            for place in places
            if isinstance(place, _Mapping)
            for key, value in place.before.items()
            if type(value) in SETTINGS or isinstance(value, type)
        )
        return hash(tuple(held))

    def holders(self, value: Any) -> list[tuple[Any, Any]]:
        """Return the (place, key) that hold an object."""
        return [(place, key) for place in self._places for key in place.keys_of(value)]

    def _skips(self, place: Any, key: Any) -> bool:
        return bool(self.skipped) and (id(place.owner), key) in self.skipped


class _Mapping:
    """A dict: its items, by identity."""

    def __init__(self, name: str, owner: Any) -> None:
        self.name, self.owner, self.before = name, owner, dict(owner)

    def held(self) -> Iterable[tuple[str, Any]]:
        return [(self.describe(key), value) for key, value in self.before.items() if type(value) not in PLAIN]

    def describe(self, key: Any) -> str:
        return f"{self.name}[{key!r}]" if isinstance(key, (str, int, float)) else self.name

    def get(self, key: Any) -> Any:
        return self.owner.get(key, MISSING)

    def set(self, key: Any, value: Any) -> None:
        self.owner[key] = value

    def changed(self) -> bool:
        owner, before = self.owner, self.before
        return not (
            len(owner) == len(before) and all(map(is_, owner.values(), before.values())) and list(owner) == list(before)
        )

    def differences(self) -> list[Any]:
        keys = [key for key in self.owner if key not in self.before]
        return keys + [key for key, value in self.before.items() if not _same(self.owner.get(key, MISSING), value)]

    def put_back(self, key: Any) -> None:
        value, now = self.before.get(key, MISSING), self.owner.get(key, MISSING)
        if value is MISSING:
            del self.owner[key]
        elif not _moved(value, now):
            self.owner[key] = value

    def keys_of(self, value: Any) -> list[Any]:
        return [key for key, held in self.owner.items() if held is value]


class _Attributes(_Mapping):
    """The attributes of an object."""

    def describe(self, key: Any) -> str:
        return f"{self.name}.{key}" if self.name else str(key)


class _Names(_Mapping):
    """Some names of something that is no dict: variables, slots, attributes of a class."""

    def __init__(self, name: str, owner: Any, names: Iterable[str]) -> None:
        self.name, self.owner = name, owner
        self.before = {key: value for key in names if (value := self.get(key)) is not MISSING}

    def changed(self) -> bool:
        return any(self.get(key) is not value for key, value in self.before.items())

    def differences(self) -> list[Any]:
        return [key for key, value in self.before.items() if not _same(self.get(key), value)]

    def put_back(self, key: Any) -> None:
        self.set(key, self.before[key])

    def keys_of(self, value: Any) -> list[Any]:
        return [key for key in self.before if self.get(key) is value]


class _Globals(_Names):
    def describe(self, key: Any) -> str:
        return str(key)


class _Cell(_Names):
    """A variable of a closure."""

    def __init__(self, name: str, owner: Any) -> None:
        super().__init__(name, owner, [name])

    def describe(self, key: Any) -> str:
        return str(key)

    def get(self, key: Any) -> Any:
        try:
            return self.owner.cell_contents
        except ValueError:  # not assigned yet
            return MISSING

    def set(self, key: Any, value: Any) -> None:
        self.owner.cell_contents = value


class _Slots(_Names):
    def describe(self, key: Any) -> str:
        return f"{self.name}.{key}"

    def get(self, key: Any) -> Any:
        return getattr(self.owner, key, MISSING)

    def set(self, key: Any, value: Any) -> None:
        object.__setattr__(self.owner, key, value)


class _Class(_Slots):
    """What a class holds besides methods."""

    def __init__(self, name: str, owner: type) -> None:
        names = [key for key, value in vars(owner).items() if not key.startswith("__") and not isinstance(value, CODE)]
        _Names.__init__(self, owner.__name__, owner, names)

    def get(self, key: Any) -> Any:
        return vars(self.owner).get(key, MISSING)

    def set(self, key: Any, value: Any) -> None:
        setattr(self.owner, key, value)


class _Whole:
    """Something that is compared and put back as a whole."""

    def __init__(self, name: str, owner: Any) -> None:
        self.name, self.owner = name, owner
        self.before = self.content()

    def content(self) -> Any:
        raise NotImplementedError

    def held(self) -> Iterable[tuple[str, Any]]:
        return ()

    def describe(self, key: Any) -> str:
        return self.name

    def get(self, key: Any) -> Any:
        return self.owner

    def changed(self) -> bool:
        return bool(self.content() != self.before)

    def differences(self) -> list[Any]:
        return [None]

    def put_back(self, key: Any) -> None:
        raise NotImplementedError

    def keys_of(self, value: Any) -> list[Any]:
        return []


class _Sequence(_Whole):
    """A list, deque, set, bytearray or array: its items, by identity."""

    def content(self) -> Any:
        return tuple(self.owner)

    def held(self) -> Iterable[tuple[str, Any]]:
        return [] if isinstance(self.owner, (bytearray, array)) else _items(self.name, self.before)

    def changed(self) -> bool:
        if isinstance(self.owner, (set, bytearray, array)):
            return len(self.owner) != len(self.before) or tuple(self.owner) != self.before
        return not (len(self.owner) == len(self.before) and all(map(is_, self.owner, self.before)))

    def differences(self) -> list[Any]:
        return [] if _same(tuple(self.owner), self.before) else [None]

    def put_back(self, key: Any) -> None:
        if isinstance(self.owner, (list, bytearray)):
            self.owner[:] = self.before
        elif isinstance(self.owner, array):
            self.owner[:] = array(self.owner.typecode, self.before)
        else:
            self.owner.clear()
            (self.owner.update if isinstance(self.owner, set) else self.owner.extend)(self.before)


class _Array(_Whole):
    """A NumPy array."""

    def content(self) -> Any:
        return self.owner.copy()

    def held(self) -> Iterable[tuple[str, Any]]:
        return _items(self.name, self.owner.ravel().tolist()) if self.owner.dtype.hasobject else ()

    def changed(self) -> bool:
        same = self.owner.shape == self.before.shape and self.owner.dtype == self.before.dtype
        if same and self.owner.dtype.hasobject:
            return not all(map(is_, self.owner.ravel().tolist(), self.before.ravel().tolist()))
        return not same or self.owner.tobytes() != self.before.tobytes()

    def put_back(self, key: Any) -> None:
        if self.owner.shape != self.before.shape:
            self.owner.resize(self.before.shape, refcheck=False)
        self.owner[...] = self.before


class _Buffer(_Whole):
    """A file in memory."""

    def content(self) -> Any:
        return None if self.owner.closed else (self.owner.getvalue(), self.owner.tell())

    def put_back(self, key: Any) -> None:
        if self.before is not None and not self.owner.closed:
            self.owner.seek(0)
            self.owner.truncate()
            self.owner.write(self.before[0])
            self.owner.seek(self.before[1])


class _Tensor:
    """A tensor: its memory, its version, and a copy where it is small or about to be written to."""

    def __init__(self, name: str, owner: Tensor) -> None:
        self.name, self.owner = name, owner
        self.version, self.storage = _version(owner), _storage(owner)
        self.requires_grad, self.grad = owner.requires_grad, owner.grad if owner.is_leaf else None
        self.memory = owner.data if self.storage is not None else None  # the same memory, whatever .data is set to
        self.copy: Tensor | None = None
        self.written = False  # through another tensor with the same memory, such as .data, which shows in no version
        view = sample_of(owner)  # an array with the same memory shows nowhere else
        self.sample: Callable[[], bytes] = bytes if view is None else view.tobytes
        self.content = self.sample()
        large = LARGE_PARAMETER if isinstance(owner, nn.Parameter) else LARGE
        if self.memory is not None and owner.numel() <= large:
            self.keep()

    def keep(self) -> None:
        if self.copy is None and self.memory is not None:
            self.copy = self.memory.clone()

    def changed(self) -> bool:
        owner = self.owner
        if self.memory is None:
            return _version(owner) != self.version
        if owner.device != self.memory.device:  # moved away by offloading
            return False
        return not self.is_untouched() or _storage(owner) != self.storage

    def is_untouched(self) -> bool:
        """Return whether nothing shows that the memory was written to."""
        return not self.written and _version(self.owner) == self.version and self.sample() == self.content

    def differs(self) -> bool:
        """Return whether a tensor that is no parameter has another content than it had."""
        if self.copy is None or isinstance(self.owner, nn.Parameter) or self.owner.device != self.copy.device:
            return False
        return not _equal(self.memory, self.copy)

    def is_whole(self) -> bool:
        return self.copy is not None or self.is_untouched()

    def restore(self) -> bool:
        owner, memory = self.owner, self.memory
        if memory is None:
            return self.is_whole()
        if owner.is_leaf and owner.requires_grad != self.requires_grad:
            owner.requires_grad_(self.requires_grad)
        if owner.is_leaf and owner.grad is not self.grad:
            owner.grad = self.grad
        if owner.device != memory.device:
            return True
        whole = self.is_whole()
        if _storage(owner) != self.storage or owner.shape != memory.shape or owner.dtype != memory.dtype:
            owner.data = memory
        # Arrays may share the memory of small tensors, and leave no trace in their version.
        look = not self.is_untouched() or not isinstance(owner, nn.Parameter)
        if self.copy is not None and look and not _equal(memory, self.copy):
            memory.copy_(self.copy)
        self.version, self.written, self.content = _version(owner), False, self.sample()
        return whole


def named_globals(function: types.FunctionType) -> list[str]:
    """Return the globals that the code of a function names."""
    return [name for name in _global_names(function.__code__) if name in function.__globals__]


@lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """Return the globals that code names; its other names are attributes."""
    names = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL")]
    for inner in code.co_consts:
        names += _global_names(inner) if isinstance(inner, types.CodeType) else ()
    return tuple(dict.fromkeys(names))


def _is_library(module: str) -> bool:
    return module.split(".")[0] in LIBRARIES and module != "__main__"


def _items(name: str, values: Iterable[Any]) -> list[tuple[str, Any]]:
    return [(f"{name}[{i}]", value) for i, value in enumerate(values) if type(value) not in PLAIN]


def _owner_name(name: str) -> str:
    return name.rpartition(".")[0] or name


def _slots(base: type) -> list[str]:
    slots = base.__dict__.get("__slots__", ())
    slots = [slots] if isinstance(slots, str) else list(slots)
    return [slot for slot in slots if slot not in ("__dict__", "__weakref__")]


def _obstacle(name: str, value: Any) -> str | None:
    """Return what keeps a value from being put back, or None."""
    if isinstance(value, io.IOBase):
        harmless = value.closed or value in (sys.stdin, sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
        return None if harmless else f"the open file {name} ({getattr(value, 'name', type(value).__name__)!r})"
    if isinstance(value, socket.socket):
        return f"the socket {name}"
    if isinstance(value, (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)):
        return f"the generator {name}"
    iterator = hasattr(type(value), "__next__") and getattr(type(value), "__module__", "") in ("builtins", "itertools")
    return f"the iterator {name} ({type(value).__name__})" if iterator else None


def _same(left: Any, right: Any) -> bool:
    """Return whether two values that places hold are the same: plain ones by value, others by identity."""
    if left is right:
        return True
    if type(left) is not type(right):
        return False
    if type(left) in PLAIN:
        return bool(left == right) or (left != left and right != right)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return False


def _equal(left: Tensor | None, right: Tensor) -> bool:
    try:
        return left is not None and torch.equal(left, right)
    except (RuntimeError, NotImplementedError):  # a format that cannot be compared
        return False


def _moved(value: Any, now: Any) -> bool:
    return isinstance(value, Tensor) and isinstance(now, Tensor) and value.device != now.device


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _storage(tensor: Any) -> int | None:
    """Return the address of a tensor's memory, or None where it has none that can be kept."""
    if type(tensor) not in TENSORS or tensor.layout != torch.strided:
        return None
    if tensor.is_meta or tensor.is_quantized or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    return tensor.untyped_storage().data_ptr() or None
