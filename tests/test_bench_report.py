"""The report of a machine and the README's table, from rows that are written here."""

import json
import math
import re

import pytest
from test_bench import row

from benchmarks import gpu, machine_report, report as readme, training_steps
from wsss_kernels import bench, registry


def test_report(tmp_path):
    rows = [row(), row(provider="eager", ratio=3.0, p50_ms=6.0), row(provider="eager compiled", ratio=2.0, p50_ms=4.0)]
    rows += [row(case="bad <case>", gate="red: error 1 > 0", p50_ms=math.nan, ratio=math.nan)]
    for n in (10.0, 20.0, 40.0):
        rows += [
            row(case=f"n{n}", sweep="H·W", size=n, p50_ms=n),
            row(case=f"n{n}", sweep="H·W", size=n, provider="eager", p50_ms=9 * n, ratio=9.0),
        ]
    rows[-1] = row(case="n40.0", sweep="H·W", size=40.0, provider="eager", gate="not run: out of memory: it would need about 9 GiB")
    steps = [("gland network", {b: {"median_seconds": 0.2, "operator_share": 0.3, "peak_bytes": 2**20} for b in ("fused", "reference")})]
    path = machine_report.write(rows, steps, tmp_path, "machine")
    page = path.read_text()
    assert "http:" not in page and "https:" not in page and "<script" not in page and "<link" not in page  # base64 has no colon
    assert "a &lt;machine&gt;" in page and "bad &lt;case&gt;" in page and "red: error 1 &gt; 0" in page
    line = next(line for line in re.findall(r"<tr>.*?</tr>", page) if "bad &lt;case&gt;" in line)
    assert "nan" not in line and line.count("<td") == 5
    assert "1 cases are green, 1 red" in page and "none of these" in page
    assert {p.stem for p in (tmp_path / "machine").glob("*.png")} == {"ratios", "time", "memory", "roofline", "end_to_end"}
    assert page.count("data:image/png;base64") == 5


def test_the_report_says_why_a_baseline_has_no_figure(tmp_path):
    rows = [row(), row(provider="eager", gate="not run: out of memory: it would need about 9 GiB", p50_ms=math.nan, ratio=math.nan)]
    page = machine_report.write(rows, [], tmp_path, "machine").read_text()
    line = next(line for line in re.findall(r"<tr>.*?</tr>", page.split("What has no figure")[1]) if "9 GiB" in line)
    assert "<td>eager</td>" in line and "nan" not in line
    assert "12 GB/s" in page and "40 GFLOP/s" in page  # the machine's own rates


def test_every_case_is_in_the_report_in_order(tmp_path):
    rows = [row(op=spec.name, case=case.name) for spec in registry.specs() for case in spec.cases][::-1]
    page = machine_report.write(rows, [], tmp_path, "machine").read_text()
    found = re.findall(r"<tr><td>(\w+)</td><td>(\S+)</td><td>float32</td>", page)
    assert found == sorted({(r.op, r.case) for r in rows})


def test_bars_of_cases_that_differ_in_the_mode_alone():
    from matplotlib import pyplot

    pairs = [
        [row(mode=m), row(mode=m, provider="eager", ratio=r)] for m, r in (("forward", 3.0), ("forward+backward", 2.0), ("backward", 4.0))
    ]
    axis = machine_report._ratios(pyplot, pairs).axes[0]
    assert [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in axis.patches] == [(0, 2.0), (1, 3.0), (2, 4.0)]
    assert [(t.get_position()[1], t.get_text()) for t in axis.texts] == [(0, " 2× eager"), (1, " 3× eager"), (2, " 4× eager")]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["par a (forward+backward)", "par a", "par a (backward)"]
    (left, right) = machine_report._roofline(pyplot, [[row()], [row(case="b", roofline=0.9)]]).axes
    assert len(right.patches) == 2 and len(left.lines[1].get_xdata()) == 2
    pyplot.close("all")


def test_the_readme_takes_the_mode_of_the_case(tmp_path):
    path = tmp_path / "m.csv"
    spec = registry.spec("cosine_affinity")
    for mode, ratio in (("forward", 2.0), ("forward+backward", 3.0), ("backward", 99.0)):
        bench.append(
            [
                row(op=spec.name, case=spec.cases[0].name, mode=mode),
                row(op=spec.name, case=spec.cases[0].name, mode=mode, provider="eager", ratio=ratio),
            ],
            path,
        )
    both = "2× eager (n784 c768); 3× eager (n784 c768, with backward)"
    assert (
        readme.cpu_figures(readme.latest(path))[readme._link(spec)] == readme.gpu_figures(readme.latest(path))[readme._link(spec)] == both
    )


def test_pictures_for_the_readme(tmp_path):
    rows = [row(op="par", case=f"n{n}", sweep="H·W", size=n, p50_ms=n) for n in (40.0, 10.0, 20.0)]
    (found,) = machine_report.groups(rows, sweep=True)
    assert [r.size for r in found] == [10.0, 20.0, 40.0]
    machine_report.write_images(rows, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"bench_time.png", "bench_memory.png"}
    assert set(machine_report._README) <= {spec.name for spec in registry.specs()}
    empty = tmp_path / "empty"
    machine_report.write_images([row()], empty)
    assert not empty.exists()


def test_cases_without_a_row_are_named(tmp_path):
    spec = registry.spec("par")
    page = machine_report.write([row(case=spec.cases[0].name)], [], tmp_path, "machine").read_text()
    sentence = page.split("Not measured")[1].split("</p>")[0]
    assert (
        f" {spec.cases[-1].name}" in sentence
        and f"({spec.cases[0].name}," not in sentence
        and "H·W = 102400" in sentence
        and "; kmeans" in sentence
    )
    rows = [row(op=s.name, case=case.name) for s in registry.specs() for case in s.cases]
    rows += [row(op=s.name, case=c.name, sweep=w.variable, size=n) for s in registry.specs() for w in s.sweeps for n, c in w.cases.items()]
    assert not machine_report.not_measured(rows)


def test_the_report_shows_the_backend():
    assert "<td>tri&lt;ton</td>" in machine_report.ratio_table([[row(backend="tri<ton")]])
    assert machine_report.ratio_table([[row()]]).count("<td") == machine_report.ratio_table([[row()]]).count("<th>")


def test_a_sweep_without_a_baseline_says_so():
    alone = [row(sweep="N", size=n) for n in (1.0, 2.0)]
    assert "no baseline was run" in machine_report.sweep_table([alone])
    assert "none of these" in machine_report.sweep_table([[*alone, row(sweep="N", size=1.0, provider="eager", ratio=2.0)]])


def test_the_reference_backend_has_no_share_that_nobody_measured():
    from matplotlib import pyplot

    step = {"median_seconds": 0.2, "operator_share": 0.5, "peak_bytes": 2**20, "seconds": [9.0, 9.0, 0.1, 0.2, 0.2, 0.2, 0.3, 0.3]}
    axis = training_steps.chart(pyplot, [("gland network", {"fused": step, "reference": {**step, "operator_share": 0.0}})]).axes[0]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    whole = "whole step, reference backend (operators not measured)"
    assert labels == [whole, "operators of wsss_kernels", "everything else"]
    assert [t.get_text() for t in axis.texts] == [" reference: 200 ms, 1 MiB", " fused: 200 ms (operators 50 %), 1 MiB"]
    assert [list(line.get_xdata()) for line in axis.lines] == [[200.0, 300.0]] * 2
    axis = training_steps.chart(pyplot, [("gland network", {"fused": step, "reference": {**step, "operator_share": 0.75}})]).axes[0]
    assert axis.texts[0].get_text() == " reference: 200 ms (operators 75 %), 1 MiB"
    assert "the same operators, reference backend" in {text.get_text() for text in axis.get_legend().get_texts()}
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([150, 50, 100, 100])
    nothing = {**step, "operator_share": 0.0}
    axis = training_steps.chart(pyplot, [("gland network", {"fused": nothing, "reference": nothing})]).axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["everything else"]
    pyplot.close("all")


def test_a_readme_is_not_emptied_by_a_csv_without_rows(tmp_path, monkeypatch, capsys):
    page = f"{readme.BEGIN}\n{readme.operator_table({}, {})}\n{readme.END}"
    (tmp_path / "README.md").write_text(page)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    (tmp_path / "a.csv").write_text("")
    for name, message in (("a.csv", "holds no rows"), ("nothing.csv", "is not a CSV")):
        with pytest.raises(SystemExit) as stop:
            readme.main(["--csv", str(tmp_path / name)])
        assert stop.value.code == 2 and message in capsys.readouterr().err and (tmp_path / "README.md").read_text() == page


@pytest.mark.parametrize(("machine", "shown"), [("a", True), ("b", False)])
def test_training_steps_stand_in_the_report_of_their_machine(tmp_path, monkeypatch, machine, shown):
    monkeypatch.setattr(machine_report, "STEPS", tmp_path / "steps")
    (tmp_path / "steps/a/gland").mkdir(parents=True)
    step = {"median_seconds": 0.2, "operator_share": 0.3, "peak_bytes": 2**20}
    (tmp_path / "steps/a/gland/classifier.json").write_text(json.dumps({"method": "gland", "fused": step, "reference": step}))
    bench.append([row()], tmp_path / f"{machine}.csv")
    assert machine_report.main([str(tmp_path / f"{machine}.csv"), "--out", str(tmp_path)]) == 0
    assert ("Whole training steps" in (tmp_path / f"{machine}.html").read_text()) is shown


def test_a_csv_that_ends_within_a_row(tmp_path, capsys):
    path = tmp_path / "a.csv"
    bench.append([row(), row(case="b")], path)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(SystemExit):
        machine_report.main([str(path), "--out", str(tmp_path)])
    assert "line 3: no " in capsys.readouterr().err


def test_a_target_is_judged_by_the_first_baseline():
    shared = {"case": "320_c2_i10", "target": 45.0}
    rows = [row(**shared), row(**shared, provider="pad_and_slice", ratio=20.0)]
    assert bench.reached(rows) is None and "target" not in bench.text(rows) and "missed" not in machine_report.ratio_table([rows])
    assert bench.reached([rows[0], row(**shared, provider="reference", ratio=99.0)]) is None
    rows.insert(1, row(**shared, provider="eager", ratio=44.0))
    assert "target 45x MISSED" in bench.text(rows).splitlines()[1] and bench.text(rows).count("target") == 1
    assert "<td>45 <b class=red>missed</b></td>" in machine_report.ratio_table([rows])
    rows[1] = row(**shared, provider="eager", ratio=46.0)
    assert "target 45x reached" in bench.text(rows) and "<td>45 reached</td>" in machine_report.ratio_table([rows])


def test_report_of_what_is_no_csv(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "empty.csv").write_text("")
    for name, message in (
        ("a.csv", "is not a CSV of `make bench`"),
        ("nothing.csv", "there is no such file"),
        ("empty.csv", "holds no rows"),
    ):
        with pytest.raises(SystemExit) as stop:
            machine_report.main([str(tmp_path / name)])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_training_steps_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    bench.append([row()], tmp_path / "a.csv")
    folder = tmp_path / "steps"
    folder.mkdir()
    (folder / "list.json").write_text("[{}]")  # of something else
    assert training_steps.read([folder]) == []
    (folder / "half.json").write_text('{"fused": {')
    arguments = [str(tmp_path / "a.csv"), "--out", str(tmp_path), "--end-to-end"]
    for wrong, message in ((folder, "half.json: is not a result"), (tmp_path / "stepz", "there is no folder")):
        with pytest.raises(SystemExit) as stop:
            machine_report.main([*arguments, str(wrong)])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_csv_that_may_not_be_read(tmp_path, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError("not yours")

    monkeypatch.setattr(machine_report, "read", refuse)
    with pytest.raises(SystemExit):
        machine_report.main([str(tmp_path / "a.csv")])
    assert "cannot be read: not yours" in capsys.readouterr().err


def test_a_damaged_summary_of_make_gpu_is_named(tmp_path):
    (tmp_path / "summary.json").write_text('{"steps": [')
    with pytest.raises(SystemExit, match="summary.json is damaged; remove it"):
        gpu.Run(tmp_path, {}, 1.0)
