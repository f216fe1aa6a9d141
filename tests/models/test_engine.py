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
from safetensors import torch as safetensors

from wsss_models import cli
from wsss_models.engine import load_weights, run as runs, training
from wsss_models.errors import UsageError
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


def test_ctrl_c_and_kill_continue(data, tmp_path, wsss):
    settings = ("recipe.steps=150", "checkpoint_every=7")
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
    file = tmp_path / "stopped/net/log.csv"
    for stop, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        rows = len(file.read_text().splitlines()) if file.is_file() else 0
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (file.is_file() and len(file.read_text().splitlines()) > rows + 5):
            time.sleep(0.02)
        process.send_signal(stop)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code and (code < 0 or "saved at step" in err), err
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


def test_full_disk_while_logging(wsss, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.Log, "row", full)
    code, _, err = wsss("train")
    assert code == 1 and "the disk is full" in err


def test_half_precision_continues_bit_for_bit(wsss, tmp_path, monkeypatch):
    wsss("train", "mixed_precision=bf16")
    flush = training._Loop._flush

    def dying(self, bar):
        if self.step == 5:
            raise Killed
        flush(self, bar)

    monkeypatch.setattr(training._Loop, "_flush", dying)
    with pytest.raises(Killed):
        wsss("train", "mixed_precision=bf16", out="killed")
    monkeypatch.setattr(training._Loop, "_flush", flush)
    assert wsss("train", "mixed_precision=bf16", out="killed")[0] == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "killed"))
    wsss("train", out="full")
    assert not same(weights(tmp_path / "run"), weights(tmp_path / "full"))


def test_tensorboard(wsss, monkeypatch):
    rows = []

    class Writer:
        def __init__(self, folder, purge_step):
            assert purge_step == 1

        def add_scalar(self, name, value, step):
            rows.append((name, step))

        def close(self):
            rows.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("fake", (), {"SummaryWriter": Writer}))
    assert wsss("train", "tensorboard=true")[0] == 0 and ("loss", 8) in rows and rows[-1] == "closed"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, _, err = wsss("train", "tensorboard=true", out="without")
    assert code == 2 and "pip install tensorboard" in err


def test_weights_of_users(tmp_path):
    weights = {"a": torch.ones(2)}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "a.pth")
    safetensors.save_file(weights, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        assert same(load_weights(tmp_path / name), weights)
    torch.save({"net": weights}, tmp_path / "b.pth")
    assert same(load_weights(tmp_path / "b.pth", "net"), weights)
    (tmp_path / "b.safetensors").write_bytes(b"damaged")
    torch.save({"model": weights, "code": _Code()}, tmp_path / "c.pth")
    for name, message in (
        ("b.pth", "dictionary of tensors"),
        ("b.safetensors", "damaged"),
        ("c.pth", "is not loaded"),
        ("d.pth", "no such"),
    ):
        with pytest.raises(UsageError, match=message):
            load_weights(tmp_path / name)


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
