"""How a method of fine-tuning enters the verbs: ``patch``, ``unpatch``, ``save``, ``load``, ``report``.

A method is a configuration (a frozen dataclass) and one :class:`Method`. The verbs do what is the same for
all: freeze the base, put modules in place and take them back, train biases and whole modules, write and read
folders. They ask the method for what is its own; :mod:`fastpeft.methods.registry` lists them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from fastpeft.errors import ConfigError
from fastpeft.patch_report import ModuleReport

PREFIX = "base_model.model."  # of every key in PEFT's files
Differences = list[str]


def _nothing() -> None:
    pass


@dataclass(kw_only=True)
class Plan:
    """What a patch is going to do; making it leaves the model untouched.

    Attributes:
        replacements: modules to put at paths.
        trained: base Parameters that train in place, by qualified name.
        reports: a line for each module.
        unmatched: entries of the configuration that named nothing, where that is allowed.
        finish: called last, with the replacements in place; :meth:`Method.detach` undoes what of it is done.
    """

    replacements: dict[str, nn.Module] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    reports: list[ModuleReport] = field(default_factory=list)
    unmatched: tuple[str, ...] = ()
    finish: Callable[[], None] = _nothing


class Method(ABC):
    """One method of fine-tuning.

    Attributes:
        config: the class of its configurations. They have ``modules_to_save``.
        peft_type: the method's name in ``adapter_config.json``, PEFT's where it has the method.
        pefts_targets: of PEFT's table of ``target_modules`` by model type, for its own objects; "" if none.
        has_names: whether several adapters can stand side by side and be switched and merged.
        merges_whole: whether its only adapter, without a name, can be merged: :meth:`merge`.
    """

    config: type[Any]
    peft_type: str
    pefts_targets: ClassVar[str] = ""
    has_names: ClassVar[bool] = False
    merges_whole: ClassVar[bool] = False

    @abstractmethod
    def plan(self, model: nn.Module, config: Any, name: str, *, allow_unmatched: bool) -> Plan:
        """Return what patching with this configuration does.

        Args:
            model: a plain model.
            config: of this method's class.
            name: the adapter's.
            allow_unmatched: accept entries of the configuration that match nothing (PEFT's rule).

        Raises:
            PatchError: the model and the configuration do not fit.
        """

    def attach(self, model: nn.Module, config: Any, name: str) -> None:
        """Do what the model as a whole needs, with an adapter's layers in place; :meth:`detach` undoes it."""
        return

    def detach(self, model: nn.Module) -> None:
        """Undo :attr:`Plan.finish`, be it half done, before the original modules return."""
        return

    def switches(self, model: nn.Module) -> list[Any]:
        """Return what has an ``adapters_enabled`` to turn adapters off by; by default there is nothing."""
        return []

    def merge(self, model: nn.Module, *, keep_base: bool) -> None:
        """Write what was learned into the base weights, where :attr:`merges_whole`.

        Raises:
            PatchError: it is merged, or a merged weight is not finite; nothing is changed.
        """
        raise NotImplementedError

    def unmerge(self, model: nn.Module) -> None:
        """Undo :meth:`merge`, to the bit.

        Raises:
            PatchError: nothing is merged, or the base was not kept.
        """
        raise NotImplementedError

    def is_merged(self, model: nn.Module, name: str) -> bool:
        """Whether what an adapter learned is in the base weights now, so that its values play no part."""
        return False

    def why_not(self, verb: str) -> str:
        """Return why a verb for named adapters is refused, where the method has none."""
        return f"the model is patched with {self.config.__name__}, whose values have no names"

    @abstractmethod
    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """Return what an adapter's file holds besides the base's own Parameters, by its key there."""

    def in_file(self, model: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of :meth:`tensors`, in host memory, as the file is to hold them."""
        return tensors

    @abstractmethod
    def content(self, model: nn.Module, config: Any, name: str) -> dict[str, Any]:
        """Return the method's own fields of ``adapter_config.json``."""

    @abstractmethod
    def read(self, content: Mapping[str, Any]) -> Any:
        """Return the configuration that ``adapter_config.json`` describes.

        Raises:
            ConfigError: it asks for what is not honoured.
        """

    def translate(self, config: Any) -> Any:
        """Return the configuration that an object of PEFT's, or its ``to_dict()``, describes.

        Raises:
            ConfigError: it asks for what is not honoured, or PEFT has no such method.
        """
        raise ConfigError(f"config: expected fastpeft.{self.config.__name__}, got {type(config).__name__}")

    @abstractmethod
    def check_file(self, path: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
        """Before anything is allocated: the folder's two files belong together.

        Raises:
            CheckpointError: they do not.
        """

    @abstractmethod
    def differences(self, model: nn.Module, name: str, config: Any) -> Differences:
        """Return, line by line, how the model's adapter differs from a folder's in more than values."""
