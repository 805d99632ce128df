"""Intrinsic dimension: the projections against the matrices they stand for, and the method in the verbs."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import math
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import fastpeft
from bench.saved import count, state_of
from fastpeft import IntrinsicDimension, intrinsic
from fastpeft.ops import subspace, subspace_layers, subspace_rows
from fastpeft.ops.subspace import Projection, add_projected, coordinates, projected_gradient, tables
from tests import architectures
from tests.models import gpt2, llama, tokens
from tests.test_bitfit import bert
from tests.test_example import examples_on_path  # noqa: F401  (fixture)
from tests.test_patch import assert_unchanged, snapshot
from tests.tolerance import assert_within_rule

KINDS = ["fastfood", "hashed"]
F64 = torch.float64


@pytest.fixture(scope="module")
def toy():
    """The example's toy problem, whose intrinsic dimension is known."""
    return importlib.import_module("intrinsic_dimension")


def projection_of(kind, d, numels, seed=3):
    projection = Projection(kind == "fastfood", d, seed, sum(numels))
    return projection, tables(projection, numels, F64)


def explicit(projection, tables_, numels):
    """P [D, d], a column for each coordinate."""
    columns = []
    for unit in torch.eye(projection.d, dtype=F64):
        phi, first, parts = coordinates(projection, unit, tables_), 0, []
        for numel in numels:
            zero = torch.zeros(numel, dtype=F64)
            parts.append(add_projected(projection, zero, phi, tables_, first, F64))
            first += projection.blocks(numel)
        columns.append(torch.cat(parts))
    return torch.stack(columns, dim=1)


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
    spec = subspace_layers.spec_of(projection)
    W, b, table = (torch.randn(s, dtype=F64) for s in ((6, 9), (6,), (11, 8)))
    firsts = [0, projection.blocks(54), projection.blocks(54) + projection.blocks(6)]
    x = torch.randn(2, 3, 9, dtype=F64, requires_grad=True)
    theta = torch.randn(9, dtype=F64, requires_grad=True)
    ids = torch.tensor([[0, 10, 3], [3, 2, 2]])
    monkeypatch.setattr(subspace_layers, "is_cheaper", lambda *_: rows_alone)

    def linear(x, theta, transposed=False, bias=True):
        phi = coordinates(projection, theta, made)
        weight = W.t().contiguous() if transposed else W
        first = [firsts[0], firsts[1] if bias else -1]
        return subspace_layers.subspace_linear(x, weight, b, phi, made, spec, first, transposed=transposed)

    def embedding(theta):
        phi = coordinates(projection, theta, made)
        return subspace_layers.subspace_embedding(ids, table, phi, made, spec, firsts[2], 2)

    def weight(theta):
        return subspace_layers.subspace_weight(W, coordinates(projection, theta, made), made, spec, 0)

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


def moved(model, seed=0, by=1.0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


def in_references(run, monkeypatch):
    """What the formulas give where nothing is saved on."""
    with monkeypatch.context() as patched:
        patched.setattr(subspace_layers, "is_transformed", lambda: True)
        return run()


def vit():
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16,
        patch_size=4
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def inputs_of(model):
    if isinstance(model, ViTForImageClassification):
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}
    if model.config.is_encoder_decoder:
        return architectures.text_to_text()
    return {"input_ids": tokens()}


MODELS = {
    "llama": llama,
    "llama-tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "bert": bert,
    "vit": vit,
    "t5": architectures.ARCHITECTURES["t5"][0],
    "mamba": architectures.ARCHITECTURES["mamba"][0],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [{}, {"projection": "hashed", "structure_aware": True}], ids=["fastfood", "said"]
)
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_moves_by_the_formula(name, options, monkeypatch):
    model = MODELS[name]().double()
    base = copy.deepcopy(model)
    fastpeft.patch(model, IntrinsicDimension(d=70, **options))
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs_of(model).items()}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)  # theta_d begins at 0
    moved(model, by=2.0)

    def run():
        logits = model(**inputs).logits
        model.zero_grad()
        logits.square().sum().backward()
        return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    logits, gradients = run()
    expected, by_reference = in_references(run, monkeypatch)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)
    assert set(gradients) == {f"subspace.{n}" for n, _ in model.subspace.named_parameters()}
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, by_reference[key], rtol=1e-8, atol=1e-10)
    # And the reference is W_0 + lambda P theta_d, in a plain model.
    numels = [p.numel() for p in base.parameters()]
    subspace_ = model.subspace
    P = explicit(subspace_.projection, subspace_.tables, numels)
    delta = (P @ subspace_.theta_d.detach()).split(numels)
    scales = {}
    for path, module in base.named_modules():
        for p in module._parameters.values():
            if p is not None and id(p) not in scales:
                scales[id(p)] = path
    paths = list(dict.fromkeys(scales.values()))
    with torch.no_grad():
        for p, change in zip(base.parameters(), delta, strict=True):
            scale = 1.0 if subspace_.lambdas is None else subspace_.lambdas[paths.index(scales[id(p)])]
            p += scale * change.view(p.shape)
        torch.testing.assert_close(base(**inputs).logits, logits, rtol=1e-9, atol=1e-11)
    assert fastpeft.report(model).trainable_parameters == 70


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_plain_pytorchs(kind):
    """In bf16: y and dtheta_d as a linear's whose weight was rounded to bf16."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 80).bfloat16()
    model = fastpeft.patch(nn.Sequential(linear), IntrinsicDimension(d=60, projection=kind))
    moved(model, by=3.0)
    x, dy = torch.randn(64, 96).bfloat16(), torch.randn(64, 80).bfloat16()
    y = model(x)
    y.backward(dy)
    subspace_ = model.subspace
    projection = subspace_.projection
    made = [t.double() if t.is_floating_point() else t for t in subspace_.tables]
    numels = [80 * 96, 80]
    P = explicit(projection, made, numels)
    theta = subspace_.theta_d.detach().double()
    W0, b0 = (model[0]._parameters[n].detach().double() for n in ("weight", "bias"))
    W, b = W0 + (P[:7680] @ theta).view(80, 96), b0 + P[7680:] @ theta
    exact = F.linear(x.double(), W, b)
    plain = F.linear(x, W.bfloat16(), b.bfloat16())
    assert_within_rule(y, exact, plain, "y")
    # The sum is rounded once, and its delta not before.
    operands = subspace_.operands(0, model[0]._parameters["weight"])
    delta = add_projected(projection, torch.zeros(80, 96), operands[0], operands[1], 0, torch.float32)
    assert torch.equal(model[0].weight, (W0.float() + delta).bfloat16())
    dW, db = dy.double().t() @ x.double(), dy.double().sum(0)
    by_hand = P.t() @ torch.cat([(dy.t() @ x).double().flatten(), dy.sum(0).double()])
    assert_within_rule(subspace_.theta_d.grad, P.t() @ torch.cat([dW.flatten(), db]), by_hand, "dtheta_d")


def test_one_layer_is_all_that_lives(monkeypatch):
    """Nothing of a weight's size is kept for backward, and one such tensor lives at a time in it."""
    torch.manual_seed(0)
    sizes = [64, 512, 512, 512, 64]
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(*layers)
    x = torch.randn(4, 64)
    full = count(lambda: model(x).sum(), [x, *state_of(model)])
    fastpeft.patch(model, IntrinsicDimension(d=100))
    kept = count(lambda: model(x).sum(), [x, *state_of(model)])
    assert kept[0] <= full[0] + 4 * 4 * 2 * 128  # phi, for each layer
    alive = []
    real = subspace_layers.projected_gradient

    def watched(*args, **kwargs):
        import gc

        big = {
            t.untyped_storage().data_ptr()
            for t in gc.get_objects()
            if isinstance(t, torch.Tensor) and t.numel() == 512 * 512 and not isinstance(t, nn.Parameter)
        }
        base = {p.untyped_storage().data_ptr() for p in model.parameters()}
        alive.append(len(big - base))
        return real(*args, **kwargs)

    monkeypatch.setattr(subspace_layers, "projected_gradient", watched)
    model(x).sum().backward()
    assert max(alive) == 1
    assert len(alive) == 4


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("structure_aware", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_files_are_tiny_and_give_the_model_to_the_bit(kind, structure_aware, make, tmp_path):
    config = IntrinsicDimension(d=50, projection=kind, structure_aware=structure_aware, seed=9)
    model = moved(fastpeft.patch(make(), config))
    fastpeft.save(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == 50
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2500
    again = fastpeft.load(make(), tmp_path)
    with torch.no_grad():
        expected = model(tokens()).logits
        assert torch.equal(again(tokens()).logits, expected)
        assert not torch.equal(make()(tokens()).logits, expected)
        fastpeft.load(moved(again, 1), tmp_path)
        assert torch.equal(again(tokens()).logits, expected)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        f"subspace.{n}" for n, _ in again.subspace.named_parameters()
    }


@pytest.mark.parametrize(
    "make", [llama, lambda: llama(tied=True), gpt2, vit], ids=["llama", "tied", "gpt2", "vit"]
)
def test_lifecycle(make):
    model = make()
    base = model(**inputs_of(model)).logits.detach()
    before = snapshot(model)
    moved(fastpeft.patch(model, IntrinsicDimension(d=60, structure_aware=True)))
    run = lambda m: m(**inputs_of(m)).logits.detach()  # noqa: E731
    expected = run(model)
    with fastpeft.disable_adapters(model):
        assert torch.equal(run(model), base)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin), expected)
        moved(twin, 5)
        assert not torch.equal(run(twin), expected)
        assert torch.equal(run(model), expected)
        fastpeft.unpatch(twin)
        assert torch.equal(run(twin), base)
    fastpeft.merge(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)
    plain = make()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "subspace" not in k})
    assert torch.equal(run(plain), run(model))
    with pytest.raises(fastpeft.PatchError, match="is merged"):
        fastpeft.merge(model)
    with pytest.raises(fastpeft.PatchError, match="is merged"), fastpeft.disable_adapters(model):
        pass
    fastpeft.unmerge(model)
    assert torch.equal(run(model), expected)
    with pytest.raises(fastpeft.PatchError, match="nothing is merged"):
        fastpeft.unmerge(model)
    fastpeft.merge(model)
    fastpeft.unpatch(model)
    assert_unchanged(model, before)
    assert type(model) is type(make())
    assert [type(m) for m in model.modules()] == [type(m) for m in make().modules()]


def test_a_merge_without_base_cannot_be_undone():
    model = moved(fastpeft.patch(llama(), IntrinsicDimension(d=20)))
    with torch.no_grad():
        expected = model(tokens()).logits
        fastpeft.merge(model, keep_base=False)
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-5, atol=1e-6)
    for verb in (fastpeft.unmerge, fastpeft.unpatch):
        with pytest.raises(fastpeft.PatchError, match="keep_base=False"):
            verb(model)
    other = moved(fastpeft.patch(llama(), IntrinsicDimension(d=20)))
    before = snapshot(other)
    with torch.no_grad():
        other.subspace.theta_d[3] = math.inf
    with pytest.raises(fastpeft.PatchError, match="is not finite; nothing was merged"):
        fastpeft.merge(other)
    for key, value in before[0].items():
        assert torch.equal(other.state_dict()[key], value) or "theta_d" in key


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, lambda n: n.endswith(("q_proj.weight", "v_proj.weight"))),
        ({"target_modules": "all-linear"}, lambda n: "_proj" in n or "lm_head" in n),
        ({"target_modules": r".*norm"}, lambda n: "norm" in n),
        ({"exclude_modules": ["embed_tokens", "lm_head"]}, lambda n: "embed" not in n and "lm_head" not in n),
        ({"layers_to_transform": [1]}, lambda n: ".layers.1." in n),
        ({"modules_to_save": ["lm_head"]}, lambda n: "lm_head" not in n),
    ],
    ids=["names", "all-linear", "regex", "exclude", "layer", "whole"],
)
def test_which_parameters(options, expected, tmp_path):
    model = fastpeft.patch(llama(), IntrinsicDimension(d=30, **options))
    total = sum(p.numel() for n, p in llama().named_parameters() if expected(n))
    assert model.subspace.projection.total == total
    moved(model)
    fastpeft.save(model, tmp_path)
    again = fastpeft.load(llama(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("way", ["plain", "checkpointing", "compile", "autocast", "bf16"])
def test_training(way):
    torch.manual_seed(0)
    model = llama(torch.bfloat16 if way == "bf16" else torch.float32).train()
    fastpeft.patch(model, IntrinsicDimension(d=60))
    if way == "bf16":
        model.to(torch.bfloat16)  # which must not reach the subspace
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    if way == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if way == "compile" else model
    optimizer = torch.optim.AdamW(trained, lr=0.2, weight_decay=0.0)
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            loss = run(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    if way in ("checkpointing", "compile"):
        plain = fastpeft.patch(llama().train(), IntrinsicDimension(d=60))
        loss = plain(input_ids=tokens(), labels=tokens()).loss
        assert loss.item() == losses[0]


def test_torch_func():
    torch.manual_seed(0)
    model = fastpeft.patch(
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double(), IntrinsicDimension(d=7)
    )
    moved(model)
    x = torch.randn(3, 5, dtype=F64)
    values = {n: p.detach() for n, p in model.named_parameters()}

    def loss(theta):
        called = torch.func.functional_call(model, {**values, "subspace.theta_d": theta}, (x,))
        return called.square().sum()

    theta = model.subspace.theta_d
    model(x).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(loss)(theta.detach()), theta.grad)


def test_the_plan_is_the_step():
    from tests.test_plan import BATCH, SEQUENCE, assert_same, config, measured, real_model

    method = IntrinsicDimension(d=40)
    planned = fastpeft.plan(config(), method, BATCH, SEQUENCE, dtype=torch.float32, device="cpu")
    assert_same(planned, measured(real_model(), method))
    assert planned.gradients == 4 * 40
    assert "IntrinsicDimension d=40" in str(planned)
    on_gpu = fastpeft.plan(config(), method, BATCH, SEQUENCE, dtype=torch.bfloat16, device="cuda")
    full = fastpeft.plan(config(), "full", BATCH, SEQUENCE, dtype=torch.bfloat16, device="cuda")
    assert on_gpu.gradients + on_gpu.optimizer_state < 1000 < full.gradients


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (llama, {"d": 5, "structure_aware": True}, r"more than the 21 scales .*, got 5"),
        (
            llama,
            {"d": 5, "target_modules": ["q_prj"]},
            "no module with parameters matches 'q_prj'; .*lm_head",
        ),
        (llama, {"d": 5, "exclude_modules": ".*"}, "no parameter of LlamaForCausalLM is left"),
        (llama, {"d": 5, "layout": "1:1:abc"}, r"layout: P is of 1:1:abc, the model has \d+:21:"),
        (lambda: nn.Sequential(nn.LSTM(3, 3)), {"d": 5}, "no parameter of Sequential is left"),
        (llama, {"d": 5, "modules_to_save": ["score"]}, "no module of the model matches score"),
    ],
    ids=["scales", "typo", "all-excluded", "layout", "rnn", "to-save"],
)
def test_refusals_leave_the_model_alone(make, options, said):
    model = make()
    before = snapshot(model)
    with pytest.raises(fastpeft.PatchError, match=said):
        fastpeft.patch(model, IntrinsicDimension(**options))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"d": 0}, "d: expected a whole number of at least 1, got 0"),
        ({"d": 2.0}, "d: expected a whole number"),
        ({"d": 1, "projection": "dense"}, "projection: expected 'fastfood' or 'hashed', got 'dense'"),
        ({"d": 1, "seed": -1}, "seed: expected a whole number of at least 0, got -1"),
        ({"d": 1, "structure_aware": 1}, "structure_aware: expected True or False, got 1"),
        ({"d": 1, "target_modules": 3}, "target_modules: expected a list of module names, got 3"),
    ],
)
def test_bad_values_are_named(options, said):
    with pytest.raises(fastpeft.ConfigError, match=said):
        IntrinsicDimension(**options)


def test_folders_that_do_not_fit_change_nothing(tmp_path):
    config = IntrinsicDimension(d=30, structure_aware=True)
    fastpeft.save(fastpeft.patch(llama(), config), tmp_path)
    for model, said in (
        (gpt2(), r"layout: P is of"),
        (fastpeft.patch(llama(), IntrinsicDimension(d=31)), "d: the model has 31, the folder 30"),
        (fastpeft.patch(llama(), IntrinsicDimension(d=30, seed=1)), "seed: the model has 1, the folder 0"),
        (
            fastpeft.patch(llama(), IntrinsicDimension(d=30, projection="hashed")),
            "projection: the model has 'hashed'",
        ),
        (fastpeft.patch(gpt2(), fastpeft.BitFit()), "is BitFit, the folder holds IntrinsicDimension"),
    ):
        before = snapshot(model)
        with pytest.raises(fastpeft.CheckpointError, match=said):
            fastpeft.load(model, tmp_path)
        assert_unchanged(model, before)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    for change, said in (
        ({"d": 29}, "declares d=29, .* holds 30 numbers"),
        ({"structure_aware": False}, "expected theta_d alone"),
        ({"projection": "dense"}, "expected 'fastfood' or 'hashed'"),
        ({"r": 3}, "expected its own fields, got r"),
    ):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(fastpeft.CheckpointError, match=said):
            fastpeft.load(llama(), tmp_path)


def test_what_it_has_not():
    model = fastpeft.patch(llama(), IntrinsicDimension(d=10))
    with pytest.raises(fastpeft.PatchError, match="whose values have no names"):
        fastpeft.add_adapter(model, "other")
    with pytest.raises(fastpeft.PatchError, match="has no name, expected None, got 'default'"):
        fastpeft.merge(model, "default")
    with pytest.raises(fastpeft.ShapeError, match=r"expected x \[..., 32\].*got \[2, 5\]"):
        model.model.layers[0].self_attn.q_proj(torch.ones(2, 5))
    with pytest.raises(fastpeft.ShapeError, match="expected x in the weight's dtype"):
        model.model.layers[0].self_attn.q_proj(torch.ones(2, 32, dtype=F64))


@pytest.mark.parametrize("kind", KINDS)
def test_ten_dimensions_solve_ten_constraints_and_nine_do_not(kind, tmp_path, toy):
    seen = []
    found = intrinsic.measure(
        toy.Toy,
        toy.train,
        toy.evaluate,
        (4, 8, 9, 10, 11, 16),
        seeds=(0, 1, 2),
        projection=kind,
        progress=seen.append,
    )
    assert found.full == pytest.approx(1.0)
    assert found.threshold == pytest.approx(0.9)
    assert found.d90 == 10
    assert all(found.scores[d] == pytest.approx(1.0, abs=1e-6) for d in (10, 11, 16))
    assert all(found.scores[d] < 0.9 for d in (4, 8, 9))
    assert len(seen) == len(found.points) == 1 + 6 * 3
    assert found.plot(tmp_path / "d90.png").stat().st_size > 5000
    assert "d90 = 10" in str(found)
    short = intrinsic.measure(
        toy.Toy, toy.train, toy.evaluate, (9, 10, 11), full=1.0, stop_when_reached=True, projection=kind
    )
    assert list(short.scores) == [9, 10]
    none = intrinsic.measure(toy.Toy, toy.train, toy.evaluate, [2], full=1.0, projection=kind)
    assert none.d90 is None
    assert "none of these" in str(none)


def test_a_threshold_above_chance(toy):
    scores = iter([0.9, 0.85, 0.87])
    found = intrinsic.measure(toy.Toy, lambda m: None, lambda m: next(scores), [1, 2], floor=0.5)
    assert found.threshold == pytest.approx(0.86)
    assert found.d90 == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ladder": []}, "expected at least one of each"),
        ({"ladder": [0]}, "ladder: expected a whole number of at least 1, got 0"),
        ({"ladder": [1], "fraction": 0.0}, r"fraction: expected a number in \(0, 1\]"),
        ({"ladder": [1], "projection": "dense"}, "projection: expected 'fastfood'"),
        ({"ladder": [1], "seeds": ()}, "expected at least one of each"),
    ],
)
def test_bad_measurements(options, said, toy):
    with pytest.raises(fastpeft.ConfigError, match=said):
        intrinsic.measure(toy.Toy, toy.train, toy.evaluate, **options)
    with pytest.raises(fastpeft.ConfigError, match="expected a finite score, got nan after full training"):
        intrinsic.measure(toy.Toy, toy.train, lambda m: math.nan, [1])


def test_the_example_prints_and_draws(tmp_path, capsys, toy):
    toy.main(["--seeds", "1", "--projection", "hashed", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "d90 = 10" in printed
    assert (tmp_path / "intrinsic_dimension.png").exists()
