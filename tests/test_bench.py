"""The benchmark: gates, modes, sweeps, the time limit, comparison of commits."""

import dataclasses
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import wsss_kernels
from benchmarks import machine_report
from wsss_kernels import bench, registry
from wsss_kernels.bench import __main__ as command, compare, sweep, timing as measuring
from wsss_kernels.bench.row import MODES, Row
from wsss_kernels.bench.timing import measure

ROOT = Path(__file__).resolve().parent.parent


def row(**changes) -> Row:
    values = {"op": "par", "case": "a", "sweep": "", "size": None, "mode": "forward", "dtype": "float32", "provider": "ours"}
    values |= {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "runs": 5, "peak_mib": 4.0, "ratio": 1.0, "target": None, "error_ratio": 0.5}
    values |= {
        "gate": "green",
        "gbps": 10.0,
        "gflops": 20.0,
        "roofline": 0.5,
        "peak_gbps": 12.0,
        "peak_gflops": 40.0,
        "compile_s": None,
        "machine": "a <machine>",
        "threads": 2,
        "clock_mhz": 3000.0,
    }
    values |= {"torch": "2.14", "commit": "abc", "kernels": "0123", "date": "2026-01-01"}
    return Row(**{**values, **changes})


def case_of(name):
    spec = registry.spec(name)
    return spec, next(case for case in spec.cases if case.quick)


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    spec = registry.spec("mpfp")
    rows = measure(spec, spec.cases[1], seconds=0.01, mode=mode)
    assert [r.provider for r in rows] == ["ours", "eager"] and all(r.gate == "green" and r.mode == mode for r in rows)
    assert rows[0].p20_ms <= rows[0].p50_ms <= rows[0].p80_ms and rows[0].ratio == 1 and rows[0].clock_mhz != 0
    assert (rows[0].roofline is not None) == (mode == "forward" and spec.bytes_moved is not None)


def test_a_wrong_baseline_prints_no_figure(monkeypatch):
    spec, case = case_of("normalize_cam")
    monkeypatch.setattr(measuring, "baselines", lambda spec, case: {"eager": lambda *a, **k: 1.01 * spec.reference(*a, **k)})
    (only,) = measure(spec, case, seconds=0.01)
    assert (
        only.gate.startswith("red: eager") and math.isnan(only.p50_ms) and "red" in bench.text([only]) and "ms [" not in bench.text([only])
    )


@pytest.mark.parametrize(("name", "wrong", "red"), [("connected_components", 1, True), ("kmeans", 66, True), ("kmeans", 65, False)])
def test_wrong_integers_of_a_baseline_print_no_figure(monkeypatch, name, wrong, red):
    """Components must be equal; of the 65536 labels of k-means a thousandth may be on the other side of a tie."""
    spec, case = case_of(name)

    def off(*args, **kwargs):
        result = spec.reference(*args, **kwargs)
        flat = (result if isinstance(result, torch.Tensor) else result[0]).view(-1)
        flat[:wrong] += 1
        return result

    monkeypatch.setattr(measuring, "baselines", lambda spec, case: {"eager": off})
    rows = measure(spec, case, seconds=0.01)
    if red:
        (only,) = rows
        assert re.match(rf"red: eager: {wrong} of \d+ integer or boolean values differ", only.gate) and math.isnan(only.ratio)
    else:
        assert [row.gate for row in rows] == ["green", "green"]


def test_one_wrong_integer_of_ours_prints_no_figure():
    spec, case = case_of("kmeans")

    def off(*args, backend=None, **kwargs):
        label, centroid = spec.public(*args, **kwargs)
        label[0, 0] = 1 - label[0, 0]
        return label, centroid

    off.__module__ = spec.public.__module__
    (only,) = measure(dataclasses.replace(spec, public=off), case, seconds=0.01)
    assert re.match(r"red: result: 1 of 65536 integer or boolean values differ", only.gate)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_a_baseline_that_runs_out_of_memory_says_so(monkeypatch, error):
    spec, case = case_of("normalize_cam")

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(measuring, "baselines", lambda spec, case: {"eager": refuse, "reference": spec.reference})
    ours, other, without = measure(spec, case, seconds=0.01)
    assert (ours.gate, other.provider, other.gate) == ("green", "reference", "green")
    assert without.provider == "eager" and without.gate == f"not run: out of memory: {error}" and math.isnan(without.p50_ms)


def test_another_error_of_a_baseline_is_not_hidden(monkeypatch):
    spec, case = case_of("normalize_cam")

    def broken(*args, **kwargs):
        raise RuntimeError("a mistake in the baseline")

    monkeypatch.setattr(measuring, "baselines", lambda spec, case: {"eager": broken})
    with pytest.raises(RuntimeError, match="a mistake in the baseline"):
        measure(spec, case, seconds=0.01)


def test_a_wrong_kernel_prints_no_figure(monkeypatch):
    spec, case = case_of("normalize_cam")

    def shifted(*args, backend=None, **kwargs):
        return spec.public(*args, **kwargs) + 1e-3

    shifted.__module__ = spec.public.__module__
    wrong = dataclasses.replace(spec, public=shifted)
    (only,) = measure(wrong, case, seconds=0.01)
    assert only.gate.startswith("red") and math.isnan(only.ratio)


@pytest.mark.parametrize("mode", ["forward+backward", "backward"])
@pytest.mark.parametrize("who", ["ours", "eager"])
def test_a_wrong_result_beside_right_gradients_prints_no_figure(monkeypatch, mode, who):
    spec, case = case_of("normalize_cam")

    def shifted(*args, backend=None, **kwargs):
        return spec.public(*args, **kwargs) + 0.01

    shifted.__module__ = spec.public.__module__
    if who == "eager":
        monkeypatch.setattr(measuring, "baselines", lambda spec, case: {"eager": shifted})
    (only,) = measure(dataclasses.replace(spec, public=shifted) if who == "ours" else spec, case, seconds=0.01, mode=mode)
    assert only.gate.startswith("red: result" if who == "ours" else "red: eager") and math.isnan(only.p50_ms)


def test_the_ratio_is_that_of_the_medians(monkeypatch):
    spec, case = case_of("normalize_cam")
    monkeypatch.setattr(measuring, "peaks", lambda: (1.0, 1.0))
    monkeypatch.setattr(measuring, "alternate", lambda calls, seconds: {"ours": [1.0, 2.0, 3.0, 4.0], "eager": [5.0, 6.0, 10.0, 20.0]})
    ours, eager = measure(spec, case, seconds=0.01)
    assert (ours.p50_ms, eager.p50_ms, eager.ratio) == (2.5, 8.0, 3.2)


@pytest.mark.slow
def test_compiled_baseline():
    spec, case = case_of("normalize_cam")
    rows = measure(spec, case, seconds=0.3, compile=True)
    assert rows[-1].provider == "eager compiled" and (rows[-1].gate == "green" or rows[-1].gate.startswith("not run"))


def test_a_baseline_that_does_not_compile_says_so(monkeypatch):
    def refuse(function):
        def call(*args, **kwargs):
            raise RuntimeError("this cannot be compiled\nat all")

        return call

    monkeypatch.setattr(measuring, "compiled", refuse)
    rows = measure(*case_of("normalize_cam"), seconds=0.3, compile=True)
    assert rows[-1].gate == "not run: RuntimeError: this cannot be compiled" and rows[0].gate == "green"


def test_a_baseline_that_is_slower_than_the_case_allows_is_not_compiled(monkeypatch):
    spec, case = case_of("normalize_cam")
    monkeypatch.setattr(measuring, "baselines", lambda spec, case: {"eager": lambda *a, **k: time.sleep(0.05) or spec.reference(*a, **k)})
    monkeypatch.setattr(measuring, "compiled", lambda function: pytest.fail("it is compiled"))
    rows = measure(spec, case, seconds=0.02, compile=True)
    assert [r.gate for r in rows[:2]] == ["green", "green"]
    assert re.match(r"not run: one call of eager needs 0\.\d+ s, more than the case's 0\.02 s", rows[2].gate)


def test_a_compiled_baseline_whose_guards_fail_is_not_timed(monkeypatch):
    def refuse(function):
        calls = []

        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) > 1:
                raise torch._dynamo.exc.RecompileError("a size has changed")
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(measuring, "compiled", refuse)
    rows = measure(*case_of("normalize_cam"), seconds=0.3, compile=True)
    assert rows[-1].gate == "not run: its guards fail, so that it would compile at every call: a size has changed"
    assert rows[-1].compile_s is None and rows[0].gate == "green"


def test_the_first_call_of_a_compiled_baseline_is_timed_apart(monkeypatch):
    def slow_at_first(function):
        calls = []

        def call(*args, **kwargs):
            calls.append(time.sleep(0 if calls else 0.3))
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(measuring, "compiled", slow_at_first)
    rows = measure(*case_of("normalize_cam"), seconds=0.3, compile=True)
    assert rows[-1].gate == "green" and rows[-1].compile_s >= 0.3 and rows[-1].p80_ms < 300 and rows[0].compile_s is None


def test_every_operator_has_a_sweep():
    for spec in registry.specs():
        assert spec.sweeps and all(len(s.cases) >= 3 and s.exponent > 0 for s in spec.sweeps), spec.name


def test_exponent():
    rows = [row(size=float(n), p50_ms=5 + 0.001 * n**2, sweep="N") for n in (10, 100, 1000, 10000)]
    assert bench.exponent(rows) == pytest.approx(2, abs=0.02)
    assert bench.exponent(rows[:1]) is None and bench.exponent(rows, "eager") is None


def test_memory_that_is_not_there():
    rows = [row(provider=p, size=n, sweep="N", peak_mib=n * n / 1e4) for n in (100.0, 200.0) for p in ("ours", "eager")]
    found = sweep.too_large(rows, 400.0, free=2**20 * 20)
    assert list(found) == ["eager"] and found["eager"].startswith("out of memory: it would need about 0.0156 GiB")
    assert sweep.too_large(rows, 400.0, free=2**30) == {}
    later = [*rows, row(provider="eager", size=400.0, gate="not run: out of memory: …")]
    assert sweep.too_large(later, 800.0, free=2**40) == {"eager": "out of memory"}


def test_a_sweep_and_where_ours_is_slower():
    spec = registry.spec("normalize_cam")
    small = dataclasses.replace(spec.sweeps[0], cases=dict(list(spec.sweeps[0].cases.items())[:2]))
    names, jobs = zip(*sweep.jobs(spec, small, seconds=0.01, backend=None), strict=True)
    assert names == ("normalize_cam at H·W = 4096", "normalize_cam at H·W = 16384")
    rows = [r for job in jobs for r in job()]
    assert {r.size for r in rows} == {64.0**2, 128.0**2} and {r.sweep for r in rows} == {"H·W"}
    assert sweep.slower_at([row(provider="eager", ratio=0.5, size=3.0), row(provider="eager", ratio=2.0, size=4.0)]) == [3.0]


def test_a_sweep_with_a_compiled_baseline(monkeypatch, tmp_path):
    spec = registry.spec("normalize_cam")
    small = dataclasses.replace(spec.sweeps[0], cases=dict(list(spec.sweeps[0].cases.items())[:2]))
    compilations = []
    monkeypatch.setattr(measuring, "compiled", lambda function: compilations.append(1) or function)
    without = iter([{}, {"eager compiled": "out of memory"}])
    monkeypatch.setattr(sweep, "too_large", lambda *a: next(without))
    first, second = (job() for _, job in sweep.jobs(spec, small, seconds=0.1, backend=None, compile=True))
    assert [r.provider for r in first] == ["ours", "eager", "eager compiled"] == [r.provider for r in second]
    assert first[2].gate == "green" and first[2].compile_s is not None and len(compilations) == 1
    assert second[2].gate == "not run: out of memory" and [r.gate for r in second[:2]] == ["green"] * 2
    for rows, said in (([*first, *second], False), (first[:2], True)):
        assert ("not compiled here" in machine_report.write(rows, [], tmp_path, "m").read_text()) == said


def test_the_command_passes_on_that_sweeps_are_compiled(monkeypatch):
    seen = []
    monkeypatch.setattr(sweep, "measure", lambda spec, case, **more: seen.append(more["compile"]) or [row(case=case.name)])
    command.main(["--op", "mpfp", "--sweep", "--compiled"])
    command.main(["--op", "mpfp", "--sweep"])
    assert set(seen[: len(seen) // 2]) == {True} and set(seen[len(seen) // 2 :]) == {False}


def test_csv_round_trip_and_the_newest_rows(tmp_path):
    path = tmp_path / "m.csv"
    bench.append([row(p50_ms=9.0), row(provider="eager", ratio=2.0)], path)
    bench.append([row(p50_ms=1.5), row(provider="eager", ratio=3.0), row(provider="other", ratio=2.5, p50_ms=0.5)], path)
    bench.append([row(case="b", gate="red: wrong", p50_ms=math.nan)], path)
    bench.append([row(case="c", sweep="H·W", size=262144.0, p50_ms=0.123456)], path)
    found = bench.read(path)
    assert [(r.case, r.provider) for r in found] == [("a", "ours"), ("a", "eager"), ("a", "other"), ("b", "ours"), ("c", "ours")]
    assert (found[-1].size, found[-1].p50_ms) == (262144, 0.1235)
    assert found[0].p50_ms == 1.5 and found[0].size is None and found[0].threads == 2
    ours, best, eager = bench.headline(found[:3])
    assert (ours.provider, best.provider, eager.provider) == ("ours", "other", "eager")
    path.write_text("op,case\npar,a\n")
    with pytest.raises(ValueError, match="has the columns of another version"):
        bench.append([row()], path)


def test_a_csv_from_before_the_newest_columns_is_read_but_takes_no_rows(tmp_path):
    path = tmp_path / "m.csv"
    bench.append([row(others=0.25), row(provider="eager", ratio=2.0)], path)
    old = "".join(line.rpartition(",")[0] + "\n" for line in path.read_text().splitlines())
    path.write_text(old)
    assert [(r.backend, r.others) for r in bench.read(path)] == [("", 0.25), ("", None)]
    with pytest.raises(ValueError, match="has the columns of another version; move it away"):
        bench.append([row(backend="cpu")], path)
    assert path.read_text() == old


def test_a_row_says_which_backend_was_measured():
    spec, case = case_of("normalize_cam")
    for backend in ("reference", None):
        rows = measure(spec, case, seconds=0.01, backend=backend)
        args, kwargs = case.make()
        chosen = backend or wsss_kernels.explain(spec.name, *args, **kwargs).chosen
        assert {r.backend for r in rows} == {chosen} and f" ours ({chosen}) " in bench.text(rows)


def test_the_command(tmp_path, capsys):
    assert command.main(["--op", "normalize_cam", "--seconds", "0.01", "--csv", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*.csv"))) == 1 and "eager" in capsys.readouterr().out
    for wrong in (["--op", "nothing"], ["--seconds", "0"], ["--case", "nothing"], ["--compare", "no-such-commit", "--op", "mpfp"]):
        with pytest.raises(SystemExit) as stop:
            command.main(wrong)
        assert stop.value.code == 2


def test_what_the_time_limit_leaves_out_is_named(capsys):
    command.main(["--op", "normalize_cam", "--seconds", "0.01", "--minutes", "0.0000001"])
    err = capsys.readouterr().err
    assert "the limit of 1e-07 minutes is reached; left out: normalize_cam 4x20_maps_28x28" in err


def test_the_time_limit_cuts_a_sweep_and_the_long_cases_first(monkeypatch, capsys):
    seen, clock = [], iter(range(100))
    monkeypatch.setattr(command.time, "monotonic", lambda: 60.0 * next(clock))
    monkeypatch.setattr(sweep, "measure", lambda spec, case, **more: seen.append(more["sweep"][1]) or [row(case=case.name)])
    command.main(["--op", "mpfp", "--sweep", "--minutes", "2.5"])
    assert seen == [1.0, 4.0] and "left out: mpfp at batch = 16, mpfp at batch = 64" in capsys.readouterr().err
    names = []
    monkeypatch.setattr(command, "measure", lambda spec, case, **more: names.append((spec.name, case.name)) or [row(case=case.name)])
    command.main(["--op", "affinity_loss", "--op", "mpfp", "--all"])
    assert [op for op, _ in names] == ["affinity_loss", "mpfp", "mpfp", "mpfp", "affinity_loss", "affinity_loss"]


def test_comparison_in_turn(monkeypatch):
    calls = []

    def times(tree, wanted, seconds):
        calls.append(tree)
        return {key: [2.0, 2.1, 1.9] if tree == Path("then") else [1.0, 1.05, 0.95] for key in wanted if key != ("par", "new")}

    import contextlib

    monkeypatch.setattr(compare, "checkout", lambda commit: contextlib.nullcontext(Path("then")))
    monkeypatch.setattr(compare, "_times", times)
    text = compare.compare("abc", [("par", "a"), ("par", "new")], seconds=1.0, rounds=2)
    assert calls == [Path("then"), compare.ROOT] * 2
    assert re.search(r"par +a +2\.000 ms +1\.000 ms +2\.00x +faster \(±", text) and "this case is not in both" in text


@pytest.mark.slow
def test_comparison_with_a_commit():
    """Against HEAD: the same kernels, so that nothing is built."""
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a clone of the repository")
    command_line = [sys.executable, "-m", "wsss_kernels.bench", "--compare", "HEAD", "--op", "mpfp", "--seconds", "0.5"]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"mpfp +16x2x28x28 .* ms .* ms", done.stdout), done.stderr
    left = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "wsss_compare_" not in left


def test_peaks_of_the_machine():
    bandwidth, rate = measuring.peaks()
    assert 0.1 < bandwidth < 1e5 and 0.1 < rate < 1e7 and torch.isfinite(torch.tensor([bandwidth, rate])).all()
