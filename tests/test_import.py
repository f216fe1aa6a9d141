"""Importing wsss_kernels is cheap and touches neither CUDA nor Triton."""

import os
import statistics
import subprocess
import sys

import pytest
from test_build import LIBRARIES, RUN, copy_of_package, import_copy

PROGRAM = """
import sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import wsss_kernels
seconds = time.perf_counter() - start
added = {name.partition('.')[0] for name in set(sys.modules) - before}
print(seconds, torch.cuda.is_initialized(), 'triton' in added, ' '.join(sorted(added - set(sys.stdlib_module_names))))
"""


def run() -> list[str]:
    """Imports as an installed package does: its files are compiled once, whatever this environment says of byte code."""
    forgotten = ("WSSS_CUDA_EMULATOR", "TRITON_INTERPRET", "WSSS_KERNELS_BACKEND", "PYTHONDONTWRITEBYTECODE")
    env = {k: v for k, v in os.environ.items() if k not in forgotten}
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_import_adds_less_than_100_ms():
    run()
    assert statistics.median(float(run()[0]) for _ in range(5)) < 0.1


def test_import_touches_neither_cuda_nor_triton():
    _, cuda, triton, *added = run()
    assert cuda == "False" and triton == "False"
    assert set(added) <= {"wsss_kernels", "numpy"}, f"the import also brings {added}"


def test_a_warning_points_at_the_line_that_imports(tmp_path):
    copy_of_package(tmp_path)
    (tmp_path / "user.py").write_text("import torch\n\nimport wsss_kernels\n")
    result = subprocess.run(
        [sys.executable, "user.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert result.returncode == 0 and "user.py:3: UserWarning: wsss_kernels was installed without" in result.stderr, result.stderr


@pytest.mark.skipif(not LIBRARIES, reason="installed without compiled libraries")
@pytest.mark.parametrize(("old", "new"), [("int num_iter) ->", "int num_iter, bool more) ->"), ("sinkhorn_bwd(", "sinkhorn_reverse(")])
def test_a_library_older_than_the_python_files_is_not_used(tmp_path, old, new):
    """Another schema, and an operator that the library does not have: all of the library is left alone, with one warning."""
    package = copy_of_package(tmp_path)
    for library in LIBRARIES:
        (package / library.name).symlink_to(library)
    api = package / "ops/sinkhorn/api.py"
    api.write_text(api.read_text().replace(old, new))
    said = import_copy(tmp_path, RUN)
    assert "the compiled kernels are older than the Python files" in said.splitlines()[0] and "pip install" in said.splitlines()[0]
    assert "cpu kernels   missing: the compiled kernels are older" in said and "chosen reference (1, 2, 9, 7)" in said
    listed = said.partition("operators ")[2]
    assert "cpu" not in listed.partition("chosen")[0] and "cuda" not in listed.partition("chosen")[0]
