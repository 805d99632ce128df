"""What is not ours to compute: PEFT's own result, gradients included, and the reason in the report."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from peft import ArrowConfig, LoraConfig, MontecloraConfig, VeloraConfig, create_arrow_model, get_peft_model
from peft.tuners.lora.config import BdLoraConfig
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn

import fastpeft
from fastpeft.in_place.install import tuner_layers
from tests.architectures import ARCHITECTURES
from tests.in_place.cases import logits, peft_model
from tests.models import llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = {"target_modules": ["q_proj", "up_proj"]}


def layers(model):
    return [layer for _, layer in tuner_layers(model)]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooks_on(name):
    def change(model):
        for layer in layers(model):
            getattr(layer, name)["default"].register_forward_hook(lambda module, inputs, output: 2 * output)

    return change


def replace_lora_a(model):
    for layer in layers(model):
        old = layer.lora_A["default"]
        layer.lora_A["default"] = Doubled(old.in_features, old.out_features, bias=False)
        layer.lora_A["default"].weight = old.weight


def replace_forward(model):
    for layer in layers(model):
        inner = layer.lora_B["default"]
        inner.forward = lambda x, inner=inner: 2 * type(inner).forward(inner, x)


def biased_lora_a(model):
    for layer in layers(model):
        layer.lora_A["default"].bias = nn.Parameter(torch.ones(4))


def qalora(model):
    """PEFT gives it to GPTQ's linears alone; its forward takes any."""
    config = LoraConfig(use_qalora=True, qalora_group_size=2)
    for layer in layers(model):
        QALoraLinearVariant.init(layer, "default", config)
        layer.lora_variant["default"] = QALoraLinearVariant()


def nothing(model):
    pass


CASES = {
    "hooks-on-A": ({}, hooks_on("lora_A"), "hooks on lora_A"),
    "hooks-on-B": ({}, hooks_on("lora_B"), "hooks on lora_B"),
    "hooks-on-magnitude": (
        {"use_dora": True},
        hooks_on("lora_magnitude_vector"),
        "a magnitude layer of another kind, or with hooks",
    ),
    "other-A": ({}, replace_lora_a, "lora_A is Doubled, not nn.Linear"),
    "other-forward": ({}, replace_forward, "forward of lora_B replaced by other code"),
    "A-with-bias": ({}, biased_lora_a, "lora_A has a bias"),
    "dropout-of-all": ({"lora_dropout": 1.0}, nothing, "lora_dropout is Dropout(p=1.0, inplace=False)"),
    "qalora": ({}, qalora, "variant QALoraLinear"),
    "velora": ({"velora_config": VeloraConfig(num_groups=4)}, nothing, "variant VeloraLinear"),
    "monteclora": (
        {"monteclora_config": MontecloraConfig(num_samples=2)},
        nothing,
        "variant MontecloraLinear",
    ),
}


def both(untouched, change=nothing):
    """An accelerated copy and the model itself, both changed after the patch."""
    patched = fastpeft.patch(copy.deepcopy(untouched))
    for model in (patched, untouched):
        torch.manual_seed(4)
        change(model)
    return patched, untouched


def trained(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    output = model(input_ids=tokens(), labels=tokens())
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


def assert_equal(patched, untouched):
    ours, theirs = trained(patched), trained(untouched)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("options", "change", "reason"), CASES.values(), ids=CASES)
def test_computes_pefts_result_and_says_why(options, change, reason):
    patched, untouched = both(peft_model(**TARGETS, **options).train(), change)
    assert_equal(patched, untouched)
    assert fastpeft.report(patched).reasons == {reason: 4}
    assert fastpeft.report(patched).calls == {"peft": 4}


@pytest.mark.parametrize(
    "options",
    [
        {"velora_config": VeloraConfig(num_groups=4)},
        {"monteclora_config": MontecloraConfig(num_samples=2)},
        {
            "use_bdlora": BdLoraConfig(
                target_modules_bd_a=["q_proj"], target_modules_bd_b=["up_proj"], nblocks=2
            )
        },
    ],
    ids=["velora", "monteclora", "bd-lora"],
)
def test_variants_that_are_lora_in_evaluation(options):
    patched, untouched = both(peft_model(**TARGETS, lora_dropout=0.3, **options))
    torch.testing.assert_close(logits(patched), logits(untouched), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(patched), logits(llama()), rtol=1e-2)
    assert fastpeft.report(patched).calls.keys() == {"fused"}


def test_block_diagonal_adapters_train_like_pefts():
    blocks = BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["up_proj"], nblocks=2)
    patched, untouched = both(peft_model(**TARGETS, use_bdlora=blocks).train())
    assert_equal(patched, untouched)
    assert fastpeft.report(patched).calls == {"fused": 4}


def test_hooks_on_every_module():
    patched, untouched = both(peft_model(**TARGETS))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        assert_equal(patched, untouched)
    finally:
        handle.remove()
    assert (
        sum(
            module is patched.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
            for module in seen
        )
        == 1
    )
    assert fastpeft.report(patched).reasons == {"global module hooks": 4}
    logits(patched)
    assert fastpeft.report(patched).calls == {"peft": 4, "fused": 4}


def test_dtensors():
    """Adapters spread over devices: as with any tensor that is not plain, its own products are right."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.experimental import implicit_replication

    def spread(model):
        for layer in layers(model):
            for inner in (layer.lora_A["default"], layer.lora_B["default"]):
                inner.weight = nn.Parameter(distribute_tensor(inner.weight.detach(), mesh))

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        patched, untouched = both(peft_model(**TARGETS), spread)
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(5))
        with torch.no_grad(), implicit_replication():
            found = [[layer(x).full_tensor() for layer in layers(m)] for m in (patched, untouched)]
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(*found)
    assert fastpeft.report(patched).reasons == {"lora_A is DTensor, not a plain tensor": 4}


def test_a_part_of_an_embedding_s_adapter():
    """Columns of A for half of the ids, as of a vocabulary in parts: PEFT looks them up all the same."""

    def halve(model):
        for layer in layers(model):
            A = layer.lora_embedding_A["default"]
            layer.lora_embedding_A["default"] = nn.Parameter(A.detach()[:, :32].clone())

    patched, untouched = both(peft_model(target_modules=["embed_tokens"]), halve)
    ids = tokens() % 32
    with torch.no_grad():
        torch.testing.assert_close(patched(ids).logits, untouched(ids).logits)
    assert fastpeft.report(patched).reasons == {"lora_embedding_A or B is a shard": 1}


def test_a_flat_shard_of_an_embedding_s_magnitude():
    def flatten(model):
        for layer in layers(model):
            magnitude = layer.lora_magnitude_vector["default"]
            magnitude.weight = nn.Parameter(magnitude.weight.detach().view(1, -1))

    patched, untouched = both(peft_model(target_modules=["embed_tokens"], use_dora=True), flatten)
    torch.testing.assert_close(logits(patched), logits(untouched))
    assert fastpeft.report(patched).reasons == {"the magnitude is a shard": 1}


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_stacked_experts_beside_linears(name):
    """target_parameters: adapters on 3-D weights (tests/in_place/test_parameters.py)."""
    make, batch = ARCHITECTURES[name]
    config = LoraConfig(
        r=2,
        init_lora_weights=False,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    torch.manual_seed(0)
    untouched = get_peft_model(make(), config).eval()
    patched = fastpeft.patch(copy.deepcopy(untouched))
    assert list(patched.state_dict()) == list(untouched.state_dict())
    found = []
    for model in (patched, untouched):
        output = model(**batch())
        output.logits.float().square().mean().backward()
        found.append(
            {"logits": output.logits, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}
        )
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-4, atol=1e-5, msg=key)
    report = fastpeft.report(patched)
    assert report.calls == {"fused": len(report.patched)}
    assert len(report.patched) == 6


def test_arrow_routes_with_pefts_forward(tmp_path):
    paths = []
    for i in range(3):
        paths.append(str(tmp_path / str(i)))
        peft_model(seed=i, target_modules=["q_proj", "v_proj"]).save_pretrained(paths[-1])
    untouched = create_arrow_model(llama(), paths, ArrowConfig(top_k=2)).eval()
    patched = fastpeft.patch(copy.deepcopy(untouched))
    found = []
    for model in (patched, untouched):
        torch.manual_seed(6)  # the first call finds the routes, by chance
        found.append(logits(model))
    torch.testing.assert_close(*found)
    assert fastpeft.report(patched).reasons == {"variant ArrowLinear": 4}
    for model in (patched, untouched):
        model.set_adapter("task_1")
    torch.testing.assert_close(logits(patched), logits(untouched), rtol=1e-4, atol=1e-5)
    assert fastpeft.report(patched).calls == {"peft": 4, "fused": 4}
