"""`make new-op`: the template is a complete operator."""

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
    for name in ("", "Bad", "2x", "a-b", "class"):
        with pytest.raises(ValueError, match="NAME must be"):
            new_op.create(name, tmp_path)


def test_nothing_is_overwritten(tmp_path):
    tree = copy_of_the_tree(tmp_path / "tree")
    made = new_op.create("leaky_gate", tree)
    assert len(made) == len(new_op.TEMPLATES) and all(p.stat().st_size for p in made)
    with pytest.raises(ValueError, match="exists already"):
        new_op.create("leaky_gate", tree)
    assert (tree / "wsss_kernels/ops/__init__.py").read_text().count("from .leaky_gate import leaky_gate as leaky_gate") == 1


@pytest.mark.slow
def test_the_template_passes_the_matrix(tmp_path):
    tree = copy_of_the_tree(tmp_path / "tree")
    new_op.create("leaky_gate", tree)
    built = run(tree, "setup.py", "-q", "build_ext", "--inplace")
    assert built.returncode == 0, built.stderr
    tests = [f"tests/test_{name}.py" for name in ("ops", "gradients", "layouts", "compile", "memory", "tree")]
    result = run(tree, "-m", "pytest", "-q", "-m", "not slow", "-k", "leaky_gate or tree", *tests)
    assert result.returncode == 0, result.stdout[-5000:]
