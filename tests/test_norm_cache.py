"""DoRA's cached row norm: bitwise fresh after every way to change A, B or W, reused where nothing changed."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastpeft
import fastpeft_kernels
from fastpeft.layers import norm_cache
from fastpeft.layers.norm_cache import trust
from fastpeft.ops.row_norm import row_norm, row_norm_squared
from tests.kernels import interpreter
from tests.models import gpt2, llama, tokens

IN, OUT, R = 24, 40, 3


def dora(dtype: torch.dtype = torch.float32, layers: int = 1) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(*(nn.Linear(IN if i == 0 else OUT, OUT) for i in range(layers))).to(dtype)
    config = fastpeft.LoRA(r=R, use_dora=True, init_lora_weights=False, target_modules="all-linear")
    return fastpeft.patch(model, config)


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, IN, generator=torch.Generator().manual_seed(4)).to(dtype)


def parts(layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    name = layer.active_adapter
    return layer.weight_out_in(), layer.lora_A[name], layer.lora_B[name]


def assert_fresh(layer, x: torch.Tensor) -> None:
    """The layer's output is, bit for bit, the op's on a norm computed now."""
    weight, A, B = (t.detach() for t in parts(layer))
    name = layer.active_adapter
    scaling = layer.specs[name].scaling
    if norm_cache._has_kernels(weight, A, B) and not A.is_inference():
        norm = fastpeft_kernels.row_norm(weight, A, B, scaling)
    else:
        norm = row_norm(weight, A, B, scaling, row_norm_squared(weight))
    m = layer.lora_magnitude_vector[name]
    expected = fastpeft.dora_linear(x, weight, layer.bias, A, B, m, scaling=scaling, norm=norm)
    assert torch.equal(layer(x), expected)


@pytest.fixture
def computed(monkeypatch) -> list[torch.Tensor]:
    """One entry for every norm that is computed, by a layer or by a kernel that found a difference."""
    calls: list[torch.Tensor] = []
    on_device = norm_cache._kept_norm

    def counting(*args):
        calls.append(row_norm(*args))
        return calls[-1]

    def counting_on_device(weight, A, B, scaling, stored):
        # A norm that nobody computes: it comes back where the kernel found no difference.
        marked = None if stored is None else replace(stored, value=stored.value + 1000.0)
        value, prints = on_device(weight, A, B, scaling, marked)
        if marked is not None and torch.equal(value, marked.value):
            return stored.value.clone(), prints
        calls.append(value)
        return value, prints

    monkeypatch.setattr(norm_cache, "row_norm", counting)
    monkeypatch.setattr(norm_cache, "_kept_norm", counting_on_device)
    return calls


POLICIES = ["cpu", "gpu", *(["kernels"] if interpreter.ACTIVE else [])]
"""A CPU's policy, and on CPU tensors a GPU's, without the kernels and with them in Triton's interpreter."""


ROUNDS = {"cpu": 3, "gpu": 3, "kernels": 1}
"""How often a test goes round: a launch in the interpreter takes a tenth of a second."""


@pytest.fixture(params=POLICIES)
def policy(request, monkeypatch) -> Iterator[str]:
    with using(request.param, monkeypatch):
        yield request.param


@pytest.fixture(params=POLICIES[1:])
def gpu(request, monkeypatch) -> Iterator[str]:
    with using(request.param, monkeypatch):
        yield request.param


@contextmanager
def using(policy: str, monkeypatch) -> Iterator[None]:
    if policy != "cpu":
        monkeypatch.setattr(norm_cache, "_is_cpu", lambda tensor: False)
    if policy == "kernels":
        runs = lambda weight: not weight.is_meta and weight.dtype is not torch.float64  # noqa: E731
        monkeypatch.setattr(norm_cache, "_runs_kernels", runs)
    with interpreter.mended():
        yield


def step(layer, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    layer(x).float().square().mean().backward()
    optimizer.step()


# --- fresh: optimisers


def variants():
    """Every optimiser of torch.optim, with each implementation it offers."""
    # SparseAdam takes sparse gradients only; Adafactor and Muon need no variant: they take foreach or none.
    for name in sorted(torch.optim.__all__):
        kind = getattr(torch.optim, name)
        if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
            continue
        if name in ("Optimizer", "SparseAdam"):
            continue
        accepted = inspect.signature(kind).parameters
        options = [{}] + [{"foreach": flag} for flag in (False, True) if "foreach" in accepted]
        options += [{"fused": True}] if "fused" in accepted else []
        for option in options:
            yield pytest.param(kind, option, id="-".join([name, *(f"{k}={v}" for k, v in option.items())]))


@pytest.mark.parametrize(("kind", "options"), list(variants()))
def test_fresh_after_every_optimizer(kind, options, policy, computed):
    layer, x = dora()[0], inputs()
    parameters = [
        p for p in layer.parameters() if p.requires_grad and (p.dim() == 2 or kind.__name__ != "Muon")
    ]
    optimizer = kind(parameters, lr=1e-2, **options)

    def closure():
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        return loss

    assert_fresh(layer, x)
    for _ in range(ROUNDS[policy]):
        before = [p.detach().clone() for p in parts(layer)[1:]]
        layer(x)  # leaves a norm to be wrongly reused
        if kind is torch.optim.LBFGS:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        assert not any(torch.equal(p, old) for p, old in zip(parts(layer)[1:], before, strict=True))
        assert_fresh(layer, x)
    computed.clear()
    layer(x), layer(x)  # and nothing else computes it anew
    assert len(computed) == (2 if policy == "gpu" else 0)


def test_fresh_after_a_compiled_fused_step(policy):
    """It neither moves the version nor runs Python of its own after the first time."""
    layer, x = dora()[0], inputs()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2, fused=True)
    torch._dynamo.reset()
    compiled = torch.compile(optimizer.step, backend="eager")
    for advance in (optimizer.step, compiled, compiled, compiled, compiled):
        layer(x).square().mean().backward()
        layer(x)
        advance()
        assert_fresh(layer, x)


class DataSGD(torch.optim.Optimizer):
    """An optimiser in the old manner: it writes through .data."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-0.1)


def test_fresh_after_optimizers_that_write_through_data(policy):
    layer, x = dora()[0], inputs()
    optimizer = DataSGD([p for p in layer.parameters() if p.requires_grad])
    for _ in range(3):
        layer(x)
        versions = [p._version for p in parts(layer)[1:]]
        step(layer, optimizer, x)
        assert [p._version for p in parts(layer)[1:]] == versions
        assert_fresh(layer, x)


def test_fresh_in_a_hand_written_loop(policy):
    layer, x = dora()[0], inputs()
    for _ in range(3):
        layer(x).square().mean().backward()
        for p in layer.parameters():
            if p.requires_grad:
                p.data -= 0.1 * p.grad
                p.grad = None
        assert_fresh(layer, x)


# --- fresh: other writes


def write_row_of_a(layer):
    parts(layer)[1].data[1].mul_(-2.0)


def write_one_element_of_b(layer):
    parts(layer)[2].data[7, 2] += 1.0


def swap_two_elements_of_a(layer):
    A = parts(layer)[1].data
    A[0, 0], A[1, 5] = A[1, 5].clone(), A[0, 0].clone()


def write_weight(layer):
    layer.weight.data.mul_(1.5)


def write_weight_row(layer):
    layer.weight.data[OUT - 1].add_(1.0)


def write_weight_column(layer):
    layer.weight.data[:, 11].add_(1.0)


def replace_weight_data(layer):
    layer.weight.data = layer.weight.data * 3.0


def replace_data_of_a_twice(layer):
    A = parts(layer)[1]
    address = A.data_ptr()
    for _ in range(8):  # the allocator is likely to hand out the first address again
        A.data = A.data * 1.1
        if A.data_ptr() == address:
            break


def copy_under_no_grad(layer):
    with torch.no_grad():
        for p in parts(layer)[1:]:
            p.copy_(torch.randn_like(p))


def write_detached(layer):
    parts(layer)[2].detach().neg_()


def write_through_numpy(layer):
    parts(layer)[1].detach().numpy()[0, 3] = 5.0


def replace_parameter(layer):
    layer.lora_B["default"] = nn.Parameter(torch.randn(OUT, R))


def change_scaling(layer):
    spec = layer.specs["default"]
    object.__setattr__(spec, "scaling", spec.scaling * 2.0)


def load_values(layer):
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()})


def assign_values(layer):
    values = {k: nn.Parameter(torch.randn_like(v), v.requires_grad) for k, v in layer.state_dict().items()}
    layer.load_state_dict(values, assign=True)
    layer.weight.requires_grad_(False)


def through_meta(layer):
    layer.to("meta")
    layer.to_empty(device="cpu")
    load_values(layer)


def scale_weight(layer):
    with torch.no_grad():
        layer.weight.mul_(1.5)


def new_parameter_at_the_same_address(layer):
    old = layer.weight
    layer.weight = nn.Parameter(old.data, requires_grad=False)
    while layer.weight._version < old._version:
        torch.autograd.graph.increment_version(layer.weight)
    layer.weight.numpy()[:] *= 2.0
    assert (layer.weight.data_ptr(), layer.weight._version) == (old.data_ptr(), old._version)


WRITES = [
    write_row_of_a, write_one_element_of_b, swap_two_elements_of_a, write_weight, write_weight_row,
    write_weight_column, replace_weight_data, replace_data_of_a_twice, copy_under_no_grad, write_detached,
    write_through_numpy, replace_parameter, change_scaling, load_values, assign_values, through_meta,
    scale_weight, new_parameter_at_the_same_address,
]  # fmt: skip


@pytest.mark.parametrize("enabled", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_fresh_after_a_write(write, enabled, policy):
    layer, x = dora()[0], inputs()
    with torch.set_grad_enabled(enabled):
        for _ in range(ROUNDS[policy]):
            layer(x)
            write(layer)
            assert_fresh(layer, x)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_fresh_after_a_write_that_follows_a_step(write, policy):
    """Where clipping and averaging write through .data: no forward has used what the step left."""
    layer, x = dora()[0], inputs()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(ROUNDS[policy]):
        layer(x)
        step(layer, optimizer, x)
        write(layer)
        assert_fresh(layer, x)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_fresh_after_a_write_between_two_forwards_of_one_step(write, policy):
    """Both with gradients: on a GPU nothing but the values tells."""
    layer, x = dora()[0], inputs()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    step(layer, optimizer, x)
    for _ in range(ROUNDS[policy]):
        layer(x)
        write(layer)
        assert_fresh(layer, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_fresh_after_a_move_of_dtype(dtype, policy):
    layer = dora()[0]
    layer(inputs())
    layer.to(dtype)
    assert_fresh(layer, inputs(dtype))
    layer.to(torch.float32)
    assert_fresh(layer, inputs())


def test_fresh_after_load(tmp_path, policy):
    config = fastpeft.LoRA(r=R, use_dora=True, init_lora_weights=False)
    saved = fastpeft.patch(llama(), config)
    fastpeft.save(saved, tmp_path)
    model = fastpeft.patch(llama(), config)
    model(tokens())
    fastpeft.load(model, tmp_path)
    assert torch.equal(model(tokens()).logits, saved(tokens()).logits)


def test_fresh_for_a_transposed_weight(policy):
    model = fastpeft.patch(gpt2(), fastpeft.LoRA(r=R, use_dora=True, init_lora_weights=False))
    layer = model.transformer.h[0].attn.c_attn
    x = torch.randn(4, 32)
    for write in (lambda: layer.weight.data[:, 5].add_(1.0), lambda: layer.weight.data[3].add_(1.0)):
        layer(x)
        write()
        assert_fresh(layer, x)


@pytest.mark.parametrize("shape", [(5, 5), (5, 12), (12, 5), (12, 6), (1, 7), (7, 1), (0, 4)], ids=str)
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
def test_the_sample_touches_every_row_and_column(shape, layout):
    rows, columns = shape
    marks = {
        "plain": torch.zeros(rows, columns),
        "transposed": torch.zeros(columns, rows).t(),
        "sliced": torch.zeros(rows + 3, columns + 4)[2:-1, 1:-3],
    }[layout]
    for part in norm_cache._diagonal(marks):
        part += 1.0
    if rows:
        assert marks.sum() == max(shape)
        assert marks.max() == 1.0
        assert marks.any(0).all()
        assert marks.any(1).all()


# --- fresh: other machinery


def test_copies_have_a_cache_of_their_own(policy):
    model, x = dora(), inputs()
    model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False), copy.deepcopy(model)):
        assert twin[0].norm_cache("default")._norm is None
        write_row_of_a(twin[0])
        assert_fresh(twin[0], x)
        assert_fresh(model[0], x)


def test_a_shallow_copy_shares_the_cache_and_not_the_values(policy):
    """As nn.DataParallel's replicas do."""
    model, x = dora(), inputs()
    twin = copy.copy(model[0])
    twin._modules = {k: copy.deepcopy(v) for k, v in model[0]._modules.items()}
    write_row_of_a(twin)
    for _ in range(2):
        assert_fresh(model[0], x)
        assert_fresh(twin, x)


def test_nothing_is_left_behind():
    model = dora(layers=2)
    keys = set(model.state_dict())
    model(inputs())
    assert set(model.state_dict()) == keys
    assert not any("norm" in key for key in keys)
    fastpeft.unpatch(model)
    assert not any("_norm_caches" in vars(module) for module in model.modules())


def test_compiled_layers_are_fresh_and_keep_nothing(policy, computed):
    model, x = dora(), inputs()
    layer = model[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for write in (write_row_of_a, write_weight, lambda _: step(compiled, optimizer, x)):
        compiled(x)
        write(layer)
        torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad():
        compiled(x)
        write_weight(layer)
        torch.testing.assert_close(compiled(x), model(x))
    model[0]._norm_caches.clear()
    computed.clear()
    compiled(x)
    assert not computed
    assert model[0].norm_cache("default")._norm is None


def test_functional_calls(policy):
    layer, x = dora()[0], inputs()
    values = {name: p.detach().clone() for name, p in layer.named_parameters()}
    values["lora_A.default"].mul_(2.0)
    for _ in range(2):
        assert_fresh(layer, x)
        other = torch.func.functional_call(layer, values, (x,))
        assert not torch.equal(other, layer(x))
    kept = layer.norm_cache("default")._norm

    def inside(A):
        assert layer.norm_cache("default").norm(layer.weight, layer.weight, A, parts(layer)[2], 1.0) is None
        return A.sum()

    torch.func.grad(inside)(values["lora_A.default"])
    assert layer.norm_cache("default")._norm is kept  # nothing of a transform's tensors stays
    assert_fresh(layer, x)


def test_inference_mode_leaves_a_norm_that_training_can_keep(policy):
    layer, x = dora()[0], inputs()
    with torch.inference_mode():
        assert_fresh(layer, x)
    layer(x).sum().backward()
    assert parts(layer)[1].grad is not None
    with torch.inference_mode():
        made = dora()[0]
        made(x)
        made.lora_A["default"].mul_(2.0)
        assert_fresh(made, x)
    assert made.norm_cache("default")._norm is None


def test_a_weight_that_trains_is_not_cached():
    layer = dora()[0]
    layer.weight.requires_grad_(True)
    layer(inputs()).sum().backward()
    assert layer.norm_cache("default")._norm is None
    assert layer.weight.grad is not None


@pytest.mark.parametrize("policy", ["cpu", "gpu"], indirect=True)
def test_selective_checkpointing_counts_the_same_products_twice(policy):
    """It hands out its saved products in order: a norm computed only in forward would shift them."""

    saved = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)

    def policy_of(_, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    def context():
        return create_selective_checkpoint_contexts(policy_of)

    model, x = dora(layers=2), inputs()
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    for layer in model:
        layer._norm_caches.clear()
    loss = checkpoint(model, x, use_reentrant=False, context_fn=context).square().sum()
    for gradient, wanted in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        assert torch.equal(gradient, wanted)


def test_fsdp2_in_two_processes_trains_as_one_process_does(tmp_path):
    script = Path(__file__).with_name("fsdp2_worker.py")
    command = [sys.executable, str(script), str(tmp_path / "store")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    workers = [subprocess.Popen([*command, str(rank)], env=environment, **pipes) for rank in range(2)]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    assert all("same losses" in output for output in outputs), outputs


# --- reused


def test_reused_under_gradient_accumulation(policy, computed):
    layer, x = dora(torch.bfloat16)[0], inputs(torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], fused=True)
    step(layer, optimizer, x)
    for _ in range(3):
        computed.clear()
        for _ in range(4):
            layer(x).sum().backward()
        assert len(computed) == (4 if policy == "gpu" else 1)
        optimizer.step()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["hooks", "reentrant"])
def test_reused_in_a_recomputation(use_reentrant, policy, computed):
    model, x = dora(layers=2), inputs().requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    for _ in range(3):
        for p in parameters:
            p.grad = None
            p.data.mul_(1.0)
        before = torch.autograd.grad(model(x).square().sum(), parameters)
        for layer in model:
            layer._norm_caches.clear()
        computed.clear()
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
        assert len(computed) == 2  # one a layer
        assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, expected, strict=True))


def test_reused_in_evaluation(policy, computed):
    layer, x = dora()[0].eval(), inputs()
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            layer(x), layer(x)
    assert len(computed) == (6 if policy == "gpu" else 1)
    computed.clear()
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].mul_(2.0)  # m is no part of n
    layer(x)
    assert len(computed) == (1 if policy == "gpu" else 0)


# --- a GPU's policy


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)), ids=str)
def test_policy(flags):
    given = dict(zip(("has_kernels", "recomputing", "sole_forward"), flags, strict=True))
    assert trust(is_cpu=True, **given) == "values"
    otherwise = "fingerprints" if given["has_kernels"] else "never"
    repeats = given["recomputing"] and given["sole_forward"]
    assert trust(is_cpu=False, **given) == ("key" if repeats else otherwise)


def test_a_norm_that_was_saved_for_backward_is_not_written_again(gpu):
    layer = dora()[0]
    cache, (weight, A, B) = layer.norm_cache("default"), parts(layer)
    first = cache.norm(layer.weight, weight, A, B, 1.0)
    before = first.clone()
    write_row_of_a(layer)
    second = cache.norm(layer.weight, weight, A, B, 1.0)
    assert torch.equal(first, before)
    assert not torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_a_change_of_backend_starts_anew(monkeypatch):
    layer, x = dora()[0], inputs()
    for policy in (*POLICIES, *reversed(POLICIES)):
        with monkeypatch.context() as patch, using(policy, patch):
            assert_fresh(layer, x)
            write_row_of_a(layer)
            assert_fresh(layer, x)


def test_averaged_weights_come_and_go_through_data(policy, computed):
    layer, x = dora()[0], inputs()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    step(layer, optimizer, x)
    layer(x)
    trained = [p.detach().clone() for p in parts(layer)[1:]]
    for values in ([torch.randn_like(t) for t in trained], trained):
        for p, value in zip(parts(layer)[1:], values, strict=True):
            p.data.copy_(value)
        with torch.no_grad():
            assert_fresh(layer, x)
    computed.clear()
    assert_fresh(layer, x)
    assert_fresh(layer, x)
    assert len(computed) == (2 if policy == "gpu" else 0)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["hooks", "reentrant"])
def test_on_a_gpu_a_recomputation_takes_no_other_forwards_norm(use_reentrant, gpu):
    """Two forwards, the second with other weights written through .data; then the first one's backward."""
    layer, x = dora()[0], inputs().requires_grad_()
    A = parts(layer)[1]
    trained, other = A.detach().clone(), torch.randn_like(A)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), A)
    for exchanged_with_grad in (True, False):
        layer._norm_caches.clear()
        loss = checkpoint(layer, x, use_reentrant=use_reentrant).square().sum()
        A.data.copy_(other)
        with torch.set_grad_enabled(exchanged_with_grad):
            layer(x)
        A.data.copy_(trained)
        A.grad = None
        loss.backward()
        assert torch.equal(A.grad, expected)
        A.data.copy_(other)  # and what that recomputation left is not the next one's
        A.grad = None
        checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
        gradient = A.grad
        layer._norm_caches.clear()
        (wanted,) = torch.autograd.grad(layer(x).square().sum(), A)
        assert torch.equal(gradient, wanted)
        A.data.copy_(trained)


def test_on_a_gpu_every_backward_recomputes_for_itself(gpu):
    gradients = []
    for forget in (False, True):
        layer, x = dora()[0], inputs().requires_grad_()
        A = parts(layer)[1]
        loss = checkpoint(layer, x, use_reentrant=False).square().sum()
        loss.backward(retain_graph=True)
        write_row_of_a(layer)
        if forget:
            layer._norm_caches.clear()
        loss.backward()
        gradients.append(A.grad)
    assert torch.equal(*gradients)
