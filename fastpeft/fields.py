"""The checks that configurations make of their fields: errors say where, what was expected, what came."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from fastpeft.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

N = TypeVar("N", bound=float)
C = TypeVar("C", bound="DataclassInstance")
ALL_LINEAR = "all-linear"


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_count(where: str, value: object, least: int = 1) -> None:
    """A whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{where}: expected a whole number of at least {least}, got {value!r}")


def check_positive(where: str, value: object) -> None:
    """A number above 0."""
    if not is_number(value) or value <= 0:  # type: ignore[operator]
        raise ConfigError(f"{where}: expected a number above 0, got {value!r}")


def check_probability(where: str, value: object) -> None:
    """A number in [0, 1)."""
    if not is_number(value) or not 0.0 <= value < 1.0:  # type: ignore[operator]
        raise ConfigError(f"{where}: expected a number in [0, 1), got {value!r}")


def check_flag(where: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: expected True or False, got {value!r}")


def check_one_of(where: str, value: object, known: Iterable[str]) -> None:
    """One of some names."""
    *others, last = known
    if value not in (*others, last):
        expected = ", ".join(repr(name) for name in others)
        raise ConfigError(f"{where}: expected {expected} or {last!r}, got {value!r}")


def _check_regex(where: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{where}: {pattern!r} is not a regular expression: {error}") from None


def names(where: str, value: object) -> tuple[str, ...]:
    """Return a list of names as a tuple."""
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise ConfigError(f"{where}: expected a list of module names, got {value!r}")
    # Sorted where there is no order, so that a PEFT set gives the same configuration in every process.
    found = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    if any(not isinstance(name, str) or not name for name in found):
        raise ConfigError(f"{where}: expected a list of module names, got {value!r}")
    return tuple(found)


def selector(where: str, value: object) -> tuple[str, ...] | str | None:
    """Return a choice of modules: names, a regular expression, ``"all-linear"``, or None."""
    if value is None:
        return None
    if isinstance(value, str):
        if value.lower() == ALL_LINEAR:
            return ALL_LINEAR
        _check_regex(where, value)
        return value
    found = names(where, value)
    if not found and where == "target_modules":
        raise ConfigError("target_modules: expected at least one name, got an empty list")
    return found or None


def pattern(where: str, value: object, check: Any) -> dict[str, Any]:
    """Return a dict from regular expressions to numbers that pass ``check(where, number)``."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a dict from module name to number, got {value!r}")
    for key, number in value.items():
        _check_regex(where, key)
        check(f"{where}[{key!r}]", number)
    return dict(value)


def indices(where: str, value: object) -> tuple[int, ...] | None:
    """Return block indices as a tuple; one number is a list of one."""
    if value is None:
        return None
    found = [value] if isinstance(value, int) else value
    if not isinstance(found, Iterable) or isinstance(found, str):
        raise ConfigError(f"{where}: expected block indices, got {value!r}")
    found = tuple(found)
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in found):
        raise ConfigError(f"{where}: expected block indices of at least 0, got {value!r}")
    return found or None


def settle_selection(config: object) -> None:
    """Put the checked form of the four fields by which every method chooses modules in their place.

    They are ``target_modules``, ``exclude_modules``, ``layers_to_transform`` and ``modules_to_save`` of a
    frozen configuration that is being made.
    """
    for name, check in (
        ("target_modules", selector),
        ("exclude_modules", selector),
        ("layers_to_transform", indices),
        ("modules_to_save", lambda where, value: names(where, value or ())),
    ):
        object.__setattr__(config, name, check(name, getattr(config, name)))


def lookup(patterns: Mapping[str, N], module_path: str, default: N) -> N:
    """PEFT's rule: the first key that is the path or, after a dot, its end, as a regular expression."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module_path):
            return value
    return default


def read_peft(config: Any) -> tuple[str, dict[str, Any]]:
    """Return (peft_type, fields) of one of PEFT's configurations, or of its ``to_dict()``."""
    values = dict(config) if isinstance(config, Mapping) else dict(config.to_dict())
    return str(getattr(values.get("peft_type"), "value", values.get("peft_type"))), values


# Fields of PEFT's configurations that do not change what the model computes or how its files are read.
WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",  # only repeats what the module's class says (Conv1D or Linear)
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def not_honoured(values: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """Return the fields that say something, but not to us."""
    honoured = WITHOUT_EFFECT.union(known)
    return sorted(n for n, v in values.items() if n not in honoured and v not in (None, False, {}, []))


def from_content(kind: type[C], content: Mapping[str, Any]) -> C:
    """Return the configuration of a class that ``adapter_config.json`` describes field by field.

    Raises:
        ConfigError: it has fields of another method, or a value cannot work.
    """
    ours = {field.name for field in dataclasses.fields(kind)}
    if unknown := not_honoured(content, ours):
        raise ConfigError(f"{kind.__name__}: expected its own fields, got {', '.join(unknown)}")
    # None stands for an empty list, as in PEFT's files.
    return kind(**{n: v for n, v in content.items() if n in ours and v is not None})


def trained_heads(values: Mapping[str, Any]) -> list[str]:
    """Return ``modules_to_save``; as PEFT's model classes do, the new head of a task trains whole."""
    given = list(values.get("modules_to_save") or ())
    task = getattr(values.get("task_type"), "value", values.get("task_type"))
    return [*given, *(head for head in _TASK_HEADS.get(str(task), ()) if head not in given)]
