"""One step of TRL's GRPOTrainer whenever a line arrives, started by `engine.py` and `gpu.py` with TRL's own Python.

    TRL_PYTHON benchmarks/trl_worker.py FOLDER GROUP_SIZE COMPLETION_TOKENS

Set that environment up with

    python3 -m venv trl && trl/bin/pip install torch==2.13.0
    trl/bin/pip install trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 pillow==13.0.0

TRL repeats the prompt and its picture for every completion, in `generate`, in the reference pass and in the loss.
"""

import json
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

import datasets
import torch
from transformers import (
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    TrainerCallback,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOConfig, GRPOTrainer


class PictureProcessor(Qwen2VLProcessor):  # type: ignore[misc]
    """Qwen2VLProcessor without its video processor, which wants torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=tokenizer.chat_template)


class StepByStep(TrainerCallback):  # type: ignore[misc]
    """Waits for a line before each step and reports the step's cost in a line."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The worker is ready."""
        report({"resting_mb": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20})

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait; then start the clocks."""
        if not sys.stdin.readline():
            os._exit(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Report."""
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
        report({"cpu_s": cpu, "wall_s": wall, "peak_mb": peak})


def report(cost: dict[str, Any]) -> None:
    """A line for `engine.py`."""
    print("REPORT " + json.dumps(cost), flush=True)


def even_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Pays the share of even token ids: a reward that random text has, and that differs in a group."""
    return [sum(token % 2 == 0 for token in row) / max(1, len(row)) for row in completion_ids]


def main(folder: str, group_size: str, num_tokens: str) -> None:
    """Train until the input ends."""
    warnings.filterwarnings("ignore")
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    processor = PictureProcessor(Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    rows = [json.loads(line) for line in (Path(folder) / "prompts.jsonl").read_text().splitlines()] * 100
    data = datasets.Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": row["text"]}] for row in rows],
            "image": [f"{folder}/{row['image']}" for row in rows],
        }
    ).cast_column("image", datasets.Image())
    options = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        fp16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=int(group_size),
        num_generations=int(group_size),
        max_completion_length=int(num_tokens),
        max_steps=10**6,
        beta=0.04,
        temperature=1.0,
        top_k=0,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        loss_type="grpo",
        gradient_checkpointing=False,
        shuffle_dataset=False,
        generation_kwargs={"suppress_tokens": tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens)},
        dataloader_pin_memory=False,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=even_tokens,
        args=options,
        train_dataset=data,
        processing_class=processor,
        callbacks=[StepByStep()],
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
