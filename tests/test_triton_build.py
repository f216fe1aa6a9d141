"""Triton kernels without a GPU: compiled ahead for two generations of GPUs, and the tuner and its file in the interpreter."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from wsss_kernels import registry

ROOT = Path(__file__).resolve().parent.parent
WITH_TRITON = [s for s in registry.specs() if "triton" in s.backends]


def run(*arguments, timeout=800, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "WSSS_"))}
    environment = {**clean, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in WITH_TRITON])
def test_compiles_without_unexplained_spills(spec, tmp_path):
    """Every launch path for sm_80 and sm_90 in float32. A kernel may spill a few registers if its page says so."""
    table = tmp_path / "usage.csv"
    done = run("-m", "wsss_kernels.aot", "--op", spec.name, "--dtype", "float32", "--csv", str(table))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for arch in ("80", "90"):
        assert {r["path"] for r in rows if r["arch"] == arch} >= set(spec.paths["triton"]), "a launch path was not compiled"
    page = (ROOT / "wsss_kernels/ops" / spec.folder / "README.md").read_text()
    explained = max((int(n) for n in re.findall(r"spills? (?:at most )?(\d+) bytes", page)), default=0)
    spilled = [(r["kernel"], r["arch"], r["stack"]) for r in rows if int(r["stack"]) > explained]
    assert not spilled, f"bytes of stack: {spilled}; fewer registers, or the reason in the operator's README"


@pytest.mark.slow
def test_compiles_with_the_oldest_triton(tmp_path):
    """PyTorch 2.10 and 2.11 bring Triton 3.6, which takes less of Python than later ones do."""
    if run("-c", "import triton; raise SystemExit(triton.__version__ >= '3.6.1')").returncode == 0:
        pytest.skip("the installed Triton is the oldest one, which the other tests use")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", str(tmp_path), "--no-deps", "triton==3.6.0"], check=True)
    old = f"{tmp_path}{os.pathsep}{ROOT}"
    assert run("-c", "import triton; print(triton.__version__)", PYTHONPATH=old).stdout.strip() == "3.6.0"
    done = run("-m", "wsss_kernels.aot", "--arch", "90", "--dtype", "float32", timeout=3000, PYTHONPATH=old)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_usage_errors():
    done = run("-m", "wsss_kernels.aot", "--op", "nonsense")
    assert done.returncode == 2 and "there is no operator 'nonsense'" in done.stderr
    done = run("-m", "wsss_kernels.aot", "--op", "par")
    assert done.returncode == 2 and "par has no Triton kernels" in done.stderr


def test_tuner_needs_a_gpu():
    done = run("-m", "wsss_kernels.bench", "--tune", "--op", "info_nce")
    assert done.returncode == 2 and "tuning needs a GPU" in done.stderr


TUNE = """
import torch
from wsss_kernels import _triton, tune
from wsss_kernels._spec import Case
from wsss_kernels.registry import spec
case = Case("tiny", lambda: ((torch.randn(5, 3), torch.randn(5, 3), 0.5), {}), backward=True)
file = tune.tune([(spec("info_nce"), case)], seconds=0)
key = next(k for k in _triton.asked if "backward" in k)
assert _triton.config(key, {"BM": -1}) != {"BM": -1}, "the tuned configuration is not used"
print(file)
"""


def test_tuner_writes_what_later_calls_read(tmp_path):
    done = run("-c", TUNE, TRITON_INTERPRET="1", WSSS_KERNELS_CONFIGS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.json")
    tuned = json.loads(file.read_text())
    assert {key.partition("/")[0] for key in tuned} == {"info_nce.triton", "info_nce.triton.backward"}
    assert all({"BM", "BN", "BK", "num_warps"} <= set(choice) for choice in tuned.values())
