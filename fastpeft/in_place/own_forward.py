"""A forward of ours on one instance, where its class's would be found; copies and replicas have theirs.

It is a partial of a module-level function with the module bound, so copies and pickles bind their own. The
replicas of ``nn.DataParallel`` are made by copying the module's attributes: they would go on calling the
original's forward, with its parameters. So what makes them is set on the instance as well, and binds anew.
A replica computes its linears one by one: siblings are the original's children.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from fastpeft.in_place.record import LAYER_ATTRIBUTE

_REPLICATE = "_replicate_for_data_parallel"


def put_forward(module: nn.Module, function: Callable[..., Any]) -> None:
    """Have ``module(..)`` call ``function(module, ..)``."""
    module.__dict__["forward"] = functools.partial(function, module)
    module.__dict__[_REPLICATE] = functools.partial(_replicate, module)


def take_forward(module: nn.Module) -> None:
    """Undo :func:`put_forward`."""
    del module.__dict__["forward"]
    module.__dict__.pop(_REPLICATE, None)


def _replicate(module: nn.Module) -> nn.Module:
    """What ``nn.parallel.replicate`` makes of a module, with our forward of the replica itself."""
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)  # type: ignore[no-untyped-call]
    own = replica.__dict__
    del own[_REPLICATE]
    forward = own.get("forward")
    if isinstance(forward, functools.partial) and forward.args == (module,):
        own["forward"] = functools.partial(forward.func, replica)
    if (record := own.get(LAYER_ATTRIBUTE)) is not None:
        own[LAYER_ATTRIBUTE] = dataclasses.replace(record, module=replica, siblings=None)
    return replica
