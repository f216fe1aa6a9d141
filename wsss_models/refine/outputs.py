"""The files of one image: written whole or not at all, the record last, so that a run can be resumed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError, UsageError

FORMAT = 1
"""Of the record; raised when the same inputs and parameters give another result."""
SUFFIXES = {"mask": ".png", "overlay": "_overlay.png", "before_after": "_before_after.png", "record": ".json"}
_PREFIX, _TEMPORARY, _STALE = ".wsss.", ".tmp", 3600.0  # of files being written; seconds after which nobody writes them any more


class OutputError(Exception):
    """Nothing more can be written: the disk is full, or the folder has gone."""


def paths(folder: Path, stem: str, pictures: bool) -> dict[str, Path]:
    """The files of one image, the record last."""
    kinds = SUFFIXES if pictures else {kind: SUFFIXES[kind] for kind in ("mask", "record")}
    return {kind: folder / f"{stem}{suffix}" for kind, suffix in kinds.items()}


def prepare_folder(folder: Path) -> None:
    """Makes the output folder, proves that a file can be written there, and removes what a killed run has left half-written.

    Raises:
        UsageError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for leftover in folder.glob(f"{_PREFIX}*{_TEMPORARY}"):
            with contextlib.suppress(OSError):  # a run beside this one may be writing: its files are seconds old
                if time.time() - leftover.stat().st_mtime > _STALE:
                    leftover.unlink()
    except OSError as error:
        raise UsageError(f"--out {folder}: expected a folder that can be written, got: {error.strerror or error}") from None


def _refused(path: Path, error: OSError) -> InputError | OutputError:
    if error.errno in (errno.ENAMETOOLONG, errno.EISDIR):  # this name cannot be written; another one can
        return InputError(f"cannot write {path}: {error.strerror}")
    reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error))
    return OutputError(f"cannot write {path}: {reason}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when everything is in it; a failure or an interrupt leaves nothing behind.

    Raises:
        InputError: this name cannot be written; another one can.
        OutputError: the operating system refuses, with its reason.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=_PREFIX, suffix=_TEMPORARY, dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def write(files: dict[str, Path], save: dict[str, Callable[[BinaryIO], None]], record: dict[str, Any]) -> None:
    """Writes all files of an image beside the old ones, then puts them in their place: a full disk or an interrupt before
    that leaves everything as it was. The old record goes first and the new one comes last: it marks a complete set.
    Pictures of the old set that are not written again go too: they would show another result.

    Raises:
        InputError: a name cannot be written; another one can.
        OutputError: the operating system refuses, with its reason.
    """
    text = (json.dumps({**record, "files": _names(files)}, indent=2) + "\n").encode()
    fill = {**save, "record": lambda file: file.write(text)}
    temporary: dict[str, str] = {}
    path = files["record"]
    try:
        for kind, path in files.items():
            handle, temporary[kind] = tempfile.mkstemp(prefix=_PREFIX, suffix=_TEMPORARY, dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                fill[kind](file)
            os.chmod(temporary[kind], 0o666 & ~_umask())
        stale = set(_read_record(files["record"]).get("files", ())) - set(_names(files))
        files["record"].unlink(missing_ok=True)
        for suffix in SUFFIXES.values():
            if (name := files["record"].stem + suffix) in stale:
                files["record"].with_name(name).unlink(missing_ok=True)
        for kind, path in files.items():
            os.replace(temporary[kind], path)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        for name in temporary.values():
            with contextlib.suppress(OSError):  # what is in its place is no longer there
                os.unlink(name)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _names(files: dict[str, Path]) -> list[str]:
    return [path.name for path in files.values()]


def _read_record(path: Path) -> dict[str, Any]:
    """A record of this format, or an empty one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    complete = isinstance(record, dict) and record.get("format") == FORMAT and isinstance(record.get("files"), list)
    return record if complete else {}


def is_done(files: dict[str, Path], inputs: dict[str, Any]) -> bool:
    """Whether all files are there and the record says that they, pictures included, were made from these inputs and parameters."""
    record = _read_record(files["record"])
    return (
        record.get("inputs") == inputs
        and all(name in record["files"] for name in _names(files))
        and all(path.is_file() for path in files.values())
    )
