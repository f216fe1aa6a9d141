"""`python -m wsss_kernels.aot`: compiles the Triton kernels for GPUs that are not here, and prints what they need.

Every operator's samples are called with kernels compiled and not run, so that what is compiled is what a launcher would launch:
its types, its block sizes, its specialisations. Registers, stack (spilled registers) and shared memory decide how many warps a
multiprocessor holds; a kernel that does not compile, or needs more shared memory than the GPU has, fails here and not at a user.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from . import _native, registry
from ._spec import OpSpec, Sample
from .testing import cast, flatten, gradient_tensors

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block may have, by compute capability."""


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs on one GPU."""

    op: str
    path: str
    kernel: str
    arch: int
    dtype: str
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int


class _Elsewhere:
    """A driver of a GPU that is not here: enough for Triton to compile, not to launch."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def _cuobjdump() -> str:
    import triton

    own = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = str(own) if own.exists() else shutil.which("cuobjdump")
    if found is None:
        raise SystemExit("wsss_kernels.aot: cuobjdump was not found, neither in the triton package nor on PATH")
    return found


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of the kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"expected the registers and the stack of a kernel from cuobjdump, got {text[:200]!r}")
    return int(found[1]), int(found[2])


def _call(spec: OpSpec, sample: Sample, dtype: torch.dtype) -> None:
    """Forward and backward. The values are undefined."""
    args, kwargs = cast((sample.args, dict(sample.kwargs)), dtype)
    for t in gradient_tensors(spec, sample, args, kwargs):
        t.requires_grad_()
    live = [t for t in flatten(spec.public(*args, **kwargs, backend="triton")) if t.requires_grad]
    if live:
        torch.autograd.backward(live, [torch.ones_like(t) for t in live])


def compile_ahead(spec: OpSpec, archs: Sequence[int], dtypes: Sequence[torch.dtype], *, every: bool) -> Iterator[Usage]:
    """Compiles what the operator's small samples launch; every sample, or only as many as it takes to see all launch paths."""
    from triton.runtime import driver

    from . import _triton

    for arch in archs:
        driver.set_active(_Elsewhere(arch))
        for dtype in dtypes:
            seen: set[str] = set()
            missing = set(spec.paths.get("triton", ()))
            for sample in spec.samples():
                if not sample.small or dtype not in sample.dtypes or not (every or missing):
                    continue
                _triton.compiled.clear()
                _call(spec, sample, dtype)
                missing -= {path for path, _, _ in _triton.compiled}
                for path, kernel, done in _triton.compiled:
                    if done.hash not in seen:
                        seen.add(done.hash)
                        meta = done.metadata
                        used = (meta.num_warps, meta.num_stages, *resources(done.asm["cubin"]), meta.shared)
                        yield Usage(spec.name, path, kernel, arch, str(dtype).removeprefix("torch."), *used)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m wsss_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", help="an operator's name; repeatable (default: all that have Triton kernels)")
    parser.add_argument(
        "--arch", action="append", type=int, choices=SHARED_LIMIT, help="compute capability; repeatable (default 80 and 90)"
    )
    parser.add_argument(
        "--dtype", action="append", choices=("float32", "float64", "float16", "bfloat16"), help="default float32 and bfloat16"
    )
    parser.add_argument("--every", action="store_true", help="every small sample, not only as many as show all launch paths")
    parser.add_argument("--csv", type=Path, help="write the table to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 if a kernel needs more shared memory than its GPU has; 2 for wrong use."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not _native.AHEAD:  # the switch is read when wsss_kernels is imported
        os.execve(
            sys.executable, [sys.executable, "-m", "wsss_kernels.aot", *(argv or sys.argv[1:])], {**os.environ, "WSSS_TRITON_AHEAD": "1"}
        )
    try:
        chosen = [registry.spec(name) for name in options.op or []] or list(registry.specs())
    except ValueError as error:
        parser.error(str(error))
    without = [s.name for s in chosen if "triton" not in s.backends]
    if options.op and without:
        parser.error(f"{', '.join(without)} has no Triton kernels")
    rows: list[Usage] = []
    dtypes = [getattr(torch, name) for name in options.dtype or ("float32", "bfloat16")]
    print(f"{'kernel':<46} {'arch':>4} {'dtype':<9} warps registers stack shared")
    for spec in chosen:
        if "triton" in spec.backends:
            for row in compile_ahead(spec, options.arch or (80, 90), dtypes, every=options.every):
                print(f"{row.path + ' ' + row.kernel:<46} {row.arch:>4} {row.dtype:<9} {row.warps:>5} {row.registers:>9} {row.stack:>5} {row.shared:>6}", flush=True)  # fmt: skip
                rows.append(row)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Usage)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    large = [row for row in rows if row.shared > SHARED_LIMIT[row.arch]]
    for row in large:
        print(f"{row.path} {row.kernel}: {row.shared} bytes of shared memory, sm_{row.arch} has {SHARED_LIMIT[row.arch]}", file=sys.stderr)
    return int(bool(large))


if __name__ == "__main__":
    sys.exit(main())
