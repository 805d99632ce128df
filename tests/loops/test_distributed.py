"""DDP and FSDP2 in two processes train as one process does; a sharded adapter's file is one process's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_two_processes_train_as_one_does(tmp_path):
    script = Path(__file__).with_name("distributed_worker.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    workers = [
        subprocess.Popen([sys.executable, str(script), str(tmp_path), str(rank)], env=environment, **pipes)
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    assert all("same losses" in output for output in outputs), outputs
