"""What ptxas said of the CUDA kernels when they were built: registers, and no spill that a README does not explain."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "build/build.log"
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'.*?(?P<spill>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers",
    re.S,
)


def kernels():
    """(name, architecture, bytes of spill stores, registers) of every kernel in the log."""
    if not LOG.exists():
        pytest.skip("build/build.log is missing: `make` writes it when it builds the libraries")
    found = [m.groupdict() for m in KERNEL.finditer(LOG.read_text())]
    if not found:
        pytest.skip("the libraries were built without CUDA (no matching nvcc)")
    return found


def test_the_log_is_understood():
    text = """ptxas info    : Compiling entry function '_ZN4wsss3fooEv' for 'sm_90'
ptxas info    : Function properties for _ZN4wsss3fooEv
    0 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers"""
    assert KERNEL.search(text).groupdict() == {"name": "_ZN4wsss3fooEv", "arch": "90", "spill": "8", "registers": "40"}


def test_no_unexplained_spill():
    pages = "".join(page.read_text() for page in ROOT.glob("wsss_kernels/ops/*/README.md"))
    spilled = {f"{k['name']} sm_{k['arch']}: {k['spill']} bytes" for k in kernels() if int(k["spill"]) and not _explained(k["name"], pages)}
    assert not spilled, "register spills that no operator's README explains (by the kernel's name beside the word spill):\n" + "\n".join(
        sorted(spilled)
    )


def _explained(mangled, pages):
    return any(name in mangled for name in re.findall(r"`(\w+)`[^\n]*spill", pages))


def test_both_architectures_are_built():
    assert {"80", "90"} <= {k["arch"] for k in kernels()}
