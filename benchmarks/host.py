"""How long a training step waits for its prompts: encoded in the training process, or ahead of it by workers.

    python benchmarks/host.py

Photographs of a million pixels are made as JPEG files: noise whose spectrum falls like that of natural images, so that
decoding costs what it costs with real ones. The real data module and processor read, resize and encode them. The device
is a pause of constant length in which the host has nothing to do, as with a GPU. What is compared is how long a step
waits until its prompts are there, and how many CPU-seconds the training process spends on them; blocks of steps
without and with workers take turns, and the first steps of each block are dropped, for there workers have had no time
to work ahead. Writes benchmarks/results/host.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from PIL import Image

from perception_r1.commands.reader import load_reader
from perception_r1.data.encoding import PromptEncoder
from perception_r1.policy.load import PolicyConfig
from perception_r1.tasks.grounding import GroundingData

RESULTS = Path(__file__).resolve().parent / "results" / "host.json"
PACKAGES = ("torch", "transformers", "pillow", "numpy")
NUM_DROPPED = 3
"""First steps of a block, which are not counted."""
QUALITY = 90
"""Of the JPEG files."""


@dataclass(kw_only=True, slots=True)
class Cost:
    """What steps with one number of workers cost the training process, one entry a step.

    Attributes:
        wait_seconds: From asking for a batch until its prompts are there.
        cpu_seconds: Of the training process in that time.
    """

    wait_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Colours with amplitudes that fall with the frequency, as in natural images."""
    generator = np.random.default_rng(seed)
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    channels = []
    for _ in range(3):
        phases = generator.uniform(0, 2 * np.pi, frequencies.shape)
        values = np.fft.irfft2(np.exp(1j * phases) / np.maximum(frequencies, 1), (height, width))
        channels.append(np.clip(values / values.std() * 50 + 128, 0, 255))
    return Image.fromarray(np.stack(channels, 2).astype(np.uint8))


def write_rows(folder: Path, num_pictures: int, width: int, height: int) -> Path:
    """Photographs, and a file of rows with a box on each."""
    rows = []
    for number in range(num_pictures):
        photograph(width, height, seed=number).save(folder / f"{number}.jpg", quality=QUALITY)
        rows.append({"image": f"{number}.jpg", "question": "red cup", "box": [0, 0, width // 2, height // 2]})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measure(rows: Path, num_workers: int, *, batch_size: int, num_steps: int, pause: float, cost: Cost) -> None:
    """A block of steps, after those that are dropped."""
    files = {f"{split}_file": rows for split in ("train", "val", "test")}  # so that no row is held out
    data = GroundingData(**files, batch_size=batch_size, num_workers=num_workers)
    policy = PolicyConfig(name="tiny", max_pixels=1_000_000)
    _, processor = load_reader(policy)
    encoder = PromptEncoder(processor=processor, task=data.task)
    data.setup("fit")
    data.encode_with(encoder)
    batches = iter(data.train_dataloader())
    for step in range(NUM_DROPPED + num_steps):
        wall, cpu = time.perf_counter(), time.process_time()
        batch = next(batches)
        if batch.prompts is None:
            encoder(batch.samples)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if step >= NUM_DROPPED:
            cost.wait_seconds.append(wall)
            cost.cpu_seconds.append(cpu)
        time.sleep(pause)


def summary(costs: dict[int, Cost]) -> dict[str, Any]:
    """Medians, means and worst cases by number of workers, and how they compare."""

    def numbers(values: Sequence[float]) -> dict[str, float]:
        found = {"median": median(values), "mean": mean(values), "most": max(values)}
        return {name: round(value, 5) for name, value in found.items()}

    found: dict[str, Any] = {
        f"{count} workers": {"wait_seconds": numbers(cost.wait_seconds), "cpu_seconds": numbers(cost.cpu_seconds)}
        for count, cost in costs.items()
    }
    before, after = (costs[count] for count in sorted(costs))
    return found | {
        "wait_ratio": round(mean(before.wait_seconds) / mean(after.wait_seconds), 2),
        "cpu_ratio": round(mean(before.cpu_seconds) / mean(after.cpu_seconds), 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=2, help="Prompts of a step.")
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--height", type=int, default=868)
    parser.add_argument("--pause", type=float, default=0.5, help="Seconds in which the device works on a step.")
    parser.add_argument("--steps", type=int, default=20, help="Steps of a block that are counted.")
    parser.add_argument("--rounds", type=int, default=3, help="Blocks with each number of workers.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    costs = {0: Cost(), args.workers: Cost()}
    with tempfile.TemporaryDirectory() as name:
        os.environ["PERCEPTION_R1_CACHE"] = name  # that of the user is not for pictures that are soon gone
        num_pictures = (args.steps + NUM_DROPPED) * args.batch_size
        rows = write_rows(Path(name), num_pictures, args.width, args.height)
        for number in range(args.rounds):
            for count, cost in costs.items():
                sizes = {"batch_size": args.batch_size, "num_steps": args.steps}
                measure(rows, count, pause=args.pause, cost=cost, **sizes)
                print(f"round {number + 1} of {args.rounds}, {count} workers: done", file=sys.stderr)
    settings = {key: value for key, value in vars(args).items() if key != "results"}
    result = {
        "date": date.today().isoformat(),
        "versions": {package: version(package) for package in PACKAGES},
        "cores": os.cpu_count(),
        **settings,
        **summary(costs),
    }
    args.results.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
