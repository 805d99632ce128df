"""What DoRA's kernels touch: every output element, and nothing outside their operands."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.dora_reference import DoraProblem, make_dora, run_dora
from tests.kernels.memory import every_guard, surrounded_by_nan
from tests.kernels.test_dropout import seed_of

# (M, K, N, r, dropout_p, drop_base, bias)
CASES = [
    pytest.param(37, 50, 45, 5, 0.0, True, True, id="r5"),
    pytest.param(37, 50, 45, 5, 0.3, True, True, id="r5-drop-base"),
    pytest.param(37, 50, 45, 5, 0.3, False, False, id="r5-adapter-only"),
    pytest.param(35, 33, 70, 40, 0.3, True, False, id="r40-drop-base"),
    pytest.param(1, 1, 1, 1, 0.0, True, False, id="ones"),
]


def in_nan(p: DoraProblem) -> DoraProblem:
    """The same problem, each operand a view into storage that is NaN all round."""
    vectors = {name: value for name in ("bias", "magnitude") if (value := getattr(p, name)) is not None}
    return replace(
        p,
        **{name: surrounded_by_nan(getattr(p, name)) for name in ("x", "weight", "lora_A", "lora_B", "dy")},
        **{name: surrounded_by_nan(value[None])[0] for name, value in vectors.items()},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("m", "k", "n", "r", "dropout_p", "drop_base", "bias"), CASES)
def test_nothing_stray(
    m: int,
    k: int,
    n: int,
    r: int,
    dropout_p: float,
    drop_base: bool,
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """NaN round the inputs, NaN in the outputs, guard zones beside them, addresses checked: the same bits."""
    p = make_dora(m, k, n, r, dtype, device, adapter=torch.float32, bias=bias)
    p.dropout_p, p.drop_base = dropout_p, drop_base
    seed = seed_of(3, device)
    expected = run_dora(p, seed=seed)
    q = in_nan(p)
    with every_guard(q, seed):
        found = run_dora(q, seed=seed)
    for name, tensor in found.items():
        assert torch.isfinite(tensor).all(), f"{name}: NaN was read, or elements were not written"
        assert torch.equal(tensor, expected[name]), name
