"""Linears that share an x, and a gated MLP, by hand: plain torch in any dtype, gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from fastpeft_kernels import Projection, glu_backward, glu_forward, stacked_backward, stacked_forward
from tests.kernels.memory import untouched
from tests.kernels.test_dropout import recover_mask

TENSORS = ("weight", "bias", "lora_A", "lora_B", "magnitude", "norm")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda g: functional.gelu(g, approximate="tanh"),
}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A projection to draw: width, rank (0 for no adapter), LoRA or DoRA, bias or none."""

    n: int
    r: int = 0
    dora: bool = False
    bias: bool = False


def make_projection(
    kind: Kind, k: int, dtype: torch.dtype, device: torch.device, adapter: torch.dtype | None = None
) -> Projection:
    """Gaussian weights of variance 1/fan-in; magnitudes around the rows' norms, some negative."""
    generator = torch.Generator().manual_seed(k * 10_007 + kind.n * 101 + kind.r)
    adapter = adapter or dtype

    def draw(*shape: int, size: float, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * size).to(device, to)

    p = Projection(
        weight=draw(kind.n, k, size=k**-0.5),
        bias=draw(kind.n, size=1.0) if kind.bias else None,
        lora_A=draw(kind.r, k, size=k**-0.5, to=adapter) if kind.r else None,
        lora_B=draw(kind.n, kind.r, size=kind.r**-0.5, to=adapter) if kind.r else None,
        scaling=0.7 + 0.1 * kind.r,
    )
    if not kind.dora or p.lora_A is None or p.lora_B is None:
        return p
    magnitude = 1.0 + draw(kind.n, size=0.3, to=torch.float32).cpu()
    magnitude[::7] *= -1
    summed = p.weight.double() + p.scaling * (p.lora_B.double() @ p.lora_A.double())
    return replace(p, magnitude=magnitude.to(device, adapter), norm=summed.norm(dim=1).float())


@dataclass(kw_only=True)
class Block:
    """Projections of one x and the gradients of their outputs; masks [M, K] or None, as the seeds draw."""

    x: Tensor
    projections: list[Projection]
    dys: list[Tensor | None]
    dropout_p: float = 0.0
    masks: list[Tensor | None]
    seeds: Tensor | None = None


def make_block(
    m: int,
    k: int,
    kinds: list[Kind],
    dtype: torch.dtype,
    device: torch.device,
    *,
    dropout_p: float = 0.0,
    adapter: torch.dtype | None = None,
) -> Block:
    """Gaussian x and gradients, and with dropout a seed and the kernels' own mask for each projection."""
    generator = torch.Generator().manual_seed(m * 1_000_003 + k)
    seeds = torch.tensor([2**40 + 3 * i for i in range(len(kinds))], dtype=torch.int64, device=device)
    masks = [
        recover_mask(m, k, dropout_p, seeds[i : i + 1]) if dropout_p else None for i in range(len(kinds))
    ]
    return Block(
        x=torch.randn(m, k, generator=generator).to(device, dtype),
        projections=[make_projection(kind, k, dtype, device, adapter) for kind in kinds],
        dys=[torch.randn(m, kind.n, generator=generator).to(device, dtype) for kind in kinds],
        dropout_p=dropout_p,
        masks=masks,
        seeds=seeds if dropout_p else None,
    )


def leaf(p: Projection, dtype: torch.dtype) -> Projection:
    """`p` in `dtype`, its adapter and bias tracked by autograd."""
    values = {name: getattr(p, name) for name in TENSORS}
    cast = {name: None if value is None else value.detach().to(dtype) for name, value in values.items()}
    for name in ("bias", "lora_A", "lora_B", "magnitude"):
        if cast[name] is not None:
            cast[name].requires_grad_()
    return Projection(scaling=p.scaling, **cast)


def project(x: Tensor, p: Projection, mask: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, S, z)`: `z = x W^T + s S B^T`, `y = c z + bias`; S is empty without an adapter."""
    z, S = x @ p.weight.T, x.new_empty((x.shape[0], 0))
    if p.lora_A is not None and p.lora_B is not None:
        dropped = x if mask is None else torch.where(mask, x / (1 - dropout_p), 0)
        S = dropped @ p.lora_A.T
        z = z + (S @ p.lora_B.T) * p.scaling
    y = z if p.magnitude is None or p.norm is None else z * (p.magnitude / p.norm)
    return y if p.bias is None else y + p.bias, S, z


def gradients(projections: list[Projection], prefix: str = "") -> dict[str, Tensor]:
    """What autograd left in the leaves."""
    names = {"dA": "lora_A", "dB": "lora_B", "dm": "magnitude", "dbias": "bias"}
    found = {
        f"{prefix}{name}{i}": getattr(p, field)
        for i, p in enumerate(projections)
        for name, field in names.items()
    }
    return {name: leaf.grad for name, leaf in found.items() if leaf is not None}


def evaluate_block(b: Block, dtype: torch.dtype) -> dict[str, Tensor]:
    """Forward and backward in `dtype`, every intermediate rounded to it."""
    x = b.x.detach().to(dtype).requires_grad_()
    leaves = [leaf(p, dtype) for p in b.projections]
    results = [project(x, p, mask, b.dropout_p) for p, mask in zip(leaves, b.masks, strict=True)]
    live = [(y, dy.to(dtype)) for (y, _, _), dy in zip(results, b.dys, strict=True) if dy is not None]
    torch.autograd.backward([y for y, _ in live], [dy for _, dy in live])
    assert x.grad is not None
    found = {f"y{i}": y.detach() for i, (y, _, _) in enumerate(results)}
    found |= {f"z{i}": z.detach() for i, (_, _, z) in enumerate(results)}
    S = torch.cat([S for _, S, _ in results], dim=1).detach()
    return found | {"S": S, "dx": x.grad} | gradients(leaves)


def wants(b: Block) -> dict[str, list[bool]]:
    """Every gradient that there is."""
    fields = {"need_A": "lora_A", "need_B": "lora_B", "need_m": "magnitude", "need_bias": "bias"}
    return {name: [getattr(p, field) is not None for p in b.projections] for name, field in fields.items()}


def run_block(b: Block, *, vendor_forward: bool = False, vendor_backward: bool = False) -> dict[str, Tensor]:
    """All results of the kernels for `b`, left as it was; dm is had from z where there is a bias, else y."""
    with untouched(b):
        return _run_block(b, vendor_forward, vendor_backward)


def _run_block(b: Block, vendor_forward: bool, vendor_backward: bool) -> dict[str, Tensor]:
    keep_z = [p.magnitude is not None and p.bias is not None for p in b.projections]
    ys, S, zs = stacked_forward(
        b.x, b.projections, b.dropout_p, b.seeds, keep_z=keep_z, vendor_gemm=vendor_forward
    )
    kept = [y if z is None else z for y, z in zip(ys, zs, strict=True)]
    dtypes = [None if p.bias is None else p.bias.dtype for p in b.projections]
    back = stacked_backward(
        b.dys,
        b.x,
        b.projections,
        S,
        kept,
        keep_z,
        b.dropout_p,
        b.seeds,
        need_x=True,
        **wants(b),
        bias_dtypes=dtypes,
        vendor_gemm=vendor_backward,
    )
    found = {"S": S, "dx": back.dx}
    for name, values in {
        "y": ys,
        "z": zs,
        "dA": back.dA,
        "dB": back.dB,
        "dm": back.dm,
        "dbias": back.dbias,
    }.items():
        found |= {f"{name}{i}": value for i, value in enumerate(values)}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(kw_only=True)
class Mlp:
    """A gated MLP: `block` has gate and up, `down` has the down projection of h and the block's dY."""

    block: Block
    down: Projection
    dy: Tensor
    activation: str
    mask: Tensor | None = None
    seed: Tensor | None = None


def make_mlp(
    m: int,
    k: int,
    kinds: tuple[Kind, Kind, Kind],
    activation: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    dropout_p: float = 0.0,
) -> Mlp:
    """Gate and up [n, k], down [kinds[2].n, n]."""
    block = make_block(m, k, list(kinds[:2]), dtype, device, dropout_p=dropout_p)
    seed = torch.tensor([77], dtype=torch.int64, device=device) if dropout_p else None
    generator = torch.Generator().manual_seed(m)
    n = kinds[0].n
    return Mlp(
        block=block,
        down=make_projection(kinds[2], n, dtype, device),
        dy=torch.randn(m, kinds[2].n, generator=generator).to(device, dtype),
        activation=activation,
        mask=None if seed is None else recover_mask(m, n, dropout_p, seed),
        seed=seed,
    )


def evaluate_mlp(p: Mlp, dtype: torch.dtype) -> dict[str, Tensor]:
    """Forward and backward in `dtype`; g and u as autograd sees them, so that dg and du come out."""
    b = p.block
    x = b.x.detach().to(dtype).requires_grad_()
    leaves, down = [leaf(q, dtype) for q in b.projections], leaf(p.down, dtype)
    (g, S_g, _), (u, S_u, _) = (project(x, q, k, b.dropout_p) for q, k in zip(leaves, b.masks, strict=True))
    g.retain_grad()
    u.retain_grad()
    h = ACTIVATIONS[p.activation](g) * u
    y, S_down, _ = project(h, down, p.mask, b.dropout_p)
    y.backward(p.dy.to(dtype))
    found = {"g": g, "u": u, "h": h, "y": y, "S": torch.cat([S_g, S_u], dim=1), "S_down": S_down}
    grads = {"dg": g.grad, "du": u.grad, "dx": x.grad} | gradients(leaves) | gradients([down], "down_")
    return {name: value.detach() for name, value in (found | grads).items() if value is not None}


def run_mlp(p: Mlp) -> dict[str, Tensor]:
    """All results of the kernels for `p`, which they leave as it was."""
    with untouched(p):
        return _run_mlp(p)


def _run_mlp(p: Mlp) -> dict[str, Tensor]:
    b = p.block
    gate, up = b.projections
    keep_z = tuple(q.magnitude is not None and q.bias is not None for q in (gate, up))
    forward = glu_forward(b.x, gate, up, p.activation, b.dropout_p, b.seeds, keep_z=keep_z)
    down_z = p.down.magnitude is not None and p.down.bias is not None
    (y,), S_down, (z,) = stacked_forward(forward.h, [p.down], b.dropout_p, p.seed, keep_z=[down_z])
    assert forward.g is not None
    assert forward.u is not None
    back = glu_backward(
        p.dy,
        p.down,
        S_down,
        y if z is None else z,
        forward.g,
        forward.u,
        p.activation,
        b.dropout_p,
        p.seed,
        kept_is_z=down_z,
        need_h=True,
        need_A=p.down.lora_A is not None,
        need_B=p.down.lora_A is not None,
        need_m=p.down.magnitude is not None,
        need_bias=p.down.bias is not None,
    )
    kept = [
        forward.g if forward.z_g is None else forward.z_g,
        forward.u if forward.z_u is None else forward.z_u,
    ]
    rest = stacked_backward(
        [back.dg, back.du],
        b.x,
        [gate, up],
        forward.S,
        kept,
        keep_z,
        b.dropout_p,
        b.seeds,
        need_x=True,
        **wants(b),
    )
    found = {"g": forward.g, "u": forward.u, "h": forward.h, "y": y, "S": forward.S, "S_down": S_down}
    found |= {"dg": back.dg, "du": back.du, "dx": rest.dx}
    found |= {f"down_{name}0": getattr(back, name) for name in ("dA", "dB", "dm", "dbias")}
    for name in ("dA", "dB", "dm", "dbias"):
        found |= {f"{name}{i}": value for i, value in enumerate(getattr(rest, name))}
    return {name: value for name, value in found.items() if value is not None}
