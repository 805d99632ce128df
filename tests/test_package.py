"""The wheel: what is in it, and that it imports without triton, without transformers, beside `kernels`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fastpeft", "kernels/fastpeft_kernels")

# A finder that makes the named packages look uninstalled, as in a clean environment.
BLOCK = """
import importlib.machinery, sys
BLOCKED = {blocked!r}
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            return None
        return super().find_spec(name, path, target)
sys.meta_path = [Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder that holds the unpacked wheel and nothing of the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    clean = folder / "source"  # setuptools would put what an earlier build left in build/ into the wheel
    for package in PACKAGES:
        shutil.copytree(ROOT / package, clean / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clean / name)
    options = ["--quiet", "--no-deps", "--wheel-dir", str(folder)]
    build = [sys.executable, "-m", "pip", "wheel", *options, str(clean)]
    subprocess.run(build, check=True, cwd=folder, timeout=300)
    (wheel,) = folder.glob("fastpeft-*.whl")
    target = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run(site: Path, code: str, blocked: frozenset[str] | set[str] = frozenset()) -> str:
    """Run code in a new process whose only fastpeft is the wheel's, outside the repository."""
    # -I keeps PYTHONPATH and the working folder out; an editable install is pushed back by the path order.
    program = BLOCK.format(blocked=set(blocked)) + f"import sys; sys.path.insert(0, {str(site)!r})\n" + code
    finished = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, cwd=site, timeout=200
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_wheel_holds_the_two_packages_and_nothing_else(site):
    names = {path.name for path in site.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"fastpeft", "fastpeft_kernels"}
    for package in PACKAGES:
        inside = {str(p.relative_to(site)) for p in (site / Path(package).name).rglob("*") if p.is_file()}
        source = [p for p in (ROOT / package).rglob("*") if p.suffix == ".py" or p.name == "py.typed"]
        assert inside == {str(p.relative_to((ROOT / package).parent)) for p in source}
    assert list(site.glob("*.dist-info/licenses/LICENSE"))


PATCH_A_PLAIN_MODEL = """
import torch, fastpeft
from torch import nn
assert fastpeft.__file__.startswith(sys.path[0]), fastpeft.__file__
blocks = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(8, 8)}) for _ in range(2)])
fastpeft.patch(blocks, fastpeft.LoRA(r=2, use_dora=True))
blocks[0]["proj"](torch.randn(3, 8)).sum().backward()
print("patched", len(fastpeft.report(blocks).patched))
"""


@pytest.mark.parametrize("blocked", [set(), {"triton"}, {"transformers"}, {"triton", "transformers", "peft"}])
def test_it_works_outside_the_repository(site, blocked):
    assert run(site, PATCH_A_PLAIN_MODEL, blocked) == "patched 2\n"


EVERY_VERB = """
import tempfile
from collections import OrderedDict
from pathlib import Path
import torch, fastpeft
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.out(torch.tanh(self.proj(x)))

def model():
    torch.manual_seed(0)
    blocks = nn.Sequential(Block(), Block())
    return nn.Sequential(OrderedDict(words=nn.Embedding(9, 8), blocks=blocks))

def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

ids = torch.arange(6).view(2, 3)
folder = Path(tempfile.mkdtemp())
base = model()(ids).detach()
for use_dora in (False, True):
    options = dict(use_dora=use_dora, init_lora_weights=False, target_modules=["words", "proj", "out"])
    patched = fastpeft.patch(model(), fastpeft.LoRA(r=2, **options))
    patched(ids).sum().backward()
    fastpeft.add_adapter(patched, "poems", fastpeft.LoRA(r=2, lora_alpha=1, **options))
    first = patched(ids).detach()
    fastpeft.set_adapter(patched, "poems")
    second = patched(ids).detach()
    assert fastpeft.active_adapters(patched) == ("poems",)
    assert not torch.allclose(first, second) and not torch.allclose(first, base)
    with fastpeft.disable_adapters(patched):
        close(patched(ids), base)
    with fastpeft.mixed_batch(patched, ["default", "__base__"]):
        close(patched(ids), torch.stack([first[0], base[1]]))
    fastpeft.merge(patched)
    close(patched(ids).detach(), second)
    fastpeft.unmerge(patched)
    fastpeft.merge(patched, {"default": 0.5, "poems": 0.5})
    fastpeft.unmerge(patched)
    assert torch.equal(patched(ids), second)
    fastpeft.save(patched, folder / str(use_dora), "poems")
    close(fastpeft.load(model(), folder / str(use_dora))(ids).detach(), second)
    fastpeft.load(patched, folder / str(use_dora), "third")
    close(fastpeft.set_adapter(patched, "third")(ids).detach(), second)
    fastpeft.set_adapter(patched, "default")
    fastpeft.hotswap(patched, folder / str(use_dora))
    close(patched(ids).detach(), second)
    if not use_dora:
        fastpeft.combine_adapters(patched, {"default": 2.0, "third": -1.0}, "mix")
        close(fastpeft.set_adapter(patched, "mix")(ids).detach(), second)
    fastpeft.delete_adapter(patched, "poems")
    print(len(str(fastpeft.report(patched)).splitlines()) > 5)
    assert torch.equal(fastpeft.unpatch(patched)(ids), base)
print("peft" in sys.modules)
"""


def test_every_verb_works_without_peft(site):
    assert run(site, EVERY_VERB, {"peft", "transformers"}) == "True\nTrue\nFalse\n"


def test_a_missing_triton_is_one_clear_error_when_used(site):
    code = """
import torch, fastpeft
fastpeft.set_backend("triton")
try:
    x, W, A, B = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
    fastpeft.lora_linear(x, W, None, A, B, scaling=1.0)
except fastpeft.BackendError as error:
    print(error)
"""
    assert "needs triton (pip install 'fastpeft[triton]')" in run(site, code, {"triton"})


def test_beside_the_hugging_face_kernels_package(site, tmp_path):
    # A stand-in of its name first on the path: importing it must not find ours, nor ours break it.
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHOSE = 'hugging face'\n")
    code = f"""
sys.path.insert(0, {str(tmp_path)!r})
import fastpeft, fastpeft_kernels, kernels
from transformers import LlamaForCausalLM
print(kernels.WHOSE)
"""
    assert run(site, code) == "hugging face\n"
