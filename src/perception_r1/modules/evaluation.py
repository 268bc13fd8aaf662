"""Greedy evaluation: the one road of validation, test, before and after training, and prediction.

Samples --encode, generate greedily, decode, parse--> ParsedCompletion --score--> ScoredCompletion --> metrics

The trainer's strategy calls every step, so all of them run in the precision of the trainer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torchmetrics import MetricCollection

from perception_r1.codecs import Codec
from perception_r1.data.base import BaseDataModule
from perception_r1.data.loading import Batch
from perception_r1.engines import GenerationEngine, NativeEngine
from perception_r1.engines.base import EngineContext, EngineError
from perception_r1.errors import UserError
from perception_r1.metrics import TaskMetrics, make_metrics, update_metrics
from perception_r1.modules.encoding import encode_prompts, prompt_encoder
from perception_r1.modules.signals import SignalConnector
from perception_r1.modules.strategies import SUPPORTED, CheckpointIO
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.packing import plan_eval_batches
from perception_r1.policy.policy import Policy
from perception_r1.policy.rollout import Rollout
from perception_r1.policy.sharding import shard, unsharded
from perception_r1.records import Sample
from perception_r1.scoring import ParsedCompletion, ScoredCompletion, parse_completions, score_completions
from perception_r1.task import AnyTask, Mixture, Task, part_of, task_of_source, tasks_of

MEAN_OF_PRIMARY = "mean_of_primary_metrics"
"""Metric of a validation of several tasks."""


class EvaluationModule(LightningModule):
    """A policy that answers a task's samples greedily.

    Args:
        task: That of the data module, or its mixture of several; the command line hands it over.
        policy: Which model is trained, and what of it.
        engine: What writes completions; null: the engine of this package.
        max_new_tokens: Longest completion, end token included.
        repetition_penalty: Of greedy answers: makes tokens that are in the prompt or the answer less probable; 1 does
            not. Sampling has none, so that its log-probabilities are the model's.
        eval_batch_tokens: Tokens of prompts and completions, padding included, that an evaluation holds at once; null:
            the whole batch of the data module.

    Attributes:
        test_metrics: Metrics of the last test, for each of its loaders.
        primary_test_metrics: Tag of the primary one of each.
    """

    policy: Policy
    """There once `configure_model` has run."""
    policy_class: type[Policy] = Policy

    def __init__(
        self,
        task: AnyTask,
        *,
        policy: PolicyConfig,
        engine: GenerationEngine | None = None,
        max_new_tokens: int = 768,
        repetition_penalty: float = 1.0,
        eval_batch_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more.")
        if repetition_penalty <= 0:
            raise UserError(f"repetition_penalty is {repetition_penalty}; it must be above 0, and 1 for none.")
        if eval_batch_tokens is not None and eval_batch_tokens < 1:
            raise UserError(f"eval_batch_tokens is {eval_batch_tokens}; it must be 1 or more, or null.")
        self.task = task
        self.policy_config = policy
        self.engine: GenerationEngine = NativeEngine() if engine is None else engine
        self._is_connected = False
        self.max_new_tokens = max_new_tokens
        self.repetition_penalty = repetition_penalty
        self.eval_batch_tokens = eval_batch_tokens
        self.val_metrics = TaskMetrics(task, "val")
        self.test_metrics: list[MetricCollection] = []
        self.primary_test_metrics: list[str] = []

    def configure_model(self) -> None:
        """Load the policy; once, whichever of fit, validate, test and predict comes first.

        The workers of the data module learn from it how a prompt is encoded.
        """
        if not hasattr(self, "policy"):
            is_elsewhere = self.engine.has_own_weights and self.trainer.state.fn != TrainerFn.FITTING
            if is_elsewhere and self.trainer.ckpt_path is None:
                self.policy = self.policy_class.without_weights(self.policy_config)
            else:
                self.policy = self.load_policy(self.policy_config)
        if not self._is_connected:
            self.connect_engine()
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, BaseDataModule):
            data.encode_with(prompt_encoder(self.policy, self.task))

    def connect_engine(self) -> None:
        """Tell the engine whom it serves."""
        strategy = self.trainer.strategy
        self.engine.connect(
            self.policy,
            EngineContext(
                config=self.policy_config,
                dtype="bfloat16" if self.trainer.precision.startswith("bf16") else self.policy_config.dtype,
                run_id=strategy.broadcast(uuid4().hex),
                rank=self.trainer.global_rank,
                local_rank=self.trainer.local_rank,
                world_size=self.trainer.world_size,
            ),
        )
        self._is_connected = True

    def load_policy(self, config: PolicyConfig, *, is_trained: bool = True) -> Policy:
        """A policy, its weights sharded over the devices where the strategy says so."""
        if self.device_mesh is None:
            return self.policy_class.load(config, is_trained=is_trained)
        strategy = self.trainer.strategy
        torch.set_rng_state(strategy.broadcast(torch.get_rng_state()))  # an adapter begins the same on every device
        policy = self.policy_class.load(config, is_trained=is_trained)
        shard(policy, self.device_mesh["data_parallel"])
        return policy

    # ------------------------------------------------------------------------------------- for trainer and callbacks

    @property
    def codec(self) -> Codec:
        """How the policy's family writes boxes."""
        return self.policy.codec

    @property
    def monitor(self) -> str:
        """Tag of the validation metric by which checkpoints are compared; higher is better.

        That of several tasks is the mean of their primary metrics.
        """
        return f"val/{MEAN_OF_PRIMARY if isinstance(self.task, Mixture) else self.task.primary_metric}"

    def describe(self) -> dict[str, Any]:
        """The task as it is in this run, options that follow from the data included, and the policy, for JSON."""
        parameters = list(self.policy.parameters())
        described = {name: _describe(task) for name, task in tasks_of(self.task).items()}
        return {
            **({"tasks": described} if isinstance(self.task, Mixture) else {"task": described[""]}),
            "policy": {
                "name": self.policy_config.name,
                "num_parameters": sum(parameter.numel() for parameter in parameters),
                "num_trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            },
        }

    def configure_callbacks(self) -> list[Callback]:
        """The first hook of a run: check the trainer before its own complaints, and change parts of it; no callback."""
        self.check_trainer(self.trainer, is_training=self.trainer.state.fn == TrainerFn.FITTING)
        self.trainer.strategy.checkpoint_io = CheckpointIO()
        self.trainer._signal_connector = SignalConnector(self.trainer)
        return []

    def check_trainer(self, trainer: Trainer, *, is_training: bool = True) -> None:
        """Refuse settings with which no run is right; it can be called before anything is loaded.

        Args:
            trainer: The trainer that is to run this module.
            is_training: It is to train it, not only to evaluate it.

        Raises:
            UserError: Names the setting, and what would be right.
        """
        if type(trainer.strategy) not in SUPPORTED:
            raise UserError(
                f"trainer.strategy {type(trainer.strategy).__name__} is not supported; use auto, ddp or zero1, with "
                "which every device has the whole model, or fsdp2, with which it has a share."
            )

    # ----------------------------------------------------------------------------------------------------- the road

    def encode(self, batch: Batch) -> PromptBatch:
        """The prompts of a batch, on this device: those of a worker, or encoded now."""
        if batch.prompts is None:
            return encode_prompts(self.policy, self.task, batch.samples)
        return self.policy.receive(batch.prompts)

    def complete(self, batch: Batch) -> list[ParsedCompletion]:
        """Greedy completions of samples, in their order, parsed and not scored: they need no target."""
        found: dict[int, ParsedCompletion] = {}
        with self.answering():
            if not len(batch):
                return []
            prompts = self.encode(batch)
            for indices in plan_eval_batches(prompts.lengths, self.max_new_tokens, self.eval_batch_tokens):
                eval_batch = prompts.select(indices)
                completions = self.answer(eval_batch)
                parsed = self.parse([batch.samples[index] for index in indices], eval_batch, completions)
                found |= zip(indices, parsed, strict=True)
        return [found[index] for index in range(len(batch))]

    @contextmanager
    def answering(self) -> Iterator[None]:
        """`evaluation_mode`, where an engine that fails on one device fails on all of them, so that all can save."""
        failure: EngineError | None = None
        with evaluation_mode(self.policy):
            try:
                yield
            except EngineError as error:
                failure = error
        is_fine = failure is None
        if self.engine.has_own_weights and self.trainer.world_size > 1:
            is_fine = self.trainer.strategy.reduce_boolean_decision(is_fine)
        if not is_fine:
            raise failure or EngineError("The engine of another device has failed.")

    def answer(self, prompts: PromptBatch) -> Rollout:
        """The greedy completion of each prompt, all at once."""
        params = self.policy.sampling_params(
            max_new_tokens=self.max_new_tokens, is_greedy=True, repetition_penalty=self.repetition_penalty
        )
        return self.engine.generate(self.policy, prompts, group_size=1, params=params, seeds=[0] * len(prompts))

    def parse(self, samples: Sequence[Sample[Any]], prompts: PromptBatch, rollout: Rollout) -> list[ParsedCompletion]:
        """The completions of a rollout as text and as predictions; samples and prompts are those that it answers."""
        group_size = len(rollout.completions) // len(samples)
        return parse_completions(
            self.task,
            self.codec,
            samples=[sample for sample in samples for _ in range(group_size)],
            image_sizes=[image_size for image_size in prompts.image_sizes for _ in range(group_size)],
            completions=self.policy.processor.decode(rollout.completions),
            lengths=[len(completion) for completion in rollout.completions],
            truncated=rollout.is_truncated,
        )

    def score_greedy(self, batch: Batch) -> list[ScoredCompletion]:
        """Greedy completions of samples, in their order, scored with the metrics of evaluation."""
        return score_completions(self.task, self.complete(batch), is_evaluation=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> list[ScoredCompletion]:  # type: ignore[override]  # for the callbacks
        """Answer greedily and accumulate."""
        scored_completions = self.score_greedy(batch)
        self.val_metrics.update(scored_completions)
        return scored_completions

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole split."""
        values = self.val_metrics.compute()
        if isinstance(self.task, Mixture):
            primary = [values[f"val/{name}/{task.primary_metric}"] for name, task in self.task.tasks.items()]
            values[self.monitor] = torch.stack(primary).nanmean()
        self.log_dict(values, sync_dist=True, batch_size=1)
        self.val_metrics.reset()

    def on_test_start(self) -> None:
        """Begin the metrics of every source of the data module: test/METRIC, or of several test/SOURCE/METRIC."""
        sources = getattr(getattr(self.trainer, "datamodule", None), "tested_sources", ("",))
        fresh = {name: make_metrics(task).to(self.device) for name, task in tasks_of(self.task).items()}
        prefixes = ["test/"] if len(sources) == 1 else [f"test/{source}/" for source in sources]
        self.test_metrics, self.primary_test_metrics = [], []
        for source, prefix in zip(sources, prefixes, strict=True):
            self.test_metrics.append(fresh[part_of(self.task, source)].clone(prefix=prefix))
            self.primary_test_metrics.append(f"{prefix}{task_of_source(self.task, source).primary_metric}")

    def test_step(  # type: ignore[override]  # for the callbacks
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[ScoredCompletion]:
        """As `validation_step`, for one source; a batch may be empty where little is left for many devices."""
        scored_completions = self.score_greedy(batch)
        update_metrics(self.test_metrics[dataloader_idx], scored_completions)
        return scored_completions

    def test_results(self) -> dict[str, float]:
        """Metrics of all sources and devices by tag."""
        return {tag: float(value) for metrics in self.test_metrics for tag, value in metrics.compute().items()}

    def on_test_epoch_end(self) -> None:
        """Log the metrics of every source."""
        self.log_dict(self.test_results(), batch_size=1)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[ParsedCompletion]:
        """Answer greedily; nobody knows what would be right."""
        return self.complete(batch)


def _describe(task: Task[Any, Any]) -> dict[str, Any]:
    return {"class_path": f"{type(task).__module__}.{type(task).__qualname__}", "init_args": asdict(task)}


@contextmanager
def evaluation_mode(policy: Policy) -> Iterator[None]:
    """A policy without dropout and gradients for a while, in whatever mode it is before and after.

    Where weights are sharded, every device has all of them meanwhile. So all enter and leave together; what each one
    does in between is its own.

    Not in the inference mode of Lightning's loops: training could not write to the buffers of decoding that it leaves.
    """
    was_training = policy.training
    policy.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), unsharded(policy):
            yield
    finally:
        policy.train(was_training)
