"""`python -m wsss_kernels.bench` under wrong use, interruption and failure; comparison of commits."""

import contextlib
import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_bench import case_of, row

from benchmarks import run
from wsss_kernels import bench, registry
from wsss_kernels.bench import __main__ as command, about, compare, sweep, timing


@pytest.fixture
def measured(monkeypatch):
    """The names of the cases that are measured, which takes no time."""
    names = []
    monkeypatch.setattr(command, "measure", lambda spec, case, **more: names.append(case.name) or [row(case=case.name)])
    return names


@pytest.mark.parametrize("what", ["other columns", "a folder that cannot be made", "half a row"])
def test_a_csv_that_takes_no_rows_is_refused_before_anything_is_measured(tmp_path, measured, capsys, what):
    path = tmp_path / "there.csv"
    path.write_text("a,b\n" if what == "other columns" else "")
    if what == "half a row":
        bench.append([row()], path)
        path.write_text(path.read_text()[:-20])
    target = path / "below.csv" if what == "a folder that cannot be made" else path
    with pytest.raises(SystemExit) as stop:
        command.main(["--op", "mpfp", "--csv", str(target)])
    assert stop.value.code == 2 and not measured and "--csv" in capsys.readouterr().err


def test_a_file_without_suffix_is_a_file(tmp_path, measured):
    (tmp_path / "rows").touch()
    command.main(["--op", "mpfp", "--csv", str(tmp_path / "rows")])
    assert len(bench.read(tmp_path / "rows")) == len(measured)
    command.main(["--op", "mpfp", "--csv", str(tmp_path / "folder")])
    assert len(list((tmp_path / "folder").glob("*.csv"))) == 1


def test_finished_rows_are_kept_when_interrupted(tmp_path, monkeypatch, capsys):
    def stop_at_the_second(spec, case, **more):
        if case.name == "1x2x28x28":
            raise KeyboardInterrupt
        return [row(op=spec.name, case=case.name)]

    monkeypatch.setattr(command, "measure", stop_at_the_second)
    assert command.main(["--op", "mpfp", "--csv", str(tmp_path / "a.csv")]) == 130
    assert "interrupted; left out: mpfp 1x2x28x28" in capsys.readouterr().err
    assert [r.case for r in bench.read(tmp_path / "a.csv")] == ["16x2x28x28"]


def test_an_interrupted_benchmark_does_not_go_on_with_the_sweeps(monkeypatch):
    calls = []
    monkeypatch.setattr(command, "main", lambda argv: calls.append(argv) or command.INTERRUPTED)
    assert run.main([]) == 130 and len(calls) == 1


def test_options_of_one_operator_in_either_spelling(monkeypatch):
    calls = []
    monkeypatch.setattr(command, "main", lambda argv: calls.append(argv) or 0)
    run.main(["--op=par"])
    run.main(["--op", "par", "--compare", "HEAD"])
    assert [call[-1] for call in calls] == ["--op=par", "HEAD"] and "--csv" in calls[0] and "--csv" not in calls[1]


def test_a_case_that_fails_does_not_end_the_others(monkeypatch, capsys):
    def fail(spec, case, **more):
        if spec.name == "par":
            raise TypeError("a mistake in the baseline\nand more")
        return [row(op=spec.name, case=case.name)]

    monkeypatch.setattr(command, "measure", fail)
    assert command.main(["--op", "par", "--op", "mpfp"]) == 1
    out, err = capsys.readouterr()
    assert "mpfp" in out and "par 320_c2_i10: failed: TypeError: a mistake in the baseline" in err and "and more" not in err


@pytest.mark.parametrize(
    "options",
    [["--sweep", "--mode", "backward"], ["--sweep", "--case", "a"], ["--compare", "HEAD", "--mode", "forward"], ["--tune", "--sweep"]],
)
def test_options_without_effect_are_refused(measured, capsys, options):
    with pytest.raises(SystemExit):
        command.main(["--op", "mpfp", *options])
    assert not measured and "has no effect beside" in capsys.readouterr().err


def test_ours_out_of_memory_says_so():
    spec, case = case_of("normalize_cam")

    def refuse(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    refuse.__module__ = spec.public.__module__
    (only,) = timing.measure(dataclasses.replace(spec, public=refuse), case, seconds=0.01)
    assert only.gate.startswith("not run: out of memory") and only.provider == "ours"


def test_a_baseline_whose_module_cannot_be_imported_is_named(monkeypatch, capsys, tmp_path):
    spec, case = case_of("box_mask")

    def without(missing):
        def load(name):
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

        return load

    monkeypatch.setattr(importlib, "import_module", without("cv2"))
    assert list(timing.baselines(spec, case)) == ["reference"] and "No module named 'cv2'" in capsys.readouterr().err
    monkeypatch.setattr(importlib, "import_module", without("benchmarks"))
    monkeypatch.setattr(timing, "PACKAGE", tmp_path / "wsss_kernels")  # installed
    assert list(timing.baselines(spec, case)) == ["reference"] and not capsys.readouterr().err


def test_what_is_wrong_is_not_compared(monkeypatch, capsys):
    wanted = []
    monkeypatch.setattr(command, "gate", lambda spec, case: "red: an error" if case.name.startswith("16x") else "green")
    monkeypatch.setattr(compare, "compare", lambda commit, cases, seconds: wanted.extend(cases) or "the table")
    assert command.main(["--op", "mpfp", "--case", "x28x28", "--compare", "HEAD"]) == 1
    out = capsys.readouterr().out
    assert wanted and all(not case.startswith("16x") for _, case in wanted) and re.search(r"16x2x28x28 +red: an error", out)


def test_the_gate_of_a_case():
    spec, case = case_of("normalize_cam")

    def shifted(*args, **kwargs):
        return spec.public(*args, **kwargs) + 0.01

    shifted.__module__ = spec.public.__module__
    assert timing.gate(spec, case) == "green"
    assert timing.gate(dataclasses.replace(spec, public=shifted), case).startswith("red: ")


def test_rounds_that_overlap_are_no_difference(monkeypatch):
    """Each process is steady in itself, and one of the old ones as fast as the new: that says nothing of the code."""
    rounds = {"then": iter([8.0, 12.0, 12.0]), "now": iter([8.0, 8.0, 8.1])}
    monkeypatch.setattr(compare, "checkout", lambda commit: contextlib.nullcontext(Path("then")))

    def times(tree, wanted, seconds):
        return dict.fromkeys(wanted, [next(rounds["then" if tree == Path("then") else "now"])] * 5)

    monkeypatch.setattr(compare, "_times", times)
    assert "no difference beyond the noise" in compare.compare("abc", [("par", "a")], seconds=1.0)


def test_a_commit_that_is_not_there():
    with pytest.raises(ValueError, match="there is no such commit|needs a clone"), compare.checkout("no-such-commit"):
        pass


def test_comparison_needs_a_clone(monkeypatch):
    monkeypatch.setattr(about, "commit", lambda: "installed")
    with pytest.raises(ValueError, match="needs a clone of the repository, and git"), compare.checkout("HEAD"):
        pass


def test_the_baselines_of_a_clone_are_found_from_any_folder(tmp_path):
    code = f"""import sys
sys.path.insert(0, {str(about.PACKAGE.parent)!r})
from wsss_kernels import registry
del sys.path[0]
from wsss_kernels.bench import timing
spec = registry.spec("mpfp")
print(list(timing.baselines(spec, spec.cases[0])))"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "['eager']", done.stderr


def test_memory_that_holds_files_is_free(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemFree:    100 kB\nMemAvailable:    2048 kB\n")
    monkeypatch.setattr(sweep, "Path", lambda name: tmp_path / "meminfo")
    monkeypatch.setattr(sweep.torch.cuda, "is_available", lambda: False)
    assert sweep.free_bytes() == 2**21
    (tmp_path / "meminfo").unlink()
    assert sweep.free_bytes() > 2**21


@pytest.mark.parametrize("what", [["--compare", "HEAD"], ["--tune"]])
def test_what_is_interrupted_before_the_cases_ends_without_a_traceback(monkeypatch, capsys, what):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_compare", interrupt)
    monkeypatch.setattr(command, "tune", interrupt)
    assert command.main(["--op", "mpfp", *what]) == 130 and "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--seconds", "nan"], ["--minutes", "nan"], ["--backend", "nothing"], ["--swee"]])
def test_values_that_mean_nothing_are_refused(measured, wrong):
    with pytest.raises(SystemExit) as stop:
        command.main(["--op", "mpfp", *wrong])
    assert stop.value.code == 2 and not measured


def test_where_no_case_matches_the_long_ones_are_pointed_to(measured, capsys):
    name = next(case.name for spec in registry.specs() for case in spec.cases if not case.quick)
    with pytest.raises(SystemExit):
        command.main(["--case", name])
    assert "no case matches; --all takes the long ones, too" in capsys.readouterr().err
    command.main(["--case", name, "--all"])
    assert measured == [name]


def test_an_operator_that_is_named_twice_is_measured_once(measured):
    command.main(["--op", "mpfp", "--op", "mpfp"])
    assert len(measured) == len(set(measured)) > 0


def test_what_the_sweeps_do_not_take_is_for_the_cases_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(command, "main", lambda argv: calls.append(argv) or 0)
    monkeypatch.setattr(run.machine_report, "main", lambda argv: 0)
    run.main(["--all", "--compiled", "--minutes", "3"])
    cases, sweeps = calls
    assert "--all" in cases and not {"--all", "--compiled"} & set(sweeps) and sweeps[-2:] == ["--minutes", "3"]


def test_a_case_that_fails_is_not_compared_and_does_not_end_the_others(monkeypatch, capsys):
    spec, case = case_of("normalize_cam")

    def fail(*args, **kwargs):
        raise TypeError("a mistake\nand more")

    fail.__module__ = spec.public.__module__
    assert timing.gate(dataclasses.replace(spec, public=fail), case) == "failed: TypeError: a mistake"


def test_the_bar_is_taken_away_before_a_failure_is_told(monkeypatch, capsys):
    monkeypatch.setattr(command, "measure", lambda spec, case, **more: 1 / 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    command.main(["--op", "mpfp"])
    assert "\r\033[Kmpfp 16x2x28x28: failed: ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["bytes", "an open quote", "a word for a number", "nothing for a number"])
def test_a_damaged_csv_is_a_value_error_that_names_the_line(tmp_path, damage):
    path = tmp_path / "a.csv"
    bench.append([row(), row(case="b", p50_ms=7.25)], path)
    text = path.read_text()
    if damage == "bytes":
        path.write_bytes(b"\xff\xfe\x00" * 100)
        with pytest.raises(ValueError, match="is no CSV"):
            bench.append([row()], path)
    elif damage == "an open quote":
        path.write_text(text + '"' + "x" * 200_000 + "\n")
    else:
        path.write_text(text.replace(",7.25,", ",seven," if damage == "a word for a number" else ",,"))
    with pytest.raises(ValueError, match=r"^line \d"):
        bench.read(path)
