"""That memory which nobody wrote is NaN in these tests, however it is had, and that the rule sees it."""

from __future__ import annotations

import pytest
import torch

from tests.device import DEVICE
from tests.tolerance import assert_within_rule

X = torch.ones(3, 5).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: torch.empty(3, 5, dtype=dtype, device=DEVICE),
        lambda dtype: torch.empty_like(X, dtype=dtype),
        lambda dtype: X.new_empty(3, 5, dtype=dtype),
        lambda dtype: torch.empty_strided((3, 5), (7, 1), dtype=dtype, device=DEVICE),
    ],
    ids=["empty", "empty_like", "new_empty", "empty_strided"],
)
def test_uninitialised_memory_is_poison(make, dtype):
    assert make(dtype).isnan().all()
    assert (torch.empty(4, dtype=torch.int64, device=DEVICE) == torch.iinfo(torch.int64).max).all()


def test_a_result_that_is_not_written_whole_is_caught():
    exact = X.double()
    forgotten = torch.empty_like(X)
    forgotten[:, :4] = 1.0
    with pytest.raises(AssertionError, match="3 elements are not finite"):
        assert_within_rule(forgotten, exact, X, "planted")
