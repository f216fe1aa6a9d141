"""The helpers themselves: a planted error of each kind must be caught."""

import pytest
import torch

from wsss_kernels.testing import assert_matches_truth, cast, flatten, poisoned_allocations, threads

TRUTH = torch.linspace(-1, 1, 101, dtype=torch.float64)


def check(actual, dtype=torch.float32, **options):
    return assert_matches_truth(actual, TRUTH, TRUTH.float(), dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_right_result_passes(dtype):
    assert check(TRUTH.to(dtype), dtype) <= 1


def test_a_small_error_is_caught():
    with pytest.raises(AssertionError, match="error .* > .* allowed"):
        check(TRUTH.float() + 2e-6)


def test_one_wrong_value_is_caught():
    wrong = TRUTH.float()
    wrong[50] += 1e-3
    with pytest.raises(AssertionError, match="allowed"):
        check(wrong)


def test_float64_is_held_to_1e_12():
    with pytest.raises(AssertionError, match="float64"):
        check(TRUTH + 2e-12, torch.float64)
    check(TRUTH + 2e-11, torch.float64, gradient=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_caught(value):
    wrong = TRUTH.float()
    wrong[3] = value
    with pytest.raises(AssertionError, match="1 of 101 values are NaN or infinite"):
        check(wrong)


def test_nan_of_the_truth_is_expected():
    truth = TRUTH.clone()
    truth[3] = float("nan")
    assert_matches_truth(truth.float(), truth, truth.float(), torch.float32)
    with pytest.raises(AssertionError, match="NaN"):
        assert_matches_truth(TRUTH.float(), truth, truth.float(), torch.float32)


def test_a_wrong_shape_is_caught():
    with pytest.raises(AssertionError, match="shape"):
        check(TRUTH[None].float())


def test_integers_are_exact():
    labels = torch.arange(5)
    assert_matches_truth(labels.int(), labels, None, torch.float32)
    with pytest.raises(AssertionError, match="1 of 5"):
        assert_matches_truth(torch.tensor([0, 1, 2, 3, 5]), labels, None, torch.float32)


def test_zeros_for_a_noisy_truth_fail_by_cosine():
    noisy = TRUTH.float() + torch.linspace(-0.1, 0.1, 101).flip(0) * 20
    with pytest.raises(AssertionError, match="cosine"):
        assert_matches_truth(torch.zeros(101), TRUTH, noisy, torch.float32)


def test_poison_is_visible():
    with poisoned_allocations():
        assert torch.empty(10).isnan().all()


def test_cast_copies_and_keeps_integers():
    a, b = torch.rand(2), torch.arange(2)
    x, y = flatten(cast((a, [b]), torch.float32))
    assert x.data_ptr() != a.data_ptr() and y.dtype == torch.int64


def test_threads():
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
