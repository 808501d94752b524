"""What a measurement was made of: parameters, settings, sampler, dtype, device, layout and versions.

A measurement such as a calibration says nothing of another network, sampler or device. Its fingerprint is kept with it
and compared where it is used; what differs is named.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import parataxis  # for its version, which stands there alone

from .samplers.sampler import Sampler

__all__ = ["Fingerprint", "changes", "fingerprint", "loop_fingerprint", "without_counters"]

Fingerprint = dict[str, str]
SCALARS = (bool, int, float, str)
VARIES = "changes from call to call"
STANDARD = frozenset(vars(nn.Module()))  # attributes of every module
DEPTH = 6  # of functions within functions that are looked into
# Digests of parameters, with what they were made of, by the network that holds them.
_known: weakref.WeakKeyDictionary[Any, tuple[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()


def fingerprint(network: Callable[..., Any], noise: Tensor, sampler: Sampler | None, condition: Any) -> Fingerprint:
    """Return what a measurement depends on, as texts by name.

    Args:
        network: The callable; modules, tensors, numbers and texts that it holds (in its closure, its defaults, as a
            partial function or as an object) belong to it.
        noise: (B, *shape); B does not matter, as samples do not depend on one another.
        sampler: The equation, or None where a loop holds it.
        condition: As in :func:`parataxis.sample`.
    """
    facts = {
        **_facts(network, noise.device),
        "dtype": str(noise.dtype)[6:],
        "shape of a sample": str(tuple(noise.shape[1:])),
        "condition": _layout(condition, batched=True),
    }
    if sampler is not None:
        facts["sampler"] = sampler_text(sampler)
    return facts


def loop_fingerprint(loop: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Fingerprint:
    """Return what a measurement of a sampling loop depends on, for a call with these arguments.

    Numbers and the shapes of tensors belong to it; texts and the contents of tensors do not.
    """
    device = next((tensor.device for _, tensor in _contents(loop)[0]), torch.device("cpu"))
    arguments = {f"argument {place}": value for place, value in enumerate(args)}
    arguments.update({f"argument {name}": value for name, value in kwargs.items()})
    return {**_facts(loop, device), **{name: _layout(value) for name, value in arguments.items()}}


def _facts(network: Callable[..., Any], device: torch.device) -> Fingerprint:
    """Return versions, device, and what a callable holds."""
    tensors, settings = _contents(network)
    return {
        "parataxis": parataxis.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "parameters": _digest_of(network, tensors),
        **settings,
    }


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Return what differs, each as ``name: before -> now``."""
    return [
        f"{name}: {before.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name) and before.get(name) != VARIES
    ]


def without_counters(*seen: Fingerprint) -> Fingerprint:
    """Return a fingerprint in which what differs among those seen, such as a count of calls, may be anything."""
    names = dict.fromkeys(name for facts in seen for name in facts)
    values = {name: {facts.get(name, "none") for facts in seen} for name in names}
    return {name: texts.pop() if len(texts) == 1 else VARIES for name, texts in values.items()}


def sampler_text(sampler: Sampler) -> str:
    """Return name, steps and a digest of all numbers of a sampler."""
    text: str | None = sampler.__dict__.get("_fingerprint")
    if text is None:
        digest = hashlib.blake2b(digest_size=8)
        for holder in (sampler, sampler.coefficients, sampler.transform):
            # What it was made of, not what it has kept since to be quicker.
            for name in sorted(field.name for field in fields(holder)) if holder is not None else ():
                value = getattr(holder, name)
                if isinstance(value, np.ndarray):
                    digest.update(name.encode() + np.ascontiguousarray(value).tobytes())
                elif value is None or isinstance(value, (*SCALARS, tuple, torch.dtype)):
                    digest.update(f"{name}={value!r}".encode())
        text = f"{sampler.name}, {sampler.steps} steps, {digest.hexdigest()}"
        sampler.__dict__["_fingerprint"] = text  # its numbers never change
    return text


def _layout(value: Any, *, batched: bool = False) -> str:
    """Return the structure of arguments: shapes (of one sample, if batched) and dtypes of tensors, numbers."""
    if value is None:
        return "none"
    leaves, spec = tree_flatten(value)
    texts = [_trait(leaf, batched) for leaf in leaves]
    return ", ".join(texts) if spec.is_leaf() else f"{spec}: {', '.join(texts)}"


def _trait(leaf: Any, batched: bool) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype)[6:]} {tuple(leaf.shape[1:] if batched else leaf.shape)}"
    return repr(leaf) if isinstance(leaf, (bool, int, float)) or leaf is None else type(leaf).__name__


def _contents(network: Any) -> tuple[list[tuple[str, Tensor]], Fingerprint]:
    """Return the tensors of the modules that a callable holds, and all else that it holds, both by name."""
    tensors: list[tuple[str, Tensor]] = []
    settings: Fingerprint = {}
    for name, value in _held("network", network, 0, set()):
        if isinstance(value, nn.Module):
            settings[name] = f"{type(value).__name__}{', training' if value.training else ''}"
            parts = list(value.named_modules())
            tensors += _module_tensors(name, parts)
            for key, module in parts:
                # The scale of an adapter, a number of heads, which adapter is active: what a module keeps outside of
                # its parameters and changes its outputs.
                for attribute, number in vars(module).items():
                    if attribute in STANDARD:
                        continue
                    if _is_scalar(number) or (
                        isinstance(number, dict) and number and all(map(_is_scalar, number.values()))
                    ):
                        settings[f"{name}.{key}.{attribute}" if key else f"{name}.{attribute}"] = repr(number)
        elif isinstance(value, Tensor):
            settings[name] = _digest([(name, value)])
        elif isinstance(value, FunctionType):
            code = value.__code__
            settings[name] = hashlib.blake2b(code.co_code + repr(code.co_names).encode(), digest_size=8).hexdigest()
        else:
            settings[name] = repr(value)
    return tensors, settings


def _is_scalar(value: Any) -> bool:
    return isinstance(value, SCALARS)


def _module_tensors(name: str, parts: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, Tensor]]:
    """Return the parameters of a module's parts, then their buffers, with their names; each once."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for holder in ("_parameters", "_buffers"):
        for key, part in parts:
            for label, tensor in vars(part)[holder].items():
                if tensor is not None and id(tensor) not in tensors:
                    tensors[id(tensor)] = f"{name}.{key}.{label}" if key else f"{name}.{label}", tensor
    return list(tensors.values())


def _held(name: str, value: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield modules, tensors, functions, numbers and texts that a callable holds, with their names."""
    if isinstance(value, SCALARS):
        yield name, value
        return
    if value is None or depth > DEPTH or id(value) in seen or isinstance(value, (type, ModuleType)):
        return
    seen.add(id(value))
    inside: dict[str, Any] = {}
    if isinstance(value, (nn.Module, Tensor)):
        yield name, value
    elif isinstance(value, FunctionType):
        yield name, value
        inside = _cells(value)
        for key in value.__code__.co_names:  # of globals, networks and functions, not numbers that may count calls
            held = value.__globals__.get(key)
            if isinstance(held, (nn.Module, Tensor, FunctionType)):
                inside[key] = held
        inside.update(value.__kwdefaults__ or {})
        inside.update({f"default {place}": held for place, held in enumerate(value.__defaults__ or ())})
    elif isinstance(value, MethodType):
        inside = {"of": value.__self__, "method": value.__func__}
    elif isinstance(value, functools.partial):
        inside = {"function": value.func, **value.keywords, **{str(i): held for i, held in enumerate(value.args)}}
    elif isinstance(value, (list, tuple)):
        inside = {str(i): held for i, held in enumerate(value[:100])}
    elif isinstance(value, dict):
        items = value.items()
        if type(value).__name__ == "FrozenDict":
            # What diffusers notes of a configuration itself (its version, which values were defaults) changes nothing,
            # and stands in the order of a set, which is another in every process.
            items = [(key, held) for key, held in items if not str(key).startswith("_")]  # type: ignore[assignment]
        inside = {str(key): held for key, held in list(items)[:100]}
    elif not type(value).__module__.startswith(("torch", "numpy", "builtins")):
        inside = dict(getattr(value, "__dict__", {}))
        if callable(value):
            inside["call"] = inspect.unwrap(type(value).__call__)
    for key, held in inside.items():
        yield from _held(f"{name}.{key}", held, depth + 1, seen)


def _cells(function: FunctionType) -> dict[str, Any]:
    """Return what the closure of a function holds."""
    inside = {}
    for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            inside[key] = cell.cell_contents
        except ValueError:  # the name has no value yet
            continue
    return inside


def _digest_of(network: Any, tensors: list[tuple[str, Tensor]]) -> str:
    """Return a digest of tensors; their bytes are read again only where something differs from the last time."""
    if not tensors:
        return "none"
    # Writing through ``.data`` leaves no trace in the version of a tensor, but in its norm.
    with torch.no_grad():
        floats = [tensor.float() for _, tensor in tensors if not tensor.is_meta and tensor.numel()]
        norms = torch.stack([torch.linalg.vector_norm(tensor).cpu() for tensor in floats]).double() if floats else None
    names = tuple((name, id(tensor), tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors)
    key = names, (0.0 if norms is None else float(norms.nan_to_num(7.0) @ torch.arange(1.0, len(norms) + 1).double()))
    try:
        before = _known.get(network)
    except TypeError:  # an object that cannot be a key
        before = None
    if before is not None and before[0] == key:
        return before[1]
    text = _digest(tensors)
    with contextlib.suppress(TypeError):
        _known[network] = key, text
    return text


def _digest(tensors: list[tuple[str, Tensor]]) -> str:
    """Return the number of elements and a digest of names, shapes, dtypes and bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return f"{sum(tensor.numel() for _, tensor in tensors)} in {len(tensors)} tensors, {digest.hexdigest()}"
