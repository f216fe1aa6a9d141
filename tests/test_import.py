"""Importing wsss_kernels is cheap and touches neither CUDA nor Triton."""

import os
import statistics
import subprocess
import sys

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
    env = {k: v for k, v in os.environ.items() if k not in ("WSSS_CUDA_EMULATOR", "TRITON_INTERPRET", "WSSS_KERNELS_BACKEND")}
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
