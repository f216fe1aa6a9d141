"""Typed configurations: a dataclass with the paper's values, overlaid by a YAML file and by `--set key=value`."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import UsageError

SHIPPED = Path(__file__).parent.parent / "configs"
MACHINE = {"device", "workers", "log_every", "checkpoint_every", "tensorboard", "skip_bad"}
"""Keys that may differ between the calls of one run: they change how it runs, not what comes out."""


@dataclass
class RunConfig:
    """What every method's configuration has. A method derives from it and adds its own fields, all with defaults."""

    seed: int = 0
    kernels: bool = True
    """False runs every operator on the reference backend."""
    device: str = "auto"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    workers: int = 0
    """Processes that load data, for each training process."""
    log_every: int = 10
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    tensorboard: bool = False
    skip_bad: bool = False
    """Leave out files that cannot be read, and count them; otherwise the first one ends the run."""

    def __post_init__(self):
        for name in ("log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.workers < 0:
            raise UsageError(f"workers: expected at least 0, got {self.workers}")


def load(cls: type, file: str | Path | None = None, overrides: Sequence[str] = ()) -> Any:
    """The configuration: defaults, then the YAML file (a run's `config.yaml` too), then `key=value` texts whose key may be dotted.

    Raises:
        UsageError: no such file, bad YAML, an unknown key (the nearest is named), a value of the wrong type.
    """
    return from_record(cls, overlay(_read(file) if file is not None else {}, overrides))


def from_record(cls: type, tree: dict[str, Any]) -> Any:
    """A configuration from nested keys and values; raises `UsageError` as `load` does."""
    return _build(cls, tree, "")


def overlay(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The nested keys and values with `key=value` texts over them.

    Raises:
        UsageError: a text that is not `key=value`, or a key below a value.
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {text}: expected key=value")
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UsageError(f"--set {text}: {parent} is a value, not a group of keys")
        node[last] = _parse(value, f"--set {text}")
    return tree


def resolve(file: str | Path) -> Path:
    """The file itself, or the one of that name that is shipped with the package."""
    path = Path(file)
    shipped = SHIPPED / path.name
    if path.is_file():
        return path
    if path.parts in ((path.name,), ("configs", path.name)) and shipped.is_file():
        return shipped
    names = ", ".join(f"configs/{p.name}" for p in sorted(SHIPPED.glob("*.yaml")))
    raise UsageError(f"--config {file}: there is no such file; shipped are {names or 'none'}")


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: cannot be read as YAML ({str(error).splitlines()[0]})") from None


def _read(file: str | Path) -> dict[str, Any]:
    path = resolve(file)
    try:
        tree = _parse(path.read_text(encoding="utf-8"), f"--config {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: cannot be read ({error})") from None
    if tree is None:
        return {}
    if isinstance(tree, dict) and set(tree) == {"method", "data", "config"}:  # what a run leaves
        tree = tree["config"]
    if not isinstance(tree, dict):
        raise UsageError(f"--config {path}: expected keys with values, got {type(tree).__name__}")
    return tree


def _build(cls: type, tree: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in tree:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; expected one of {', '.join(names)}"
            raise UsageError(f"{prefix}{key}: there is no such key{hint}")
    return cls(**{key: _convert(hints[key], value, prefix + key) for key, value in tree.items()})


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", None) if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _convert(kind: Any, value: Any, key: str) -> Any:
    """The value as the annotation wants it; an int is a float, a list a tuple, nothing else is bent."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    wrong = UsageError(f"{key}: expected {_name(kind)}, got {value!r}")
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise wrong
        return _build(kind, value, f"{key}.")
    if origin is Literal:
        if (value is False and "off" in arguments) or (value is True and "on" in arguments):  # YAML reads these words as booleans
            value = "on" if value else "off"
        if value is False and "no" in arguments:
            value = "no"
        if value not in arguments:
            raise UsageError(f"{key}: expected one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(option, value, key)
            except UsageError:
                continue
        raise wrong
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise wrong
        inner = arguments[:1] * len(value) if origin is list or arguments[-1] is Ellipsis else arguments
        if len(inner) != len(value):
            raise wrong
        return origin(_convert(k, v, f"{key}[{i}]") for i, (k, v) in enumerate(zip(inner, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong
        return {_convert(arguments[0], k, key): _convert(arguments[1], v, f"{key}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, str):  # YAML 1.1 takes 1e-4 for a text
        try:
            return float(value)
        except ValueError:
            raise wrong from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is type(None) and value is None:
        return None
    if not isinstance(kind, type) or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise wrong
    return value


def record(config: Any) -> dict[str, Any]:
    """The configuration as YAML and JSON can hold it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return plain(dataclasses.asdict(config))


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, ours, theirs) wherever two records differ in what changes results."""
    for key in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b and prefix + key not in MACHINE:
            yield prefix + key, a, b
