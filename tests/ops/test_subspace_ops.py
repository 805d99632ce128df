"""The projections of an intrinsic dimension against their matrices, and the ops that add them to weights."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from fastpeft.ops import subspace, subspace_embedding, subspace_linear, subspace_rows, subspace_weight
from fastpeft.ops.subspace import Projection, add_projected, coordinates, projected_gradient
from tests.ops.projections import F64, KINDS, explicit, projection_of


@pytest.mark.parametrize("d", [1, 2, 7, 40, 100, 131])
def test_hashed_columns_are_orthonormal(d):
    numels = (50, 13, 200, 1, 131)
    projection, made = projection_of("hashed", d, numels)
    P = explicit(projection, made, numels)
    torch.testing.assert_close(
        P.t() @ P, torch.eye(d, dtype=F64), rtol=0, atol=sum(numels) * torch.finfo(F64).eps
    )
    assert ((P != 0).sum(1) == 1).all()  # one coordinate for each parameter
    counts = (P != 0).sum(0)
    torch.testing.assert_close(P.abs().max(0).values, counts.double().rsqrt())


@pytest.mark.parametrize("d", [5, 32, 100])
def test_fastfood_of_whole_blocks_has_unit_columns(d):
    n = max(32, 2 ** math.ceil(math.log2(d)))
    numels = (20 * n, 30 * n)
    projection, made = projection_of("fastfood", d, numels)
    assert projection.block == n
    P = explicit(projection, made, numels)
    gram = P.t() @ P
    torch.testing.assert_close(gram.diagonal(), torch.ones(d, dtype=F64), rtol=1e-12, atol=0)
    # Each is a sum of g^2 with as many plus as minus signs: of variance 2 / D.
    off = gram - gram.diagonal().diag()
    deviation = (off.square().sum() / (d * (d - 1))).sqrt() * math.sqrt(sum(numels) / 2)
    assert abs(deviation - 1) < 4 / math.sqrt(d * (d - 1))  # as of so many pairs, four times
    # As for a normal matrix, entries of every row have variance 1/D and hardly any skew or excess.
    z = P * math.sqrt(sum(numels))
    assert abs(z.mean()) < 0.03
    assert abs(z.square().mean() - 1) < 0.02
    assert abs(z.pow(4).mean() - 3) < 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_keeps_its_length(kind):
    numels = (3000, 700, 64, 129)
    ratios = []
    for seed in range(8):
        projection, made = projection_of(kind, 90, numels, seed)
        P = explicit(projection, made, numels)
        step = torch.randn(90, dtype=F64, generator=torch.Generator().manual_seed(seed))
        ratios.append(((P @ step).norm() / step.norm()).item())
    if kind == "hashed":
        assert ratios == pytest.approx([1.0] * 8, abs=1e-12)
    else:  # sqrt(1 + a normal number of deviation sqrt(2 / D)), wider for the few directions
        assert ratios == pytest.approx([1.0] * 8, abs=0.1)
        assert sum(ratios) / 8 == pytest.approx(1.0, abs=0.04)


def test_the_transform_is_hadamards():
    for n in (1, 2, 32, 64, 128, 1024, 8192):
        u = torch.randn(3, n, dtype=F64)
        H64 = projection_of("fastfood", 4, (8,))[1][1]
        expected = u.clone()
        half = 1
        while half < n:  # the butterfly
            pairs = expected.view(3, n // (2 * half), 2, half)
            expected = torch.stack(
                [pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2
            ).view(3, n)
            half *= 2
        torch.testing.assert_close(subspace._transformed(u, H64), expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("n", [32, 64, 256, 4096])
def test_permutations_are_permutations(n):
    projection, made = projection_of("fastfood", n, (n * 50,))
    found = subspace._Draw(projection, torch.arange(50), made).permutation
    assert torch.equal(found.sort(1).values, torch.arange(n).expand(50, n))
    assert len({tuple(row) for row in found.tolist()}) == 50
    # No place goes to near itself more often than it should.
    assert ((found - torch.arange(n)).abs() < n // 8).double().mean() < 0.3


def test_signs_and_levels_are_even():
    projection, _ = projection_of("fastfood", 1024, (2**20,))
    hashed, _ = subspace._hashed(projection, torch.arange(1024))
    signs = subspace._signs(hashed, F64)
    assert abs(signs.mean()) < 4 / 1024
    for other in (signs.roll(1, 0), signs.roll(1, 1), signs.roll((1, 1), (0, 1))):
        assert abs((signs * other).mean()) < 4 / 1024
    levels = torch.bincount(((hashed >> 19) & 4095).flatten(), minlength=4096).double()
    chi_square = ((levels - 256) ** 2 / 256).sum()
    assert abs(chi_square - 4095) < 5 * math.sqrt(2 * 4095)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_and_blocks_make_other_projections(kind):
    numels = (400,)
    a, b, c = (explicit(*projection_of(kind, 40, numels, seed), numels) for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a[:40], a[40:80])


@pytest.mark.parametrize("d", [6, 50, 700])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_transposed_matrixs(kind, d, monkeypatch):
    numels = (830, 41)
    projection, made = projection_of(kind, d, numels)
    P = explicit(projection, made, numels)
    G, W = torch.randn(830, dtype=F64), torch.randn(830, dtype=F64)
    theta = torch.randn(d, dtype=F64, requires_grad=True)
    phi = coordinates(projection, theta, made)
    found = {}
    for chunk in (1, 3, 2**16):  # the same whatever is computed at a time
        monkeypatch.setattr(Projection, "chunk", lambda self, like, chunk=chunk: chunk)
        buffer = G.clone()
        plain = projected_gradient(projection, G, made, 0)
        refilled = projected_gradient(projection, buffer, made, 0, refill=(W, phi.detach()))
        torch.testing.assert_close(plain, refilled, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(buffer, W + P[:830] @ theta.detach(), rtol=1e-12, atol=1e-12)
        found[chunk] = plain
        (dtheta,) = torch.autograd.grad(phi, theta, plain, retain_graph=True)
        torch.testing.assert_close(dtheta, P[:830].t() @ G, rtol=1e-11, atol=1e-11)
    for other in found.values():
        torch.testing.assert_close(other, found[1], rtol=1e-12, atol=1e-12)


def test_another_process_draws_the_same(tmp_path):
    code = (
        "import torch; from fastpeft.ops.subspace import *\n"
        "for fast in (True, False):\n"
        "    p = Projection(fast, 37, 5, 500); t = tables(p, [500], torch.float64)\n"
        "    phi = coordinates(p, torch.arange(37, dtype=torch.float64), t)\n"
        "    w = add_projected(p, torch.zeros(500, dtype=torch.float64), phi, t, 2, torch.float64)\n"
        "    print(w.numpy().tobytes().hex())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in "ab"
    ]
    assert runs[0].stdout == runs[1].stdout
    for line, kind in zip(runs[0].stdout.split(), KINDS, strict=True):
        projection, made = projection_of(kind, 37, (500,), 5)
        phi = coordinates(projection, torch.arange(37, dtype=F64), made)
        here = add_projected(projection, torch.zeros(500, dtype=F64), phi, made, 2, F64)
        assert here.numpy().tobytes().hex() == line


def test_the_projection_of_today_is_that_of_tomorrow():
    """Files hold a seed: other numbers for it would make other models of them."""
    for kind, expected in zip(KINDS, (GOLDEN_FASTFOOD, GOLDEN_HASHED), strict=True):
        projection, made = projection_of(kind, 5, (100,), 11)
        phi = coordinates(projection, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=F64), made)
        found = add_projected(projection, torch.zeros(100, dtype=F64), phi, made, 0, F64)
        torch.testing.assert_close(found[:6], torch.tensor(expected, dtype=F64), rtol=1e-5, atol=1e-6)


GOLDEN_FASTFOOD = [-0.1659944, -1.3027902, 0.3176753, 0.7388659, -0.9306264, -0.6848319]
GOLDEN_HASHED = [0.4472136, -0.8944272, 0.2236068, 0.6708204, 1.118034, 0.8944272]


@pytest.mark.parametrize("rows_alone", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_ops_pass_gradcheck(kind, rows_alone, monkeypatch):
    torch.manual_seed(0)
    numels = (6 * 9, 6, 11 * 8)
    projection, made = projection_of(kind, 9, numels)
    spec = projection.spec()
    W, b, table = (torch.randn(s, dtype=F64) for s in ((6, 9), (6,), (11, 8)))
    firsts = [0, projection.blocks(54), projection.blocks(54) + projection.blocks(6)]
    x = torch.randn(2, 3, 9, dtype=F64, requires_grad=True)
    theta = torch.randn(9, dtype=F64, requires_grad=True)
    ids = torch.tensor([[0, 10, 3], [3, 2, 2]])
    monkeypatch.setattr(subspace_embedding, "is_cheaper", lambda *_: rows_alone)

    def linear(x, theta, transposed=False, bias=True):
        phi = coordinates(projection, theta, made)
        weight = W.t().contiguous() if transposed else W
        first = [firsts[0], firsts[1] if bias else -1]
        return subspace_linear.subspace_linear(x, weight, b, phi, made, spec, first, transposed=transposed)

    def embedding(theta):
        phi = coordinates(projection, theta, made)
        return subspace_embedding.subspace_embedding(ids, table, phi, made, spec, firsts[2], 2)

    def weight(theta):
        return subspace_weight.subspace_weight(W, coordinates(projection, theta, made), made, spec, 0)

    P = explicit(projection, made, numels)
    moved = W + (P[:54] @ theta).view(6, 9)
    torch.testing.assert_close(linear(x, theta), F.linear(x, moved, b + P[54:60] @ theta))
    torch.testing.assert_close(linear(x, theta, bias=False), F.linear(x, moved, b))
    torch.testing.assert_close(embedding(theta), (table + (P[60:] @ theta).view(11, 8))[ids])
    assert torch.autograd.gradcheck(linear, (x, theta))
    assert torch.autograd.gradcheck(lambda x, t: linear(x, t, transposed=True), (x, theta))
    assert torch.autograd.gradcheck(lambda t: linear(x.detach(), t), (theta,))
    assert torch.autograd.gradcheck(lambda x: linear(x, theta.detach()), (x,))
    assert torch.autograd.gradcheck(weight, (theta,))
    # torch's embedding gives no gradient for the padding row, which a difference quotient sees.
    (found,) = torch.autograd.grad(embedding(theta).sum(), theta)
    rows = torch.zeros(11, 8, dtype=F64)
    for row in ids.flatten().tolist():
        rows[row] += row != 2
    torch.testing.assert_close(found, P[60:].t() @ rows.flatten())


def test_rows_of_a_table_are_the_tables_rows():
    for width, d in ((48, 5), (8, 40), (64, 32), (70, 100), (7, 700)):
        for kind in KINDS:
            projection, made = projection_of(kind, d, (90 * width,))
            table, ids = torch.randn(90, width), torch.tensor([0, 89, 5, 5, 31], dtype=torch.int32)
            made = [t.float() if t.is_floating_point() else t for t in made]
            phi = coordinates(projection, torch.randn(d), made)
            whole = add_projected(projection, table, phi, made, 7, torch.float32)
            rows = subspace_rows.rows_added(projection, table, ids, phi, made, 7)
            torch.testing.assert_close(rows, whole[ids.long()], rtol=1e-6, atol=1e-6)
