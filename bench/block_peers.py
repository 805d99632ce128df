"""What fused blocks move at least, and what their linears move one by one, as formulas in X, W, F and Y.

X = 2MK is the input all share, W and Y are the sums over the projections (Y the block's output in a gated
MLP), F = 2 M d_ff its inner tensors. As in `peers`, terms of the rank are left out and nothing is measured.

What linears do one by one is their own formula taken for each, and what lies between them: autograd adds up
the gradients of a shared x (3X an addition), and an eager gate reads and writes 5F forward (act(g); times u)
and 9F backward (dh u, dh act(g), act's own).
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.peers import PEERS, TARGETS, Formula

SINGLES = "single-layer ops"


def stacked_target(method: str, name: str, count: int) -> Formula:
    """The floor, split at S: of all S and all dA one read of x each, of all y and of dx one launch each."""
    layer = TARGETS[method, name]
    norms = count if layer.launches == 3 and name == "forward" else 0
    launches = 2 + (norms if name.startswith("forward") else count)
    return Formula(name="target", x=2, w=layer.w, y=layer.y, launches=launches)


def stacked_peers(method: str, name: str, count: int) -> Iterator[Formula]:
    """One read of everything where it is forward's, then linear by linear."""
    if name == "forward, norm cached" or (method, name) == ("lora", "forward"):
        yield Formula(name="one pass (minimum)", x=1, w=1, y=1, launches=1)
    for layer in _linears(method, name):
        sums = count - 1 if name == "backward" else 0
        yield Formula(
            name=layer.name,
            x=count * layer.x + 3 * sums,
            w=layer.w,
            y=layer.y,
            launches=count * (layer.launches or 0) + sums,
        )


def gated_target(method: str, name: str) -> Formula:
    """The floor, split at S: g, u and h written once, h read twice; dh never written, h made again for dA.

    Backward reads g and u for dA and for dg and du, which it writes, and reads for dS and for dx; for DoRA's
    dm once more.
    """
    dora = method == "dora"
    if name == "backward":
        return Formula(name="target", x=2, w=1, f=10 + 2 * dora, y=2 + dora, launches=7)
    norms = 3 if dora and name == "forward" else 0
    return Formula(name="target", x=2, w=1 + (norms > 0), f=5, y=1, launches=4 + norms)


def gated_peers(method: str, name: str) -> Iterator[Formula]:
    """One read of everything where it is forward's, then linear by linear."""
    if name == "forward, norm cached" or (method, name) == ("lora", "forward"):
        yield Formula(name="one pass (minimum)", x=1, w=1, f=4, y=1, launches=2)
    backward = name == "backward"
    for layer in _linears(method, name):
        # Gate and up read x and write F; down reads F, and backward its x is h.
        yield Formula(
            name=layer.name,
            x=2 * layer.x + 3 * backward,
            w=layer.w,
            f=2 * layer.y + layer.x + (9 if backward else 5),
            y=layer.y,
            launches=3 * (layer.launches or 0) + (4 if backward else 2),
        )


def _linears(method: str, name: str) -> Iterator[Formula]:
    """What one linear moves: by our single-layer op, and in PEFT."""
    yield _named(SINGLES, TARGETS[method, name])
    yield from (peer for peer in PEERS[method, name] if peer.name.startswith("PEFT"))


def _named(name: str, formula: Formula) -> Formula:
    return Formula(name=name, x=formula.x, w=formula.w, y=formula.y, launches=formula.launches)
