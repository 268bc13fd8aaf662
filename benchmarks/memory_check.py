"""How far a plan is from what a process really takes: small models, real tensors, on the CPU.

    python benchmarks/memory_check.py

Each case trains a randomly initialised Qwen2-VL for three steps in a process of its own, in float32, with the trainer
and the buffers of captured decoding steps. Measured is the most resident memory of each phase of the last step, above
what the process takes once it has trained a tiny model in the same way. The plan is that of `perception-r1 plan` for
the same model and batch, with the attention kernel of the CPU in place of those of CUDA. Writes
benchmarks/results/memory_check.json and the table of docs/memory.md.
"""

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakMethod

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch.overrides import TorchFunctionMode

from perception_r1.modules import GRPO
from perception_r1.modules.base import LRSchedulerConfig
from perception_r1.planning.cuda_semantics import functions
from perception_r1.planning.devices import Devices
from perception_r1.planning.measure import RunSize, load_shapes, measure
from perception_r1.planning.prompts import LongestPrompt
from perception_r1.policy.cuda_graphs import GraphGenerator, Step
from perception_r1.policy.decoder import Decoder
from perception_r1.policy.load import LoraConfig, PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.policy.rollout import SamplingParams

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pages import fill, table
from random_model import Shape, make_folder
from step_worker import EvenCharacters, Prompts, ban_special_tokens, forget_peak, peak_mb, resident_mb

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory_check.json"
PAGE = ROOT / "docs" / "memory.md"
SHAPE = Shape(
    prompt_tokens=220,
    picture=(14, 14),
    hidden=768,
    intermediate=3072,
    layers=6,
    heads=12,
    kv_heads=12,
    vocabulary=16384,
    vision_hidden=384,
    vision_layers=4,
    vision_heads=6,
)
WHOLE = "all weights, one micro-batch"
"""The case in which the update goes on from what the rollout has computed of prompts."""
CASES: dict[str, dict[str, Any]] = {
    "all weights": {},
    WHOLE: {},
    "checkpointing": {"gradient_checkpointing": True},
    "frozen vision": {"freeze_vision": True},
    "LoRA": {"lora": LoraConfig()},
    "all weights, zero1, 2 devices": {},
    "all weights, fsdp2, 2 devices": {},
    "checkpointing, fsdp2, 2 devices": {"gradient_checkpointing": True},
}
DEVICES = {case: Devices(count=2, strategy=case.split(", ")[1]) for case in CASES if case.endswith("2 devices")}
GROUP_SIZE, COMPLETION, NUM_PROMPTS, BUDGET = 8, 32, 2, 500
NUM_STEPS = 3
"""Of which the last is measured: by then buckets of gradients are those that stay."""
WARM_UP = "warm-up"
"""Folder of a tiny model beside that of a case."""
PHASES = {
    "prefill": "prefill",
    "decode": "decode",
    "reference": "reference",
    "policy_forward": "forward",
    "backward": "backward",
    "optimizer": "update",
}
"""Of the module, by the names of a plan."""


class FixedBuffers(Policy):
    """Decodes in the buffers that a captured graph of CUDA has."""

    def generate(self, prompts: Any, *, group_size: int, params: SamplingParams, seeds: Sequence[int]) -> Any:
        """As on CUDA."""
        if self._graphs is None:
            self._graphs = GraphGenerator(Decoder(self.model), lambda: _run_again)
        return self._graphs.generate(prompts, group_size=group_size, params=params, seeds=seeds)


def _run_again(step: Step) -> Step:
    """A step that can be run again; like a graph, it does not hold the buffers of the step."""
    method = WeakMethod(step)

    def replay() -> None:
        held = method()
        assert held is not None
        held()

    return replay


class CpuAttention(TorchFunctionMode):
    """Attention on the meta device as the CPU computes it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mask = kwargs.get("attn_mask")
        if mask is not None:
            mask = torch.empty(mask.shape, device="meta")  # as numbers
        causal = kwargs.get("is_causal", False)
        return kernel(*args[:3], 0.0, causal, attn_mask=mask, scale=kwargs.get("scale"))[0]


def make_module(folder: Path, case: str) -> GRPO:
    """The training of a case."""
    return GRPO(
        EvenCharacters(),
        policy=PolicyConfig(name=str(folder), **CASES[case]),
        optimizer=partial(torch.optim.AdamW, lr=1e-5, foreach=False),
        lr_scheduler=LRSchedulerConfig(type="constant"),
        group_size=GROUP_SIZE,
        max_new_tokens=COMPLETION,
        micro_batch_tokens=None if case == WHOLE else BUDGET,
    )


def make_trainer(callbacks: Sequence[Callback] = (), devices: Devices | None = None) -> Trainer:
    """On the CPU, silent."""
    return Trainer(
        accelerator="cpu",
        devices=1 if devices is None else devices.count,
        strategy="auto" if devices is None else devices.strategy,
        use_distributed_sampler=False,
        max_steps=NUM_STEPS,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class PhasePeaks(Callback):
    """Most resident memory of every phase of the last step, in MiB."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Completions keep their full length; the module's clock measures memory instead."""
        ban_special_tokens(pl_module)
        pl_module.phase = self.phase

    def on_train_batch_start(self, *args: Any) -> None:
        """Begin anew."""
        self.peaks = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase, possibly one of several of its name."""
        forget_peak()
        yield
        self.peaks[name] = max(self.peaks.get(name, 0.0), peak_mb())


def run_worker(folder: Path, case: str) -> None:
    """Train, and print a line of what was measured."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    train(folder / WARM_UP, case)  # what libraries hold for themselves from their first use on is not the run's
    gc.collect()
    before = resident_mb()
    peaks = train(folder, case)
    found = {PHASES[name]: peak - before for name, peak in peaks.peaks.items() if name in PHASES}
    print("REPORT " + json.dumps(found))


def train(folder: Path, case: str) -> PhasePeaks:
    """The steps of a case."""
    module, peaks = make_module(folder, case), PhasePeaks()
    module.policy_class = FixedBuffers
    make_trainer([peaks], DEVICES.get(case)).fit(module, datamodule=Prompts(folder, NUM_PROMPTS))
    return peaks


def measured(folder: Path, case: str) -> dict[str, float]:
    """MiB of each phase in a process of its own, or the first of two, whose freed memory goes back at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    command = [sys.executable, __file__, "--worker", str(folder), case]
    if case in DEVICES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        environment |= {"WORLD_SIZE": str(DEVICES[case].count), "NODE_RANK": "0"}
    ranks = [{"LOCAL_RANK": str(rank)} for rank in range(DEVICES[case].count)] if case in DEVICES else [{}]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment | rank, **options) for rank in ranks]
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise SystemExit(errors)
    lines = outputs[0][0].splitlines()
    found: dict[str, float] = json.loads(
        next(line for line in lines if line.startswith("REPORT ")).removeprefix("REPORT ")
    )
    return found


def planned(folder: Path, case: str) -> dict[str, float]:
    """MiB of each phase in the plan."""
    module = make_module(folder, case)
    load_shapes(module, make_trainer(), "32-true")
    rows, columns = SHAPE.picture
    text = SHAPE.prompt_tokens - SHAPE.image_tokens
    prompt = LongestPrompt(num_text_tokens=text, grid=(1, 2 * rows, 2 * columns), merge_size=2)
    size = RunSize(batch_size=NUM_PROMPTS, eval_batch_size=0, devices=DEVICES.get(case, Devices()))
    peaks = measure(module, prompt, size, functions(CpuAttention))
    return {peak.phase: peak.bytes / 2**20 for peak in peaks if peak.phase in PHASES.values()}


def main() -> int:
    """Every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run_worker(Path(args.worker[0]), args.worker[1])
        return 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        make_folder(folder, SHAPE)
        make_folder(
            folder / WARM_UP, replace(SHAPE, layers=1, vision_layers=1, hidden=64, intermediate=64, heads=2, kv_heads=2)
        )
        for case in args.cases:
            print(f"{case} ...", file=sys.stderr, flush=True)
            rows += compare(folder, case)
            results = {
                "date": date.today().isoformat(),
                "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
                "shape": asdict(SHAPE),
                "rows": rows,
            }
            args.results.parent.mkdir(parents=True, exist_ok=True)
            args.results.write_text(json.dumps(results, indent=1) + "\n")
    print(rows_table(rows))
    if args.results == RESULTS:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), "memory_check", {"table": rows_table(rows)}))
    return 0


def compare(folder: Path, case: str) -> list[dict[str, Any]]:
    """A row of the results for each phase."""
    real, plan = measured(folder, case), planned(folder, case)
    return [
        {"trained": case, "phase": phase, "measured_mib": round(mib), "planned_mib": round(plan[phase])}
        | {"error": round(plan[phase] / mib - 1, 3)}
        for phase, mib in real.items()
    ]


def rows_table(rows: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    heads = ["trained", "phase", "measured, MiB", "planned, MiB", "error"]
    keys = ("trained", "phase", "measured_mib", "planned_mib")
    return table(heads, [[*(str(row[key]) for key in keys), f"{100 * row['error']:+.1f} %"] for row in rows])


if __name__ == "__main__":
    sys.exit(main())
