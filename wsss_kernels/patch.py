"""`wsss_kernels.patch(model)`: the released modules in any model, replaced by ours with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._args import describe
from .ops.criss_cross import CrissCrossAttention
from .ops.par import PAMR, PAR

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Largest difference on random input over the largest value (released modules hold float32 constants)."""


class _Unsuitable(Exception):
    """Why a module is left alone."""


@dataclass(frozen=True)
class Replacement:
    """One replaced module.

    Args:
        names: where it is in the model; several where the model shares it.
        kind: the class.
        options: how ours was built.
        error: largest difference on random input, over the largest value.
    """

    names: tuple[str, ...]
    kind: str
    options: dict
    error: float


@dataclass
class PatchReport:
    """What `patch` did. Printing it gives a readable list; `undo()` puts the original modules back."""

    replaced: list[Replacement] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason)"""
    _originals: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Restores the original modules, which share their parameters with the replacements. A second call does nothing."""
        while self._originals:
            parent, name, module = self._originals.pop()
            module.train(getattr(parent, name).training)
            parent._modules[name] = module

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, skipped {len(self.skipped)}"]
        for r in self.replaced:
            options = ", ".join(f"{k}={v!r}" for k, v in r.options.items())
            lines.append(f"  {', '.join(r.names)}: {r.kind}({options}), agrees to {r.error:.1e}")
        lines += [f"  {name}: left alone: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def _require_buffers(module: nn.Module, wanted: nn.Module) -> None:
    mine, theirs = dict(wanted.named_buffers()), dict(module.named_buffers())
    for name, kernel in mine.items():
        if name not in theirs or theirs[name].shape != kernel.shape or not torch.equal(theirs[name].to(kernel), kernel):
            raise _Unsuitable(f"its buffer {name} is not that of the released module")


def _attribute(module: nn.Module, *paths: str) -> Any:
    for path in paths:
        try:
            return module.get_submodule(path.rpartition(".")[0]).__dict__[path.rpartition(".")[2]]
        except (AttributeError, KeyError):
            continue
    raise _Unsuitable(f"it has no attribute {paths[0]}")


def _refinement(module: nn.Module, ours: type[nn.Module], *dilation_paths: str) -> list[tuple[dict, nn.Module]]:
    """Candidates for PAR and PAMR: releases differ in what they resize, which only their behaviour tells."""
    dilations, num_iter = _attribute(module, *dilation_paths), _attribute(module, "num_iter")
    candidates = []
    for resize in ("mask", "image"):
        options: dict[str, Any] = {"dilations": list(dilations), "num_iter": int(num_iter), "resize": resize}
        candidates.append((options, ours(**options)))
    _require_buffers(module, candidates[0][1])
    return candidates


def _criss_cross(module: nn.Module) -> list[tuple[dict, nn.Module]]:
    parts = [getattr(module, name, None) for name in ("query_conv", "key_conv", "value_conv")]
    convolutions = [part for part in parts if isinstance(part, nn.Conv2d)]
    gamma = getattr(module, "gamma", None)
    if len(convolutions) != len(parts) or not isinstance(gamma, nn.Parameter) or gamma.numel() != 1:
        raise _Unsuitable("it has not the parameters of the released module")
    in_dim = convolutions[2].in_channels
    replacement = CrissCrossAttention(in_dim)
    shapes = {name: p.shape for name, p in module.named_parameters()}
    if shapes != {name: p.shape for name, p in replacement.named_parameters()}:
        raise _Unsuitable("its parameters have other shapes than those of the released module")
    replacement.query_conv, replacement.key_conv, replacement.value_conv = convolutions
    replacement.gamma = gamma
    return [({"in_dim": in_dim}, replacement)]


_KINDS: dict[str, Callable[[nn.Module], list[tuple[dict, nn.Module]]]] = {
    "PAR": lambda module: _refinement(module, PAR, "dilations"),
    "PAMR": lambda module: _refinement(module, PAMR, "dilations", "aff_x.dilations"),
    "CrissCrossAttention": _criss_cross,
}
_OURS = (PAR, PAMR, CrissCrossAttention)


def _inputs(kind: str, options: dict, like: Tensor) -> tuple[Tensor, ...]:
    """Random, from a generator of its own, so that the program's random numbers stay as they are."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator).to(like)

    if kind == "CrissCrossAttention":
        return (random(2, options["in_dim"], 5, 7) - 0.5,)
    return random(1, 3, 16, 20), random(1, 2, 8, 9)  # of different sizes: which one is resized must show


def _difference(kind: str, options: dict, module: nn.Module, replacement: nn.Module) -> float:
    first, second = copy.deepcopy(module).eval(), copy.deepcopy(replacement).eval()
    like = next(iter([*module.parameters(), *module.buffers()]))
    with torch.no_grad():
        if kind == "CrissCrossAttention":  # its gamma starts at 0, where every attention looks alike
            first.get_parameter("gamma").fill_(1.0)
            second.get_parameter("gamma").fill_(1.0)
        inputs = _inputs(kind, options, like)
        wanted, given = first(*inputs), second.to(like.device)(*inputs)
    if wanted.shape != given.shape:
        return float("inf")
    return float((wanted - given).abs().max().double() / wanted.abs().max().double().clamp_min(1e-30))


def _replacement(kind: str, module: nn.Module) -> tuple[dict, nn.Module, float]:
    if any(getattr(module, name, None) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")):
        raise _Unsuitable("it has hooks")
    candidates = _KINDS[kind](module)
    like = next(iter([*module.parameters(), *module.buffers()]))
    best: tuple[dict, nn.Module, float] | None = None
    for options, replacement in candidates:
        try:
            error = _difference(kind, options, module, replacement)
        except Exception as cause:
            raise _Unsuitable(f"running it on random input raised {type(cause).__name__}: {cause}") from None
        if best is None or error < best[2]:
            best = options, replacement, error
    assert best is not None
    if not best[2] <= _TOLERANCE.get(like.dtype, 1e-4):
        raise _Unsuitable(f"on random input its result differs from ours by {best[2]:.1e} of the largest value")
    best[1].to(like.device, like.dtype).train(module.training)
    return best


def _places(model: nn.Module, module: nn.Module) -> Sequence[tuple[nn.Module, str, str]]:
    """(parent, name in it, full name) wherever the model holds the module."""
    return [
        (parent, name, f"{path}.{name}" if path else name)
        for path, parent in model.named_modules()
        for name, child in parent._modules.items()
        if child is module
    ]


def patch(model: nn.Module) -> PatchReport:
    """Replaces the released `PAR`, `PAMR` and `CrissCrossAttention` in a model by ours.

    A module is found by its class's name and its buffers or parameters. It is replaced only if ours agrees with it on random
    input; parameters and convolutions stay the same objects, so optimisers and checkpoints go on working. Modules with
    hooks, and the model itself (which nothing holds), are left alone.

    Ours has no gradient with respect to the image of PAR and PAMR: where a model needs one, `report.undo()`.

    Args:
        model: any module; changed in place.

    Returns:
        A report with `replaced`, `skipped` (name and reason) and `undo()`.

    Raises:
        TypeError: `model` is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be an nn.Module, got {describe(model)}")
    report = PatchReport()
    for path, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind not in _KINDS or isinstance(module, _OURS):
            continue
        places = _places(model, module)
        try:
            if not places:
                raise _Unsuitable("it is the model itself, which nothing holds; build ours in its place")
            options, replacement, error = _replacement(kind, module)
        except _Unsuitable as reason:
            report.skipped.append((path, str(reason)))
            continue
        for parent, name, _ in places:
            report._originals.append((parent, name, module))
            parent._modules[name] = replacement
        report.replaced.append(Replacement(tuple(full for _, _, full in places), kind, options, error))
    return report
