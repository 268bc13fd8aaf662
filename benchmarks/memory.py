"""How much memory a GRPO step needs on a GPU, computed where there is none.

    python benchmarks/memory.py

Activations are counted, not estimated: the engine's forward pass runs on the CPU in the real widths, under the same
mixed precision, and every tensor that autograd keeps is added up. Networks of one and two layers and prompts of a tenth
and a fifth of the length are enough, for the bytes are linear in layers and in lengths. Weights, gradients, AdamW's
moments, the reference and the copy of the weights that decoding reads follow from their numbers. What the allocator
wastes and what kernels need for themselves is not in it. Results go to benchmarks/results/memory.json.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, Qwen2VLForConditionalGeneration

from perception_r1.policy.load import LoraConfig, PolicyConfig
from perception_r1.policy.logprobs import _HEAD_ROWS
from perception_r1.policy.policy import Policy

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu import IMAGES, SHAPES, make_policy
from random_model import Shape, make_folder

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
CASES = (
    ("smoke", "all weights", False),
    ("2b", "all weights", False),
    ("2b", "all weights", True),
    ("2b", "frozen vision", False),
    ("2b", "LoRA", False),
    ("7b", "LoRA", False),
    ("7b", "LoRA", True),
)
"""Model, what is trained, gradient checkpointing."""
GROUP_SIZE, COMPLETION = 8, 128
_BYTES_PER_LOGIT = 4 + 3 * 4 + 2
"""Logits in float32, three buffers of backward, and the gradient in bfloat16."""


def saved_bytes(policy: Policy, prompts: Any, completions: Sequence[torch.Tensor]) -> int:
    """What autograd keeps between the forward and the backward pass, without the model's own weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    kept: dict[int, tuple[torch.Tensor, int]] = {}  # the tensors are held, so that no address is given out twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage, bare = tensor.untyped_storage(), tensor.detach()  # without its graph, which would hold it for ever
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (bare, storage.nbytes())
        return bare

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(prompts, completions)
    return sum(size for _, size in kept.values())


def config_of(folder: Path, trained: str, *, is_checkpointed: bool = False) -> PolicyConfig:
    """The policy of a case."""
    return PolicyConfig(
        name=str(folder),
        dtype="bfloat16" if trained == "LoRA" else "float32",
        freeze_vision=trained == "frozen vision",
        lora=LoraConfig() if trained == "LoRA" else None,
        gradient_checkpointing=is_checkpointed,
    )


def count(shape: Shape, trained: str, is_checkpointed: bool, share: float, parent: Path) -> int:
    """Bytes kept by the pass over one group, all lengths cut to a share."""
    rows, columns = shape.picture
    small = replace(
        shape, picture=(round(rows * share), columns), prompt_tokens=round(shape.prompt_tokens * share), vocabulary=2048
    )
    folder = parent / f"{small.layers}-{small.vision_layers}-{small.prompt_tokens}"
    make_folder(folder, small, has_weights=False)
    policy = make_policy(Policy, config_of(folder, trained, is_checkpointed=is_checkpointed))
    text = json.loads((folder / "prompts.jsonl").read_text().splitlines()[0])["text"]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    picture = Image.new("RGB", (28 * small.picture[1], 28 * small.picture[0]))
    prompts = policy.encode([chat], [[picture]])
    if policy.is_vision_frozen:
        prompts = policy.encode_images(prompts)
    completions = [torch.zeros(round(COMPLETION * share), dtype=torch.long)] * GROUP_SIZE
    with torch.autocast("cpu", dtype=torch.bfloat16):
        size = saved_bytes(policy, prompts, completions)
    del policy
    gc.collect()
    return size


def activations(shape: Shape, trained: str, is_checkpointed: bool) -> float:
    """Bytes kept by the pass over one group of the full shape, from six small ones: linear in layers and lengths."""
    with tempfile.TemporaryDirectory() as parent:

        def at(layers: int, vision_layers: int, share: float) -> int:
            cut = replace(shape, layers=layers, vision_layers=vision_layers)
            return count(cut, trained, is_checkpointed, share, Path(parent))

        def full(layers: int, vision_layers: int) -> float:
            short, long = at(layers, vision_layers, 0.1), at(layers, vision_layers, 0.2)
            return long + 8 * (long - short)  # from a fifth to the whole

        one, text = full(1, 1), full(2, 1)
        vision = full(1, 2) if trained == "all weights" else one  # a frozen tower keeps nothing
    total = one + (shape.layers - 1) * (text - one) + (shape.vision_layers - 1) * (vision - one)
    if is_checkpointed:  # one layer at a time is computed again
        total += activations(replace(shape, layers=2, vision_layers=1), trained, False) / 2
    # On CUDA the masked attention takes keys and values repeated over all heads (policy/attention.py).
    repeated = (shape.heads - shape.kv_heads) * shape.hidden // shape.heads
    layers = 1 if is_checkpointed else shape.layers
    return total + 2 * 2 * layers * GROUP_SIZE * (shape.prompt_tokens + COMPLETION) * repeated


def numbers_of_weights(shape: Shape, trained: str) -> dict[str, int]:
    """Of the whole model, of its language model without embedding, and of what is trained."""
    with tempfile.TemporaryDirectory() as parent, torch.device("meta"):
        make_folder(Path(parent), replace(shape, prompt_tokens=100, picture=(4, 4), vocabulary=2048), has_weights=False)
        config = AutoConfig.from_pretrained(parent)
        config.text_config.vocab_size = shape.vocabulary
        model = Qwen2VLForConditionalGeneration(config)
    everything = sum(parameter.numel() for parameter in model.parameters())
    vision = sum(parameter.numel() for parameter in model.model.visual.parameters())
    text = sum(parameter.numel() for parameter in model.model.language_model.layers.parameters())
    rank = LoraConfig().r
    adapters = rank * sum(
        sum(layer.weight.shape) for layer in model.model.language_model.modules() if isinstance(layer, torch.nn.Linear)
    )
    trained_number = {"all weights": everything, "frozen vision": everything - vision, "LoRA": adapters}[trained]
    return {"all": everything, "text": text + shape.hidden * shape.vocabulary, "trained": trained_number}


def peak_gib(shape: Shape, trained: str, is_checkpointed: bool) -> dict[str, float]:
    """Parts of the peak, in GiB, with one group of completions at a time."""
    numbers = numbers_of_weights(shape, trained)
    is_lora = trained == "LoRA"
    parts = {
        "weights": numbers["all"] * (2 if is_lora else 4) + (4 * numbers["trained"] if is_lora else 0),
        "gradients and moments": 12 * numbers["trained"],
        "reference": 0 if is_lora else 4 * numbers["all"],
        "copy for decoding": 0 if is_lora else 2 * numbers["text"],
        "activations": activations(shape, trained, is_checkpointed),
        "logits": min(_HEAD_ROWS, GROUP_SIZE * COMPLETION) * shape.vocabulary * _BYTES_PER_LOGIT,
    }
    sizes = {name: round(size / 2**30, 1) for name, size in parts.items()}
    return sizes | {"peak": round(sum(parts.values()) / 2**30, 1)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| model | trained | checkpointing | P | C | G | weights and their like, GiB | activations and logits, GiB | "
        "peak, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = row["gib"]
        passes = sizes["activations"] + sizes["logits"]
        columns = [
            row["model"],
            row["trained"],
            "yes" if row["checkpointing"] else "no",
            row["prompt"],
            COMPLETION,
            GROUP_SIZE,
            f"{sizes['peak'] - passes:.0f}",
            f"{passes:.0f}",
            f"{sizes['peak']:.0f}",
        ]
        lines.append("| " + " | ".join(map(str, columns)) + " |")
    return "\n".join(lines)


def main() -> int:
    """Every case at both prompt lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["2b", "7b"], choices=["2b", "7b", "smoke"])
    parser.add_argument("--prompts", nargs="+", type=int, default=[400, 1300], choices=[400, 1300])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model, trained, is_checkpointed in CASES:
        for prompt in args.prompts if model in args.models else []:
            shape = replace(SHAPES["7b-lora" if model == "7b" else model], prompt_tokens=prompt, picture=IMAGES[prompt])
            case = {"model": model, "trained": trained, "checkpointing": is_checkpointed, "prompt": prompt}
            print(f"{model}, {trained}, P = {prompt} ...", file=sys.stderr, flush=True)
            rows.append(case | {"gib": peak_gib(shape, trained, is_checkpointed)})
            results = {
                "date": date.today().isoformat(),
                "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
                "group_size": GROUP_SIZE,
                "completion": COMPLETION,
                "rows": rows,
            }
            args.results.parent.mkdir(parents=True, exist_ok=True)
            args.results.write_text(json.dumps(results, indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
