"""The files of one image: written whole or not at all, the record last, so that a run can be resumed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError, UsageError

FORMAT = 1
"""Of the record; raised when the same inputs and parameters give another result."""
SUFFIXES = {"mask": ".png", "overlay": "_overlay.png", "before_after": "_before_after.png", "record": ".json"}


class OutputError(Exception):
    """Nothing more can be written: the disk is full, or the folder has gone."""


def paths(folder: Path, stem: str, pictures: bool) -> dict[str, Path]:
    """The files of one image, the record last."""
    kinds = SUFFIXES if pictures else {kind: SUFFIXES[kind] for kind in ("mask", "record")}
    return {kind: folder / f"{stem}{suffix}" for kind, suffix in kinds.items()}


def prepare_folder(folder: Path) -> None:
    """Makes the output folder and proves that a file can be written there.

    Raises:
        UsageError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--out {folder}: expected a folder that can be written, got: {error.strerror or error}") from None


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when everything is in it; a failure or an interrupt leaves nothing behind.

    Raises:
        InputError: this name cannot be written; another one can.
        OutputError: the operating system refuses, with its reason.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=".wsss.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EISDIR):
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error))
        raise OutputError(f"cannot write {path}: {reason}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write(files: dict[str, Path], save: dict[str, Callable[[BinaryIO], None]], record: dict[str, Any]) -> None:
    """Writes all files of an image. The old record goes first and the new one comes last: it marks a complete set."""
    with contextlib.suppress(FileNotFoundError):
        files["record"].unlink()
    for kind, path in files.items():
        with whole_file(path) as file:
            if kind == "record":
                file.write((json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
            else:
                save[kind](file)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_done(files: dict[str, Path], inputs: dict[str, Any]) -> bool:
    """Whether all files are there and the record says that they were made from these inputs and parameters."""
    if not all(path.is_file() for path in files.values()):
        return False
    try:
        record = json.loads(files["record"].read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("format") == FORMAT and record.get("inputs") == inputs
