"""Whether an op may skip ``torch.library``'s dispatch and run as a plain ``autograd.Function``.

A Python custom op costs about 0.1 ms a call, forward and backward together more than a small linear itself
(figures in CONTRIBUTING.md). In plain eager mode nobody looks at the op as an op, so it is called without it;
whoever does look (``torch.compile``, ``FakeTensor``, dispatch modes, ``torch.func``) sees the custom op.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def runs_eagerly(x: Tensor) -> bool:
    """Whether nothing traces, intercepts or transforms the operations on ``x``."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not isinstance(x, FakeTensor)
    )
