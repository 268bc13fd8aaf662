"""What both trainings share: the optimiser and its schedule, one update, what is logged, exact checkpoints."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from perception_r1.errors import UserError
from perception_r1.metrics import TaskMetrics
from perception_r1.modules.evaluation import EvaluationModule
from perception_r1.modules.memory import peak_memory_gb
from perception_r1.modules.strategies import ZeRO1Strategy
from perception_r1.policy.batch import PromptBatch, to_device
from perception_r1.policy.checkpoint import check_entries, check_origin, trained_entries
from perception_r1.policy.packing import MicroBatch, plan_micro_batches
from perception_r1.policy.sharding import total_grad_norm
from perception_r1.task import AnyTask, tasks_of

VALIDATION = "validation"
"""Name of the phase that is no part of a step."""
MAX_SKIPPED_IN_A_ROW = 20
"""Updates that may be skipped one after another before training stops: by then the weights do not recover."""


@dataclass(kw_only=True)
class LRSchedulerConfig:
    """Learning rate over the optimiser steps: linear warm-up, then a decay.

    Attributes:
        warmup_steps: Steps of linear growth to the optimiser's learning rate.
        type: Shape of the way down after the warm-up, over all steps of the run.
        min_lr_rate: Learning rate at the end, as a share of the optimiser's.
    """

    warmup_steps: int = 0
    type: Literal["constant", "linear", "cosine"] = "linear"
    min_lr_rate: float = 0.05

    def factor(self, step: int, num_steps: int) -> float:
        """Learning rate of one step as a share of the optimiser's.

        >>> schedule = LRSchedulerConfig(warmup_steps=2, type="linear", min_lr_rate=0.0)
        >>> [schedule.factor(step, 6) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.type == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps))
        left = 1 - done if self.type == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.min_lr_rate + (1 - self.min_lr_rate) * left


class PolicyModule(EvaluationModule):
    """A policy that is trained and updated by hand, and evaluated greedily.

    Args:
        task: That of the data module, or its mixture of several; the command line hands it over.
        optimizer: Optimiser of the trainable weights.
        lr_scheduler: Learning rate over the steps.
        max_grad_norm: Gradients are scaled down to this norm.
        micro_batch_tokens: Tokens of prompts and completions computed at once, each prompt counted once; null computes
            the batch in one piece. A group that is larger by itself is split over its completions. It changes memory,
            not results.
        tokens_per_patch: What a patch of an image counts in `micro_batch_tokens` where the vision tower is trained: the
            memory that it takes there over that of a token. 0 counts tokens alone.
        seed: Seed of sampling and dropout; a resumed run continues their sequence.
        **kwargs: Those of `EvaluationModule`.
    """

    def __init__(
        self,
        task: AnyTask,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerConfig,
        max_grad_norm: float = 1.0,
        micro_batch_tokens: int | None = None,
        tokens_per_patch: float = 0.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(task, **kwargs)
        if max_grad_norm <= 0:
            raise UserError(f"max_grad_norm is {max_grad_norm}; it must be above 0.")
        if micro_batch_tokens is not None and micro_batch_tokens < 1:
            raise UserError(f"micro_batch_tokens is {micro_batch_tokens}; it must be 1 or more, or null.")
        if tokens_per_patch < 0:
            raise UserError(f"tokens_per_patch is {tokens_per_patch}; it must not be negative.")
        self.automatic_optimization = False
        self.optimizer_factory = optimizer
        self.lr_scheduler = lr_scheduler
        self.max_grad_norm = max_grad_norm
        self.micro_batch_tokens = micro_batch_tokens
        self.tokens_per_patch = tokens_per_patch
        self.seed = seed
        self.train_metrics = TaskMetrics(task, "train", is_evaluation=False)
        self.phase_seconds: dict[str, float] = {}
        self.current_phase: str | None = None
        self.num_skipped_steps = 0
        self.num_steps = 0  # of the whole run, known once it starts
        self._skipped_in_a_row = 0
        self._validation_started = 0.0

    # ---------------------------------------------------------------------------------------------- set-up

    def check_trainer(self, trainer: Trainer, *, is_training: bool = True) -> None:
        """Refuse settings with which no run is right; in training also those without effect, and a wrong optimiser."""
        super().check_trainer(trainer, is_training=is_training)
        if not is_training:
            return
        if trainer.gradient_clip_val is not None:
            raise UserError("trainer.gradient_clip_val has no effect here; set model.max_grad_norm instead.")
        if trainer.accumulate_grad_batches != 1:
            raise UserError(
                "trainer.accumulate_grad_batches has no effect here; set data.global_batch_size to the prompts of one "
                "step and model.micro_batch_tokens to what is computed at once."
            )
        if trainer.precision in ("16-mixed", "16-true"):
            raise UserError(f"trainer.precision {trainer.precision} is not supported; use bf16-mixed or 32-true.")
        if trainer.max_steps < 0 and (trainer.max_epochs is None or trainer.max_epochs < 0):
            raise UserError("Set trainer.max_steps or max_epochs: the learning rate decays over a known length.")
        self._make_optimizer([nn.Parameter(torch.zeros(1, 1))])  # its settings are wrong for one weight or for all

    def _make_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        try:
            return self.optimizer_factory(parameters)
        except Exception as error:  # whatever an optimiser of anybody's raises
            raise UserError(f"model.optimizer cannot be made: {' '.join(str(error).split())}") from error

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser over what is trained, with the schedule stepped at every update."""
        strategy = self.trainer.strategy
        make = strategy.sharded(self._make_optimizer) if isinstance(strategy, ZeRO1Strategy) else self._make_optimizer
        optimizer = make([parameter for parameter in self.parameters() if parameter.requires_grad])
        self.num_steps = self.num_planned_steps()
        scheduler = LambdaLR(optimizer, lambda step: self.lr_scheduler.factor(step, self.num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def num_planned_steps(self) -> int:
        """Optimiser steps of the whole run."""
        planned = self.trainer.max_steps if self.trainer.max_steps >= 0 else math.inf
        if self.trainer.max_epochs is not None and self.trainer.max_epochs >= 0:
            self.trainer.fit_loop.setup_data()  # only then is the number of batches known
            num_batches = self.trainer.num_training_batches * self.trainer.max_epochs
            planned = min(planned, num_batches * self.updates_per_batch)
        return int(planned)

    @property
    def updates_per_batch(self) -> int:
        """Optimiser steps per batch of the data module."""
        return 1

    # -------------------------------------------------------------------------------------------- one update

    def prompt_sizes(self, prompts: PromptBatch) -> list[int]:
        """What each prompt takes of `micro_batch_tokens`: its tokens, and what its patches add."""
        if prompts.image_features is not None or self.policy.is_vision_frozen:
            return prompts.lengths
        pairs = zip(prompts.lengths, prompts.num_patches, strict=True)
        return [tokens + round(self.tokens_per_patch * patches) for tokens, patches in pairs]

    def exchanges_gradients(self) -> bool:
        """Whether devices exchange gradients, which they do in the last backward pass of a step."""
        return self.trainer.world_size > 1

    def accumulation(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around the passes of one micro-batch: devices exchange gradients with the last one only.

        The number of micro-batches may therefore differ between devices; see `num_empty_passes`.
        """
        if isinstance(self.trainer.strategy, ParallelStrategy) and not is_last:
            return self.trainer.strategy.block_backward_sync()
        return nullcontext()

    def plan_micro_batches(
        self, prompts: PromptBatch, completions: Sequence[int], chosen: Sequence[int], *, are_known: bool = False
    ) -> list[MicroBatch]:
        """See `policy/packing.py`. Sharded weights are gathered by all devices in every pass, so passes are alike.

        The parts of a group then compute its prompt each, instead of sharing it, as they do where the family's prompts
        cannot be shared; there a completion brings the tokens of its prompt along. Prompts that are known leave the
        rest of the budget to completions.
        """
        is_shared, budget = self.policy.family.shares_prompts, self.micro_batch_tokens
        sizes = self.prompt_sizes(prompts)
        if are_known:
            budget, sizes = None if budget is None else budget - sum(sizes), [0] * len(prompts)
        if not is_shared:
            group_size, lengths = len(completions) // len(prompts), prompts.lengths
            completions = [length + lengths[row // group_size] for row, length in enumerate(completions)]
            sizes = [size - length for size, length in zip(sizes, lengths, strict=True)]
        micro_batches = plan_micro_batches(sizes, completions, chosen, budget)
        if self.device_mesh is None and is_shared:
            return micro_batches
        return [replace(micro_batch, part=0, num_parts=1) for micro_batch in micro_batches]

    def num_empty_passes(self, num_micro_batches: int) -> int:
        """Backward passes that this device makes without a micro-batch, because other devices wait for them.

        Sharded weights are gathered by all devices in every pass, so all make as many as the one with most. Else only
        gradients are exchanged, in the last pass: a device with nothing to learn makes one where another device learns.
        """
        if not self.exchanges_gradients():
            return 0  # nobody waits, and neither does this device for its own number
        value = to_device(torch.tensor(num_micro_batches), self.device)
        most = int(cast(Tensor, self.trainer.strategy.reduce(value, reduce_op="max")))
        needed = most if self.device_mesh is not None else min(1, most)
        return max(0, needed - num_micro_batches)

    def empty_pass(self, prompts: PromptBatch, completions: Sequence[Tensor]) -> None:
        """A pass forward and backward that leaves all gradients as they are: one token of the shortest prompt."""
        shortest = min(range(len(prompts)), key=prompts.lengths.__getitem__)
        completion = completions[shortest * (len(completions) // len(prompts))]
        with self.phase("policy_forward"):
            logprobs = self.policy(prompts.select([shortest]), [completion[:1]])
        with self.phase("backward"):
            self.manual_backward(0.0 * logprobs.sum())

    def mean_over_devices(self, number: float) -> Tensor:
        """Mean of a number over all devices.

        Gradients are averaged over devices. So a sum of losses that is divided by the mean number of tokens per device
        becomes the mean over the tokens of all of them.
        """
        value = to_device(torch.tensor(number, dtype=torch.float32), self.device)
        return cast(Tensor, self.trainer.strategy.reduce(value, reduce_op="mean"))

    def apply_gradients(self, loss: float) -> dict[str, float]:
        """Clip, step the optimiser and the learning rate; skip an update that is not finite, count it and name it.

        Args:
            loss: Value of the loss whose gradients are in place.

        Returns:
            What the log tells of the update: the gradient norm before clipping, the learning rate used, and the like.

        Raises:
            UserError: Too many updates in a row were skipped.
        """
        optimizer = cast(LightningOptimizer, self.optimizers())
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = total_grad_norm(trained)
        torch.nn.utils.clip_grads_with_norm_(trained, self.max_grad_norm, norm)
        learning_rate = optimizer.param_groups[0]["lr"]
        is_finite = self.trainer.strategy.reduce_boolean_decision(math.isfinite(loss) and bool(norm.isfinite()))
        if is_finite:
            self._skipped_in_a_row = 0
        else:
            optimizer.zero_grad(set_to_none=True)  # the step below then counts, but moves no weight
            self.num_skipped_steps += 1
            self._skipped_in_a_row += 1
            what = "gradient" if math.isfinite(loss) else "loss"
            self.print(f"Step {self.global_step}: the {what} is not finite; the update is skipped.")
            if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise UserError(
                    f"{MAX_SKIPPED_IN_A_ROW} updates in a row were not finite; lower the learning rate or "
                    "max_grad_norm and go on from an earlier checkpoint."
                )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.engine.invalidate()
        self.lr_schedulers().step()  # type: ignore[union-attr]
        return {
            "grad_norm": float(norm),
            "lr": learning_rate,
            "skipped_steps": float(self.num_skipped_steps),
            "peak_memory_gb": peak_memory_gb(self.device),
        }

    # ----------------------------------------------------------------------------------------------- logging

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the seconds of a part of the training step, and say that it goes on."""
        started, self.current_phase = time.perf_counter(), name
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.current_phase = f"after {name}"
        self.count_seconds(name, time.perf_counter() - started)

    def count_seconds(self, name: str, seconds: float) -> None:
        """Add seconds to those of a phase."""
        self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + seconds

    @property
    def validation_share(self) -> float:
        """Share of validations in the seconds of all steps and validations so far."""
        return self.phase_seconds.get(VALIDATION, 0.0) / max(sum(self.phase_seconds.values()), 1e-9)

    def log_train(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Log metrics of this step under `train/`, means over the ranks."""
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, batch_size=1, sync_dist=True)

    def on_validation_start(self) -> None:
        """Begin to measure a validation."""
        self._validation_started = time.perf_counter()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics; during a fit also how sure the means are, and how long validations take."""
        if self.trainer.state.fn != TrainerFn.FITTING or self.trainer.sanity_checking:
            super().on_validation_epoch_end()
            return
        self.log_dict(self.val_metrics.margins_of_error(), batch_size=1)
        super().on_validation_epoch_end()
        self.engine.sleep()  # only where weights are handed over again
        seconds = time.perf_counter() - self._validation_started
        self.count_seconds(VALIDATION, seconds)
        values = {"val/seconds": seconds, "val/frac_seconds": self.validation_share}
        self.log_dict(values, batch_size=1, sync_dist=True)

    # -------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What training changes, and no more: frozen weights come from the model's folder again."""
        return trained_entries(self, super().state_dict(*args, **kwargs))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Restore exactly the entries that `state_dict` gives.

        Raises:
            UserError: An entry is missing, unexpected or of another shape.
        """
        check_entries(self.state_dict(), state_dict)
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the counters of the run, and what it trains."""
        checkpoint["run"] = {
            "phase_seconds": dict(self.phase_seconds),
            "num_skipped_steps": self.num_skipped_steps,
            "training": self._training(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters of the run up again; `check_origin` refuses a checkpoint that is not one of ours."""
        check_origin(checkpoint)
        if self.trainer.state.fn == TrainerFn.FITTING and "optimizer_states" not in checkpoint:
            raise UserError("The checkpoint holds weights alone, as best.ckpt does; training goes on from last.ckpt.")
        written = checkpoint["run"].get("training")
        if self.trainer.state.fn == TrainerFn.FITTING and written != self._training():
            raise UserError(
                f"The checkpoint is of another training, {written}, and this one is {self._training()}: go on with the "
                "same task, or export the checkpoint and give its folder as --model."
            )
        self.engine.invalidate()
        self.phase_seconds = dict(checkpoint["run"]["phase_seconds"])
        self.num_skipped_steps = checkpoint["run"]["num_skipped_steps"]

    def _training(self) -> str:
        """What is trained and how, in words: "GRPO of counting"."""
        return f"{type(self).__name__} of {' and '.join(task.name for task in tasks_of(self.task).values())}"
