"""What both trainings share: the policy, its optimiser and schedule, greedy evaluation, exact checkpoints."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from perception_r1.errors import UserError
from perception_r1.metrics import SourceMetrics, score_means, task_metrics, update_metrics
from perception_r1.modules.encoding import encode_prompts
from perception_r1.policy.checkpoint import check_entries, check_origin, trained_entries
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.packing import plan_eval_batches
from perception_r1.policy.policy import Policy
from perception_r1.records import LoadedSample
from perception_r1.scoring import ScoredCompletion, score_completions
from perception_r1.task import Task

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


class PolicyModule(LightningModule):
    """A policy that answers a task's samples, is evaluated greedily and is updated by hand.

    Args:
        task: The task of the data module; the command line hands it over.
        policy: Which model is trained, and what of it.
        optimizer: Optimiser of the trainable weights.
        lr_scheduler: Learning rate over the steps.
        max_new_tokens: Longest completion, end token included.
        max_grad_norm: Gradients are scaled down to this norm.
        micro_batch_tokens: Tokens computed at once; None: the whole batch.
        eval_batch_tokens: Tokens of prompts and completions that an evaluation holds at once; None: the whole batch.
        seed: Seed of sampling and dropout; a resumed run continues their sequence.
    """

    policy: Policy
    """There once `configure_model` has run."""

    def __init__(
        self,
        task: Task[Any, Any],
        *,
        policy: PolicyConfig,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerConfig,
        max_new_tokens: int,
        max_grad_norm: float,
        micro_batch_tokens: int | None,
        eval_batch_tokens: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more.")
        if max_grad_norm <= 0:
            raise UserError(f"max_grad_norm is {max_grad_norm}; it must be above 0.")
        for name, value in {"micro_batch_tokens": micro_batch_tokens, "eval_batch_tokens": eval_batch_tokens}.items():
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be 1 or more, or null.")
        self.automatic_optimization = False
        self.task = task
        self.policy_config = policy
        self.optimizer_factory = optimizer
        self.lr_scheduler = lr_scheduler
        self.max_new_tokens = max_new_tokens
        self.max_grad_norm = max_grad_norm
        self.micro_batch_tokens = micro_batch_tokens
        self.eval_batch_tokens = eval_batch_tokens
        self.seed = seed
        self.train_scores = score_means(task)
        self.eval_metrics = task_metrics(task)
        self.phase_seconds: dict[str, float] = {}
        self.metrics_by_source: dict[str, dict[str, float]] = {}  # of the last test
        self.num_skipped_steps = 0
        self.num_steps = 0  # of the whole run, known once it starts
        self._skipped_in_a_row = 0

    # ---------------------------------------------------------------------------------------------- set-up

    def configure_model(self) -> None:
        """Load the policy; once, whichever of fit, validate, test and predict comes first."""
        if not hasattr(self, "policy"):
            self.policy = Policy.load(self.policy_config)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser over what is trained, with the schedule stepped at every update."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = self.optimizer_factory(trained)
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
        if math.isinf(planned):
            raise UserError("Set trainer.max_steps or max_epochs: the learning rate decays over a known length.")
        return int(planned)

    @property
    def updates_per_batch(self) -> int:
        """Optimiser steps per batch of the data module."""
        return 1

    def configure_callbacks(self) -> list[Callback]:
        """The first hook of a run, before the trainer's own complaints: refuse settings that would have no effect here.

        Raises:
            UserError: Gradients are clipped or accumulated, or half precision is asked for, by the trainer.
        """
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.check_trainer(self.trainer)
        return []

    def check_trainer(self, trainer: Trainer) -> None:
        """Refuse a trainer or an optimiser that cannot train this, before any weight is read.

        Raises:
            UserError: A setting would have no effect, or a wrong one.
        """
        if trainer.gradient_clip_val is not None:
            raise UserError("trainer.gradient_clip_val has no effect here; set model.max_grad_norm instead.")
        if trainer.accumulate_grad_batches != 1:
            raise UserError(
                "trainer.accumulate_grad_batches has no effect here; set data.batch_size to the prompts of one step "
                "and model.micro_batch_tokens to what is computed at once."
            )
        if trainer.precision in ("16-mixed", "16-true"):
            raise UserError(f"trainer.precision {trainer.precision} is not supported; use bf16-mixed or 32-true.")
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise UserError(f"trainer.strategy {type(trainer.strategy).__name__} is not supported; use auto or ddp.")
        if trainer.max_steps < 0 and (trainer.max_epochs is None or trainer.max_epochs < 0):
            raise UserError("Set trainer.max_steps or max_epochs: the learning rate decays over a known length.")
        try:
            self.optimizer_factory([torch.nn.Parameter(torch.zeros(1))])
        except (TypeError, ValueError) as error:
            raise UserError(f"model.optimizer: {error}") from error

    # -------------------------------------------------------------------------------------------- one update

    def accumulation(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around the passes of one part of a batch: devices exchange gradients with the last one only.

        The number of parts may therefore differ between devices.
        """
        strategy = self.trainer.strategy
        return (
            strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) and not is_last else nullcontext()
        )

    def apply_gradients(self, loss: float) -> dict[str, float]:
        """Clip, step the optimiser and the learning rate; skip an update that is not finite, count it and name it.

        Args:
            loss: Value of the loss whose gradients are in place.

        Returns:
            The gradient norm before clipping and the learning rate used, for the log.

        Raises:
            UserError: Too many updates in a row were skipped.
        """
        optimizer = cast(LightningOptimizer, self.optimizers())
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.max_grad_norm)
        learning_rate = optimizer.param_groups[0]["lr"]
        is_finite = self.trainer.strategy.reduce_boolean_decision(math.isfinite(loss) and bool(norm.isfinite()))
        if is_finite:
            self._skipped_in_a_row = 0
        else:
            optimizer.zero_grad(set_to_none=True)  # the step below then counts, but moves no weight
            self._count_skipped("loss" if not math.isfinite(loss) else "gradient")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.lr_schedulers().step()  # type: ignore[union-attr]
        return {"grad_norm": float(norm), "lr": learning_rate, "skipped_steps": float(self.num_skipped_steps)}

    def _count_skipped(self, what: str) -> None:
        self.num_skipped_steps += 1
        self._skipped_in_a_row += 1
        self.print(f"Step {self.global_step}: the {what} is not finite; the update is skipped.")
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{MAX_SKIPPED_IN_A_ROW} updates in a row were not finite; lower the learning rate or max_grad_norm "
                "and go on from an earlier checkpoint."
            )

    # ---------------------------------------------------------------------------------------------- evaluation

    def score_greedy(self, samples: Sequence[LoadedSample[Any]]) -> list[ScoredCompletion]:
        """Greedy completions of loaded samples, in their order, scored with the metrics of evaluation."""
        if not samples:
            return []
        prompts = encode_prompts(self.policy, self.task, samples)
        scored_completions: dict[int, ScoredCompletion] = {}
        for places in plan_eval_batches(prompts.lengths, self.max_new_tokens, self.eval_batch_tokens):
            micro_batch = prompts.select(places)
            rollout = self.policy.generate(
                self.policy.prefill(micro_batch),
                group_size=1,
                max_new_tokens=self.max_new_tokens,
                seeds=[0] * len(places),
                is_greedy=True,
            )
            scored = score_completions(
                self.task,
                self.policy.codec,
                samples=[samples[place] for place in places],
                image_sizes=micro_batch.image_sizes,
                completions=self.policy.processor.decode(rollout.completions),
                lengths=[len(completion) for completion in rollout.completions],
                truncated=rollout.is_truncated,
                is_evaluation=True,
            )
            scored_completions |= zip(places, scored, strict=True)
        return [scored_completions[place] for place in range(len(samples))]

    def evaluate(self, batches: Iterable[list[LoadedSample[Any]]]) -> dict[str, float]:
        """Greedy metrics over a whole data set, outside of any loop of the trainer."""
        metrics = task_metrics(self.task).to(self.policy.device)
        was_training = self.policy.training
        self.policy.eval()
        for batch in batches:
            update_metrics(metrics, self.score_greedy(batch))
        self.policy.train(was_training)
        return {name: float(value) for name, value in metrics.compute().items()}

    def validation_step(  # type: ignore[override]  # they are for the callbacks, not for Lightning
        self, batch: list[LoadedSample[Any]], batch_idx: int
    ) -> list[ScoredCompletion]:
        """Answer greedily and accumulate."""
        scored_completions = self.score_greedy(batch)
        update_metrics(self.eval_metrics, scored_completions)
        return scored_completions

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole split."""
        metrics = tag_metrics("val", self.eval_metrics.compute(), self.task)
        self.eval_metrics.reset()
        self.log_dict(metrics, sync_dist=True, batch_size=1)

    def on_test_start(self) -> None:
        """Begin the metrics of every source."""
        names = getattr(getattr(self.trainer, "datamodule", None), "tested_sources", ("",))
        self.test_metrics = SourceMetrics(self.task, names, self.device)

    def test_step(self, batch: list[LoadedSample[Any]], batch_idx: int) -> list[ScoredCompletion]:  # type: ignore[override]
        """As `validation_step`, source by source; a batch may be empty where little is left for many devices."""
        scored_completions = self.score_greedy(batch)
        self.test_metrics.update(scored_completions)
        return scored_completions

    def on_test_epoch_end(self) -> None:
        """Log the metrics of every source."""
        self.metrics_by_source = self.test_metrics.compute()
        for name, metrics in self.metrics_by_source.items():
            stage = "test" if len(self.metrics_by_source) == 1 else f"test/{name}"
            self.log_dict(tag_metrics(stage, metrics, self.task), batch_size=1)

    # ----------------------------------------------------------------------------------------------- logging

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the seconds of a part of the training step."""
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + time.perf_counter() - started

    def log_train(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Log metrics of this step under `train/`, means over the ranks."""
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, batch_size=1, sync_dist=True)

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
        """Keep the counters of the run."""
        checkpoint["run"] = {"phase_seconds": dict(self.phase_seconds), "num_skipped_steps": self.num_skipped_steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters of the run up again.

        Raises:
            UserError: The checkpoint is not one of ours.
        """
        check_origin(checkpoint)
        self.phase_seconds = dict(checkpoint["run"]["phase_seconds"])
        self.num_skipped_steps = checkpoint["run"]["num_skipped_steps"]


def tag_metrics(stage: str, metrics: Mapping[str, Any], task: Task[Any, Any]) -> dict[str, Any]:
    """TensorBoard tags: the reward's components stand below the reward, all else directly below the stage."""
    prefixes = {name: f"{stage}/reward/" if name in task.component_names else f"{stage}/" for name in metrics}
    return {prefixes[name] + name: value for name, value in metrics.items()}
