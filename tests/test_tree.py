"""Holds the tree to its rules: twins, budgets, docstrings, exports. `CONTRIBUTING.md` explains them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import wsss_kernels as wk
from wsss_kernels import registry

ROOT = Path(__file__).resolve().parent.parent
TOP = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Makefile", "MANIFEST.in", "pyproject.toml", "setup.py", "CMakeLists.txt"}
TOP |= {".clang-format", ".gitignore", ".ci", "csrc", "wsss_kernels", "wsss_models", "benchmarks", "tests", "docs"}
FOLDERS = sorted(p.name for p in (ROOT / "wsss_kernels/ops").iterdir() if (p / "__init__.py").exists())


def tracked(*patterns):
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "--", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git clone: git ls-files has no answer")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_top_level():
    assert {p.relative_to(ROOT).parts[0] for p in tracked()} <= TOP


@pytest.mark.parametrize("folder", FOLDERS)
def test_operator_folder_is_complete(folder):
    home, twin = ROOT / "wsss_kernels/ops" / folder, ROOT / "csrc/ops" / folder
    missing = [n for n in ("__init__.py", "reference.py", "api.py", "spec.py", "README.md") if not (home / n).is_file()]
    assert not missing, f"wsss_kernels/ops/{folder} lacks {missing}"
    specs = [s for s in registry.specs() if s.folder == folder]
    assert specs, f"wsss_kernels/ops/{folder}/spec.py lists no OpSpec"
    backends = {b for s in specs for b in s.backends}
    wanted = {"cpu": [f"{folder}_ops.cpp", f"{folder}_cpu.inc"], "cuda": [f"{folder}_cuda.cu", f"{folder}_kernels.cuh"]}
    for backend, names in wanted.items():
        if backend in backends and any(s.operator.raw for s in specs):
            assert all((twin / n).is_file() for n in names), f"csrc/ops/{folder} lacks one of {names}"
    assert ("triton" in backends) == (home / "triton_impl.py").is_file()


def test_no_orphan_in_csrc():
    assert sorted(p.name for p in (ROOT / "csrc/ops").iterdir()) == [f for f in FOLDERS if (ROOT / "csrc/ops" / f).exists()]


def test_every_public_operator_has_a_spec_and_is_exported():
    for spec in registry.specs():
        assert getattr(wk, spec.name) is spec.public
    functions = {n for n in wk.ops.__all__ if callable(getattr(wk, n)) and not isinstance(getattr(wk, n), type)}
    assert functions == {s.name for s in registry.specs()}


def test_file_budgets():
    for path in tracked("*.py"):
        assert len(path.read_text().splitlines()) <= 400, f"{path} is longer than 400 lines"
    for path in tracked("*.cpp", "*.h", "*.inc", "*.cu", "*.cuh"):
        assert len(path.read_text().splitlines()) <= 500, f"{path} is longer than 500 lines"


def test_function_budgets():
    for path in tracked("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                docstring = len((ast.get_docstring(node) or "").splitlines())
                assert node.end_lineno - node.lineno + 1 - docstring <= 60, f"{path}: {node.name} is longer than 60 lines"
    for path in tracked("*.cpp", "*.h", "*.inc", "*.cu", "*.cuh"):
        start = None
        for number, line in enumerate(path.read_text().splitlines()):
            if re.match(r"[A-Za-z].*", line) and not re.match(r"(namespace|extern|struct|class|#)", line) and start is None:
                start = number
            if line.startswith("}"):
                assert start is None or line != "}" or number - start < 70, f"{path}:{start + 1}: a function of {number - start} lines"
                start = None
            elif line.rstrip().endswith(";") and not line.startswith(" "):
                start = None


@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in registry.specs()])
def test_docstrings(spec):
    text = spec.public.__doc__ or ""
    for part in ("Args:", "Tensor[", "Raises:", "radient"):
        assert part in text, f"the docstring of {spec.name} has no {part!r}"
    assert spec.reference.__doc__ and spec.paper


def test_forbidden_texts():
    """No unfinished work, no path of a machine, no bare skip or expected failure."""
    forbidden = re.compile(r"\bTODO\b|\bFIXME\b|\bXXX\b|xfail|/home/|/root/")
    for path in tracked("*.py", "*.cpp", "*.h", "*.inc", "*.cu", "*.cuh", "*.md", "Makefile", "*.sh", "*.toml"):
        if path != Path(__file__):
            found = forbidden.search(path.read_text())
            assert not found, f"{path}: {found.group()}"


def test_backend_code_is_not_imported_early():
    """Triton is imported by `triton_*.py` files and what they share, which are imported when a call needs them."""
    for path in tracked("wsss_kernels/*.py"):
        if path.name != "_triton.py" and not path.name.startswith("triton_"):
            assert not re.search(r"^(import|from) (triton|\S*_triton\b)|^from [.\w]+ import .*_triton\b", path.read_text(), re.M), path


def test_readme_lists_the_operators():
    done = subprocess.run([sys.executable, "benchmarks/report.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("wsss_kernels/ops/*/README.md"))]


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_run(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(code, str(page), "exec"), {})
