"""DoRA's row norm ``n = ||W + s B A||_row``, kept while A, B and W stay what they were.

Gradient accumulation, the recomputation of activation checkpointing and evaluation find it ready. m is no
part of it (``c = m / n`` is taken inside the op), so a step of m alone keeps it.

Neither identity nor ``_version`` proves that a tensor is unchanged: writes through ``.data``, FSDP2's
all-gather and torch's fused optimisers (measured with torch 2.13) leave the version as it was. So, beyond a
key of the storage's identity, address, version, dtype, device, shape and strides, every forward compares
values, training or not:

- On a CPU A and B are compared whole, with exact copies: 40 us at r=16 and 4096 x 4096, as long as sums
  over the integer bits take, which some changes would pass. W is compared along its diagonal, continued
  through the whole matrix in steps of its shorter side: one element of every row and of every column, 17 us
  there (cold 120 us; four whole columns: 55 and 450). It sees whatever rewrites W, a row or a column of it;
  it cannot see a write through ``weight.data`` to elements off the diagonal alone.
- On a GPU the host would wait for the device. There one launch of ``fastpeft_kernels.kept_norm`` compares
  fingerprints of the same values and makes n anew only where they differ: a launch more than a norm that
  needs no proof, and W is not read. The one forward without it is a recomputation inside a backward, which
  takes what its forward had.
- On a GPU where these kernels do not run (the torch backend, fp64, a part they have no configuration for)
  nothing sound is at hand that reads less than W: n is computed by every forward, but for recomputations.

Kept: n and, on a CPU, ``||W||^2``, the copies of A and B and W's sample; on a GPU the fingerprints, 2 KiB.
Never in a state_dict; a copied or pickled module starts with an empty cache.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastpeft import backend as backends
from fastpeft.ops.eager import is_intercepted, is_seen_through
from fastpeft.ops.row_norm import row_norm, row_norm_squared

PLAIN_TYPES = (Tensor, nn.Parameter)  # not DTensor, FakeTensor, quantised weights
Trust = Literal["values", "fingerprints", "key", "never"]


def trust(
    *, is_cpu: bool, has_kernels: bool = False, recomputing: bool = False, sole_forward: bool = False
) -> Trust:
    """Return what must be unchanged before a stored norm is used again; ``never``: nothing suffices.

    Args:
        is_cpu: the host can compare values without waiting for a device.
        has_kernels: the device can compare fingerprints, and make the norm where they differ.
        recomputing: this forward runs inside a backward, as activation checkpointing's does.
        sole_forward: the stored norm is from the only forward that this backward can be repeating, or from
            this backward itself. (After two forwards, with weights exchanged through ``.data`` in between,
            it may be the other one's.)
    """
    if is_cpu:
        return "values"
    if recomputing and sole_forward:
        return "key"
    return "fingerprints" if has_kernels else "never"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """A value computed from ``tensors``: what they looked like then, and copies of what to compare."""

    storages: tuple[weakref.ref[torch.UntypedStorage], ...]
    key: tuple[object, ...]
    copies: tuple[Tensor, ...]
    value: Tensor

    def is_of(self, tensors: tuple[Tensor, ...], key: tuple[object, ...]) -> bool:
        alive = zip(self.storages, tensors, strict=True)
        return self.key == key and all(r() is t.untyped_storage() for r, t in alive)

    def same_values(self, values: tuple[Tensor, ...]) -> bool:
        if len(self.copies) != len(values):
            return False  # made by another backend, which keeps fingerprints
        return all(torch.equal(copy, value) for copy, value in zip(self.copies, values, strict=True))


class NormCache:
    """One layer's row norm (module docstring)."""

    def __init__(self) -> None:
        self._norm: _Stored | None = None
        self._squared: _Stored | None = None
        self._forwards = 0  # outside backward, since the last one inside
        self._task = -1  # the backward that the last forward inside one belonged to

    def __reduce__(self) -> tuple[type[NormCache], tuple[()]]:  # copy and pickle start empty
        return NormCache, ()

    def norm(
        self, parameter: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor | None:
        """Return n [out_features] in fp32 (fp64), or None where it is the op's own business.

        ``weight`` is ``parameter`` as [out_features, in_features]. None: under torch.compile, CUDA graph
        capture and other tracing, whose results outlive this call; for tensor subclasses; for tensors made in
        inference mode, which count no writes; on the meta device; and for a weight that trains.
        """
        tensors = (parameter, lora_A, lora_B)
        if _is_traced(parameter) or parameter.requires_grad or not all(map(_is_plain, tensors)):
            return None
        has_kernels = _has_kernels(weight, lora_A, lora_B)
        squared = None
        if has_kernels or not _is_cpu(parameter):
            level = self._trust_on_gpu(has_kernels)
        else:
            level, squared = trust(is_cpu=True), self._weight_norm_squared(parameter, weight)
        key = (*map(_look, tensors), scaling, has_kernels, _stream(weight))
        stored = self._norm
        if stored is not None and not stored.is_of(tensors, key):
            stored = None
        if stored is not None and (
            level == "key" or (level == "values" and stored.same_values((lora_A, lora_B)))
        ):
            return stored.value
        with torch.inference_mode(False), torch.no_grad():
            copies: tuple[Tensor, ...] = ()
            if has_kernels:
                value, prints = _kept_norm(weight, lora_A, lora_B, scaling, stored)
                copies = (prints,)
            else:
                if level == "values":
                    # Before they are read: a write by another thread in between costs a recomputation.
                    copies = (lora_A.clone(), lora_B.clone())
                squared = row_norm_squared(weight) if squared is None else squared
                value = row_norm(weight, lora_A, lora_B, scaling, squared)
        self._norm = _Stored(storages=tuple(map(_alive, tensors)), key=key, copies=copies, value=value)
        return value

    def _weight_norm_squared(self, parameter: Tensor, weight: Tensor) -> Tensor:
        stored, key, sample = self._squared, (_look(parameter),), _diagonal(weight)
        if stored is None or not (stored.is_of((parameter,), key) and stored.same_values(sample)):
            with torch.inference_mode(False), torch.no_grad():
                copies = tuple(part.clone() for part in sample)
                value = row_norm_squared(weight)
            stored = _Stored(storages=(_alive(parameter),), key=key, copies=copies, value=value)
            self._squared, self._norm = stored, None
        return stored.value

    def _trust_on_gpu(self, has_kernels: bool) -> Trust:
        task = torch._C._current_graph_task_id()
        recomputing = task != -1
        level = trust(
            is_cpu=False,
            has_kernels=has_kernels,
            recomputing=recomputing,
            sole_forward=self._forwards == 1 or (self._forwards == 0 and self._task == task),
        )
        self._forwards, self._task = (0, task) if recomputing else (self._forwards + 1, -1)
        return level


def _has_kernels(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether the fused kernels serve these tensors; under Triton's interpreter a CPU's too."""
    words = all(t.is_floating_point() and t.element_size() in (2, 4) for t in (lora_A, lora_B))
    return words and _runs_kernels(weight)


def _runs_kernels(weight: Tensor) -> bool:
    return backends.resolve(weight, op="dora_linear") == "triton"


def _kept_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, stored: _Stored | None
) -> tuple[Tensor, Tensor]:
    """Return n, as the op computes it where it is given none, and the fingerprints of what it is of."""
    import fastpeft_kernels

    kept = None if stored is None else (stored.value, stored.copies[0])
    return fastpeft_kernels.kept_norm(weight, lora_A, lora_B, scaling, kept)


def _is_cpu(tensor: Tensor) -> bool:
    return tensor.is_cpu


def _is_plain(tensor: Tensor) -> bool:
    plain = type(tensor) in PLAIN_TYPES or (is_seen_through() and isinstance(tensor, FakeTensor))
    return plain and not tensor.is_inference() and not tensor.is_meta


def _is_traced(parameter: Tensor) -> bool:
    """Whether something watches the calls: what it keeps would keep a value, or miss a call another time.

    Selective activation checkpointing is such a dispatch mode: it counts the products it sees in forward and
    hands them out in that order in the recomputation.
    """
    return (
        torch.compiler.is_compiling()
        or is_intercepted()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or (parameter.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _alive(tensor: Tensor) -> weakref.ref[torch.UntypedStorage]:
    """What tells a tensor from a later one at its address.

    Not a weak reference to the tensor: ``torch.utils.swap_tensors``, by which a module's parameters can be
    cast, moved and loaded (``torch.__future__.set_swap_module_params_on_conversion``), refuses one that has
    any.
    """
    return weakref.ref(tensor.untyped_storage())


def _look(tensor: Tensor) -> tuple[object, ...]:
    """What shows of a tensor without reading it."""
    return (
        tensor.data_ptr() if type(tensor) in PLAIN_TYPES else 0,  # a fake tensor has no address
        tensor._version,
        tensor.dtype,
        tensor.device,
        tensor.shape,
        tensor.stride(),
    )


def _stream(tensor: Tensor) -> int:
    """The stream that orders a stored value before its use; work on another one would not wait for it."""
    return torch.cuda.current_stream(tensor.device).stream_id if tensor.is_cuda else 0


def _diagonal(weight: Tensor) -> tuple[Tensor, ...]:
    """Views of one element of every row and of every column of W: the diagonals of its square parts."""
    short, long = sorted(weight.shape)
    if short == 0:
        return ()
    along = weight.stride(0 if weight.shape[0] == long else 1)
    step, start = sum(weight.stride()), weight.storage_offset()
    squares, rest = divmod(long, short)
    whole = weight.as_strided((squares, short), (short * along, step), start)
    return (whole, weight.as_strided((rest,), (step,), start + squares * short * along)) if rest else (whole,)
