"""Runs the stages of a method in their order; each leaves a record when it is done, and is then not run again."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

import wsss_kernels

from ..errors import UsageError
from ..refine.outputs import prepare_folder, whole_file
from . import about, config as configs
from .context import Context, make_accelerator
from .method import Job, Method, Stage
from .stream import derive, seed_everything

DONE = "done.json"


def saved(out: Path) -> dict[str, Any] | None:
    """What `config.yaml` of a run says: method, data, config.

    Raises:
        UsageError: the file is damaged.
    """
    path = out / "config.yaml"
    if not path.is_file():
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found["config"], dict) or not all(isinstance(found[k], str) for k in ("method", "data")):
            raise TypeError("method, data and config are expected")
    except (yaml.YAMLError, KeyError, TypeError, ValueError, OSError) as error:
        raise UsageError(f"{path}: is damaged ({type(error).__name__}: {error}); use another --out") from None
    return found


def open_run(method: Method, config: Any, data: Path, out: Path) -> Context:
    """The context of a run, new or continued.

    Raises:
        UsageError: the folder holds a run of another method or configuration, or cannot be written; there is no data folder.
    """
    if not data.is_dir():
        raise UsageError(f"--data {data}: expected a folder that is there")
    before = saved(out)
    if before is not None:
        if before["method"] != method.name:
            raise UsageError(f"--out {out}: holds a run of {before['method']}; use another folder for {method.name}")
        changed = list(configs.differences(configs.record(config), before["config"]))
        if changed:
            texts = [f"{key} is {ours} here and {theirs} there" for key, ours, theirs in changed]
            raise UsageError(f"--out {out}: holds a run with another configuration ({'; '.join(texts)}); use another folder")
    context = Context(config, data, out, make_accelerator(config.device, config.mixed_precision))
    if context.main:
        prepare_folder(out)
        content = {"method": method.name, "data": str(data.resolve()), "config": configs.record(config)}
        with whole_file(out / "config.yaml") as file:
            file.write(yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())
    context.accelerator.wait_for_everyone()
    return context


def read_done(out: Path, stage: Stage) -> dict[str, Any] | None:
    """The record of a stage that is done."""
    try:
        found = json.loads((out / stage.name / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def choose(stages: Sequence[Stage], out: Path, kind: str | None, name: str | None) -> list[Stage]:
    """The stages that a command runs: all, those of a kind, or the named one.

    Raises:
        UsageError: there is no such stage, or one before it is not done. Of several `evaluate` stages those that can, run.
    """
    if name is not None and name not in [s.name for s in stages]:
        raise UsageError(f"--stage: expected one of {', '.join(s.name for s in stages)}, got {name!r}")
    chosen = [s for s in stages if kind in (None, s.kind) and name in (None, s.name)]
    if not chosen:
        raise UsageError(
            f"this method has no {kind} stage{f' {name}' if name else ''}; it has {', '.join(f'{s.name} ({s.kind})' for s in stages)}"
        )
    missing: list[str] = []
    possible, first = [], None
    for stage in stages:
        if stage in chosen:
            if missing:
                first = first or (stage.name, missing[0])
            else:
                possible.append(stage)
        elif stage.kind != "evaluate" and read_done(out, stage) is None:
            missing.append(stage.name)
    if first is not None and (kind != "evaluate" or not possible):
        raise UsageError(f"stage {first[0]}: stage {first[1]} must be run first")
    return possible


def run_stages(method: Method, context: Context, chosen: Sequence[Stage], *, overwrite: bool = False) -> dict[str, Any]:
    """Runs what is not done yet and returns the summary, which is also in `summary.json`."""
    stages = list(method.stages(context.config))
    with contextlib.nullcontext() if context.config.kernels else wsss_kernels.use_backend("reference"):
        for stage in chosen:
            if overwrite and context.main:
                shutil.rmtree(context.folder(stage.name), ignore_errors=True)
            context.accelerator.wait_for_everyone()
            if read_done(context.out, stage) is None:
                _run_stage(context, stage)
            elif context.main:
                print(f"{stage.name}: done before")
            if context.main:
                _write_json(context.out / "summary.json", _summary(method, context, stages))
    return _summary(method, context, stages)


def build(context: Context, stage: Stage) -> Job:
    """The stage's job, always with the same initial weights."""
    context.stage = stage.name
    seed_everything(derive(context.config.seed, stage.name, "build"))
    return stage.build(context)


def _run_stage(context: Context, stage: Stage) -> None:
    context.stage, context.bad = stage.name, {}
    if context.main:
        context.folder().mkdir(parents=True, exist_ok=True)
    context.accelerator.wait_for_everyone()
    started = time.perf_counter()
    metrics = build(context, stage).run(context)
    bad = dict(context.gather(list(context.bad.items())))
    if context.main:
        record = {
            "stage": stage.name,
            "kind": stage.kind,
            "metrics": metrics,
            "seconds": round(time.perf_counter() - started, 2),
            "left_out": bad,
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "processes": context.processes,
            "device": str(context.device),
            "versions": about.versions(),
        }
        _write_json(context.folder() / DONE, record)
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in metrics.items() if isinstance(v, (int, float))}
        print(f"{stage.name}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))
        if bad:
            print(f"{stage.name}: {len(bad)} left out: " + "; ".join(f"{k}: {v}" for k, v in list(bad.items())[:5]))
    context.accelerator.wait_for_everyone()


def _summary(method: Method, context: Context, stages: Sequence[Stage]) -> dict[str, Any]:
    records = {stage.name: read_done(context.out, stage) for stage in stages}
    done = {name: record for name, record in records.items() if record is not None}
    return {
        "method": method.name,
        "complete": len(done) == len(stages),
        "seconds": round(sum(record["seconds"] for record in done.values()), 2),
        "left_out": sum(len(record["left_out"]) for record in done.values()),
        "stages": done,
        "config": configs.record(context.config),
        "data": str(context.data.resolve()),
        "versions": about.versions(),
    }
