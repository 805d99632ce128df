"""Layer-sparse training in two processes, under DDP and FSDP2, started as a user would: by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastpeft
from fastpeft import LISA, LayerSparseAdamW
from tests.loops.sparse_worker import SAVED, STEPS, train
from tests.test_layer_sparse import llama


def alone(folder=None):
    """One process with both ranks' batches; from a folder, the steps after it was saved."""
    model = llama().train()
    optimizer = LayerSparseAdamW(model, 0.02, 0.1, LISA(2, 2))
    if folder is not None:
        fastpeft.load_training(model, optimizer, folder)
    return model, optimizer


def test_two_processes_train_as_one_does_and_save_for_any_number(tmp_path):
    model, optimizer = alone()
    train(model, optimizer, [0, 1], 0, range(SAVED))
    fastpeft.save_training(model, optimizer, tmp_path / "of-one")
    expected = train(model, optimizer, [0, 1], 0, range(SAVED, STEPS))
    (tmp_path / "a-file").write_text("")
    script = Path(__file__).with_name("sparse_worker.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("ok") == 2
    model, optimizer = alone(tmp_path / "of-two")
    found = train(model, optimizer, [0, 1], 0, range(SAVED, STEPS))
    assert found == pytest.approx(expected, rel=1e-4)
