"""A process that ends with its parent."""

import os
import signal
import subprocess
import sys
import time

import pytest

SLEEPER = "import time; print('sleeps', flush=True); time.sleep(600)"
ENDS = f"import signal; from perception_r1.processes import end_with_parent; end_with_parent(signal.SIGTERM); {SLEEPER}"
OUTLIVES = ENDS.replace("; import time", "; end_with_parent(None); import time")
RANK = "from perception_r1.cli import main; print('starts', flush=True); main(['fit', '--task=counting'])"


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pid_of_orphan(code, seconds, **variables):
    """The process with some code, whose parent is killed so many seconds after it has said something."""
    parent = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", parent, code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | variables) as process:
        pid = int(process.stdout.readline())
        time.sleep(seconds)
        assert is_alive(pid)
        process.kill()
    return pid


def has_ended(pid):
    for _ in range(100):
        if not is_alive(pid):
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="Only Linux tells a process.")
@pytest.mark.parametrize(("code", "ends"), [(ENDS, True), (SLEEPER, False), (OUTLIVES, False)])
def test_it_ends_with_its_parent_where_it_has_said_so(code, ends):
    assert has_ended(pid_of_orphan(code, 0.0)) == ends


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Only Linux tells a process.")
@pytest.mark.parametrize("seconds", [1.0, 12.0])
def test_a_rank_whose_first_one_is_gone_before_they_meet_does_not_wait_for_it(tmp_path, monkeypatch, seconds):
    monkeypatch.chdir(tmp_path)
    others = {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    code = RANK.replace("counting'", "counting', '--trainer.devices=2', '--trainer.strategy=ddp'")
    assert has_ended(pid_of_orphan(code, seconds, **others))
