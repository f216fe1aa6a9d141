"""BraTS: `CASE/CASE_{flair,t1,t1ce,t2,seg}.nii.gz` volumes (2015 to 2021), single slices of diffusion code, and 2D exports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .volumes import GREY, Case, nifti_files, stem, tokens

PARTS = {
    "train": "train",
    "training": "train",
    "trainingdata": "train",
    "validation": "validation",
    "validate": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
}
_EXPORT = ("normal", "tumor", "tumour")


def read(root: Path, modalities: Sequence[str] = ("flair", "t1", "t1ce", "t2"), seg: str = "seg") -> list[Case]:
    """The cases below `root`: the folders that hold one file of each modality.

    Args:
        modalities: each a word of the file names (case does not matter).
        seg: the word that marks the mask. Masks of single slices may also lie beside the cases' folder as
            `test_labels/CASE-label.nii.gz`.

    Raises:
        InputError: no folder holds all modalities.
    """
    found, partial = [], None
    for folder in sorted({path.parent for path in nifti_files(root)}):
        files = [p for p in sorted(folder.iterdir()) if p in set(nifti_files(folder))]
        by_word = {word: [p for p in files if word.lower() in tokens(p)] for word in (*modalities, seg)}
        missing = [m for m in modalities if len(by_word[m]) != 1]
        if missing:
            partial = partial or (folder, missing) if any(by_word[m] for m in modalities) else partial
            continue
        label = folder.parent.parent / "test_labels" / f"{folder.name}-label.nii.gz"
        masks = by_word[seg][:1] or ([label] if label.is_file() else [])
        part = next((PARTS[p.lower()] for p in reversed(folder.relative_to(root).parts) if p.lower() in PARTS), None)
        found.append(Case(folder.name, tuple(by_word[m][0] for m in modalities), tuple(masks), part=part))
    if not found:
        hint = f"; {partial[0]} has not one file of {', '.join(partial[1])}" if partial else ""
        raise InputError(f"{root}: expected folders with one NIfTI file for each of {', '.join(modalities)}, got none{hint}")
    return found


def read_export(root: Path, modalities: Sequence[str] = ("flair", "t1", "t1ce", "t2")) -> list[Case]:
    """A 2D export: `MODALITY/{training,validate}/{normal,tumor}/CASE-Z.jpg`, masks in `seg` beside them (grey, not 0 is tumour).

    Raises:
        InputError: no such slices, or one that another modality lacks.
    """
    found = []
    for part in sorted(p for p in (root / modalities[0]).glob("*") if p.is_dir()):
        for kind in _EXPORT:
            for path in sorted(p for p in (part / kind).glob("*") if p.suffix.lower() in GREY):
                files = [_same(root / m / part.name / kind, path) for m in modalities]
                mask = next((p for s in GREY if (p := part / "seg" / f"{path.stem}{s}").is_file()), None)
                if mask is None and kind != "normal":
                    raise InputError(f"{path}: it shows a tumour and has no mask {part / 'seg' / path.stem}.png")
                masks = (mask,) if mask is not None else ()
                found.append(Case(path.stem, tuple(files), masks, kind="export", part=PARTS.get(part.name.lower())))
    if not found:
        raise InputError(f"{root}: expected {modalities[0]}/training/{{normal,tumor}}/CASE-SLICE.png, got none")
    return found


def _same(folder: Path, path: Path) -> Path:
    found = next((p for s in GREY if (p := folder / f"{stem(path)}{s}").is_file()), None)
    if found is None:
        raise InputError(f"{folder / path.name}: there is no such file, but {path} is there")
    return found
