"""Do two runs on one machine starve each other? Alone and side by side, with this project's setting and without it.

    python benchmarks/two_runs.py

Threads of GNU OpenMP that wait for work keep their core busy for a while. `perception-r1` makes this while short (see
`cli.py`); GOMP_SPINCOUNT takes libgomp's own default back here. Compared are median seconds of a training step; two
runs that share a machine fairly take twice as long as one alone. Writes benchmarks/results/two_runs.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from statistics import median

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "two_runs.json"
SETTINGS: Mapping[str, Mapping[str, str]] = {"default of libgomp": {"GOMP_SPINCOUNT": "300000"}, "perception-r1": {}}
NUM_DROPPED = 2
"""First steps, which are not counted."""
BARE = (
    "--before_after.enabled false --log_samples.num_samples 0 --checkpoints.enabled false --trainer.limit_val_batches 0"
)


def start(folder: Path, name: str, num_steps: int, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """A training of the embedded model with one thread per core."""
    command = [sys.executable, "-m", "perception_r1", "fit", "--task", "grounding", *BARE.split()]
    command += ["--trainer.max_steps", str(num_steps), "--run_name", name]
    own = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    own |= {"PYTHONPATH": str(ROOT / "src"), **environment}
    return subprocess.Popen(command, cwd=folder, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def seconds(folder: Path, name: str) -> float | None:
    """Median seconds of a step; None where the run did not come that far in time."""
    events = EventAccumulator(str(folder / "logs" / name / "version_0"), size_guidance={"scalars": 0}).Reload()
    if "train/seconds/step" not in events.Tags()["scalars"]:
        return None
    values = [event.value for event in events.Scalars("train/seconds/step")][NUM_DROPPED:]
    return round(median(values), 3) if values else None


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--limit", type=float, default=120, help="Seconds after which a run is stopped.")
    args = parser.parse_args()
    found: dict[str, dict[str, list[float | None]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "configs").symlink_to(ROOT / "configs")
        for number, (setting, environment) in enumerate(SETTINGS.items()):
            for count in (1, 2):
                names = [f"{number}-{count}-{index}" for index in range(count)]
                runs = [start(folder, run, args.steps, environment) for run in names]
                for run in runs:
                    try:
                        run.wait(args.limit)
                    except subprocess.TimeoutExpired:
                        run.kill()
                        run.wait()
                found.setdefault(setting, {})["alone" if count == 1 else "side by side"] = [
                    seconds(folder, run) for run in names
                ]
    result = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "steps": args.steps,
        "limit_seconds": args.limit,
        "seconds_per_step": found,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
