"""What the built CUDA kernels need: registers, and no stack, where spilled registers live, that a README does not explain."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = sorted(ROOT.glob("wsss_kernels/_cuda.*so"))
CODE = re.compile(r"^arch = sm_(?P<arch>\d+)|^ Function (?P<name>\w+):\s*\n\s*REG:(?P<registers>\d+) STACK:(?P<stack>\d+)", re.MULTILINE)


def parsed(text):
    """(name, architecture, registers, bytes of stack) of every kernel in the answer of `cuobjdump --dump-resource-usage`."""
    found, arch = [], None
    for match in CODE.finditer(text):
        arch = match["arch"] or arch
        if match["name"]:
            found.append((match["name"], arch, int(match["registers"]), int(match["stack"])))
    return found


def cuobjdump():
    """That of the toolkit, or the one that Triton brings."""
    import triton

    places = [
        shutil.which("cuobjdump"),
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/cuobjdump"),
        Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump",
    ]
    return next(place for place in places if place and Path(place).is_file())


@pytest.fixture(scope="module")
def kernels():
    if not LIBRARIES:
        pytest.skip("the libraries were built without CUDA (no matching nvcc)")
    answer = subprocess.run([cuobjdump(), "--dump-resource-usage", LIBRARIES[0]], capture_output=True, text=True, check=True)
    found = parsed(answer.stdout)
    assert found and len(found) == answer.stdout.count(" Function "), "the answer of cuobjdump is not understood"
    return found


def explained(mangled, pages):
    return any(name in mangled for name in re.findall(r"`(\w+)`[^\n]*(?:spill|stack)", pages))


def test_the_answer_is_understood():
    text = """
arch = sm_80
Resource usage:
 Function _ZN4wsss3fooEv:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:424
arch = sm_90
 Function _ZN4wsss3fooEv:
  REG:255 STACK:16 SHARED:0 LOCAL:0
"""
    assert parsed(text) == [("_ZN4wsss3fooEv", "80", 40, 0), ("_ZN4wsss3fooEv", "90", 255, 16)]
    assert explained("_ZN4wsss3fooEv", "`foo` keeps its sums on the stack") and not explained("_ZN4wsss3fooEv", "`bar` spills 8 bytes")


def test_no_unexplained_spill(kernels):
    pages = "".join(page.read_text() for page in ROOT.glob("wsss_kernels/ops/*/README.md"))
    spilled = sorted(f"{name} sm_{arch}: {stack} bytes" for name, arch, _, stack in kernels if stack and not explained(name, pages))
    assert not spilled, "stack or spills that no operator's README explains (by the kernel's name beside the word):\n" + "\n".join(spilled)


def test_both_architectures_are_built(kernels):
    assert {"80", "90"} <= {arch for _, arch, _, _ in kernels}
