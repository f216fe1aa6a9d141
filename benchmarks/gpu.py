"""`make gpu`: build, tests, sanitizers and benchmark of the GPU kernels on this machine's GPU, and what came of them in one folder.

Needs the checkout, a Python with torch, triton, numpy, pybind11, ninja and pytest, and nvcc. With `--rehearse` the same steps
run without a GPU: the CUDA kernels in the emulator, the Triton kernels in the interpreter, small samples.

In `$OUT`, or else build/gpu, are then `summary.txt`, `summary.json` (command, exit code and seconds of each step), the
figures `<machine>.csv`, and `logs.tar.gz` with one file for each step. A step that fails does not stop the others. Parts can
run in several calls: the summary keeps the steps of earlier ones.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("build", "tests", "sanitize", "bench")
MATRIX = ("ops", "gradients", "layouts", "compile", "golden")
SANITIZERS = ("memcheck", "racecheck", "initcheck")
ORDERS = ("reverse", "7")  # of the emulator's threads: what takes a sanitizer's place in a rehearsal
NOTHING = 5  # pytest's exit code where no test was selected


@dataclass
class Step:
    """A command with its own log. `rc` is None while it has not run."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    alone: bool = True
    rc: int | None = None
    seconds: float = 0.0
    note: str = ""

    @property
    def good(self) -> bool:
        return self.rc in (0, NOTHING) or (self.rc is None and not self.command)


class Run:
    """Runs steps, and writes the summary after each, so that it is there whenever the time is up."""

    def __init__(self, out: Path, about: dict[str, str], minutes: float):
        self.out, self.about, self.end = out, about, time.monotonic() + 60 * minutes
        self.logs = ROOT / "build/gpu/logs"
        for folder in (out, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.steps: dict[str, dict] = {}
        summary = out / "summary.json"
        if summary.exists():
            try:
                self.steps = {step["name"]: step for step in json.loads(summary.read_text())["steps"]}
            except (ValueError, KeyError, TypeError):  # a run was stopped while it wrote
                raise SystemExit(f"{summary} is damaged; remove it") from None
        self.failed = False

    def run(self, steps: Sequence[Step], jobs: int = 1) -> None:
        """Runs steps, those that need not be alone beside each other."""
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            for step in pool.map(self._one, [s for s in steps if not s.alone]):
                self._keep(step)
        for step in steps:
            if step.alone:
                self._keep(self._one(step))

    def _one(self, step: Step) -> Step:
        left = self.end - time.monotonic()
        if not step.command:
            return step
        if left < 5:
            step.note = "not run: the time is up; run its part again"
            return step
        start, log = time.monotonic(), self.logs / f"{step.name.replace('/', '-')}.log"
        with log.open("wb") as file:
            file.write(f"{' '.join(step.command)}\n{step.environment}\n\n".encode())
            file.flush()
            try:
                done = subprocess.run(
                    step.command, cwd=ROOT, env={**os.environ, **step.environment}, stdout=file, stderr=subprocess.STDOUT, timeout=left
                )
                step.rc = done.returncode
            except subprocess.TimeoutExpired:
                step.rc, step.note = 124, "stopped: the time is up; "
            except OSError as error:
                step.rc, step.note = 127, f"{error}; "
        step.seconds = round(time.monotonic() - start, 1)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        step.note += lines[-1][:160] if lines else ""
        return step

    def _keep(self, step: Step) -> None:
        self.failed |= not step.good
        self.steps[step.name] = {**asdict(step), "good": step.good}
        print(self._line(self.steps[step.name]), flush=True)
        done = list(self.steps.values())
        (self.out / "summary.json").write_text(json.dumps({**self.about, "steps": done}, indent=1) + "\n")
        head = [f"{key}: {value}" for key, value in self.about.items()]
        (self.out / "summary.txt").write_text("\n".join([*head, "", *map(self._line, done)]) + "\n")
        with tarfile.open(self.out / "logs.tar.gz", "w:gz") as archive:
            archive.add(self.logs, arcname="logs")

    @staticmethod
    def _line(step: dict) -> str:
        state = "ok" if step["rc"] == 0 else "none" if step["good"] else "FAILED" if step["rc"] is not None else "NOT RUN"
        return (
            f"{step['name']:<32} {state:<8} rc {step['rc'] if step['rc'] is not None else '-':<4} {step['seconds']:7.1f} s  {step['note']}"
        )


def build_steps(rehearse: bool) -> Iterator[Step]:
    """The libraries for the GPU at hand; in a rehearsal those that this machine can build, and the emulator."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    for stamps in (ROOT / "build/stamps", Path(sys.prefix) / ".wsss"):  # the next `make` builds for all architectures again
        (stamps / "built").unlink(missing_ok=True)
    if rehearse:
        yield Step("build/libraries", command)
        yield Step("build/configure", ["cmake", "-G", "Ninja", "-S", ".", "-B", "build/cmake", f"-DPython3_EXECUTABLE={sys.executable}"])
        yield Step("build/emulator", ["cmake", "--build", "build/cmake", "--target", "wsss_emulator"])
        return
    import torch

    major, minor = torch.cuda.get_device_capability()
    yield Step("build/libraries", command, {"WSSS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"})
    yield Step("build/info", [sys.executable, "-m", "wsss_kernels.info"])


def _pytest(name: str, folder: str, files: Sequence[str], backend: str, *, rehearse: bool, alone: bool, **environment: str) -> Step:
    paths = [f"tests/test_{file}.py" for file in files]
    paths += [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(f"tests/test_{folder}*.py")) if "ops" in files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.selection", "-m", "not slow", *dict.fromkeys(paths)]
    chosen = {"WSSS_SELECT_OPS": folder, "WSSS_SELECT_BACKENDS": backend, "PYTHONPATH": str(ROOT)}
    if rehearse and backend == "cuda":
        chosen["WSSS_CUDA_EMULATOR"] = str(ROOT / "build/cmake/libwsss_emulator.so")
    if rehearse and backend == "triton":
        chosen["TRITON_INTERPRET"] = "1"
    return Step(name, command, {**chosen, **environment}, alone)


def test_steps(folders: Sequence[str], rehearse: bool) -> Iterator[Step]:
    """The matrix of each operator, then determinism and memory, which need the machine for themselves."""
    for folder in folders:
        samples = {"WSSS_SELECT_SAMPLES": "4"} if rehearse else {}
        if rehearse:
            for backend in ("cuda", "triton"):
                yield _pytest(f"tests/{folder}-{backend}", folder, MATRIX, backend, rehearse=True, alone=False, **samples)
        else:
            step = _pytest(f"tests/{folder}", folder, MATRIX, "cuda,triton", rehearse=False, alone=False)
            if importlib.util.find_spec("xdist") is not None:  # tests compile kernels and compare on the CPU: they hardly load the GPU
                step.command += ["-n", "4", "--dist", "worksteal"]
            yield step
        backends = "cpu" if rehearse else "cuda,triton"
        yield _pytest(f"tests/{folder}-same-bits", folder, ("determinism", "memory"), backends, rehearse=rehearse, alone=True, **samples)
    if list(ROOT.glob("tests/test_gpu*.py")):
        yield Step(
            "tests/gpu", [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *map(str, sorted(ROOT.glob("tests/test_gpu*.py")))]
        )


def sanitize_steps(folders: Sequence[str], rehearse: bool) -> Iterator[Step]:
    """A few samples of each operator, forward and backward, under compute-sanitizer."""
    places = [shutil.which("compute-sanitizer"), *Path("/").glob("usr/local/cuda*/bin/compute-sanitizer")]
    program = next((str(place) for place in places if place), None)
    if program is None and not rehearse:
        yield Step("sanitize", [], note="compute-sanitizer is not on this machine")
        return
    for folder in folders:
        for tool in ORDERS if rehearse else SANITIZERS:
            backends = "cuda" if rehearse else "cuda,triton"
            extra = {"WSSS_EMULATOR_ORDER": tool} if rehearse else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            extra["WSSS_SELECT_SAMPLES"] = "3"
            step = _pytest(f"sanitize/{folder}-{tool}", folder, ("gradients",), backends, rehearse=rehearse, alone=False, **extra)
            step.command += ["tests/test_ops.py", "-k", "matches_truth and float32"]
            if not rehearse:
                step.command = [program, "--tool", tool, "--error-exitcode", "99", *step.command]
            yield step


def bench_steps(folders: Sequence[str], cases: dict[str, list[tuple[str, str]]], out: Path, rehearse: bool) -> Iterator[Step]:
    """The quick cases of each operator, then sweeps, then the cases with compiled baselines; in a rehearsal one case each."""
    command = [sys.executable, "benchmarks/run.py", "--csv", str(out), "--seconds"]
    for folder in folders:
        name, case = cases[folder][0]
        names = [part for name in dict.fromkeys(name for name, _ in cases[folder]) for part in ("--op", name)]
        yield Step(f"bench/{folder}", [*command, "0.05", "--op", name, "--case", case] if rehearse else [*command, "0.5", "--all", *names])
    if not rehearse:
        names = [part for folder in folders for name in dict.fromkeys(n for n, _ in cases[folder]) for part in ("--op", name)]
        yield Step("bench/sweeps", [*command, "0.3", "--sweep", "--minutes", "2", *names])
        yield Step("bench/compiled", [*command, "0.5", "--compiled", "--minutes", "2", *names])
    if importlib.util.find_spec("matplotlib") is not None:
        yield Step("bench/report", [sys.executable, "benchmarks/machine_report.py", str(out), "--out", str(out / "reports")])


def benchmark_cases() -> dict[str, list[tuple[str, str]]]:
    """(public name, quick case) by folder, from the specs of what has been built."""
    code = "import json; from wsss_kernels import registry; "
    code += "print(json.dumps([(s.folder, s.name, c.name) for s in registry.specs() for c in s.cases if c.quick]))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    found: dict[str, list[tuple[str, str]]] = {}
    if answer.returncode:
        print(f"the cases cannot be listed: {answer.stderr[-500:]}", file=sys.stderr)
    if answer.returncode == 0:
        for folder, name, case in json.loads(answer.stdout.splitlines()[-1]):
            found.setdefault(folder, []).append((name, case))
    return found


def about(rehearse: bool) -> dict[str, str]:
    import torch

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    triton = importlib.util.find_spec("triton") is not None
    return {
        "device": "rehearsal on the CPU: emulator and interpreter" if rehearse else torch.cuda.get_device_name(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": "installed" if triton else "missing",
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 if a step failed or did not run; 2 for wrong use."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", default="all", choices=(*PARTS, "all"))
    parser.add_argument("--ops", default="", help="folders of operators, comma-separated (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on small samples")
    parser.add_argument("--minutes", type=float, default=9.5, help="no step starts later, and one that runs is stopped (default 9.5)")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 4), help="test processes beside each other")
    options = parser.parse_args(argv)
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; `make gpu REHEARSE=1` goes through the same steps on the CPU")
    existing = sorted(path.name for path in (ROOT / "wsss_kernels/ops").iterdir() if (path / "spec.py").exists())
    folders = [name for name in options.ops.split(",") if name] or existing
    if unknown := [name for name in folders if name not in existing]:
        parser.error(f"there is no operator {', '.join(unknown)}; there are {', '.join(existing)}")
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.jobs))
    out = Path(os.environ.get("OUT") or ROOT / "build/gpu").resolve()
    run = Run(out, about(options.rehearse), options.minutes)
    wanted = PARTS if options.part == "all" else (options.part,)
    if "build" in wanted:
        run.run(list(build_steps(options.rehearse)))
    if "tests" in wanted:
        run.run(list(test_steps(folders, options.rehearse)), options.jobs)
    if "sanitize" in wanted:
        run.run(list(sanitize_steps(folders, options.rehearse)), options.jobs)
    if "bench" in wanted:
        cases = benchmark_cases()
        run.run(list(bench_steps([folder for folder in folders if folder in cases], cases, out, options.rehearse)))
        run.failed |= not cases
    print(f"{out}/summary.txt")
    return int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
