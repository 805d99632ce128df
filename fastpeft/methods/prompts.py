"""Prefix tuning (arXiv 2101.00190) and prompt tuning (arXiv 2104.08691): virtual tokens train, no weight.

    prefix tuning   keys [P_K ; K] and values [P_V ; V] in every layer, P from rows or from an MLP over rows
    prompt tuning   embeddings [P ; E] below the first layer

For decoders of transformers' classes. The files are PEFT's: the rows alone, also of a prefix that was trained
through an MLP, which is there for training only.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastpeft import fields
from fastpeft.errors import CheckpointError, ConfigError, PatchError
from fastpeft.folder_files import CONFIG_NAME, WEIGHTS_NAME
from fastpeft.layers.prompts import CHILD, PrefixEncoder, PromptEncoder, attach, detach
from fastpeft.methods.method import Differences, Method, Plan
from fastpeft.patch_report import ModuleReport

_KEY = "prompt_embeddings"  # of the one tensor in a file
# What PEFT writes of the model's own sizes.
_SIZES = ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    num_virtual_tokens: int
    modules_to_save: tuple[str, ...] = ()

    peft_type: ClassVar[str]
    own_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        fields.check_count("num_virtual_tokens", self.num_virtual_tokens)
        names = fields.names("modules_to_save", self.modules_to_save or ())
        object.__setattr__(self, "modules_to_save", names)

    @classmethod
    def from_peft(cls, config: Any) -> Any:
        """Return the configuration that one of PEFT's (or its ``to_dict()``) describes.

        Raises:
            ConfigError: it is of another method, or sets what fastpeft does not honour.
        """
        kind, values = fields.read_peft(config)
        if kind != cls.peft_type:
            raise ConfigError(f"expected peft_type {cls.peft_type}, got peft_type {kind!r}")
        ours = {f.name for f in dataclasses.fields(cls)}
        if unsupported := fields.not_honoured(values, (*ours, *_SIZES, *cls.own_fields)):
            raise ConfigError(f"{cls.__name__} does not honour: {', '.join(unsupported)}")
        if values.get("num_transformer_submodules") not in (None, 1):
            raise ConfigError(f"{cls.__name__} is for decoders, num_transformer_submodules=1")
        values["modules_to_save"] = fields.trained_heads(values)
        return cls(**{name: value for name, value in values.items() if name in ours and value is not None})


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(_Prompt):
    """Keys and values of virtual tokens in every layer. Names and meanings are ``peft.PrefixTuningConfig``'s.

    Attributes:
        num_virtual_tokens: how many, n.
        prefix_projection: make them by an MLP, which the paper finds to train more steadily; a file holds its
            result.
        encoder_hidden_size: of the MLP; default: as many as the keys of a layer have.
        init_weights: ``"zero"`` starts with keys and values of zero, None at random.
        modules_to_save: modules trained whole and saved with the prefix: every one whose path ends so.

    Raises:
        ConfigError: a value cannot work; the message names the field, what was expected and what came.
    """

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: Literal["zero"] | None = None

    peft_type = "PREFIX_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        fields.check_flag("prefix_projection", self.prefix_projection)
        if self.encoder_hidden_size is not None:
            fields.check_count("encoder_hidden_size", self.encoder_hidden_size)
        if self.init_weights not in (None, "zero"):
            raise ConfigError(f"init_weights: expected 'zero' or None, got {self.init_weights!r}")


@dataclass(frozen=True, kw_only=True)
class PromptTuning(_Prompt):
    """Embeddings of virtual tokens in front of the input. Names are ``peft.PromptTuningConfig``'s.

    The model's logits begin with those of the virtual tokens, as under PEFT; labels are set to -100 there.

    Attributes:
        num_virtual_tokens: how many.
        prompt_tuning_init: ``"RANDOM"``, or ``"SAMPLE_VOCAB"`` for embeddings of random tokens.
        modules_to_save: modules trained whole and saved with the prompt: every one whose path ends so.

    Raises:
        ConfigError: a value cannot work; the message names the field, what was expected and what came.
    """

    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB"] = "RANDOM"

    peft_type = "PROMPT_TUNING"
    own_fields = ("prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path")

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)
        object.__setattr__(self, "prompt_tuning_init", chosen)
        fields.check_one_of("prompt_tuning_init", chosen, ("RANDOM", "SAMPLE_VOCAB"))


class PromptMethod(Method):
    """:class:`fastpeft.PrefixTuning` or :class:`fastpeft.PromptTuning` in the verbs.

    Args:
        config: which of the two.
    """

    config: type[_Prompt]

    def __init__(self, config: type[_Prompt]) -> None:
        self.config, self.peft_type = config, config.peft_type

    def plan(self, model: nn.Module, config: Any, name: str, *, allow_unmatched: bool) -> Plan:
        """Virtual tokens before the model's input.

        Raises:
            PatchError: it is no decoder whose sizes its configuration tells.
        """
        layers, heads, head_dim, token_dim = _sizes(model)
        like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        kind: dict[str, Any] = {
            "dtype": torch.float64 if like.dtype is torch.float64 else torch.float32,
            "device": like.device,
        }
        encoder: PromptEncoder
        if isinstance(config, PrefixTuning):
            features = heads * head_dim
            hidden = (config.encoder_hidden_size or features) if config.prefix_projection else None
            shape = layers, heads, head_dim
            encoder = PrefixEncoder(config.num_virtual_tokens, shape, features, hidden, **kind)
            if config.init_weights == "zero":
                last = encoder.embedding if encoder.transform is None else encoder.transform[-1]
                for parameter in last.parameters():
                    nn.init.zeros_(parameter)
            what = f"{layers} layers of keys and values" + (", by an MLP" if hidden else "")
        else:
            encoder = PromptEncoder(config.num_virtual_tokens, token_dim, token_dim, None, **kind)
            if config.prompt_tuning_init == "SAMPLE_VOCAB":
                table: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
                chosen = torch.randint(len(table), (config.num_virtual_tokens,))
                encoder.embedding.weight.data.copy_(table.detach()[chosen.to(table.device)])
            what = "embeddings"
        report = ModuleReport(CHILD, "patched", f"{config.num_virtual_tokens} virtual tokens, {what}")
        return Plan(reports=[report], finish=lambda: attach(model, encoder.train(model.training)))

    def detach(self, model: nn.Module) -> None:
        """Take them away."""
        detach(model)

    def switches(self, model: nn.Module) -> list[Any]:
        """The encoder."""
        return [model._modules[CHILD]]

    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """The rows: the parameter itself where there is no MLP."""
        encoder: Any = model._modules[CHILD]
        return {_KEY: encoder.embedding.weight if encoder.transform is None else encoder().detach()}

    def content(self, model: nn.Module, config: Any, name: str) -> dict[str, Any]:
        """PEFT's fields."""
        layers, heads, head_dim, token_dim = _sizes(model)
        return {
            **dataclasses.asdict(config),
            "num_layers": layers,
            "num_attention_heads": heads,
            "num_transformer_submodules": 1,
            "token_dim": heads * head_dim if isinstance(config, PrefixTuning) else token_dim,
        }

    def read(self, content: Mapping[str, Any]) -> Any:
        """One of PEFT's configurations; how the rows began, and through which MLP, is not in the file."""
        values = {**content, "prefix_projection": False, "encoder_hidden_size": None}
        if "prompt_tuning_init" in values:
            values["prompt_tuning_init"] = "RANDOM"
        return self.config.from_peft(values)

    def translate(self, config: Any) -> Any:
        """One of PEFT's configurations."""
        return self.config.from_peft(config)

    def check_file(self, path: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
        """There are as many rows as the configuration says."""
        if _KEY not in tensors:
            raise CheckpointError(f"{path / WEIGHTS_NAME}: holds no {_KEY}")
        rows = list(tensors[_KEY].shape)
        if rows[:1] != [config.num_virtual_tokens]:
            raise CheckpointError(
                f"{path}: {CONFIG_NAME} declares {config.num_virtual_tokens} virtual tokens, "
                f"{WEIGHTS_NAME} holds {_KEY} {rows}"
            )

    def differences(self, model: nn.Module, name: str, config: Any) -> Differences:
        """An MLP, which the rows cannot be read back into."""
        encoder: Any = model._modules[CHILD]
        if encoder.transform is None:
            return []
        return ["the model's prefix is made by an MLP, the folder holds the result of one; unpatch it first"]


def _sizes(model: nn.Module) -> tuple[int, int, int, int]:
    """(layers, heads of keys, features of a head, width) of a decoder."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    has_cache = "past_key_values" in inspect.signature(model.forward).parameters
    if not (heads and layers and width and has_cache) or getattr(config, "is_encoder_decoder", False):
        raise PatchError(
            "virtual tokens are for decoders with a cache, whose configuration tells their sizes, "
            f"and {type(model).__name__} is none"
        )
    head_dim = getattr(config, "head_dim", None) or width // heads
    return layers, getattr(config, "num_key_value_heads", None) or heads, head_dim, width
