"""pytest-benchmark on the quick cases, for regressions: `pytest benchmarks --benchmark-only --benchmark-compare`."""

import pytest
import torch

from wsss_kernels import registry
from wsss_kernels.bench import bind, case_mode
from wsss_kernels.testing import cast

# The mode is part of the name: a run that was kept is not compared with one of another mode.
CASES = [
    pytest.param(spec, case, id=f"{spec.name}-{case.name}-{case_mode(case)}")
    for spec in registry.specs()
    for case in spec.cases
    if case.quick
]


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_speed(benchmark, spec, case):
    call = bind(spec, spec.public, *cast(case.make(), torch.float32), case_mode(case))
    benchmark.pedantic(call, warmup_rounds=2, rounds=20)
