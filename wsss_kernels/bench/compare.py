"""What a change did: ours at another commit against ours here, in turn."""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import about

ROOT = about.PACKAGE.parent
_BUILT_FROM = ("csrc", "setup.py")
_SCRIPT = """
import json, sys
from wsss_kernels import registry
from wsss_kernels.testing import cast, flatten, gradient_tensors
import time, torch
wanted, seconds = json.loads(sys.argv[1]), float(sys.argv[2])
for name, case_name in wanted:
    found = [(s, c) for s in registry.specs() for c in s.cases if (s.name, c.name) == (name, case_name)]
    if not found:
        print(json.dumps([name, case_name, []]), flush=True)
        continue
    spec, case = found[0]
    args, kwargs = cast(case.make(), torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    inputs = [t.requires_grad_() for t in gradient_tensors(spec, None, args, kwargs)] if case.backward else []
    def call():
        with torch.set_grad_enabled(bool(inputs)):
            live = [t for t in flatten(spec.public(*args, **kwargs)) if t.requires_grad]
            if inputs:
                torch.autograd.grad(live, inputs, [torch.ones_like(t) for t in live])
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    call()
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < stop and len(times) < 500):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    print(json.dumps([name, case_name, times]), flush=True)
"""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--compare: git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A built tree of the commit. Libraries are compiled only if their sources differ from those here.

    Raises:
        ValueError: no such commit, or it does not build.
    """
    if about.commit() == "installed":
        raise ValueError("--compare needs a clone of the repository, and git")
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True, text=True
    )
    name = found.stdout.strip()
    if found.returncode or not name:
        raise ValueError(f"--compare {commit}: there is no such commit")
    with tempfile.TemporaryDirectory(prefix="wsss_compare_") as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--detach", "--quiet", str(tree), name)
        try:
            same = subprocess.run(["git", "diff", "--quiet", name, "--", *_BUILT_FROM], cwd=ROOT).returncode == 0
            if same:
                for library in (ROOT / "wsss_kernels").glob("*.so"):
                    shutil.copy2(library, tree / "wsss_kernels" / library.name)
            else:
                print(f"building {commit} (its kernels differ), several minutes", file=sys.stderr)
                built = subprocess.run(
                    [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, capture_output=True, text=True
                )
                if built.returncode:
                    raise ValueError(f"--compare {commit}: does not build: {built.stderr[-500:]}")
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, capture_output=True)


def _times(tree: Path, wanted: Sequence[tuple[str, str]], seconds: float) -> dict[tuple[str, str], list[float]]:
    command = [sys.executable, "-c", _SCRIPT, json.dumps(list(wanted)), str(seconds)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--compare: the measurement in {tree.name} failed: {done.stderr[-500:]}")
    return {(name, case): times for name, case, times in map(json.loads, done.stdout.splitlines())}


def compare(commit: str, wanted: Sequence[tuple[str, str]], *, seconds: float, rounds: int = 3) -> str:
    """Medians of (operator, case) at the commit and here, measured in turn in processes of their own.

    Raises:
        ValueError: no such commit, or one that does not build or run.
    """
    then: dict[tuple[str, str], list[list[float]]] = {}  # by round
    now: dict[tuple[str, str], list[list[float]]] = {}
    with checkout(commit) as tree:
        for _ in range(rounds):
            for found, where in ((then, tree), (now, ROOT)):
                for key, times in _times(where, wanted, seconds / rounds / 2).items():
                    found.setdefault(key, []).append(times)
    lines = [f"{'operator':<26} {'case':<28} {commit[:12]:>12} {'here':>12}  {commit[:12]} / here"]
    for key in wanted:
        a, b = ([t for times in found.get(key, []) for t in times] for found in (then, now))
        if not a or not b:
            lines.append(f"{key[0]:<26} {key[1]:<28} this case is not in both")
            continue
        old, new = statistics.median(a), statistics.median(b)
        noise = max(_spread(a), _spread(b))
        same = abs(old / new - 1) <= noise or not _apart(then[key], now[key])
        verdict = "no difference beyond the noise" if same else "faster" if old > new else "SLOWER"
        lines.append(f"{key[0]:<26} {key[1]:<28} {old:9.3f} ms {new:9.3f} ms  {old / new:6.2f}x  {verdict} (±{100 * noise:.0f} %)")
    return "\n".join(lines)


def _apart(a: Sequence[list[float]], b: Sequence[list[float]]) -> bool:
    """Whether every round of one was faster than every round of the other: processes differ by more than the runs of one."""
    old, new = ([statistics.median(times) for times in rounds] for rounds in (a, b))
    return min(old) > max(new) or max(old) < min(new)


def _spread(times: list[float]) -> float:
    """Half the distance from the 20th to the 80th percentile, over the median."""
    ordered = sorted(times)
    low, high = ordered[int(0.2 * (len(ordered) - 1))], ordered[int(0.8 * (len(ordered) - 1))]
    return (high - low) / 2 / statistics.median(times)
