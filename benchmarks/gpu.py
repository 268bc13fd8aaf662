"""What a GRPO step costs on a GPU in the shapes of real models, with random weights, in half an hour.

    python benchmarks/gpu.py

It is made for a card that is there for a short time. Stages follow one another by importance, each in a process of its
own and with a limit of time; what is over is written at once, what failed says why, and a second start goes on with
what is missing:

- the rates at which the card multiplies and reads;
- rollouts from captured graphs beside eager ones, of short and long completions;
- steps of this engine, and of the same module with repeated prompts and `generate`: seconds and peak memory of each
  phase, the peak that `perception-r1 plan` computes, and a decoding step beside the time of reading the weights once;
- TRL beside them, with the Python of its environment (`--trl-python`, see `trl_worker.py`);
- with two cards, the same step with ddp, zero1 and fsdp2.

`PYTHONPATH=src` is enough of an installation. Writes benchmarks/results/gpu.json and the tables of docs/engine.md.
`--smoke` does all of it with a tiny shape on any device, to see that the program works.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pages import fill, table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "gpu.json"
PAGE = HERE.parent / "docs" / "engine.md"
MODELS: dict[str, dict[str, Any]] = {
    "2B": {"published": "Qwen/Qwen2-VL-2B-Instruct"},
    "3B": {"published": "Qwen/Qwen2.5-VL-3B-Instruct", "gradient_checkpointing": True},
    "7B, LoRA": {"published": "Qwen/Qwen2-VL-7B-Instruct", "is_lora": True},
    "smoke": {"published": None},
}
"""With the settings of configs/model."""
STEPS = (
    ("2B", 1300, 128, 4),
    ("2B", 400, 128, 4),
    ("2B", 1300, 1024, 4),
    ("2B", 1300, 128, 1),
    ("3B", 1300, 128, 4),
    ("7B, LoRA", 1300, 128, 4),
    ("3B", 1300, 1024, 2),
)
"""Model, prompt tokens, completion tokens, prompts; of each prompt 8 completions."""
STRATEGIES = ("ddp", "zero1", "fsdp2")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A process that measures something.

    Attributes:
        name: Under which its result stands.
        minutes: How long it may take.
        options: See `gpu_worker.py`; with "trl" those of `trl_worker.py`.
        num_devices: Cards that it takes.
    """

    name: str
    minutes: float
    options: Mapping[str, Any]
    num_devices: int = 1


def stages(args: argparse.Namespace) -> Iterator[Stage]:
    """All that can be done here, the most important first."""
    steps = (("smoke", 100, 12, 2),) if args.smoke else STEPS
    model = MODELS[steps[0][0]]
    yield Stage(name="rates", minutes=2, options={"what": "rates"})
    for length in (12,) if args.smoke else (32, 300):
        options = {"what": "graphs", "prompt": 100, "completion": length, **model}
        yield Stage(name=f"graphs, {length} tokens", minutes=4, options=options)
    for number, (name, prompt, completion, count) in enumerate(steps):
        size = {"prompt": prompt, "completion": completion, "num_prompts": count}
        for kind in ("shared", "repeated"):
            options = {"what": "step", "kind": kind, **size, **MODELS[name]}
            yield Stage(name=f"{name}, {prompt}, {completion}, {count}, {kind}", minutes=5, options=options)
        if number == 0 and args.trl_python is not None:
            yield Stage(
                name=f"{name}, {prompt}, {completion}, 1, trl", minutes=6, options={"what": "trl", **size, **model}
            )
    if torch.cuda.device_count() > 1:
        size = {"prompt": 1300, "completion": 128, "num_prompts": 2}
        for strategy in STRATEGIES:
            options = {"what": "step", "kind": "shared", "strategy": strategy, **size, **model}
            yield Stage(name=f"2 cards, {strategy}", minutes=5, options=options, num_devices=2)


def run(stage: Stage, seconds: float, trl_python: str | None) -> dict[str, Any]:
    """The result of a stage, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        launcher = [sys.executable]
        if stage.num_devices > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={stage.num_devices}"]
        options = {**stage.options, "num_devices": stage.num_devices, "trl_python": trl_python}
        command = [*launcher, str(HERE / "gpu_worker.py"), json.dumps(options), str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {seconds:.0f} seconds"}
        if path.exists():
            result: dict[str, Any] = json.loads(path.read_text())
            return result
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": lines[-1][:300] if lines else f"exit status {done.returncode}"}


def main() -> int:
    """Stage by stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="After which no other stage begins.")
    parser.add_argument("--trl-python", help="Python of TRL's environment.")
    parser.add_argument("--smoke", action="store_true", help="A tiny shape, on any device.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="File of the results.")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        print(
            "Nothing was measured: there is no CUDA device. Needed are about 75 GB of its memory; --smoke tries the "
            "program without one.",
            file=sys.stderr,
        )
        return 1
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "lightning", "peft")},
        "group_size": 8,
        "stages": {},
    }
    if args.results.exists():
        results["stages"] = json.loads(args.results.read_text())["stages"]
    started = time.monotonic()
    for stage in stages(args):
        left = 60 * args.minutes - (time.monotonic() - started)
        if "error" not in results["stages"].get(stage.name, {"error": ""}):
            continue
        if left > 0:
            print(f"{stage.name} ...", file=sys.stderr, flush=True)
            results["stages"][stage.name] = run(stage, min(left, 60 * stage.minutes), args.trl_python)
        else:
            results["stages"][stage.name] = {"error": "no time was left"}
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(results, indent=1) + "\n")
    tables = {"steps": step_table(results["stages"]), "memory": memory_table(results["stages"])}
    if args.results == RESULTS:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), "gpu", tables))
    print(*tables.values(), sep="\n\n")
    return 0


def step_table(found: Mapping[str, dict[str, Any]]) -> str:
    """Markdown: seconds of a step beside repeated prompts, and of a decoding step beside reading the weights."""
    rows = []
    for name, shared in found.items():
        if not name.endswith("shared"):
            continue
        repeated, trl = (found.get(name.removesuffix("shared") + other, {}) for other in ("repeated", "trl"))
        *model, prompt, completion, count, _ = name.split(", ")
        both = "seconds" in shared and "seconds" in repeated
        rows.append(
            [
                ", ".join(model),
                prompt,
                completion,
                count,
                _or_error(shared, lambda row: f"{row['seconds']['step']:.2f}"),
                _or_error(repeated, lambda row: f"{row['seconds']['step']:.2f}"),
                _or_error(trl, lambda row: f"{row['seconds']['step']:.2f}"),
                f"{repeated['seconds']['step'] / shared['seconds']['step']:.1f}" if both else "",
                f"{shared['decode_step_s'] / shared['read_weights_s']:.1f}" if "seconds" in shared else "",
            ]
        )
    heads = [
        "model",
        "P",
        "C",
        "prompts",
        "step, s",
        "repeated, s",
        "TRL, s",
        "repeated / ours",
        "decoding step / reading weights",
    ]
    return table(heads, rows)


def memory_table(found: Mapping[str, dict[str, Any]]) -> str:
    """Markdown: the peak of each phase, and how far a plan is off."""
    rows = []
    for name, shared in found.items():
        for phase, planned in shared.get("planned_gb", {}).items():
            measured = shared["peak_gb"].get(phase)
            if measured:
                cells = [f"{measured:.1f}", f"{planned:.1f}", f"{100 * (planned / measured - 1):+.0f} %"]
                rows.append([name.removesuffix(", shared"), phase, *cells])
    return table(["model, P, C, prompts", "phase", "measured, GB", "planned, GB", "error"], rows)


def _or_error(row: Mapping[str, Any], show: Any) -> str:
    return show(row) if "seconds" in row else str(row.get("error", ""))


if __name__ == "__main__":
    sys.exit(main())
