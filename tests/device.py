"""Where the kernels' tests keep their tensors: on the GPU where there is one, else on the CPU, interpreted.

A tensor that a kernel may be given is made on ``DEVICE``, or brought there with ``.to(DEVICE)`` where its
values come from a seeded CPU generator, so that both machines see the same numbers.
``FASTPEFT_TEST_FAKE_GPU=1`` shows without a GPU that none was forgotten (:mod:`tests.fake_gpu`).
"""

from __future__ import annotations

import os

import torch

FAKE_GPU = os.environ.get("FASTPEFT_TEST_FAKE_GPU", "0") == "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# "cpu:0" is the CPU, and tells a tensor that was put there on purpose from one that nobody put anywhere.
DEVICE = torch.device("cpu:0" if FAKE_GPU else "cpu" if INTERPRETED else "cuda")
