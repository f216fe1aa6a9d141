"""`make new-op NAME=my_operator`: both folders of a new operator, complete and green.

What it writes is a small real operator (y = scale · relu(x)) with reference, C++ kernel, gradient, spec and page, which
passes the whole test matrix. Replace it piece by piece: first the reference and the samples, then the kernels.
"""

from __future__ import annotations

import ast
import keyword
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TEMPLATES = {
    "wsss_kernels/ops/{name}/__init__.py": """from .api import {name}

__all__ = ["{name}"]
""",
    "wsss_kernels/ops/{name}/reference.py": '''"""{name} in plain PyTorch: the truth that every kernel is compared with. Source: paper and equation."""

from __future__ import annotations

import torch
from torch import Tensor


def {name}(x: Tensor, scale: float = 1.0) -> Tensor:
    """See `wsss_kernels.{name}`."""
    return (scale * x.to(x.dtype if x.dtype.itemsize > 2 else torch.float64).relu()).to(x.dtype)
''',
    "wsss_kernels/ops/{name}/api.py": '''"""{name}: the public function and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _args
from ..._dispatch import Backend, Operator, apply
from ..._once import once_differentiable
from . import reference

{upper}_OP = Operator("{name}", backends=(Backend("cpu"),))

_fwd = {upper}_OP.raw_op("{name}_fwd(Tensor x, float scale) -> Tensor", lambda x, scale: x.new_empty(x.shape))
_bwd = {upper}_OP.raw_op("{name}_bwd(Tensor x, Tensor grad, float scale) -> Tensor", lambda x, grad, scale: x.new_empty(x.shape))


class _{camel}(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, backend):
        ctx.save_for_backward(x)
        ctx.scale, ctx.backend = scale, backend
        return _fwd[backend](x, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return _bwd[ctx.backend](x, grad, ctx.scale), None, None


def {name}(x: Tensor, scale: float = 1.0, *, backend: str | None = None) -> Tensor:
    """y = scale · relu(x).

    Args:
        x: `Tensor[…, h, w]`, any floating type, any range.
        scale: a finite number.
        backend: `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        Tensor of the shape and dtype of `x`.

    Gradient: with respect to `x`; 0 where x ≤ 0.

    Raises:
        TypeError: `x` is not a floating-point tensor.
        ValueError: fewer than two dimensions, an empty map, a scale that is not finite.
    """
    _args.tensor("{name}", "x", x, "…×h×w", spatial=2)
    scale = _args.number("{name}", "scale", scale)
    (x,) = _args.align("{name}", ("x",), (x,))
    chosen = {upper}_OP.resolve((x,), backend)
    if chosen == "reference":
        return reference.{name}(x, scale)
    dtype = x.dtype
    (x,) = _args.widen(chosen, x)
    return apply(_{camel}, x, scale, chosen).to(dtype)
''',
    "wsss_kernels/ops/{name}/spec.py": """from __future__ import annotations

import torch

from ..._spec import Case, Malformed, OpSpec, Sample, randn
from . import api, reference


def samples() -> list[Sample]:
    return [
        Sample("typical", (randn(2, 3, 5, 7), 0.5)),
        Sample("1×1", (randn(1, 1),)),
        Sample("empty batch", (randn(0, 4, 5),)),
    ]


def malformed() -> list[Malformed]:
    x = torch.rand(3, 4)
    return [
        Malformed("integer", (x.long(),), {{}}, TypeError, "x must be a floating-point tensor .* got int64"),
        Malformed("rank", (x[0],), {{}}, ValueError, "x must be .* of shape …×h×w, got float32 of shape 4"),
        Malformed("NaN", (x, float("nan")), {{}}, ValueError, "scale must be a finite number, got nan"),
    ]


def homogeneous(run) -> None:
    x = randn(3, 4)
    torch.testing.assert_close(run(x, 6.0), 3 * run(x, 2.0))


def _case() -> tuple[tuple, dict]:
    return (torch.rand(4, 8, 256, 256, generator=torch.Generator().manual_seed(0)),), {{}}


SPECS = (
    OpSpec(
        operator=api.{upper}_OP,
        public=api.{name},
        reference=reference.{name},
        paper="paper and equation",
        samples=samples,
        gradients=("x",),
        invariants=(homogeneous,),
        malformed=malformed,
        paths={{"cpu": ("{name}.cpu",)}},
        cases=(Case("4x8x256x256", _case, backward=True),),
        flops=lambda x, scale=1.0: 2.0 * x.numel(),
        bytes_moved=lambda x, scale=1.0: 2.0 * x.numel() * x.element_size(),
        peak_bytes=lambda x, scale=1.0: 0,
    ),
)
""",
    "wsss_kernels/ops/{name}/README.md": """# {name}

What it computes, where the equation stands, and where released code differs.

| | floor | ours |
|---|---|---|
| memory beyond inputs and outputs | 0 | 0 |
""",
    "csrc/ops/{name}/{name}_cpu.inc": """// y = scale * relu(x) and its adjoint over a range of elements.
template <class T>
static void {name}_forward(const T* x, T* y, int64_t count, T scale) {{
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] > T(0) ? scale * x[i] : T(0);
}}

template <class T>
static void {name}_backward(const T* x, const T* grad, T* dx, int64_t count, T scale) {{
  for (int64_t i = 0; i < count; ++i) dx[i] = x[i] > T(0) ? scale * grad[i] : T(0);
}}

static void {name}_forward_f32(const float* x, float* y, int64_t n, float s) {{ {name}_forward(x, y, n, s); }}
static void {name}_forward_f64(const double* x, double* y, int64_t n, double s) {{ {name}_forward(x, y, n, s); }}
static void {name}_backward_f32(const float* x, const float* g, float* d, int64_t n, float s) {{
  {name}_backward(x, g, d, n, s);
}}
static void {name}_backward_f64(const double* x, const double* g, double* d, int64_t n, double s) {{
  {name}_backward(x, g, d, n, s);
}}
""",
    "csrc/ops/{name}/{name}_ops.cpp": """// Operators of {name}: arguments, threads, registration.
#include "wsss/tensor.h"

namespace wsss {{
namespace {name} {{

#define WSSS_CPU_KERNELS "ops/{name}/{name}_cpu.inc"
#include "wsss/cpu_kernels.h"

constexpr int64_t kGrain = 32768;

WSSS_PICK({name}_forward)
WSSS_PICK({name}_backward)

static Tensor fwd(const Tensor& x, double scale) {{
  const Tensor input = torch::stable::contiguous(x);
  Tensor y = torch::stable::empty_like(input);
  for_float_type("{name}", x, [&](auto tag) {{
    using T = decltype(tag);
    WSSS_PATH("{name}.cpu");
    const auto kernel = {name}_forward(tag);
    parallel_for(0, x.numel(), kGrain, [&, px = in<T>(input), py = out<T>(y)](int64_t begin, int64_t end) {{
      kernel(px + begin, py + begin, end - begin, T(scale));
    }});
  }});
  return y;
}}

static Tensor bwd(const Tensor& x, const Tensor& grad, double scale) {{
  WSSS_CHECK(x.numel() == grad.numel(), "{name}_bwd: x and grad must have the same size");
  const Tensor input = torch::stable::contiguous(x), g = torch::stable::contiguous(grad);
  Tensor dx = torch::stable::empty_like(input);
  for_float_type("{name}", x, [&](auto tag) {{
    using T = decltype(tag);
    const auto kernel = {name}_backward(tag);
    parallel_for(0, x.numel(), kGrain, [&, px = in<T>(input), pg = in<T>(g), pd = out<T>(dx)](int64_t begin, int64_t end) {{
      kernel(px + begin, pg + begin, pd + begin, end - begin, T(scale));
    }});
  }});
  return dx;
}}

}}  // namespace {name}
}}  // namespace wsss

STABLE_TORCH_LIBRARY_FRAGMENT(wsss, m) {{
  m.def("{name}_fwd(Tensor x, float scale) -> Tensor");
  m.def("{name}_bwd(Tensor x, Tensor grad, float scale) -> Tensor");
}}

STABLE_TORCH_LIBRARY_IMPL(wsss, CPU, m) {{
  m.impl("{name}_fwd", TORCH_BOX(&wsss::{name}::fwd));
  m.impl("{name}_bwd", TORCH_BOX(&wsss::{name}::bwd));
}}
""",
}


# A C++ namespace and functions get the operator's name, inside namespace wsss.
_CPP_WORDS = """
    alignas alignof and_eq asm at auto bitand bitor bool c10 case catch char class co_await co_return co_yield compl concept const
    consteval constexpr constinit decltype default delete do double dynamic_cast enum explicit export extern false float friend
    goto in inline int int64_t long mutable namespace new noexcept not_eq nullptr operator or_eq out private protected public
    register requires short signed size_t sizeof static std struct switch template this thread_local throw torch true try
    typedef typeid typename union unsigned using virtual void volatile wchar_t wsss xor
"""


def _taken(root: Path) -> set[str]:
    """Names that a new operator would hide or overwrite: modules and whatever the package exports."""
    modules = {path.stem for path in (root / "wsss_kernels").iterdir()} | {"ops", "api", "reference", "spec"}
    exported = set()
    for name in ("wsss_kernels/__init__.py", "wsss_kernels/ops/__init__.py"):
        tree = ast.parse((root / name).read_text())
        exported |= {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return modules | {name.lower() for name in exported}


def create(name: str, root: Path = ROOT) -> list[Path]:
    """Writes the folders below `root` and the export line; returns the new files."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or "__" in name or keyword.iskeyword(name) or name in _CPP_WORDS.split():
        raise ValueError(f"NAME must be lower_case_with_underscores and no word of Python or C++, got {name!r}")
    words = {"name": name, "upper": name.upper(), "camel": name.title().replace("_", "")}
    files = {root / path.format(**words): text.format(**words) for path, text in TEMPLATES.items()}
    for path in files:
        if path.exists():
            raise ValueError(f"{path} exists already")
    if name in _taken(root):
        raise ValueError(f"wsss_kernels has a {name} already; NAME must be another one")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    exports = root / "wsss_kernels/ops/__init__.py"
    text = exports.read_text()
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
    lines = text.splitlines()
    # in the order that the linter wants: before the first folder whose name comes later
    at = next((node.lineno - 1 for node in imports if (node.module or "") > name), imports[-1].end_lineno or len(lines))
    lines.insert(at, f"from .{name} import {name} as {name}")
    exports.write_text("\n".join(lines) + "\n")
    return list(files)


def main() -> int:
    try:
        made = create(sys.argv[1] if len(sys.argv) == 2 else "")
    except ValueError as error:
        print(f"make new-op: {error}", file=sys.stderr)
        return 2
    print("\n".join(str(path.relative_to(ROOT)) for path in made))
    print("One export line was added to wsss_kernels/ops/__init__.py. Next: `make test-fast`, then CONTRIBUTING.md.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
