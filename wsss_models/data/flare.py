"""FLARE21: `train_XXX_0000.nii.gz` volumes and `train_XXX.nii.gz` masks, in one folder or in two."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from .volumes import Case, nifti_files, stem

ORGANS = ("liver", "kidney", "spleen", "pancreas")
"""Of the mask values 1 to 4."""


def read(root: Path, organ: str) -> list[Case]:
    """The cases below `root` that have a mask, with the organ as object.

    Raises:
        InputError: no such organ, or no cases.
    """
    if organ not in ORGANS:
        raise InputError(f"organ: expected one of {', '.join(ORGANS)}, got {organ!r}")
    files = {stem(path): path for path in nifti_files(root)}
    pairs = [(name.removesuffix("_0000"), path) for name, path in files.items() if name.endswith("_0000")]
    value = (ORGANS.index(organ) + 1,)
    found = [Case(name, (path,), (files[name],), classes=value) for name, path in sorted(pairs) if name in files]
    if not found:
        raise InputError(f"{root}: expected train_XXX_0000.nii.gz with train_XXX.nii.gz, got none")
    return found
