"""AdamW whose moments exist for the blocks that train now (arXiv 1711.05101 under a schedule)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fastpeft.errors import ConfigError, LayerSparseError
from fastpeft.sparse.candidates import trainable
from fastpeft.sparse.controller import LayerSparse, unwrapped
from fastpeft.sparse.rounding import stochastic_copy_
from fastpeft.sparse.schedule import Everything, Part, Policy, Schedule
from fastpeft.sparse.uniform import uniform

_MOMENTS = ("exp_avg", "exp_avg_sq")
_CHUNK = 2**25  # elements updated at a time in fp32: what the temporaries are the size of


class LayerSparseAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` over a model whose blocks take turns; two lines in any loop.

    >>> optimizer = fastpeft.LayerSparseAdamW(model, lr=1e-5, schedule=fastpeft.LISA(layers=2, period=10))
    >>> trainer = Trainer(model, args, train_dataset=dataset, optimizers=(optimizer, None))

    The candidates are the model's parameters that require gradients (on a patched model: the adapters);
    ``state`` holds moments for the active ones alone, 2 x element size x active parameters. With everything
    active the result is torch's to the bit. ``sparse`` is the :class:`LayerSparse` at work: ``active``,
    ``scores``, ``update_importance``, ``remove``.

    Args:
        model: the module that trains.
        lr: learning rate; groups may have their own.
        weight_decay: decoupled, on active parameters only.
        schedule: who trains when; default: every block, always.
        on_deactivate: ``"drop"`` the moments of blocks that stop, ``"keep"`` them, or ``"offload"`` them to
            host memory; default: the schedule's (drop; keep for IST).
        params: parameter groups as torch takes them, of the model's parameters, each with its own lr and
            weight_decay if need be; default: one group of all candidates.
        betas: of the moments.
        eps: added to the root of the second moment.
        blocks: paths of modules, each one block; default: found by structure.
        always_on: what trains besides the blocks: of ``"embeddings"``, ``"norms"``, ``"head"``, ``"other"``.
        master_weights: keep an fp32 copy of each active 16-bit parameter, and fp32 moments. It is made when a
            block's turn begins, and goes with its moments.
        moments_dtype: of 16-bit parameters' moments (default: the parameter's, or fp32 with a master).
        stochastic_rounding: bf16 parameters and moments are updated in fp32 and rounded by chance, instead
            of to the nearest, which loses small updates.
        importance_loss: for IST, see :class:`LayerSparse`.
        **options: ``foreach``, ``fused``, ``maximize``, ``capturable`` as torch's.

    Raises:
        ConfigError: an argument cannot work.
        LayerSparseError: nothing trains, or a parameter is not the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        schedule: Schedule | None = None,
        on_deactivate: Policy | None = None,
        *,
        params: Iterable[dict[str, Any]] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        blocks: Sequence[str] | None = None,
        always_on: Sequence[Part] | None = None,
        master_weights: bool = False,
        moments_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        importance_loss: Callable[[Any], Tensor] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model: expected the module that trains, got {type(model).__name__}")
        _check_options(options, master_weights, moments_dtype, stochastic_rounding)
        inner = unwrapped(model)
        candidates = [parameter for _, parameter in trainable(inner)]
        if not candidates:
            raise LayerSparseError(f"no parameter of {type(inner).__name__} requires gradients")
        groups: Any = [{"params": candidates}] if params is None else list(params)
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)
        _check_groups(inner, self.param_groups, stochastic_rounding)
        self.master_weights = master_weights
        self.moments_dtype = moments_dtype
        self.stochastic_rounding = stochastic_rounding
        self._in_fp32 = bool(master_weights or moments_dtype or stochastic_rounding)
        self.sparse = LayerSparse(
            self,
            inner,
            Everything() if schedule is None else schedule,
            blocks=blocks,
            always_on=always_on,
            on_deactivate=on_deactivate,
            importance_loss=importance_loss,
        )
        self.sparse.options.update(
            master_weights=master_weights,
            moments_dtype=str(moments_dtype),
            stochastic_rounding=stochastic_rounding,
        )
        self.sparse.write_record()

    @property
    def active_blocks(self) -> tuple[str, ...]:
        """The names of the blocks that train now."""
        return self.sparse.active

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the active parameters, then let the schedule choose."""
        # Not by way of AdamW.step: the hooks, of which the schedule is one, would run for it once more.
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for place, group in enumerate(self.param_groups):
                if not self._in_fp32:
                    self._update(group, [p for p in group["params"] if p.grad is not None])
                    continue
                numbered = [(i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
                for chunk in _chunks(numbered):
                    self._update_in_fp32(group, place, chunk)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """One step of AdamW on what is stored."""
        states = [self._state_of(p, group) for p in parameters]
        moments = {key: [state[key] for state in states] for key in _MOMENTS}
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._adamw(group, list(parameters), gradients, moments, [state["step"] for state in states])

    def _adamw(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        moments: dict[str, list[Tensor]],
        steps: list[Tensor],
    ) -> None:
        adamw(
            weights,
            gradients,
            moments["exp_avg"],
            moments["exp_avg_sq"],
            [],
            steps,
            foreach=group["foreach"],
            capturable=group["capturable"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            has_complex=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _update_in_fp32(
        self, group: dict[str, Any], place: int, numbered: list[tuple[int, nn.Parameter]]
    ) -> None:
        """One step of AdamW in fp32 on what is stored in less; each parameter with its index in the group."""
        parameters = [parameter for _, parameter in numbered]
        states = [self._state_of(p, group) for p in parameters]
        weights = [
            state["master"] if "master" in state else p.detach().float()
            for p, state in zip(parameters, states, strict=True)
        ]
        moments = {key: [state[key].float() for state in states] for key in _MOMENTS}
        gradients = [p.grad.float() for p in parameters if p.grad is not None]
        self._adamw(group, weights, gradients, moments, [state["step"] for state in states])
        for i, ((index, parameter), state) in enumerate(zip(numbered, states, strict=True)):
            stored = [(parameter, weights[i]), *((state[key], moments[key][i]) for key in _MOMENTS)]
            generator = self._generator(parameter.device, place, index) if self.stochastic_rounding else None
            for target, value in stored:
                if torch._C._is_alias_of(target, value):  # type: ignore[attr-defined]
                    continue
                if generator is not None and target.dtype is torch.bfloat16:
                    stochastic_copy_(target, value, generator)
                else:
                    target.copy_(value)

    def _state_of(self, parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if state:
            return state
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise LayerSparseError("AdamW has no sparse gradients; make the embedding with sparse=False")
        on_device = group["capturable"] or group["fused"]
        state["step"] = torch.zeros((), device=parameter.device if on_device else "cpu")
        short = parameter.dtype in (torch.bfloat16, torch.float16)
        dtype = self.moments_dtype if short else None
        if short and self.master_weights:
            state["master"] = parameter.detach().float()
            dtype = dtype or torch.float32
        for key in _MOMENTS:
            state[key] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        return state

    def _generator(self, device: torch.device, place: int, index: int) -> torch.Generator:
        """Random numbers for one parameter at one step: the same after a resumption."""
        seed = uniform(self.sparse.schedule.seed, "rounding", self.sparse.steps, place, index)
        return torch.Generator(device).manual_seed(int(seed * 2**53))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume: moments, masters, schedule, scores, and who trains.

        Raises:
            LayerSparseError: the state is of another model, schedule or precision; nothing is changed.
        """
        super().load_state_dict(state_dict)
        # torch casts what it loads to the parameter's dtype, which masters and fp32 moments do not have.
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            state = self.sparse.state_of(parameter)
            for key, saved in state_dict["state"].get(index, {}).items():
                if not state or key not in state:  # others' tensors (fastpeft.allocation) are theirs again
                    continue
                if isinstance(saved, Tensor) and state[key].dtype is not saved.dtype:
                    state[key] = saved.to(device=state[key].device, copy=True)


def _chunks(numbered: Sequence[tuple[int, nn.Parameter]]) -> Iterable[list[tuple[int, nn.Parameter]]]:
    chunk: list[tuple[int, nn.Parameter]] = []
    elements = 0
    for entry in numbered:
        chunk.append(entry)
        elements += entry[1].numel()
        if elements >= _CHUNK:
            yield chunk
            chunk, elements = [], 0
    if chunk:
        yield chunk


def _check_options(
    options: dict[str, Any], master: bool, moments_dtype: torch.dtype | None, stochastic: bool
) -> None:
    allowed = ("foreach", "fused", "maximize", "capturable")
    for name in options:
        if name not in allowed:
            raise ConfigError(
                f"LayerSparseAdamW: no option {name!r}; torch's that it takes: {', '.join(allowed)}"
            )
    if moments_dtype not in (None, torch.bfloat16, torch.float32):
        raise ConfigError(f"moments_dtype: expected torch.bfloat16 or torch.float32, got {moments_dtype!r}")
    if master and stochastic:
        raise ConfigError("master_weights and stochastic_rounding are two ways to the same end: choose one")


def _check_groups(model: nn.Module, groups: list[dict[str, Any]], stochastic: bool) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise LayerSparseError(
                    f"params: one of shape {list(parameter.shape)} is no parameter of {type(model).__name__}"
                )
            if parameter.is_complex() or (stochastic and parameter.dtype is torch.float16):
                raise LayerSparseError(
                    f"{names[id(parameter)]}: expected real parameters, of fp32 or bf16 under stochastic "
                    f"rounding, got {parameter.dtype}"
                )
