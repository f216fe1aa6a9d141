"""What a row says of the machine and of the code: names, clocks, commit, a hash of the kernel's sources."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from .. import _native

PACKAGE = Path(__file__).resolve().parent.parent
T = TypeVar("T")


def machine() -> str:
    """The name of the GPU, or of the CPU with its instruction-set level."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).name
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found.group(1) if found else model
    level = _native.extension.cpu_capability() if _native.extension is not None else "no kernels"
    return re.sub(r"\((R|TM)\)", "", f"{model}, {level}, {torch.get_num_threads()} threads")


@functools.cache
def commit() -> str:
    """Of the clone; `installed` where no repository tracks the package, whatever repository lies around it.

    WSSS_COMMIT says it where the sources were copied without their repository.
    """
    if named := os.environ.get("WSSS_COMMIT"):
        return named
    try:
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", "_spec.py"], cwd=PACKAGE, capture_output=True)
        answer = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=PACKAGE, capture_output=True, text=True)
    except OSError:  # no git
        return "installed"
    return answer.stdout.strip() if tracked.returncode == answer.returncode == 0 else "installed"


_TAKEN = re.compile(r'^(?:#include "ops/|from \.\.)(\w+)', re.MULTILINE)


def _python(folder: str, root: Path) -> list[Path]:
    return [p for p in (root / "wsss_kernels/ops" / folder).glob("*.py") if p.name not in ("spec.py", "__init__.py")]


def _native_sources(folder: str, root: Path) -> list[Path]:
    return [p for p in (root / "csrc/ops" / folder).glob("*") if p.is_file()]


def _with_others(folder: str, root: Path) -> list[str]:
    """The folder, and those whose kernels it takes."""
    found = [folder]
    for one in found:
        for path in [*_python(one, root), *_native_sources(one, root)]:
            if path.name != "reference.py":
                found += sorted(set(_TAKEN.findall(path.read_text(encoding="utf-8"))) - set(found))
    return found


def kernel_hash(folder: str, root: Path = PACKAGE.parent) -> str:
    """Of the sources of one operator's kernels, Triton and C++, and of how they were built: equal as long as a figure still speaks of
    the same kernel.

    Without the C++ sources (an installed package) the compiled libraries stand for them.
    """
    folders = _with_others(folder, root)
    native = [path for one in folders for path in _native_sources(one, root)]
    native += [p for p in (root / "csrc/include").rglob("*") if p.is_file()]
    native = native or list((root / "wsss_kernels").glob("*.so"))
    # setup.py holds the compiler's flags, _triton.py what the Triton kernels share
    native += [path for path in (root / "setup.py", root / "wsss_kernels/_triton.py") if path.exists()]
    built = _native.extension.build_info() if _native.extension is not None else "no compiled kernels"
    digest = hashlib.sha256(built.encode())
    for path in sorted([*(path for one in folders for path in _python(one, root)), *native]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _cpu_seconds() -> tuple[float, float] | None:
    """Seconds that the cores have worked for anybody (what a hypervisor took included), and for this process; Linux only."""
    try:
        user, nice, system, _, _, *rest = (int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
        busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    own = os.times()
    return busy, own.user + own.system + own.children_user + own.children_system


def watched(call: Callable[[], T]) -> tuple[T, float | None]:
    """The result of a call, and the share of all cores that other processes took meanwhile (`None` where it is not known)."""
    before, start = _cpu_seconds(), time.perf_counter()
    result = call()
    after, cores = _cpu_seconds(), (time.perf_counter() - start) * (os.cpu_count() or 1)
    if before is None or after is None:
        return result, None
    return result, max(0.0, (after[0] - before[0]) - (after[1] - before[1])) / cores


def clock_mhz() -> float | None:
    """Of the processor now: the mean over the CPU's cores, or the GPU's."""
    try:
        if torch.cuda.is_available():
            return float(torch.cuda.clock_rate())
        found = re.findall(r"^cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except (OSError, RuntimeError, ModuleNotFoundError):  # without the GPU's management library it is not known
        return None
    return round(sum(map(float, found)) / len(found), 1) if found else None
