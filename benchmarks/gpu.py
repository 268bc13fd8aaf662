"""What a GRPO step costs on a GPU in the real shapes of Qwen2-VL, with random weights.

    python benchmarks/gpu.py

2B: all weights trained, float32 weights with bf16-mixed passes. 7B: LoRA on bfloat16 weights. Prompts of 400 and 1,300
tokens, 8 completions of 128 tokens each, 1 and 4 prompts per step. Measured are this engine and the same module with
repeated prompts and `generate`: seconds of a step and its phases, peak memory, and seconds of a decoding step beside
the time that reading the language model's weights once takes at this device's measured bandwidth. Before that, rollouts
from CUDA graphs are compared with the eager ones.

Only torch, transformers, lightning and peft are needed besides this repository (PYTHONPATH=src does); results go to
benchmarks/results/gpu.json. `--smoke` runs all of it on a tiny shape on any device, to see that the program works.
"""

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import AutoConfig, GenerationConfig, Qwen2VLForConditionalGeneration

from perception_r1.codecs import CODECS
from perception_r1.modules import GRPO
from perception_r1.modules.base import LRSchedulerConfig
from perception_r1.modules.encoding import encode_prompts
from perception_r1.policy.attention import NAME
from perception_r1.policy.decoder import Decoder
from perception_r1.policy.load import LoraConfig, PolicyConfig, prepare_for_training
from perception_r1.policy.policy import Policy
from perception_r1.policy.processor import Processor
from perception_r1.policy.rollout import SamplingParams, generate

sys.path.insert(0, str(Path(__file__).resolve().parent))
from random_model import Shape, make_folder
from repeated import RepeatedPolicy
from step_worker import EvenCharacters, Prompts, ban_special_tokens

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
IMAGES = {400: (20, 17), 1300: (40, 31), 100: (4, 4)}
"""Prompt tokens -> rows and columns of the picture in tokens."""
SHAPES = {
    "2b": Shape(
        prompt_tokens=0,
        picture=(0, 0),
        hidden=1536,
        intermediate=8960,
        layers=28,
        heads=12,
        kv_heads=2,
        vocabulary=151936,
        vision_hidden=1280,
        vision_layers=32,
        vision_heads=16,
    ),
    "7b-lora": Shape(
        prompt_tokens=0,
        picture=(0, 0),
        hidden=3584,
        intermediate=18944,
        layers=28,
        heads=28,
        kv_heads=4,
        vocabulary=152064,
        is_tied=False,
        vision_hidden=1280,
        vision_layers=32,
        vision_heads=16,
    ),
    "smoke": Shape(prompt_tokens=0, picture=(0, 0), hidden=64, intermediate=128, layers=2, heads=2, kv_heads=1),
}
NUM_STEPS = 4
"""Steps of each run; the first, in which graphs are captured and memory is claimed, is dropped."""


class Costs(Callback):
    """Seconds and peak memory of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Completions keep their full length."""
        ban_special_tokens(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to measure anew."""
        self.before = dict(pl_module.phase_seconds)  # type: ignore[arg-type]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """The step's own share of the module's clocks."""
        spent: dict[str, float] = pl_module.phase_seconds  # type: ignore[assignment]
        phases = {name: value - self.before.get(name, 0.0) for name, value in spent.items()}
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        self.steps.append(phases | {"step": sum(phases.values()), "peak_gib": peak})


class RandomGRPO(GRPO):
    """GRPO whose weights are random and never on disk."""

    policy_class: type[Policy] = Policy

    def configure_model(self) -> None:
        """Policy, and reference where there is no adapter."""
        if hasattr(self, "policy"):
            return
        self.policy = make_policy(self.policy_class, self.policy_config)
        if self.policy_config.lora is None:
            self.reference = make_policy(self.policy_class, self.policy_config)
            self.reference.requires_grad_(False)


def make_policy(kind: type[Policy], config: PolicyConfig) -> Policy:
    """A policy with random weights on the device."""
    torch.manual_seed(0)
    plain = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, config.dtype))
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(config.name))
    finally:
        torch.set_default_dtype(plain)
    model.generation_config = GenerationConfig.from_pretrained(config.name)
    model.set_attn_implementation({"text_config": NAME})
    policy = kind(prepare_for_training(model, config), Processor.load(config.name), CODECS["qwen2_vl"])
    policy.network.train()
    return policy.to(model.device)


def run(
    kind: type[Policy], folder: Path, *, num_prompts: int, completion: int, is_lora: bool
) -> dict[str, float] | str:
    """Median costs of a step, or why there are none."""
    config = PolicyConfig(
        name=str(folder), dtype="bfloat16" if is_lora else "float32", lora=LoraConfig() if is_lora else None
    )
    module = RandomGRPO(
        EvenCharacters(),
        policy=config,
        optimizer=partial(torch.optim.AdamW, lr=1e-6, fused=torch.cuda.is_available()),
        lr_scheduler=LRSchedulerConfig(type="constant"),
        max_new_tokens=completion,
    )
    module.policy_class = kind
    costs = Costs()
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",  # bfloat16 takes ages on a CPU
        max_steps=NUM_STEPS,
        callbacks=[costs],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module, datamodule=Prompts(folder, num_prompts))
    except torch.cuda.OutOfMemoryError:
        return "out of memory"
    finally:
        del trainer, module
        gc.collect()
        torch.cuda.empty_cache() if torch.cuda.is_available() else None
    timed = costs.steps[1:]
    return {name: round(median(step[name] for step in timed), 5) for name in timed[0]}


def bandwidth() -> float:
    """Bytes per second that this device reads when it adds a large vector up."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.ones(2**30 if device == "cuda" else 2**24, device=device)
    seconds = _seconds(lambda: values.sum())
    return values.numel() * values.element_size() / seconds


def _seconds(action: Any) -> float:
    taken = []
    for _ in range(5):
        _wait()
        started = time.perf_counter()
        action()
        _wait()
        taken.append(time.perf_counter() - started)
    return median(taken[1:])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare_graphs(folder: Path) -> dict[str, Any]:
    """A rollout of the device's own path and the eager one of the same network in float32."""
    policy = make_policy(Policy, PolicyConfig(name=str(folder))).eval()
    data = Prompts(folder, 2)
    prompts = policy.prefill(encode_prompts(policy, EvenCharacters(), data.samples[:2]))
    options: dict[str, Any] = {"group_size": 4, "max_new_tokens": 32, "seeds": [1, 2]}
    graphs = policy.generate(prompts, **options)
    params = SamplingParams(
        max_new_tokens=32, eos_token_ids=policy.eos_token_ids, suppress_tokens=policy.suppress_tokens
    )
    eager = generate(Decoder(policy.model), prompts, group_size=4, params=params, seeds=[1, 2])
    equal = sum(torch.equal(one, other) for one, other in zip(graphs.completions, eager.completions, strict=True))
    return {"rows": len(eager.completions), "equal_rows": equal}


def main() -> int:
    """Measure everything; results are written after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["2b", "7b-lora"], choices=list(SHAPES))
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--prompts", nargs="+", type=int, default=[400, 1300], choices=list(IMAGES))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--smoke", action="store_true", help="A tiny shape, on any device.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        print(
            "Nothing was measured: there is no CUDA device. Needed are about 60 GB of its memory for 2b and 40 GB for "
            "7b-lora; --smoke tries the program without one.",
            file=sys.stderr,
        )
        return 1
    if args.smoke:
        torch.set_num_threads(1)
        args.models, args.prompts, args.batch_sizes, args.completion = ["smoke"], [100], [2], 4
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "lightning", "peft")},
        "bandwidth_gb_per_s": round(bandwidth() / 1e9, 1),
        "group_size": 8,
        "completion": args.completion,
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as made:
        for model in args.models:
            for prompt in args.prompts:
                shape = replace(SHAPES[model], prompt_tokens=prompt, picture=IMAGES[prompt])
                folder = Path(made) / f"{model}-{prompt}"
                make_folder(folder, shape, has_weights=False)
                if "graphs" not in results:
                    results["graphs"] = compare_graphs(folder)
                for batch_size in args.batch_sizes:
                    results["runs"].append(measure(model, shape, folder, batch_size, args.completion, results))
                    args.results.parent.mkdir(parents=True, exist_ok=True)
                    args.results.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results["runs"]))
    return 0


def measure(
    model: str, shape: Shape, folder: Path, batch_size: int, completion: int, results: dict[str, Any]
) -> dict[str, Any]:
    """Both paths in one shape."""
    options: dict[str, Any] = {
        "num_prompts": batch_size,
        "completion": completion,
        "is_lora": model.endswith("lora"),
    }
    shared, repeated = (run(kind, folder, **options) for kind in (Policy, RepeatedPolicy))
    weights = shape.layers * (
        2 * shape.hidden**2 * (1 + shape.kv_heads / shape.heads) + 3 * shape.hidden * shape.intermediate
    )
    weights += shape.hidden * shape.vocabulary
    return {
        "model": model,
        "prompt": shape.prompt_tokens,
        "batch_size": batch_size,
        "shared": shared,
        "repeated": repeated,
        "read_weights_s": round(2 * weights / (results["bandwidth_gb_per_s"] * 1e9), 6),
        "decode_step_s": round(shared["decode"] / completion, 6) if isinstance(shared, dict) else None,
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| model | P | B | step, s | repeated, s | ratio | decode step / reading weights | peak, GiB | repeated, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in runs:
        shared, repeated = row["shared"], row["repeated"]
        both = isinstance(shared, dict) and isinstance(repeated, dict)
        columns = [
            row["model"],
            row["prompt"],
            row["batch_size"],
            f"{shared['step']:.3f}" if isinstance(shared, dict) else shared,
            f"{repeated['step']:.3f}" if isinstance(repeated, dict) else repeated,
            f"{repeated['step'] / shared['step']:.1f}" if both else "-",
            f"{row['decode_step_s'] / row['read_weights_s']:.1f}" if row["decode_step_s"] else "-",
            f"{shared['peak_gib']:.1f}" if isinstance(shared, dict) else "-",
            f"{repeated['peak_gib']:.1f}" if isinstance(repeated, dict) else "-",
        ]
        lines.append("| " + " | ".join(map(str, columns)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
