"""One GRPO step whenever a line arrives, with this project's own module and trainer; started by `engine.py`.

python benchmarks/step_worker.py FOLDER shared|repeated GROUP_SIZE COMPLETION_TOKENS
"""

import json
import resource
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader

from perception_r1.data.loading import Batch
from perception_r1.modules import GRPO
from perception_r1.modules.base import LRSchedulerConfig
from perception_r1.policy.load import PolicyConfig
from perception_r1.records import Sample, Score
from perception_r1.tasks.counting import Counting

sys.path.insert(0, str(Path(__file__).resolve().parent))
from random_model import SPECIAL_TOKENS
from repeated import RepeatedGRPO


class EvenCharacters(Counting):
    """Pays the share of characters with an even code: a reward that random text has, and that differs in a group."""

    component_names = ("even",)
    metric_names = ()
    primary_metric = "even"

    def prompt(self, query: str) -> str:
        """The question as it stands in the folder."""
        return query

    def parse_answer(self, text: str, codec: Any, image_size: Any) -> Any:
        """Any text will do."""
        return text

    def score(self, prediction: Any, target: Any) -> Score:
        """The share of even characters."""
        share = sum(ord(letter) % 2 == 0 for letter in prediction) / max(1, len(prediction))
        return Score(reward=share, components={"even": share}, metrics={})


class Prompts(LightningDataModule):
    """The folder's prompts in turn."""

    def __init__(self, folder: Path, batch_size: int = 1) -> None:
        super().__init__()
        self.batch_size = batch_size
        rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
        self.samples: list[Sample[Any]] = []
        for row in rows:
            image = Image.open(folder / row["image"]).convert("RGB")
            size = {"width": image.width, "height": image.height}
            self.samples.append(Sample(id=row["image"], image=image, query=row["text"], target=None, **size))

    def train_dataloader(self) -> Any:
        """More than anybody will ask for."""
        return DataLoader(self.samples * 1000, batch_size=self.batch_size, collate_fn=Batch)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Samples stay where they are; the policy moves what it encodes."""
        return batch


class StepByStep(Callback):
    """Waits for a line before each step and reports the step's cost in a line."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell that the worker is ready."""
        ban_special_tokens(pl_module)
        report({"resting_mb": resident_mb()})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Wait; then start the clocks."""
        if not sys.stdin.readline():
            sys.exit(0)
        forget_peak()
        self.before = dict(pl_module.phase_seconds)  # type: ignore[arg-type]
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Report."""
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        spent: dict[str, float] = pl_module.phase_seconds  # type: ignore[assignment]
        phases = {name: value - self.before.get(name, 0.0) for name, value in spent.items()}
        report({"cpu_s": cpu, "wall_s": wall, "peak_mb": peak_mb(), "phases_s": phases})


def ban_special_tokens(module: Any) -> None:
    """No completion may end early, so that all have the same length."""
    for policy in (module.policy, module.reference):
        if policy is not None:
            ids = policy.processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
            policy.suppress_tokens = torch.tensor(sorted(ids), device=policy.device)


def report(cost: dict[str, Any]) -> None:
    """A line for `engine.py`."""
    print("REPORT " + json.dumps(cost), flush=True)


def resident_mb() -> float:
    """Memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def forget_peak() -> None:
    """Begin to measure the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Largest resident memory since then."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main(folder: str, kind: str, group_size: str, num_tokens: str) -> None:
    """Train until the input ends."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    module = {"shared": GRPO, "repeated": RepeatedGRPO}[kind](
        EvenCharacters(),
        policy=PolicyConfig(name=folder),
        optimizer=partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0),
        lr_scheduler=LRSchedulerConfig(type="constant"),
        group_size=int(group_size),
        max_new_tokens=int(num_tokens),
        kl_coef=0.04,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=10**6,
        callbacks=[StepByStep()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Prompts(Path(folder)))


if __name__ == "__main__":
    main(*sys.argv[1:])
