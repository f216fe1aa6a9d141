"""The numerical parameters of the refinement, and the command-line options that are made from them."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError


def _option(
    default: Any, group: str, text: str, minimum: float, maximum: float = math.inf, *, read: Callable | None = None, unit: str = ""
) -> Any:
    metadata = {"group": group, "help": text, "minimum": minimum, "maximum": maximum, "read": read or type(default), "unit": unit}
    return field(default=default, metadata=metadata)


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def _flag(text: str) -> Any:
    return field(default=False, metadata={"group": text.partition(":")[0], "help": text.partition(": ")[2], "read": bool})


_MOST = 2**31 - 1  # the operators take 32-bit integers
BOX, WALK, BACKGROUND, PAR = "box mask", "affinity and random walk", "background", "pixel-adaptive refinement (PAR)"
TOKENS, POINTS = "token grid and fallback features (without --features)", "CAM from points (--point, --points)"


@dataclass(frozen=True)
class Settings:
    """Parameters with the published defaults (UniCL-AffSeg, after WeCLIP and AFA); the last two groups are this project's."""

    box_threshold: float = _option(0.4, BOX, "foreground of the box mask: CAM above this share of its maximum (VOC 0.4, COCO 0.7)", 0, 1)
    box_clip_border: bool = _flag(f"{BOX}: never cover the last row and column, as the released code does")
    sinkhorn_iter: int = _option(3, WALK, "rounds of column and row normalisation of the affinity", 0, _MOST)
    power: int = _option(2, WALK, "steps of the random walk", 0, _MOST)
    mask_side: str = _option("source", WALK, "what the box mask masks: where the walk starts (source) or where it ends (target)", 0)
    clamp_min: float = _option(0.0, WALK, "smallest affinity; Sinkhorn needs non-negative ones", 0)
    first_layer: int = _option(0, WALK, "first layer of --features (from 0) whose affinity is used", 0, _MOST)
    background_power: float = _option(1.0, BACKGROUND, "background score = (1 - highest class score) to this power", 0)
    background_score: float | None = _option(None, BACKGROUND, "a constant background score instead", 0, 1, read=number_or_none)
    par_iter: int = _option(20, PAR, "iterations (WeCLIP 20, AFA 10); 0 leaves PAR out", 0, _MOST)
    par_dilations: tuple[int, ...] = _option(
        (1, 2, 4, 8, 12, 24), PAR, "distances of the neighbours, comma-separated", 1, _MOST, read=integers, unit="pixels"
    )
    par_w1: float = _option(0.3, PAR, "colour scale, in standard deviations of the neighbours", 1e-6)
    par_w2: float = _option(0.3, PAR, "distance scale, in standard deviations of the distances", 1e-6)
    par_w3: float = _option(0.01, PAR, "weight of the distance term", 0)
    par_fast: bool = _flag(f"{PAR}: weights in half precision: about twice as fast, scores differ by at most 5e-4")
    max_side: int = _option(
        2048, PAR, "larger images are refined at this size of their longer side; the mask has full size", 16, unit="pixels"
    )
    token_size: int = _option(8, TOKENS, "side of a token", 1, unit="pixels")
    max_tokens: int = _option(4096, TOKENS, "tokens grow with the image so that there are at most this many", 1)
    landmarks: int = _option(128, TOKENS, "tokens that the others are compared with: the number of feature channels", 1)
    colour_scale: float = _option(9.0, TOKENS, "colour difference at which tokens are strangers", 1e-6, unit="CIELAB units")
    texture_scale: float = _option(
        15.0, TOKENS, "difference of contrast within tokens at which they are strangers", 1e-6, unit="CIELAB units"
    )
    position_scale: float = _option(0.7, TOKENS, "distance at which tokens are strangers", 1e-6, unit="longer sides of the image")
    edge_weight: float = _option(0.75, TOKENS, "length of a path across a colour step of 100", 0, unit="longer sides of the image")
    path_scale: float = _option(
        0.4, TOKENS, "length of the path between tokens at which they are strangers", 1e-6, unit="longer sides of the image"
    )
    point_radius: float = _option(0.19, POINTS, "standard deviation of the blob around a point", 1e-6, unit="longer sides of the image")
    point_edge_weight: float = _option(
        0.45, POINTS, "how much the blob avoids edges: length of a path across a colour step of 100", 0, unit="longer sides of the image"
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name == "mask_side":
                if value not in ("source", "target"):
                    raise UsageError(f"--mask-side must be source or target, got {value!r}")
                continue
            kind, fits = _FITS[item.metadata["read"]]
            if not fits(value):
                raise UsageError(f"{_option_name(item.name)} must be {kind}, got {value!r}")
            if value is not None and item.metadata["read"] is not bool:
                _in_range(item, value)

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()}


def _option_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_FITS: dict[Callable, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda v: isinstance(v, bool)),
    int: ("an integer", _is_integer),
    float: ("a number", _is_number),
    integers: ("a tuple of integers", lambda v: isinstance(v, tuple) and all(map(_is_integer, v))),
    number_or_none: ("a number or None", lambda v: v is None or _is_number(v)),
}


def _in_range(item: dataclasses.Field, value: Any) -> None:
    minimum, maximum = item.metadata["minimum"], item.metadata["maximum"]
    values = value if isinstance(value, tuple) else (value,)
    if not values or not all(math.isfinite(v) and minimum <= v <= maximum for v in values):
        bounds = f"at least {minimum:g}" if maximum == math.inf else f"between {minimum:g} and {maximum:.10g}"
        raise UsageError(f"{_option_name(item.name)} must be {bounds}, got {','.join(map(str, values)) or 'nothing'}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each parameter, in groups."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item in dataclasses.fields(Settings):
        data = item.metadata
        if data["group"] not in groups:
            groups[data["group"]] = parser.add_argument_group(data["group"])
        if data["read"] is bool:
            groups[data["group"]].add_argument(_option_name(item.name), action="store_true", help=data["help"])
            continue
        default = ",".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
        unit = f", in {data['unit']}" if data["unit"] else ""
        kind = (
            {"choices": ("source", "target")}
            if item.name == "mask_side"
            else {"type": data["read"], "metavar": "N" if data["read"] is int else "X"}
        )
        groups[data["group"]].add_argument(
            _option_name(item.name), default=item.default, help=f"{data['help']}{unit} (default {str(default).lower()})", **kind
        )


def from_arguments(args: argparse.Namespace) -> Settings:
    return Settings(**{item.name: getattr(args, item.name) for item in dataclasses.fields(Settings)})
