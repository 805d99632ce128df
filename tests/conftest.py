"""Set-up that must come before any test module is imported."""

from __future__ import annotations

import os

import torch

# Triton decides on import whether its kernels run on a GPU or in its interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tiny tensors in two worker processes: with two threads each, they spend their time waiting for one another.
torch.set_num_threads(1)
