"""What a row says of the machine and of the code."""

import os
import shutil
import subprocess
import sys
import types

from test_bench import case_of, row

from wsss_kernels import bench
from wsss_kernels.bench import about
from wsss_kernels.bench.about import kernel_hash
from wsss_kernels.bench.timing import measure


def test_what_others_took_of_the_machine_is_told():
    assert "other processes took 69 %" in bench.text([row(others=0.69)])
    assert "disturbed" not in bench.text([row(others=0.02)]) + bench.text([row(others=None)])
    spec, case = case_of("normalize_cam")
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        found = measure(spec, case, seconds=0.5)[0].others
    finally:
        busy.kill()
        busy.wait()
    assert found is None or 0.5 / (os.cpu_count() or 1) < found <= 1


def test_the_hash_follows_the_sources(tmp_path):
    for name in ("wsss_kernels/ops/par/api.py", "wsss_kernels/ops/par/spec.py", "csrc/ops/par/par.cpp", "csrc/include/wsss/a.h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    first = kernel_hash("par", tmp_path)
    (tmp_path / "wsss_kernels/ops/par/spec.py").write_text("two")  # cases do not change a kernel
    assert kernel_hash("par", tmp_path) == first
    for name in ("csrc/include/wsss/a.h", "wsss_kernels/ops/par/api.py"):
        before = kernel_hash("par", tmp_path)
        (tmp_path / name).write_text("two")
        assert kernel_hash("par", tmp_path) != before


def test_the_hash_follows_how_the_kernels_were_built(tmp_path, monkeypatch):
    for root in (tmp_path / "clone", tmp_path / "worktree"):
        for name in ("csrc/ops/par/par.cpp", "setup.py", "wsss_kernels/_triton.py"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("one")
    hashes, available = [kernel_hash("par", root)], about._native.extension is not None
    assert kernel_hash("par", tmp_path / "clone") == hashes[0]
    for name in ("setup.py", "wsss_kernels/_triton.py"):
        (root / name).write_text("two")
        hashes.append(kernel_hash("par", root))
    for library in (types.SimpleNamespace(build_info=lambda: "built with another PyTorch"), None):
        monkeypatch.setattr(about._native, "extension", library)
        hashes.append(kernel_hash("par", root))
    assert len(set(hashes)) == (5 if available else 4)


def test_the_hash_follows_kernels_that_are_taken_from_another_operator(tmp_path):
    for name, text in {
        "csrc/ops/walk/walk.h": '#include "ops/scale/scaling.h"\n',
        "csrc/ops/scale/scaling.h": "1",
        "wsss_kernels/ops/walk/triton_impl.py": "from ... import _args\nfrom ..map.triton_impl import tile\n",
        "wsss_kernels/ops/map/triton_impl.py": "1",
        "wsss_kernels/ops/walk/reference.py": "from ..loss.reference import unit\n",
        "wsss_kernels/ops/loss/triton_impl.py": "1",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    hashes = [about.kernel_hash("walk", tmp_path)]
    for name in ("csrc/ops/scale/scaling.h", "wsss_kernels/ops/map/triton_impl.py", "wsss_kernels/ops/loss/triton_impl.py"):
        (tmp_path / name).write_text("2")
        hashes.append(about.kernel_hash("walk", tmp_path))
    assert len(set(hashes[:3])) == 3 and hashes[3] == hashes[2]
    assert about._with_others("random_walk", about.PACKAGE.parent)[0] == "random_walk"
    if (about.PACKAGE.parent / "csrc").exists():
        assert {"affinity", "sinkhorn"} < set(about._with_others("random_walk", about.PACKAGE.parent))


def test_the_commit_is_not_that_of_a_repository_around_the_package(tmp_path, monkeypatch):
    package = tmp_path / "site-packages/wsss_kernels"
    package.mkdir(parents=True)
    shutil.copy(about.PACKAGE / "_spec.py", package)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "their own"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(about, "PACKAGE", package)
    assert about.commit.__wrapped__() == "installed"
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    assert about.commit.__wrapped__() not in ("", "installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert about.commit.__wrapped__() == "installed"
