"""`make new-op`: the template is a complete operator."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wsss_kernels import new_op

ROOT = Path(__file__).resolve().parent.parent


def copy_of_the_tree(folder):
    shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "build*", "*.so", "__pycache__", "demo_output", ".*_cache")
    )
    return folder


def run(tree, *command):
    return subprocess.run([sys.executable, *command], cwd=tree, capture_output=True, text=True)


def test_names_are_checked(tmp_path):
    for name in ("", "Bad", "2x", "a-b", "class", "a b", "double", "std", "namespace", "out"):
        with pytest.raises(ValueError, match="NAME must be lower_case_with_underscores"):
            new_op.create(name, tmp_path)


@pytest.mark.parametrize("name", ["bench", "explain", "supervised_contrastive_loss", "affinity_random_walk", "info", "testing", "pamr"])
def test_what_is_there_is_not_replaced(tmp_path, name):
    tree = copy_of_the_tree(tmp_path / "tree")
    with pytest.raises(ValueError, match=f"wsss_kernels has a {name} already"):
        new_op.create(name, tree)


def test_nothing_is_overwritten(tmp_path):
    tree = copy_of_the_tree(tmp_path / "tree")
    made = new_op.create("leaky_gate", tree)
    assert len(made) == len(new_op.TEMPLATES) and all(p.stat().st_size for p in made)
    with pytest.raises(ValueError, match="exists already"):
        new_op.create("leaky_gate", tree)
    assert (tree / "wsss_kernels/ops/__init__.py").read_text().count("from .leaky_gate import leaky_gate as leaky_gate") == 1


@pytest.mark.parametrize("name", ["aaa", "nnn", "zzz"])
def test_the_export_line_is_valid_and_sorted(tmp_path, name):
    tree = copy_of_the_tree(tmp_path / "tree")
    new_op.create(name, tree)
    exports = tree / "wsss_kernels/ops/__init__.py"
    names = {alias.name for node in ast.parse(exports.read_text()).body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {name, "par", "window_attention"} <= names
    modules = [node.module for node in ast.parse(exports.read_text()).body if isinstance(node, ast.ImportFrom)]
    assert modules == sorted(modules)


@pytest.mark.slow
def test_the_template_passes_the_matrix(tmp_path):
    tree = copy_of_the_tree(tmp_path / "tree")
    new_op.create("leaky_gate", tree)
    for command in (["ruff", "format", "-q", "wsss_kernels/ops/leaky_gate"], ["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]):
        linted = run(tree, "-m", *command)
        assert linted.returncode == 0, linted.stdout + linted.stderr
    sources = sorted(map(str, (tree / "csrc/ops/leaky_gate").iterdir()))
    assert subprocess.run(["clang-format", "-i", *sources]).returncode == 0
    assert subprocess.run(["clang-format", "--dry-run", "-Werror", *sources]).returncode == 0
    built = run(tree, "setup.py", "-q", "build_ext", "--inplace")
    assert built.returncode == 0, built.stderr
    assert run(tree, "benchmarks/report.py").returncode == 0
    tests = [f"tests/test_{name}.py" for name in ("ops", "gradients", "layouts", "compile", "memory", "tree")]
    result = run(tree, "-m", "pytest", "-q", "-m", "not slow", "-k", "leaky_gate or tree", *tests)
    assert result.returncode == 0, result.stdout[-5000:]
