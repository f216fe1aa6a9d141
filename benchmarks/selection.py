"""A pytest plugin (`-p benchmarks.selection`) that keeps the tests of some operators on some backends.

Environment:
    WSSS_SELECT_OPS         operators' folders, comma-separated.
    WSSS_SELECT_BACKENDS    backends, comma-separated. Tests without a backend run if they stand in the operator's own file.
    WSSS_SELECT_SAMPLES     at most so many samples of each test and operator, 0 for all.
"""

from __future__ import annotations

import collections
import os

import pytest

from wsss_kernels import registry

FOLDERS = sorted({spec.folder for spec in registry.specs()})


def _wanted(item: pytest.Item, folders: list[str], backends: list[str]) -> bool:
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if "backend" in params and params["backend"] not in backends:
        return False
    if "spec" in params:
        return "backend" in params and params["spec"].folder in folders
    named = [folder for folder in FOLDERS if item.path.stem == f"test_{folder}" or item.path.stem.startswith(f"test_{folder}_")]
    own = max(named, key=len, default="") in folders
    return own or ("backend" in params and any(item.name.startswith(f"test_{folder}[") for folder in folders))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    folders, backends = (os.environ[f"WSSS_SELECT_{name}"].split(",") for name in ("OPS", "BACKENDS"))
    limit, seen = int(os.environ.get("WSSS_SELECT_SAMPLES", "0")), collections.Counter[tuple]()
    kept = []
    for item in items:
        if not _wanted(item, folders, backends):
            continue
        params = item.callspec.params if hasattr(item, "callspec") else {}
        key = (item.path, item.name.partition("[")[0], getattr(params.get("spec"), "name", ""), params.get("backend"))
        seen[key] += 1
        if not limit or seen[key] <= limit:
            kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
