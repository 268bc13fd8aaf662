"""The warm start of the embedded policy: plain SFT on synthetic scenes, stopped early, kept for later runs.

GRPO can only sharpen what a policy already does now and then, so the random model first learns the task roughly. The
result is cached under a fingerprint of everything that shapes it: settings, seed, scenes, code and library versions.
"""

import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

import perception_r1
from perception_r1.data.module import TaskDataModule
from perception_r1.embedded.model import Family, build_image_processor, build_model_folder, build_tokenizer
from perception_r1.modules.base import LRSchedulerConfig
from perception_r1.modules.sft import SFT
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.processor import Processor

_WITHOUT_EFFECT = ("commands", "callbacks", "cli.py", "__main__.py")
"""What of the package the warm start does not use: all other files may decide what it is."""
_LOSS_MEMORY = 0.95
"""Decay of the moving average of the training loss."""
_NUM_CORPUS_SAMPLES = 256


@dataclass(kw_only=True)
class EmbeddedConfig:
    """The embedded policy (`--model.policy.name tiny`) and its warm start; without effect for any other policy.

    Attributes:
        family: Architecture, and with it the way boxes are written.
        whole_tokens: Strings that are one token each in the built tokenizer; they shorten answers, not their text.
        stop_loss: The warm start ends once the moving average of its training loss is below this.
        max_steps: It ends after this many steps in any case.
        cooldown_steps: Steps over which the learning rate then falls to zero.
        batch_size: Samples per step.
        lr: Learning rate.
        warmup_steps: Steps of linear growth to the learning rate.
        cache_dir: Where warm starts are kept.
    """

    family: Family = "qwen2_vl"
    whole_tokens: list[str] = field(default_factory=list)
    stop_loss: float = 0.1
    max_steps: int = 1000
    cooldown_steps: int = 30
    batch_size: int = 16
    lr: float = 2e-3
    warmup_steps: int = 40
    cache_dir: Path = Path(".cache/tiny")


def warm_policy(
    config: EmbeddedConfig,
    data: TaskDataModule,
    *,
    seed: int,
    max_new_tokens: int,
    callbacks: Callable[[], list[Callback]],
) -> Path:
    """Folder of the warmed-up policy of a task, trained now unless it is in the cache.

    Args:
        config: The embedded policy and its warm start.
        data: The data module of the run; only its synthetic scenes are used.
        seed: Of weights and scenes.
        max_new_tokens: Longest answer.
        callbacks: Makes the callbacks of the warm start's trainer (a progress display).
    """
    scenes = data.synthetic(batch_size=config.batch_size)
    folder = Path(config.cache_dir) / f"{data.task.name}-{_fingerprint(config, scenes, seed)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        with isolate_rng():  # the run that follows is the same whether or not the warm start was in the cache
            _build(building, config, scenes, seed=seed, max_new_tokens=max_new_tokens, callbacks=callbacks())
        os.replace(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        if not folder.is_dir():  # another process may have been first
            raise
    return folder


def build_unwarmed(folder: Path, config: EmbeddedConfig, scenes: TaskDataModule, *, seed: int) -> None:
    """The embedded policy before its warm start: random weights, and the tokenizer, made of the scenes' prompts."""
    corpus, tokens = _corpus(scenes), config.whole_tokens
    build_model_folder(folder, family=config.family, seed=seed, corpus=corpus, whole_tokens=tokens)


def embedded_processor(config: EmbeddedConfig, scenes: TaskDataModule) -> Processor:
    """Tokenizer and image processor of the embedded policy, which its warm start leaves as they are."""
    return Processor(build_tokenizer(_corpus(scenes), config.whole_tokens), build_image_processor(config.family))


class StopAtLoss(Callback):
    """Ends training by the moving average of its loss, after a cool-down of the learning rate.

    Args:
        loss: Threshold.
        cooldown_steps: Steps over which the learning rate falls to zero once the threshold is passed.
        patience: Steps before the average counts.
    """

    def __init__(self, *, loss: float, cooldown_steps: int, patience: int = 60) -> None:
        self.loss, self.cooldown_steps, self.patience = loss, cooldown_steps, patience
        self.average: float | None = None
        self.passed_at: int | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Lower the learning rate during the cool-down."""
        if self.passed_at is None:
            return
        left = 1 - (trainer.global_step - self.passed_at) / max(1, self.cooldown_steps)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] *= max(0.0, left)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the loss; start the cool-down or stop."""
        loss = float(trainer.callback_metrics["train/loss"])
        self.average = loss if self.average is None else _LOSS_MEMORY * self.average + (1 - _LOSS_MEMORY) * loss
        if self.passed_at is None and trainer.global_step >= self.patience and self.average < self.loss:
            self.passed_at = trainer.global_step
        if self.passed_at is not None and trainer.global_step >= self.passed_at + self.cooldown_steps:
            trainer.should_stop = True


def _build(
    folder: Path,
    config: EmbeddedConfig,
    scenes: TaskDataModule,
    *,
    seed: int,
    max_new_tokens: int,
    callbacks: list[Callback],
) -> None:
    """Random model, SFT, warmed-up model, all in one folder."""
    build_unwarmed(folder, config, scenes, seed=seed)
    module = SFT(
        scenes.task,
        policy=PolicyConfig(name=str(folder)),
        optimizer=partial(torch.optim.AdamW, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0),
        lr_scheduler=LRSchedulerConfig(warmup_steps=config.warmup_steps, type="constant"),
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=config.max_steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[StopAtLoss(loss=config.stop_loss, cooldown_steps=config.cooldown_steps), *callbacks],
    )
    trainer.fit(module, datamodule=scenes)
    module.policy.save(folder)


def _corpus(scenes: TaskDataModule) -> list[str]:
    """Prompts of scenes."""
    scenes.setup("fit")
    samples = [scenes.samples("train")[index] for index in range(_NUM_CORPUS_SAMPLES)]
    return [message["content"][1]["text"] for sample in samples for message in scenes.task.messages(sample)]


def _fingerprint(config: EmbeddedConfig, scenes: TaskDataModule, seed: int) -> str:
    """Hex digest of everything that shapes the warm start."""
    settings = {name: value for name, value in asdict(config).items() if name != "cache_dir"}
    package = Path(perception_r1.__file__).parent
    files = {path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in _WITHOUT_EFFECT}
    files |= {Path(inspect.getfile(type(part))) for part in (scenes.task, scenes.world)}  # they may lie elsewhere
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    digest.update(f"{seed} {scenes.task} {scenes.fingerprint()} {version('torch')} {version('transformers')}".encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()
