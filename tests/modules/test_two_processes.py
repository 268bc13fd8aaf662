import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", ["grpo", "uneven"])
def test_two_processes_learn_the_same_from_different_samples(folder, tmp_path, kind):
    """The second kind has nothing to learn on one of the processes, which must not make the other one wait for ever."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.modules.run_on_two", str(folder), str(tmp_path), kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    assert process.returncode == 0, errors
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["weights"] == second["weights"]
    seen = [sample for part in (first, second) for step in part["ids"] for sample in step]
    assert len(seen) == len(set(seen)) == 8
    assert first["steps"] == second["steps"]
    assert first["validated"] == second["validated"] > 0
    assert sorted(path.name for path in tmp_path.glob("version_0/checkpoints/*")) == ["best.ckpt", "last.ckpt"]
