"""Which pixel value of the mask stands for which class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import InputError, UsageError
from .points import BACKGROUND

VOC = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]


def read_classes(text: str | None) -> list[str]:
    """`--classes`: names in the order of their pixel values 1, 2, …; `voc` stands for the 20 classes of Pascal VOC."""
    if text is None:
        return []
    names = list(VOC) if text == "voc" else [name.strip() for name in text.split(",")]
    if (
        not all(names)
        or len(set(names)) != len(names)
        or len(names) > 254
        or BACKGROUND in names
        or any(name.isascii() and name.isdigit() for name in names)
    ):
        raise UsageError(f"--classes: expected up to 254 different names without {BACKGROUND}, comma-separated, got {text!r}")
    return names


class ClassTable:
    """Names of pixel values. Without `--classes`, names are numbered in the order in which they are met."""

    def __init__(self, declared: Sequence[str] = ()):
        self.declared = bool(declared)
        self.value = {BACKGROUND: 0, **{name: k + 1 for k, name in enumerate(declared)}}

    def add(self, names: Iterable[str], option: str) -> None:
        """Gives each name its pixel value; an integer is its own."""
        names = list(dict.fromkeys(names))
        for name in names:
            if name.isascii() and name.isdigit() and name not in self.value:
                self.value[name] = int(name)
        for name in names:
            if name in self.value:
                continue
            if self.declared:
                raise UsageError(f"{option}: expected one of the --classes {', '.join(list(self.value)[1:])}, got {name}")
            taken = set(self.value.values())
            self.value[name] = next(k for k in range(1, 256) if k not in taken)
            if self.value[name] == 255:
                raise UsageError(f"{option}: expected at most 254 classes, got more")

    def name(self, value: int) -> str:
        return next((name for name, v in self.value.items() if v == value and not (name.isascii() and name.isdigit())), f"class {value}")

    def numbers(self, names: Iterable[str]) -> dict[str, int]:
        """The pixel values of what `--classes` names, or of these names."""
        return {name: self.value[name] for name in (self.value if self.declared else dict.fromkeys(names))}

    def of_maps(self, classes: Sequence[str] | Sequence[int] | None, count: int, several: bool) -> list[int]:
        """Pixel values of a CAM file's `count` maps, from what the file says of them."""
        if classes is None:
            if self.declared and count != len(self.value) - 1:
                raise InputError(f"--cam: expected {len(self.value) - 1} maps, one for each of --classes, got {count}")
            if count > 254:
                raise InputError(f"--cam: expected at most 254 maps, got {count}")
            return list(range(1, count + 1))
        if all(isinstance(name, int) for name in classes):
            return [int(name) for name in classes]
        if several and not self.declared:
            raise InputError(
                f"--cam: the file names its classes ({', '.join(map(str, classes))}): say their order for all images with --classes"
            )
        try:
            self.add([str(name) for name in classes], "--cam")
        except UsageError as error:
            raise InputError(str(error)) from None
        return [self.value[str(name)] for name in classes]
