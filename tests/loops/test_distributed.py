"""DDP and FSDP2 in two processes, started by torchrun, train as one process does, and save what it saves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.loops.distributed_worker import CASES


def test_two_processes_train_and_save_as_one_does(tmp_path):
    script = Path(__file__).with_name("distributed_worker.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path), *CASES],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    for case in CASES:
        assert done.stdout.count(f"{case}: same losses") == 2, (case, done.stdout)
