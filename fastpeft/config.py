"""The LoRA/DoRA configuration: PEFT's field names, frozen, checked on construction."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fastpeft import fields
from fastpeft.errors import ConfigError

Bias = Literal["none", "all", "lora_only"]
DoRADropout = Literal["base_and_adapter", "adapter"]

# Fields of PEFT's LoraConfig that only matter to initialisations which are not ours.
_WITHOUT_EFFECT = (
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
)
_NITER = re.compile(r"pissa_niter_[1-9]\d*")
# No fields of PEFT's: they play no part once the adapter is trained.
NOT_IN_FILES = ("dora_dropout", "freeze_lora_A")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """LoRA (arXiv 2106.09685) or, with ``use_dora``, DoRA (arXiv 2402.09353) on chosen linear layers.

    Every field but ``dora_dropout`` and ``freeze_lora_A`` has the name and meaning it has in
    ``peft.LoraConfig``; only the default of ``target_modules`` differs (PEFT keeps a table of names by model
    type, used for its own objects).

    Attributes:
        r: rank of the update ``B A``.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        lora_dropout: probability of zeroing an element of the adapter's input during training.
        target_modules: names or dotted suffixes of modules; or one regular expression that must match a whole
            module path; or ``"all-linear"`` (every linear but the output embedding); or None for every linear
            inside the model's repeated blocks.
        exclude_modules: names, suffixes or one regular expression, taken out of ``target_modules``.
        use_dora: learn a magnitude per output feature beside the low-rank direction.
        dora_dropout: what ``lora_dropout`` drops under ``use_dora``: ``"base_and_adapter"``, as PEFT and the
            paper's code do, or ``"adapter"``, as torchtune and Axolotl do (formulas in
            :mod:`fastpeft.ops.dora`). Files do not hold it: it plays no part after training.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` (arXiv 2312.03732).
        bias: which biases of the base train: ``"none"``, ``"all"``, or ``"lora_only"`` (of patched modules).
        modules_to_save: modules trained whole and saved with the adapter: every one whose path ends so.
        rank_pattern: rank by module, for names, suffixes or regular expressions that differ from ``r``.
        alpha_pattern: likewise for ``lora_alpha``.
        layers_to_transform: indices of the repeated blocks to patch; None means all.
        init_lora_weights: True for Kaiming-uniform A and zero B, ``"gaussian"`` for normal A and zero B,
            False for random A and B (the update starts non-zero), ``"orthogonal"`` for random A and B with
            ``B A = 0``; or ``"pissa"``, ``"pissa_niter_N"`` or ``"olora"``, which move a part of each base
            weight into the adapter (:mod:`fastpeft.layers.initialise`).
        freeze_lora_A: LoRA-FA (arXiv 2308.03303): only B trains, and the adapter keeps no input for backward.
            Files do not hold it.

    Raises:
        ConfigError: a value cannot work; the message names the field, what was expected and what came.
    """

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    use_dora: bool = False
    dora_dropout: DoRADropout = "base_and_adapter"
    use_rslora: bool = False
    bias: Bias = "none"
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    init_lora_weights: bool | str = True
    freeze_lora_A: bool = False

    def __post_init__(self) -> None:
        fields.check_count("r", self.r)
        fields.check_positive("lora_alpha", self.lora_alpha)
        fields.check_probability("lora_dropout", self.lora_dropout)
        fields.check_one_of("bias", self.bias, get_args(Bias))
        fields.check_one_of("dora_dropout", self.dora_dropout, get_args(DoRADropout))
        for name in ("use_dora", "use_rslora", "freeze_lora_A"):
            fields.check_flag(name, getattr(self, name))
        fields.settle_selection(self)
        self._store("rank_pattern", fields.pattern("rank_pattern", self.rank_pattern, fields.check_count))
        self._store(
            "alpha_pattern", fields.pattern("alpha_pattern", self.alpha_pattern, fields.check_positive)
        )
        self._check_initialisation()

    def _store(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_initialisation(self) -> None:
        chosen = self.init_lora_weights
        if not is_initialisation(chosen):
            raise ConfigError(
                "init_lora_weights: expected True, False, 'gaussian', 'orthogonal', 'olora', 'pissa' or "
                f"'pissa_niter_N' for N power iterations, got {chosen!r}"
            )
        if chosen == "orthogonal" and (odd := [r for r in (self.r, *self.rank_pattern.values()) if r % 2]):
            raise ConfigError(f"r: expected an even rank for the orthogonal initialisation, got {odd[0]}")

    @property
    def rewrites_base(self) -> bool:
        """Whether the initialisation moves a part of the base weights into the adapter."""
        return rewrites_base(self.init_lora_weights)

    def rank_of(self, module_path: str) -> int:
        """Return the rank of one module: its entry in ``rank_pattern``, else ``r``."""
        return fields.lookup(self.rank_pattern, module_path, self.r)

    def scaling_of(self, module_path: str) -> float:
        """Return the factor on ``B A`` for one module: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        alpha, r = fields.lookup(self.alpha_pattern, module_path, self.lora_alpha), self.rank_of(module_path)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def doubled(self) -> LoRA:
        """Return the configuration of twice the rank and the same scaling everywhere, plainly initialised."""
        factor = math.sqrt(2) if self.use_rslora else 2
        return dataclasses.replace(
            self,
            r=2 * self.r,
            lora_alpha=self.lora_alpha * factor,
            rank_pattern={key: 2 * r for key, r in self.rank_pattern.items()},
            alpha_pattern={key: alpha * factor for key, alpha in self.alpha_pattern.items()},
            init_lora_weights=True,
        )

    @classmethod
    def from_peft(cls, config: Any) -> LoRA:
        """Return the LoRA that a ``peft.LoraConfig`` (or its ``to_dict()``) describes.

        Raises:
            ConfigError: it is not a LoRA configuration, or it sets fields that fastpeft does not honour.
        """
        kind, values = fields.read_peft(config)
        if kind != "LORA":
            raise ConfigError(f"expected a peft.LoraConfig (peft_type LORA), got peft_type {kind!r}")
        ours = {f.name for f in dataclasses.fields(cls)}
        unsupported = fields.not_honoured(values, {*ours, *_WITHOUT_EFFECT})
        if not is_initialisation(chosen := values.get("init_lora_weights", True)):
            unsupported.append(f"init_lora_weights={chosen!r}")
        if unsupported:
            raise ConfigError(f"peft.LoraConfig sets what fastpeft does not honour: {', '.join(unsupported)}")
        values["modules_to_save"] = fields.trained_heads(values)
        return cls(**{name: value for name, value in values.items() if name in ours})


def is_initialisation(value: object) -> bool:
    """Whether ``init_lora_weights`` may have this value."""
    known = ("gaussian", "orthogonal", "olora", "pissa")
    return isinstance(value, bool) or (
        isinstance(value, str) and (value in known or _NITER.fullmatch(value) is not None)
    )


def rewrites_base(value: bool | str) -> bool:
    """Whether an initialisation moves a part of the base weights into the adapter."""
    return isinstance(value, str) and (value == "olora" or value.startswith("pissa"))
