"""Prefix tuning (arXiv 2101.00190) and prompt tuning (arXiv 2104.08691): virtual tokens train, no weight.

    prefix tuning   keys [P_K ; K] and values [P_V ; V] in every layer, P from rows or from an MLP over rows
    prompt tuning   embeddings [P ; E] below the first layer

For decoders and encoder-decoder models of transformers' classes. The files are PEFT's: the rows alone, also
of a prefix that was trained through an MLP, which is there for training only. Beside an encoder the prefix
stands in the decoder's self-attention and the prompt before the encoder's input, as PEFT 0.21 has it.
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
from fastpeft.layers.prompts import (
    CHILD,
    PrefixEncoder,
    PromptEncoder,
    attach,
    detach,
    is_encoder_decoder,
)
from fastpeft.methods.method import Differences, Method, Plan
from fastpeft.patch_report import ModuleReport

_KEY = "prompt_embeddings"  # of the one tensor in a file
# What PEFT writes of the model's own sizes.
_SIZES = ("token_dim", "num_attention_heads", "num_layers")


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    num_virtual_tokens: int
    num_transformer_submodules: int | None = None
    modules_to_save: tuple[str, ...] = ()

    peft_type: ClassVar[str]
    own_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        fields.check_count("num_virtual_tokens", self.num_virtual_tokens)
        if self.num_transformer_submodules not in (None, 1, 2):
            raise ConfigError(
                f"num_transformer_submodules: expected 1, 2 or None, got {self.num_transformer_submodules!r}"
            )
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
        num_transformer_submodules: 1 for decoders, 2 beside an encoder, where layer l of the decoder takes
            the keys and values of layer ``2 l mod layers`` and cross-attention none, as in PEFT 0.21; None
            for what the model is.
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
        num_transformer_submodules: 1 for decoders. Beside an encoder 2, which is PEFT's default, has as many
            rows again that play no part, and 1 leaves them out; None for PEFT's default.
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
        parts = _submodules(model, config)
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
            encoder = PrefixEncoder(
                config.num_virtual_tokens, shape, features, hidden, is_crossed=parts == 2, **kind
            )
            if config.init_weights == "zero":
                last = encoder.embedding if encoder.transform is None else encoder.transform[-1]
                for parameter in last.parameters():
                    nn.init.zeros_(parameter)
            what = f"{layers} layers of keys and values" + (", by an MLP" if hidden else "")
        else:
            encoder = PromptEncoder(config.num_virtual_tokens, token_dim, token_dim, None, sets=parts, **kind)
            if config.prompt_tuning_init == "SAMPLE_VOCAB":
                table: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
                chosen = torch.randint(len(table), (config.num_virtual_tokens * parts,))
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
            "num_transformer_submodules": _submodules(model, config),
            # PEFT puts virtual tokens before an encoder-decoder model by the class of the task alone.
            **({"task_type": "SEQ_2_SEQ_LM"} if is_encoder_decoder(model) else {}),
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
        rows, sets = list(tensors[_KEY].shape), 1
        if isinstance(config, PromptTuning):
            sets = config.num_transformer_submodules or 1
        if rows[:1] != [config.num_virtual_tokens * sets]:
            times = f" for each of {sets} submodules" if sets > 1 else ""
            raise CheckpointError(
                f"{path}: {CONFIG_NAME} declares {config.num_virtual_tokens} virtual tokens{times}, "
                f"{WEIGHTS_NAME} holds {_KEY} {rows}"
            )

    def differences(self, model: nn.Module, name: str, config: Any) -> Differences:
        """An MLP, which the rows cannot be read back into."""
        encoder: Any = model._modules[CHILD]
        if encoder.transform is None:
            return []
        return ["the model's prefix is made by an MLP, the folder holds the result of one; unpatch it first"]


def _submodules(model: nn.Module, config: _Prompt) -> int:
    """How many of PEFT's "submodules" the virtual tokens are for.

    Raises:
        PatchError: the model does not have them.
    """
    beside_encoder = is_encoder_decoder(model)
    number = config.num_transformer_submodules or (2 if beside_encoder else 1)
    if number == 2 and not beside_encoder:
        raise PatchError(
            f"num_transformer_submodules: {type(model).__name__} has no encoder and decoder, expected 1 or "
            "None, got 2"
        )
    if number == 1 and beside_encoder and isinstance(config, PrefixTuning):
        raise PatchError(
            "num_transformer_submodules: a prefix beside an encoder is for both, expected 2 or None, got 1"
        )
    return number


def _sizes(model: nn.Module) -> tuple[int, int, int, int]:
    """(layers, heads of keys, features of a head, width) of a decoder."""
    config: Any = getattr(model, "config", None)
    if beside_encoder := is_encoder_decoder(model) and hasattr(model, "get_decoder"):
        config = getattr(model.get_decoder(), "config", config)  # type: ignore[operator]
    elif hasattr(config, "get_text_config"):
        config = config.get_text_config()
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    width, head_dim = getattr(config, "hidden_size", None), getattr(config, "head_dim", None)
    if beside_encoder:
        named = (getattr(config, name, None) for name in ("decoder_layers", "num_decoder_layers"))
        layers = next((number for number in named if number), layers)
        heads = getattr(config, "decoder_attention_heads", None) or heads
        head_dim = getattr(config, "d_kv", None) or head_dim
    parameters = inspect.signature(model.forward).parameters
    takes_tokens = not is_encoder_decoder(model) or {"input_ids", "decoder_input_ids"} <= set(parameters)
    if not (heads and layers and width and "past_key_values" in parameters and takes_tokens):
        raise PatchError(
            "virtual tokens are for decoders with a cache, alone or beside an encoder of tokens, whose "
            f"configuration tells their sizes, and {type(model).__name__} is none"
        )
    return layers, getattr(config, "num_key_value_heads", None) or heads, head_dim or width // heads, width
