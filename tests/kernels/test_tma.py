"""The GEMM with rank-r epilogue by TMA, against fp64 by the rule of tests/tolerance.py.

TMA wants rows that start on 16 bytes, so sizes and paddings are multiples of 16 elements here; they are no
multiples of the interpreter's 32x32x32 tile, and M is anything.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpeft_kernels import configs, launch
from fastpeft_kernels.primitives import RowScale
from fastpeft_kernels.rank_r_gemm_tma import rank_r_gemm_tma, select
from tests.device import DEVICE
from tests.kernels.memory import every_guard, surrounded_by_nan, untouched
from tests.kernels.test_properties import assert_exact, exactly, layouts, scalings
from tests.tolerance import assert_within_rule

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# (M, K, N, r)
SHAPES = [
    pytest.param(33, 48, 80, 1, id="r1"),
    pytest.param(70, 80, 48, 5, id="r5"),
    pytest.param(64, 64, 96, 16, id="even-r16"),
    pytest.param(130, 48, 80, 40, id="r40-two-rank-tiles"),
    pytest.param(35, 80, 48, 130, id="r130-above-in-and-out"),
    pytest.param(1, 48, 16, 8, id="one-token"),
]


@pytest.fixture(autouse=True)
def _one_unit(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Any number of tiles fills the device; a GPU without TMA has nothing to test."""
    monkeypatch.setattr(launch, "unit_count", lambda device: 1)
    if not configs.TABLES[configs.architecture(device)][configs.RANK_R_GEMM_TMA]:
        pytest.skip("no TMA on this device")


class Product:
    """Operands of `c * (p q + scale * low r) + bias`; by_columns as in forward, where q is W^T."""

    def __init__(
        self,
        m: int,
        k: int,
        n: int,
        r: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        by_columns: bool = True,
        adapter: torch.dtype | None = None,
        bias: bool = True,
        row_scale: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(m * 1_000_003 + k * 10_007 + n * 101 + r)

        def draw(*shape: int, size: float = 1.0, to: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*shape, generator=generator) * size).to(device, to)

        adapter = adapter or dtype
        self.p, self.low = draw(m, k), draw(m, r)
        self.q = draw(n, k, size=k**-0.5).t() if by_columns else draw(k, n, size=k**-0.5)
        self.r = draw(r, n, size=r**-0.5, to=adapter)
        if by_columns:
            self.r = self.r.t().contiguous().t()
        self.bias = draw(n) if bias else None
        self.scale = 0.7
        self.row_scale = None
        if row_scale:
            self.row_scale = RowScale(
                magnitude=draw(n, to=torch.float32), norm=draw(n, to=torch.float32).abs() + 0.5
            )

    def run(self, *, keep_z: bool = False) -> tuple[Tensor, Tensor | None]:
        config = select(self.p, self.q, self.low.shape[1])
        assert config is not None
        return rank_r_gemm_tma(
            self.p,
            self.q,
            self.low,
            self.r,
            self.bias,
            self.scale,
            config,
            scale_columns=self.row_scale,
            keep_z=keep_z,
        )

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """out and z in plain torch."""
        z = self.p.to(dtype) @ self.q.to(dtype) + self.scale * (self.low.to(dtype) @ self.r.to(dtype))
        out = z
        if self.row_scale is not None:
            out = out * (self.row_scale.magnitude.to(dtype) / self.row_scale.norm.to(dtype))
        return (out + self.bias.to(dtype) if self.bias is not None else out), z

    def check(self, *, keep_z: bool = False) -> None:
        out, z = self.run(keep_z=keep_z)
        reference, plain = self.plain(torch.float64), self.plain(self.p.dtype)
        assert out.dtype == self.p.dtype
        assert_within_rule(out, reference[0], plain[0], "out")
        assert (z is not None) == keep_z
        if z is not None:
            assert_within_rule(z, reference[1], plain[1], "z")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("by_columns", [True, False], ids=["forward", "backward"])
@pytest.mark.parametrize(("m", "k", "n", "r"), SHAPES)
def test_lora(
    m: int, k: int, n: int, r: int, by_columns: bool, dtype: torch.dtype, device: torch.device
) -> None:
    Product(m, k, n, r, dtype, device, by_columns=by_columns, bias=by_columns).check()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("keep_z", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_row_scale(bias: bool, keep_z: bool, dtype: torch.dtype, device: torch.device) -> None:
    Product(70, 48, 80, 5, dtype, device, bias=bias, row_scale=True).check(keep_z=keep_z)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_guarded_rows(dtype: torch.dtype, device: torch.device) -> None:
    """A norm of 0 gives 0, m = 0 and m near 0 give 2^-100 z; no other row's bits move."""
    product = Product(70, 48, 80, 5, dtype, device, bias=False, row_scale=True)
    before, z_before = product.run(keep_z=True)
    scale = product.row_scale
    assert scale is not None
    scale.magnitude[3], scale.magnitude[4], scale.norm[5] = 0.0, -1e-36, 0.0
    after, z = product.run(keep_z=True)
    others = [i for i in range(80) if i not in (3, 4, 5)]
    assert torch.equal(after[:, others], before[:, others])
    assert torch.equal(z, z_before)  # type: ignore[arg-type]
    assert z is not None
    assert not after[:, 5].any()
    if dtype == torch.bfloat16:
        assert torch.equal(after[:, 3], z[:, 3] * 2.0**-100)
        assert torch.equal(after[:, 4], z[:, 4] * -(2.0**-100))
    else:
        assert not after[:, 3:5].any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_fp32_adapters(dtype: torch.dtype, device: torch.device) -> None:
    product = Product(70, 48, 80, 40, dtype, device, adapter=torch.float32)
    assert product.bias is not None
    product.bias = product.bias.float()
    product.check()


@pytest.mark.parametrize("scale", [0.0, 1e-31, -2.0])
def test_scale(scale: float, device: torch.device) -> None:
    product = Product(40, 48, 80, 5, torch.bfloat16, device)
    product.scale = scale
    product.check()


@pytest.mark.parametrize("by_columns", [True, False], ids=["forward", "backward"])
def test_nothing_outside_is_read_or_written(by_columns: bool, device: torch.device) -> None:
    """Inputs lie in NaN, outputs between guards, and every address belongs to an element."""
    product = Product(70, 48, 80, 40, torch.bfloat16, device, by_columns=by_columns, row_scale=True)
    expected = product.run(keep_z=True)
    product.p = surrounded_by_nan(product.p, padding=16)
    product.q = surrounded_by_nan(product.q.t(), 16).t() if by_columns else surrounded_by_nan(product.q, 16)
    product.low, product.r = surrounded_by_nan(product.low), surrounded_by_nan(product.r)
    with every_guard(vars(product)):
        out, z = product.run(keep_z=True)
    assert z is not None
    assert torch.equal(out, expected[0])
    assert torch.equal(z, expected[1])  # type: ignore[arg-type]


@st.composite
def exact_products(draw: st.DrawFn) -> Product:
    """-1, 0 and 1, factors of powers of two, rows that start on 16 elements, in NaN or not."""
    m, r = draw(st.integers(1, 70)), draw(st.one_of(st.integers(1, 9), st.integers(10, 80)))
    k, n = (16 * draw(st.integers(1, 5)) for _ in range(2))
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    adapter = draw(st.sampled_from([dtype, torch.float32]))
    by_columns, padded = draw(st.booleans()), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def integers(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator).to(DEVICE, to)

    def laid(tensor: Tensor) -> Tensor:
        return surrounded_by_nan(tensor, padding=16) if padded else tensor

    product = Product(m, k, n, r, dtype, DEVICE, by_columns=by_columns)
    product.p, product.low = laid(integers(m, k)), draw(layouts)(integers(m, r))
    product.q = laid(integers(n, k)).t() if by_columns else laid(integers(k, n))
    product.r = draw(layouts)(integers(r, n, to=adapter))
    product.bias = draw(st.none() | st.just(integers(n, to=adapter)))
    product.scale = draw(scalings)
    if draw(st.booleans()):
        c, norm = (
            torch.tensor(values)[torch.randint(len(values), (n,), generator=generator)].to(DEVICE)
            for values in ([1.0, 2.0, -1.0, -2.0], [0.5, 1.0, 4.0])
        )
        product.row_scale = RowScale(magnitude=(c * norm).to(adapter), norm=norm)
    return product


@exactly
@given(product=exact_products())
def test_any_shape_exactly(product: Product) -> None:
    """As in test_properties.py: the fp64 result rounded once, bit for bit."""
    with untouched(vars(product)):
        out, z = product.run(keep_z=product.row_scale is not None)
    found = {"out": out} | ({} if z is None else {"z": z})
    assert_exact(found, dict(zip(("out", "z"), product.plain(torch.float64), strict=True)), out.dtype)


def test_runs_are_equal_to_the_bit(device: torch.device) -> None:
    product = Product(70, 48, 80, 40, torch.bfloat16, device)
    assert torch.equal(product.run()[0], product.run()[0])


def test_where_the_plain_kernel_is_used(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    p, q = of(64, 64), of(64, 64)
    assert select(p, q, 16) is not None
    assert select(p, q.t(), 16) is not None
    assert select(of(64, 64, dtype=torch.float32), of(64, 64, dtype=torch.float32), 16) is None
    assert select(of(64, 64).t(), q, 16) is None, "tokens across"
    assert select(of(1, 64).expand(64, 64), q, 16) is None, "rows on top of each other"
    assert select(of(64, 63), of(63, 64), 16) is None, "rows not on 16 bytes"
    assert select(p, of(64, 63), 16) is None, "out's rows not on 16 bytes"
    assert select(of(65 * 64)[1:4097].view(64, 64), q, 16) is None, "base not on 16 bytes"
    assert select(of(64, 0), of(0, 64), 16) is None
    assert select(of(0, 64), q, 16) is None, "no tokens"
    monkeypatch.setattr(launch, "unit_count", lambda device: 5)
    assert select(p, q, 16) is None or device.type == "cuda", "four tiles for five units"


def test_rows_by_rank_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = (torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta") for _ in range(2))
    q = q.t()
    for target, small, large in (("sm_90", 256, 128), ("sm_100", 256, 128)):
        monkeypatch.setattr(configs, "architecture", lambda device, target=target: target)
        found = select(p, q, 16), select(p, q, 512)
        assert [row and row.block_n for row in found] == [small, large]
        assert (select(p, q, 16, keep_z=True) is None) == (target == "sm_100")
        assert all(row is not None and row.warp_specialize == (target == "sm_100") for row in found)
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_80")
    assert select(p, q, 16) is None


def test_warp_specialisation_is_part_of_the_row(device: torch.device) -> None:
    """The interpreter runs both; only the compiled code differs."""
    product = Product(70, 48, 80, 5, torch.bfloat16, device)
    config = select(product.p, product.q, 5)
    assert config is not None
    changed = replace(config, warp_specialize=not config.warp_specialize)
    arguments = (product.p, product.q, product.low, product.r, product.bias, product.scale)
    out, _ = rank_r_gemm_tma(*arguments, changed)
    assert torch.equal(out, product.run()[0])
