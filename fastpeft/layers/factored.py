"""A weight ``W + s L R`` that is never formed: a stand-in for a Parameter while a module's forward reads it.

Stacked experts keep the weights of all experts in one Parameter and multiply by it in ways of their own: by
one expert after another, by one gathered for each token, by groups of tokens. PEFT's LoRA on such a Parameter
forms ``W + B A`` of every expert in every forward, and autograd the gradient of all of it in every backward.
The stand-in takes each product apart instead, with torch's last two axes multiplied::

    x (W + s L R) = x W + s (x L) R

whatever the module's forward is. It needs to know the calls that read a weight (:data:`_PRODUCTS`); any
other call is handed the sum itself, formed for it, so that its result is right as well.

To autograd the stand-in is the result of a node (:class:`_StandIn`) whose inputs are W and the factors, so
that gradients arrive which an ``autograd.Function`` of the forward's own computes for it as a whole. A
``torch.vmap`` of a function that closes over the stand-in raises: functorch wraps it unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops.eager import is_transformed
from fastpeft.ops.grouped import grouped_lora
from fastpeft.ops.lora import lora_linear


class FactoredWeight(Tensor):
    """``weight + scaling * left @ right`` to whoever reads it; no memory of its own. Made by :meth:`of`.

    Attributes:
        weight: W, [rows, columns] or [experts, rows, columns], as the module stores it.
        left: L, [.., rows, r], in W's dtype or fp32.
        right: R, [.., r, columns], likewise.
        scaling: s.
        formed_for: names of the calls that the sum was formed for, shared with the parts taken of it.
        recording: whether gradients were on where it was made; one read without them first is still trained.
    """

    weight: Tensor
    left: Tensor
    right: Tensor
    scaling: float
    formed_for: list[str]
    recording: bool
    _sum: Tensor | None
    _experts: list[tuple[Tensor, Tensor]] | None

    @classmethod
    def of(
        cls, weight: Tensor, left: Tensor, right: Tensor, scaling: float, formed_for: list[str] | None = None
    ) -> FactoredWeight:
        """Stand for the sum of these; nothing is computed."""
        formed_for = [] if formed_for is None else formed_for
        recording = torch.is_grad_enabled()
        if not recording:
            weight, left, right = map(_without_gradient, (weight, left, right))
        given = (weight, left, right, scaling, formed_for, recording)
        if is_transformed():  # which sees no Function without rules of its own; the products it does
            return cls._wrapping(*given)
        return _StandIn.apply(*given)  # type: ignore[no-any-return, no-untyped-call]

    @classmethod
    def _wrapping(
        cls,
        weight: Tensor,
        left: Tensor,
        right: Tensor,
        scaling: float,
        formed_for: list[str],
        recording: bool,
    ) -> FactoredWeight:
        self: FactoredWeight = Tensor._make_wrapper_subclass(
            cls, weight.size(), strides=weight.stride(), dtype=weight.dtype, device=weight.device
        )
        self.weight, self.left, self.right, self.scaling = weight, left, right, scaling
        self.formed_for, self.recording = formed_for, recording
        self._sum = self._experts = None
        return self

    def formed(self, call: str) -> Tensor:
        """Return the sum, for a call that no product here stands for."""
        if self._sum is None:
            self.formed_for.append(call)
            add = torch.addmm if self.weight.dim() == 2 else torch.baddbmm
            with _without_autocast(self.weight.device.type), torch.set_grad_enabled(self.recording):
                left, right = (factor.to(self.weight.dtype) for factor in (self.left, self.right))
                self._sum = add(self.weight, left, right, alpha=self.scaling)
        return self._sum

    def expert(self, index: int) -> FactoredWeight:
        """Return one expert's [rows, columns]."""
        if self._experts is None:  # unbound once: a gradient of a part would be as large as the whole
            with torch.set_grad_enabled(self.recording):
                self._experts = list(zip(self.left.unbind(0), self.right.unbind(0), strict=True))
        return self._part(self.weight[index], *self._experts[index])

    def gathered(self, indices: Tensor) -> FactoredWeight:
        """Return [indices, rows, columns], an expert for each."""
        return self._part(self.weight[indices], self.left[indices], self.right[indices])

    def transposed(self) -> FactoredWeight:
        """Return [.., columns, rows]."""
        return self._part(self.weight.mT, self.right.mT, self.left.mT)

    def _part(self, weight: Tensor, left: Tensor, right: Tensor) -> FactoredWeight:
        return FactoredWeight.of(weight, left, right, self.scaling, self.formed_for)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer a call that reads the weight."""
        kwargs = kwargs or {}
        if func in _LOOKS and args:
            return func(args[0].weight, *args[1:], **kwargs)
        if func in _PLACE_IN_THE_GRAPH:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if (product := _PRODUCTS.get(func)) is not None:
            result = product(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # of a property
            name = getattr(getattr(func, "__self__", None), "__name__", name)

        def plain(value: Any) -> Any:
            return value.formed(name) if isinstance(value, FactoredWeight) else value

        return func(*torch.utils._pytree.tree_map(plain, args), **torch.utils._pytree.tree_map(plain, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuse what comes past ``__torch_function__``: in there is no sum to compute with."""
        raise TypeError(f"{func}: expected a plain tensor, got the stand-in for an adapted Parameter")


class _StandIn(torch.autograd.Function):
    """W + s L R of W, L and R, not formed."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, left: Tensor, right: Tensor, scaling: float, *rest: Any
    ) -> FactoredWeight:
        ctx.save_for_backward(left, right)
        ctx.set_materialize_grads(False)
        ctx.scaling = scaling
        return FactoredWeight._wrapping(weight, left, right, scaling, *rest)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return g, s g R^T and s L^T g."""
        if g is None:
            return (None,) * 6
        left, right = ctx.saved_tensors
        need_weight, need_left, need_right, *_ = ctx.needs_input_grad
        d_left = (ctx.scaling * (g @ right.to(g.dtype).mT)).to(left.dtype) if need_left else None
        d_right = (ctx.scaling * (left.to(g.dtype).mT @ g)).to(right.dtype) if need_right else None
        return g if need_weight else None, d_left, d_right, None, None, None


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Of W itself, not of a copy in another dtype."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def _without_gradient(t: Tensor) -> Tensor:
    return t.detach() if t.requires_grad else t


# Handlers return NotImplemented for what is no product, or not spelled as one: torch is handed the sum then.


def _linear(
    _func: Any, x: Any = None, weight: Any = None, bias: Any = None, *more: Any, **others: Any
) -> Any:
    if more or others or not _is_product_of(x, weight, dim=2) or isinstance(bias, FactoredWeight):
        return NotImplemented
    return lora_linear(x, weight.weight, bias, weight.right, weight.left, scaling=weight.scaling)


def _matmul(func: Any, a: Any = None, b: Any = None, *more: Any, **others: Any) -> Any:
    """``a @ b``, either of which is the weight."""
    if more or others:
        return NotImplemented
    if _is_product_of(a, b, dim=2):  # x W, of which the stored W is the transposed weight of a linear
        return lora_linear(a, b.weight.mT, None, b.left.mT, b.right.mT, scaling=b.scaling)
    if _is_product_of(a, b, dim=3) and a.dim() == 3:
        left, right = b.left.to(a.dtype), b.right.to(a.dtype)
        return func(a, b.weight).add_(func(func(a, left), right), alpha=b.scaling)
    if _is_product_of(b, a, dim=3) and b.dim() == 3:
        left, right = a.left.to(b.dtype), a.right.to(b.dtype)
        return func(a.weight, b).add_(func(left, func(right, b)), alpha=a.scaling)
    return NotImplemented


def _grouped_mm(
    _func: Any,
    x: Any = None,
    weight: Any = None,
    offs: Any = None,
    bias: Any = None,
    out_dtype: Any = None,
    **others: Any,
) -> Any:
    """Rows of x by groups, each with the weight [in_features, out_features] of an expert."""
    if others or offs is None or bias is not None or out_dtype is not None:
        return NotImplemented
    if not _is_product_of(x, weight, dim=3) or x.dim() != 2:
        return NotImplemented
    if x.dtype is not weight.weight.dtype:  # autocast has no part in it
        return NotImplemented
    return grouped_lora(x, weight.weight, weight.left, weight.right, offs, scaling=weight.scaling)


def _is_product_of(x: Any, weight: Any, *, dim: int) -> bool:
    """Whether x is a plain operand for a weight with ``dim`` axes; else torch says what it makes of it."""
    if not isinstance(weight, FactoredWeight) or isinstance(x, FactoredWeight) or not isinstance(x, Tensor):
        return False
    fits = x.dtype is weight.weight.dtype or torch._C._is_any_autocast_enabled()
    return fits and weight.weight.dim() == dim and x.device == weight.weight.device


def _index(_func: Any, weight: Any, index: Any) -> Any:
    if not isinstance(weight, FactoredWeight) or weight.weight.dim() != 3 or isinstance(index, bool):
        return NotImplemented
    if isinstance(index, int):
        return weight.expert(index)
    integral = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)  # uint8 is a mask
    if not integral or index.dim() > 1:
        return NotImplemented
    return weight.gathered(index) if index.dim() else weight.expert(int(index))


def _transpose(_func: Any, weight: Any = None, dim0: Any = None, dim1: Any = None, **others: Any) -> Any:
    if others or weight is None or not (isinstance(dim0, int) and isinstance(dim1, int)):
        return NotImplemented
    dim = weight.weight.dim()
    return weight.transposed() if {dim0 % dim, dim1 % dim} == {dim - 2, dim - 1} else NotImplemented


def _transposed(_func: Any, weight: Any) -> Any:
    return weight.transposed()


def _transposed_matrix(_func: Any, weight: Any = None, **others: Any) -> Any:
    if others or weight is None or weight.weight.dim() != 2:
        return NotImplemented
    return weight.transposed()


# What a weight looks like, and the sum the same.
_LOOKS = frozenset(
    (
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "dtype", "device", "layout", "ndim", "is_cpu", "is_cuda", "is_meta")
        ),
        *(getattr(Tensor, name) for name in ("dim", "size", "numel", "is_floating_point")),
        torch.is_floating_point,
        torch.numel,
    )
)
_PLACE_IN_THE_GRAPH = frozenset(
    getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf")
)
_PRODUCTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
    **dict.fromkeys((torch.bmm, Tensor.bmm), _matmul),
    Tensor.__getitem__: _index,
    **dict.fromkeys((torch.transpose, Tensor.transpose), _transpose),
    Tensor.mT.__get__: _transposed,  # type: ignore[attr-defined]
    **dict.fromkeys((torch.t, Tensor.t, Tensor.T.__get__), _transposed_matrix),  # type: ignore[attr-defined]
}
if hasattr(torch, "_grouped_mm"):  # what F.grouped_mm calls
    _PRODUCTS[torch._grouped_mm] = _grouped_mm
