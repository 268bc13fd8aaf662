"""What a GRPO step costs on a CPU: this engine, the same module with repeated prompts, and TRL's GRPOTrainer.

    python benchmarks/engine.py --trl-python trl/bin/python

All three train the same randomly initialised Qwen2-VL on the same pictures, with completions of the same length, KL
penalty and all weights trained. They run in processes of their own on one thread each and take turns, step by step, so
that a busy machine disturbs them alike; compared are medians of CPU-seconds and of peak memory. The first step of each
is dropped. `trl_worker.py` says how to set TRL's environment up; without it TRL is left out.

TRL has one handicap on a CPU: it computes vocabulary scores of the prompt's tokens as well. The vocabulary is kept
small on purpose, so that this costs it little.

"Reached" is the share of this machine's own rate of matrix products, measured in turn with the steps, at which a step
of this engine gets the operations done that a shared prompt needs: each prompt once for rollout and loss and once in
the reference, each completion token once in decoding, reference and loss, backward counted as two forward passes.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).resolve().parent))
from random_model import Shape, make_folder

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "engine_cpu.json"
SHAPES = {
    333: Shape(prompt_tokens=333, picture=(16, 16)),
    653: Shape(prompt_tokens=653, picture=(24, 24)),
    1101: Shape(prompt_tokens=1101, picture=(32, 32)),
    100: Shape(prompt_tokens=100, picture=(4, 4)),  # to try the program
}
"""By prompt length."""
SIZES = ((333, 64), (1101, 64), (333, 256))
"""Prompt and completion tokens."""
GROUP_SIZES = (8, 4, 16, 32)
PROCESS_NAMES = {"shared": "this engine", "repeated": "repeated prompts", "trl": "TRL"}


@dataclass(kw_only=True)
class Cell:
    """One line of the table.

    Attributes:
        prompt: Prompt tokens.
        completion: Completion tokens.
        group_size: Completions of the prompt.
        cpu_s: Process -> median CPU-seconds of a step.
        peak_mb: Process -> median peak of resident memory during a step, in MiB.
        resting_mb: Process -> resident memory before the first step, in MiB.
        steps: Process -> number of steps that were measured.
        phases_s: Median seconds of the phases of this engine.
        gflop: Operations that a step needs, in billions.
        matmul_gflops: This machine's rate of matrix products, in billions per CPU-second.
    """

    prompt: int
    completion: int
    group_size: int
    cpu_s: dict[str, float] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)
    resting_mb: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    phases_s: dict[str, float] = field(default_factory=dict)
    gflop: float = 0.0
    matmul_gflops: float = 0.0

    @property
    def reached(self) -> float:
        """Share of the machine's rate that this engine reaches."""
        return self.gflop / self.cpu_s["shared"] / self.matmul_gflops

    def ratio(self, process: str, cost: str = "cpu_s") -> float:
        """How many times more another process takes than this engine."""
        taken: dict[str, float] = getattr(self, cost)
        return taken[process] / taken["shared"]


class Worker:
    """A process that makes a step whenever it is told to."""

    def __init__(self, command: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_environment(),
        )
        self.resting_mb: float = self._report()["resting_mb"]

    def step(self) -> dict[str, Any]:
        """Make a step; returns its cost."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._report()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _report(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("REPORT "):
                cost: dict[str, Any] = json.loads(line.removeprefix("REPORT "))
                return cost
        self._errors.seek(0)
        raise SystemExit(f"A worker stopped:\n{self._errors.read()[-2000:]}")


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def measure(cell: Cell, folder: Path, processes: Sequence[str], *, rounds: int, trl_python: str | None) -> None:
    """Fill a cell in: one step of each process in turn, the first of each dropped."""
    sizes = [str(cell.group_size), str(cell.completion)]
    workers: dict[str, Worker] = {}
    try:
        for name in processes:
            own = [sys.executable, str(HERE / "step_worker.py"), str(folder), name]
            trl = [str(trl_python), str(HERE / "trl_worker.py"), str(folder)]
            workers[name] = Worker([*(trl if name == "trl" else own), *sizes])
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
        rates = []
        for turn in range(rounds + 1):
            rates.append(matmul_rate())
            for name, worker in workers.items():
                cost = worker.step()
                if turn > 0:
                    taken[name].append(cost)
    finally:
        for worker in workers.values():
            worker.close()
    for name, steps in taken.items():
        cell.cpu_s[name] = round(median(step["cpu_s"] for step in steps), 4)
        cell.peak_mb[name] = round(median(step["peak_mb"] for step in steps), 1)
        cell.resting_mb[name] = round(workers[name].resting_mb, 1)
        cell.steps[name] = len(steps)
    phases = [step["phases_s"] for step in taken["shared"]]
    cell.phases_s = {name: round(median(step[name] for step in phases), 4) for name in phases[0]}
    cell.matmul_gflops = round(median(rates), 2)


def matmul_rate() -> float:
    """Billions of operations per CPU-second in products of 1024 x 1024 matrices in float32, on one thread."""
    torch.set_num_threads(1)
    left, right = torch.rand(1024, 1024), torch.rand(1024, 1024)
    left @ right
    started = time.process_time()
    for _ in range(10):
        left @ right
    return 10 * 2 * 1024**3 / (time.process_time() - started) / 1e9


def needed_operations(folder: Path, prompt: int, completion: int, group_size: int, image_tokens: int) -> float:
    """Operations of a step with all weights trained, in billions: two per weight and token, four per attended pair.

    A forward pass sees the prompt once and every completion without its last token; only the tokens that predict
    completion tokens meet the vocabulary.
    """
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    text, vision = model.config.text_config, model.config.vision_config
    per_token = sum(weight.numel() for weight in model.model.language_model.layers.parameters() if weight.ndim == 2)
    head = text.vocab_size * text.hidden_size
    written = group_size * (completion - 1)
    pairs = prompt**2 / 2 + written * prompt + group_size * completion**2 / 2
    prompt_pairs = prompt**2 / 2
    wide = text.num_hidden_layers * text.hidden_size

    patches = image_tokens * vision.spatial_merge_size**2
    of_patches = sum(
        weight.numel()
        for module in (model.model.visual.blocks, model.model.visual.patch_embed)
        for weight in module.parameters()
        if weight.ndim >= 2
    )
    of_tokens = sum(weight.numel() for weight in model.model.visual.merger.parameters() if weight.ndim == 2)
    vision = 2 * (of_patches * patches + of_tokens * image_tokens) + 4 * vision.depth * vision.embed_dim * patches**2

    decode = 2 * per_token * written + 4 * wide * (pairs - prompt_pairs) + 2 * head * group_size * completion
    forward = vision + 2 * per_token * (prompt + written) + 4 * wide * pairs + 2 * head * group_size * completion
    return (
        decode + forward + 3 * forward
    ) / 1e9  # reference, then policy, prompts of the rollout included, and backward


def table(cells: Sequence[Cell]) -> str:
    """The results as Markdown."""
    lines = [
        "| P | C | G | this engine, CPU-s | repeated, CPU-s | TRL, CPU-s | repeated / ours | TRL / ours | peak, MiB "
        "(ours, TRL) | memory, ours / TRL | reached |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in sorted(cells, key=lambda cell: (cell.completion, cell.prompt, cell.group_size)):
        has_trl = "trl" in cell.cpu_s
        columns = [
            cell.prompt,
            cell.completion,
            cell.group_size,
            f"{cell.cpu_s['shared']:.2f}",
            f"{cell.cpu_s['repeated']:.2f}",
            f"{cell.cpu_s['trl']:.2f}" if has_trl else "-",
            f"{cell.ratio('repeated'):.1f}",
            f"{cell.ratio('trl'):.1f}" if has_trl else "-",
            f"{cell.peak_mb['shared']:.0f}, {cell.peak_mb['trl']:.0f}"
            if has_trl
            else f"{cell.peak_mb['shared']:.0f}, -",
            f"{1 / cell.ratio('trl', 'peak_mb'):.2f}" if has_trl else "-",
            f"{cell.reached:.0%}",
        ]
        lines.append("| " + " | ".join(map(str, columns)) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure every size and group size; results are written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="Python of an environment with TRL; without it TRL is left out.")
    parser.add_argument("--group-sizes", nargs="+", type=int, default=list(GROUP_SIZES))
    parser.add_argument("--rounds", type=int, default=3, help="Steps of each at G = 8.")
    parser.add_argument("--other-rounds", type=int, default=1, help="Steps of each at other group sizes.")
    parser.add_argument("--sizes", nargs="+", default=[f"{p},{c}" for p, c in SIZES], help="Pairs P,C.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    processes = ["shared", "repeated"]
    if args.trl_python and Path(args.trl_python).exists():
        processes.append("trl")
    else:
        print("TRL is left out: --trl-python names no Python.", flush=True)
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as made:
        for group_size in args.group_sizes:
            for prompt, completion in (map(int, size.split(",")) for size in args.sizes):
                folder = Path(made) / str(prompt)
                make_folder(folder, SHAPES[prompt])
                cell = Cell(prompt=prompt, completion=completion, group_size=group_size)
                cell.gflop = round(
                    needed_operations(folder, prompt, completion, group_size, SHAPES[prompt].image_tokens), 2
                )
                rounds = args.rounds if group_size == 8 else args.other_rounds
                measure(cell, folder, processes, rounds=rounds, trl_python=args.trl_python)
                cells.append(cell)
                write(args.results, cells)
                print(table(cells), flush=True)
    return 0


def write(path: Path, cells: Sequence[Cell]) -> None:
    """Results so far, with what they were measured with."""
    names = ("torch", "transformers", "lightning", "peft")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    results = {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "trl": "1.16.0, in its own environment; see benchmarks/trl_worker.py",
        "threads": 1,
        "shapes": [asdict(shape) for shape in SHAPES.values()],
        "names": PROCESS_NAMES,
        "cells": [
            asdict(cell)
            | {"reached": round(cell.reached, 3)}
            | {f"{name}_over_shared": round(cell.ratio(name), 2) for name in cell.cpu_s if name != "shared"}
            for cell in cells
        ],
        "table": table(cells).splitlines(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
