"""pytest-benchmark on the quick cases, for regressions: `pytest benchmarks --benchmark-only --benchmark-compare`."""

import pytest
import torch

from wsss_kernels import registry
from wsss_kernels.testing import cast

CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in registry.specs() for case in spec.cases if case.quick]


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_speed(benchmark, spec, case):
    args, kwargs = cast(case.make(), torch.float32)
    with torch.no_grad():
        benchmark.pedantic(spec.public, args=args, kwargs=kwargs, warmup_rounds=2, rounds=20)
