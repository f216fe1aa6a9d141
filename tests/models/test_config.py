"""Typed configurations: what is taken from YAML and the command line, and how mistakes are answered."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from wsss_models.engine import RunConfig, config
from wsss_models.errors import UsageError


@dataclass
class Inner:
    rate: float = 0.1


@dataclass
class Example(RunConfig):
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, float] = (1, 1.0)
    mode: Literal["on", "off"] = "on"
    limit: int | None = None
    table: dict[str, float] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def test_yaml_then_overrides(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("seed: 3\nsizes: [4, 5, 6]\ninner: {rate: 1e-4}\nmode: off\n")
    found = config.load(Example, file, ["seed=4", "inner.rate=2", "limit=7", "table={a: 1}", "kernels=off"])
    assert (found.seed, found.sizes, found.inner.rate, found.limit) == (4, (4, 5, 6), 2.0, 7)
    assert found.mode == "off" and found.table == {"a": 1.0} and not found.kernels
    assert config.load(Example, file).inner.rate == 1e-4
    assert config.from_record(Example, config.record(found)) == found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=1", "did you mean seed"),
        ("inner.rat=1", "did you mean inner.rate"),
        ("inner=3", "inner: expected Inner, got 3"),
        ("seed=1.5", "seed: expected int, got 1.5"),
        ("seed=true", "seed: expected int, got True"),
        ("inner.rate=fast", "inner.rate: expected float"),
        ("sizes=[1, a]", r"sizes\[1\]: expected int, got 'a'"),
        ("pair=[1]", "pair: expected"),
        ("mode=maybe", "mode: expected one of on, off"),
        ("limit=x", "limit: expected"),
        ("kernels=1", "kernels: expected bool"),
        ("seed", "expected key=value"),
        ("seed.a.b=1", "seed: expected int"),
        ("sizes=[1", "cannot be read as YAML"),
        ("log_every=0", "log_every: expected at least 1"),
        ("workers=-1", "workers: expected at least 0"),
    ],
)
def test_mistakes(override, message):
    with pytest.raises(UsageError, match=message):
        config.load(Example, None, [override])


def test_files(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "SHIPPED", tmp_path)
    (tmp_path / "shipped.yaml").write_text("seed: 9")
    assert config.load(Example, "configs/shipped.yaml").seed == 9
    with pytest.raises(UsageError, match="shipped are configs/shipped.yaml"):
        config.load(Example, "configs/other.yaml")
    with pytest.raises(UsageError, match="no such file"):
        config.load(Example, "/elsewhere/configs/shipped.yaml")
    for text, message in (
        ("- 1", "expected keys"),
        ("{", "cannot be read as YAML"),
        ("!!python/object/apply:os.system [true]", "cannot be read"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UsageError, match=message):
            config.load(Example, tmp_path / "bad.yaml")
    (tmp_path / "run.yaml").write_text("{method: gland, data: /data, config: {seed: 3}}")
    assert config.load(Example, tmp_path / "run.yaml") == Example(seed=3)
    (tmp_path / "empty.yaml").write_text("")
    assert config.load(Example, tmp_path / "empty.yaml") == Example()


def test_differences_leave_out_the_machine():
    a, b = config.record(Example()), config.record(Example(seed=1, workers=3, inner=Inner(2.0)))
    assert list(config.differences(a, b)) == [("seed", 0, 1), ("inner.rate", 0.1, 2.0)]
