"""Starts a module on two processes, as a launcher of several machines would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(module: str, *args: str, **options: object) -> list[subprocess.Popen[str]]:
    """Both processes; each knows its rank and where to find the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, *args],
            cwd=ROOT,
            env=os.environ | shared | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        for rank in (0, 1)
    ]


def run(module: str, *args: str) -> None:
    """Wait for both to end well."""
    processes = start(module, *args)
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
