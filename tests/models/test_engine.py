"""The commands on a toy method: the chain, its files, continuation bit for bit, refusals."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wsss_models import cli
from wsss_models.engine import load_weights, run as runs, training
from wsss_models.refine.outputs import OutputError

from . import toy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(tmp_path):
    return toy.make_data(tmp_path / "data")


@pytest.fixture
def wsss(data, tmp_path, capsys):
    """`wsss(command, *settings, out=…) -> (exit code, stdout, stderr)`."""

    def run(command, *settings, out="run", options=(), config=True):
        arguments = [command, "tests.models.toy", "--out", str(tmp_path / out), *options]
        arguments += ["--data", str(data)] if config else []
        code = cli.main([*arguments, *[a for s in ("device=cpu", *settings) for a in ("--set", s)]])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def weights(folder):
    return load_weights(folder / "net" / "model.pt")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log(folder, columns=("step", "loss")):
    with open(folder / "net" / "log.csv") as file:
        return [tuple(row[c] for c in columns) for row in csv.DictReader(file)]


def test_chain_and_its_files(wsss, tmp_path):
    code, out, _ = wsss("run")
    assert code == 0 and "net: steps 8" in out
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["complete"] and list(summary["stages"]) == ["net", "labels", "test"]
    assert summary["versions"]["torch"] == torch.__version__ and summary["seconds"] > 0
    assert set(summary["stages"]["test"]["metrics"]["iou"]) == {"blue", "disc"}
    assert len(log(folder)) == 8 and (folder / "test" / "sheet.png").is_file()
    assert len((folder / "test" / "images.csv").read_text().splitlines()) == 7
    before = {p: p.stat().st_mtime_ns for p in (folder / "labels").iterdir()}
    code, out, _ = wsss("run")
    assert code == 0 and out.count("done before") == 3
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "labels").iterdir()}


def test_step_by_step_gives_the_same(wsss, tmp_path):
    wsss("run")
    for command in ("train", "pseudo-label", "evaluate"):
        assert wsss(command, out="steps", config=command == "train")[0] == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "steps"))
    metrics = [json.loads((tmp_path / f / "test" / "done.json").read_text())["metrics"] for f in ("run", "steps")]
    assert metrics[0] == metrics[1]


def test_a_step_before_its_turn(wsss):
    code, _, err = wsss("pseudo-label")
    assert code == 2 and "stage net must be run first" in err
    code, _, err = wsss("segment")
    assert code == 2 and "no segment stage" in err


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when", [2, 3, 5, 7])
def test_killed_at_any_step_continues_bit_for_bit(wsss, tmp_path, monkeypatch, when):
    settings = ("best=score", "recipe.accumulate=2", "workers=0")
    assert wsss("train", *settings)[0] == 0
    step = training._Loop._train_step

    def dying(self, source):
        if self.step == when:
            raise Killed
        step(self, source)

    monkeypatch.setattr(training._Loop, "_train_step", dying)
    with pytest.raises(Killed):
        wsss("train", *settings, out="killed")
    monkeypatch.setattr(training._Loop, "_train_step", step)
    assert wsss("train", *settings, out="killed")[0] == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "killed"))
    assert log(tmp_path / "run") == log(tmp_path / "killed")


def test_loader_processes_change_nothing(wsss, tmp_path):
    wsss("train")
    wsss("train", "workers=2", out="workers")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "workers"))


def test_accumulation_equals_the_joint_batch(wsss, tmp_path):
    plain = ("dropout=0.0", "noise=0.0")
    wsss("train", *plain, "recipe.batch_size=4")
    wsss("train", *plain, "recipe.batch_size=2", "recipe.accumulate=2", out="two")
    a, b = (np.array(log(tmp_path / f, ("loss", "twice")), float) for f in ("run", "two"))
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_best_weights_and_patience(wsss, tmp_path):
    wsss("train", "best=score", "patience=1", "recipe.lr=1e-9", "recipe.steps=40", "dropout=0.0")
    metrics = json.loads((tmp_path / "run/net/done.json").read_text())["metrics"]
    assert metrics["steps"] < 40 and metrics["best_score"] < 0
    rows = list(csv.DictReader((tmp_path / "run/net/validation.csv").read_text().splitlines()))
    assert metrics["best_score"] == max(float(r["score"]) for r in rows)


def test_ctrl_c_saves_and_continues(data, tmp_path, wsss):
    settings = ("recipe.steps=150", "checkpoint_every=1000")
    wsss("train", *settings)
    command = [
        sys.executable,
        "-m",
        "wsss_models.cli",
        "train",
        "tests.models.toy",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "stopped"),
    ]
    command += [a for s in ("device=cpu", *settings) for a in ("--set", s)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    file = tmp_path / "stopped/net/log.csv"
    while process.poll() is None and not (file.is_file() and len(file.read_text().splitlines()) > 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "saved at step" in err, err
    assert wsss("train", *settings, out="stopped")[0] == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "stopped"))
    assert log(tmp_path / "run") == log(tmp_path / "stopped")


def test_damaged_checkpoint(wsss, tmp_path):
    file = tmp_path / "run/net/checkpoint.pt"
    wsss("train")
    (tmp_path / "run/net/done.json").unlink()
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a checkpoint"):
        file.write_bytes(damaged)
        code, _, err = wsss("train")
        assert code == 2 and str(file) in err and "Delete" in err
    file.unlink()
    assert wsss("train")[0] == 0


class _Code:
    def __reduce__(self):
        return os.system, ("touch attacked",)


def test_hostile_checkpoint_runs_nothing(wsss, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wsss("train")
    (tmp_path / "run/net/done.json").unlink()
    torch.save({"format": 1, "model": _Code()}, tmp_path / "run/net/checkpoint.pt")
    code, _, err = wsss("train")
    assert code == 2 and "is not loaded" in err and not (tmp_path / "attacked").exists()


def test_full_disk(wsss, monkeypatch):
    def full(*_, **__):
        raise OutputError("cannot write checkpoint.pt: the disk is full")

    monkeypatch.setattr(training.checkpoint, "save", full)
    code, _, err = wsss("train")
    assert code == 1 and "the disk is full" in err


def test_refusal_of_the_system_while_saving(tmp_path):
    program = "import resource, torch, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    program += (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); from wsss_models.engine import checkpoint; from pathlib import Path; "
    )
    program += f"checkpoint.save(Path({str(tmp_path / 'x.pt')!r}), torch.zeros(10000))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "OutputError" in done.stderr.splitlines()[-1] and not list(tmp_path.iterdir())


def test_bad_images_are_named_or_skipped(wsss, data, tmp_path):
    (data / "3.png").write_bytes((data / "3.png").read_bytes()[:100])
    code, _, err = wsss("run")
    assert code == 1 and "3.png" in err
    code, out, _ = wsss("run", options=["--skip-bad"])
    assert code == 0 and "1 left out" in out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert "3" in summary["stages"]["labels"]["left_out"] and summary["stages"]["test"]["metrics"]["images"] == 5


def test_infinite_loss_ends_the_stage(wsss):
    code, _, err = wsss("train", "recipe.lr=1e30")
    assert code == 2 and "not finite" in err


def test_another_configuration_is_refused(wsss):
    wsss("train")
    code, _, err = wsss("train", "recipe.lr=0.5")
    assert code == 2 and "recipe.lr is 0.5 here and 0.05 there" in err
    assert wsss("run", "recipe.lr=0.5", options=["--overwrite"])[0] == 0
    assert wsss("train", "log_every=2", "recipe.lr=0.5")[0] == 0  # changes how it runs, not what comes out


def test_predict_any_images(wsss, data, tmp_path):
    wsss("train")
    code, out, _ = wsss("predict", options=["--images", str(data / "1.png")], config=False)
    assert code == 0 and "1 of 1 written" in out
    with Image.open(tmp_path / "run/images/1.png") as mask:
        assert mask.size == (16, 16) and mask.mode == "P"


def test_kernels_off_is_the_reference_backend(wsss, monkeypatch):
    seen = []
    monkeypatch.setattr(runs.wsss_kernels, "use_backend", lambda name: seen.append(name) or runs.contextlib.nullcontext())
    assert wsss("train", "kernels=off")[0] == 0 and seen == ["reference"]


def test_usage(wsss, capsys):
    assert cli.main(["run", "no_such", "--out", "x"]) == 2
    assert "METHOD: expected one of" in capsys.readouterr().err
    assert wsss("train", options=["--config", "configs/none.yaml"])[0] == 2
    assert cli.main(["run", "tests.models.toy", "--out", "x"]) == 2
    assert cli.main(["info"]) == 0 and "transformers" in capsys.readouterr().out


def test_two_processes_equal_one(wsss, data, tmp_path):
    plain = ("dropout=0.0", "noise=0.1", "recipe.accumulate=2")
    wsss("run", *plain)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "wsss_models.cli"]
    command += ["run", "tests.models.toy", "--data", str(data), "--out", str(tmp_path / "two")]
    command += [a for s in ("device=cpu", *plain) for a in ("--set", s)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "two/summary.json").read_text())
    assert all(stage["processes"] == 2 for stage in summary["stages"].values())
    a, b = (np.array(log(tmp_path / f), float) for f in ("run", "two"))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert summary["stages"]["labels"]["metrics"] == {"items": 6, "written": 6}
    assert sorted(p.name for p in (tmp_path / "two/labels").glob("*.png")) == [f"{i}.png" for i in range(6)]
    assert len((tmp_path / "two/test/images.csv").read_text().splitlines()) == 7
