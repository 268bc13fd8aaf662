"""One stage of `gpu.py`: what the options say, its result as a JSON file.

python benchmarks/gpu_worker.py OPTIONS RESULT
"""

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Self

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import AutoConfig, AutoModelForImageTextToText

from perception_r1.modules import GRPO
from perception_r1.modules.base import LRSchedulerConfig
from perception_r1.modules.encoding import encode_prompts
from perception_r1.planning.measure import RunSize, load_shapes, measure
from perception_r1.planning.prompts import LongestPrompt
from perception_r1.policy.cuda_graphs import GraphGenerator
from perception_r1.policy.decoder import Decoder
from perception_r1.policy.families import FAMILIES
from perception_r1.policy.load import LoraConfig, PolicyConfig, load_processor
from perception_r1.policy.policy import Policy
from perception_r1.policy.rollout import generate

sys.path.insert(0, str(Path(__file__).resolve().parent))
from random_model import Shape, make_folder
from repeated import RepeatedPolicy
from step_worker import EvenCharacters, Prompts, ban_special_tokens

IMAGES = {400: (20, 17), 1300: (40, 31), 100: (4, 4)}
"""Prompt tokens -> rows and columns of the picture in tokens."""
NUM_STEPS = 4
"""Steps of each run; the first, in which graphs are captured and memory is claimed, is dropped."""
PHASES = {"policy_forward": "forward", "optimizer": "update"}
"""Phases that a plan calls otherwise."""
HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
PRECISION = "bf16-mixed" if HAS_CUDA else "32-true"  # bfloat16 takes ages on a CPU


class RandomPolicy(Policy):
    """A policy whose weights are random and never on disk."""

    @classmethod
    def load(cls, config: PolicyConfig, *, is_trained: bool = True) -> Self:
        """Made on the device."""
        torch.manual_seed(0)
        with torch.device(DEVICE):
            network = AutoConfig.from_pretrained(config.name)
            model = AutoModelForImageTextToText.from_config(network, dtype=getattr(torch, config.dtype))
        FAMILIES[network.model_type].prepare(model)
        codec, processor = FAMILIES[network.model_type].codec, load_processor(config.name)
        return cls.from_model(model, processor, codec, config, is_trained=is_trained).to(DEVICE)


class RandomRepeatedPolicy(RandomPolicy, RepeatedPolicy):
    """The same, with repeated prompts."""


def make_model(options: dict[str, Any], folder: Path) -> None:
    """The folder of a model, without weights."""
    rows, columns = IMAGES[options["prompt"]]
    shape = Shape(prompt_tokens=options["prompt"], picture=(rows, columns))
    if options["published"] is None:
        shape = Shape(**vars(shape) | {"hidden": 64, "intermediate": 128, "layers": 2, "heads": 2, "kv_heads": 1})
    make_folder(folder, shape, published=options["published"], has_weights=options["what"] == "trl")


def make_module(options: dict[str, Any], folder: Path) -> GRPO:
    """A module with the settings of configs/model."""
    is_lora = options.get("is_lora", False)
    config = PolicyConfig(
        name=str(folder),
        dtype="bfloat16" if is_lora else "float32",
        lora=LoraConfig() if is_lora else None,
        gradient_checkpointing=options.get("gradient_checkpointing", False),
    )
    return GRPO(
        EvenCharacters(),
        policy=config,
        optimizer=partial(torch.optim.AdamW, lr=1e-6, fused=HAS_CUDA),
        lr_scheduler=LRSchedulerConfig(type="constant"),
        max_new_tokens=options["completion"],
        reference_dtype="bfloat16" if HAS_CUDA else None,
        micro_batch_tokens=6144,
        tokens_per_patch=0.6,
    )


def rates(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Operations per second of large products, and bytes per second of adding up a large vector."""
    values = torch.ones(2**30 if HAS_CUDA else 2**22, device=DEVICE)
    size = 8192 if HAS_CUDA else 256
    matrix = torch.ones(size, size, device=DEVICE, dtype=torch.bfloat16 if HAS_CUDA else torch.float32)
    return {
        "tflops": round(2 * size**3 / _seconds(lambda: matrix @ matrix) / 1e12, 3),
        "read_gb_per_s": round(values.nbytes / _seconds(lambda: values.sum()) / 1e9, 1),
    }


def graphs(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Rollouts of the device's own path, with all rows to the end and without, and the eager one, in float32."""
    make_model(options, folder)
    policy = RandomPolicy.load(PolicyConfig(name=str(folder))).eval()
    prompts = policy.prefill(encode_prompts(policy, EvenCharacters(), Prompts(folder, 2).samples[:2]))
    length, sampled = options["completion"], {"group_size": 4, "seeds": [1, 2]}
    params = policy.sampling_params(max_new_tokens=length)
    eager = generate(Decoder(policy.model), prompts, params=params, **sampled)
    found = {"rows": len(eager.completions)}
    for name, max_kept_bytes in {"kept": 2**40, "released": 0}.items() if HAS_CUDA else ():
        generator = GraphGenerator(Decoder(policy.model), max_kept_bytes=max_kept_bytes)
        rollout = generator.generate(prompts, params=params, **sampled)
        pairs = zip(rollout.completions, eager.completions, strict=True)
        found[f"equal_rows_{name}"] = sum(torch.equal(one, other) for one, other in pairs)
        seconds = _seconds(partial(generator.generate, prompts, params=params, **sampled))
        found[f"seconds_{name}"] = round(seconds, 4)
    found["seconds_eager"] = round(
        _seconds(lambda: generate(Decoder(policy.model), prompts, params=params, **sampled)), 4
    )
    return found


class Costs(Callback):
    """Seconds of each step and its phases, and the most memory of each phase."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.peaks: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Completions keep their full length; phases tell their memory."""
        ban_special_tokens(pl_module)
        measured = pl_module.phase

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            if HAS_CUDA:
                torch.cuda.reset_peak_memory_stats()
            with measured(name):
                yield
            if HAS_CUDA:
                name = PHASES.get(name, name)
                self.peaks[name] = max(self.peaks.get(name, 0.0), torch.cuda.max_memory_allocated() / 1e9)

        pl_module.phase = phase  # type: ignore[method-assign, assignment]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to measure anew."""
        self.before = dict(pl_module.phase_seconds)  # type: ignore[arg-type]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """The step's own share of the module's clocks."""
        spent: dict[str, float] = pl_module.phase_seconds  # type: ignore[assignment]
        phases = {name: value - self.before.get(name, 0.0) for name, value in spent.items()}
        self.steps.append(phases | {"step": sum(phases.values())})


def step(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Median costs of a step, and where prompts are shared and the device is one, what a plan says of its memory."""
    make_model(options, folder)
    module, costs = make_module(options, folder), Costs()
    module.policy_class = {"shared": RandomPolicy, "repeated": RandomRepeatedPolicy}[options["kind"]]
    trainer = Trainer(
        accelerator="auto",
        devices=options["num_devices"],
        strategy=options.get("strategy", "auto"),
        precision=PRECISION,  # type: ignore[arg-type]
        max_steps=NUM_STEPS,
        callbacks=[costs],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=Prompts(folder, options["num_prompts"]))
    timed = costs.steps[1:]
    seconds = {name: round(median(step[name] for step in timed), 5) for name in timed[0]}
    text = module.policy.model.model.language_model
    num_weights = sum(weight.numel() for name, weight in text.named_parameters() if "embed" not in name)
    num_weights += module.policy.model.lm_head.weight.numel()
    rate = rates(options, folder)["read_gb_per_s"] * 1e9
    found = {
        "seconds": seconds,
        "decode_step_s": seconds["decode"] / options["completion"],
        "read_weights_s": 2 * num_weights / rate,
        "peak_gb": {name: round(value, 3) for name, value in costs.peaks.items()},
    }
    if options["kind"] == "shared" and options["num_devices"] == 1:
        found["planned_gb"] = planned(options, folder)
    return found


def planned(options: dict[str, Any], folder: Path) -> dict[str, float]:
    """GB of each phase, as a plan has them."""
    module = make_module(options, folder)
    load_shapes(module, Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False), PRECISION)
    rows, columns = IMAGES[options["prompt"]]
    text = options["prompt"] - rows * columns
    prompt = LongestPrompt(num_text_tokens=text, grid=(1, 2 * rows, 2 * columns), merge_size=2)
    size = RunSize(batch_size=options["num_prompts"], eval_batch_size=0, precision=PRECISION)
    return {peak.phase: round(peak.bytes / 1e9, 3) for peak in measure(module, prompt, size)}


def trl(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Median seconds of a step of TRL with one prompt."""
    make_model(options, folder)
    command = [options["trl_python"], str(Path(__file__).parent / "trl_worker.py"), str(folder), "8"]
    steps = []
    with subprocess.Popen(
        [*command, str(options["completion"])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        reports = (line.removeprefix("REPORT ") for line in worker.stdout if line.startswith("REPORT "))
        next(reports)
        for _ in range(NUM_STEPS):
            worker.stdin.write("\n")
            worker.stdin.flush()
            steps.append(json.loads(next(reports))["wall_s"])
        worker.kill()
    return {"seconds": {"step": round(median(steps[1:]), 5)}}


def _seconds(action: Callable[[], Any]) -> float:
    taken = []
    for _ in range(4):
        _wait()
        started = time.perf_counter()
        action()
        _wait()
        taken.append(time.perf_counter() - started)
    return median(taken[1:])


def _wait() -> None:
    if HAS_CUDA:
        torch.cuda.synchronize()


def main(options: dict[str, Any], result: Path) -> None:
    """Measure and write."""
    warnings.filterwarnings("ignore")
    if not HAS_CUDA:
        torch.set_num_threads(1)
    actions = {"rates": rates, "graphs": graphs, "step": step, "trl": trl}
    with tempfile.TemporaryDirectory() as made:
        found = actions[options["what"]](options, Path(made))
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
