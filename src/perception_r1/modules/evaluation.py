"""Greedy evaluation: the one road of validation, test, before and after training, and prediction.

Samples --encode, generate greedily, decode, parse--> ParsedCompletion --score--> ScoredCompletion --> metrics

The trainer's strategy calls every step, so all of them run in the precision of the trainer.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torchmetrics import MetricCollection

from perception_r1.codecs import Codec
from perception_r1.errors import UserError
from perception_r1.metrics import make_metrics, update_metrics
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.packing import plan_eval_batches
from perception_r1.policy.policy import Policy
from perception_r1.records import Sample
from perception_r1.scoring import ParsedCompletion, ScoredCompletion, parse_completions, score_completions
from perception_r1.task import Task


class EvaluationModule(LightningModule):
    """A policy that answers a task's samples greedily.

    Args:
        task: The task of the data module; the command line hands it over.
        policy: Which model is trained, and what of it.
        max_new_tokens: Longest completion, end token included.
        eval_batch_tokens: Tokens of prompts and completions, padding included, that an evaluation holds at once; null:
            the whole batch of the data module.

    Attributes:
        test_results: Metrics of the last test by source and name.
    """

    policy: Policy
    """There once `configure_model` has run."""

    def __init__(
        self,
        task: Task[Any, Any],
        *,
        policy: PolicyConfig,
        max_new_tokens: int = 768,
        eval_batch_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more.")
        check_token_budget("eval_batch_tokens", eval_batch_tokens)
        self.task = task
        self.policy_config = policy
        self.max_new_tokens = max_new_tokens
        self.eval_batch_tokens = eval_batch_tokens
        self.val_metrics = make_metrics(task).clone(prefix="val/")
        self.test_metrics: list[MetricCollection] = []  # of each source
        self.test_results: dict[str, dict[str, float]] = {}

    def configure_model(self) -> None:
        """Load the policy; once, whichever of fit, validate, test and predict comes first."""
        if not hasattr(self, "policy"):
            self.policy = Policy.load(self.policy_config)

    # ------------------------------------------------------------------------------------- for trainer and callbacks

    @property
    def codec(self) -> Codec:
        """How the policy's family writes boxes."""
        return self.policy.codec

    @property
    def monitor(self) -> str:
        """Tag of the validation metric by which checkpoints are compared; higher is better."""
        return f"val/{self.task.primary_metric}"

    def describe(self) -> dict[str, Any]:
        """The task as it is in this run, options that follow from the data included, and the policy, for JSON."""
        parameters = list(self.policy.parameters())
        task_class = type(self.task)
        return {
            "task": {
                "class_path": f"{task_class.__module__}.{task_class.__qualname__}",
                "init_args": asdict(self.task),
            },
            "policy": {
                "name": self.policy_config.name,
                "num_parameters": sum(parameter.numel() for parameter in parameters),
                "num_trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            },
        }

    def configure_callbacks(self) -> list[Callback]:
        """The first hook of a run, before the trainer's own complaints: check the trainer; it adds no callback."""
        self.check_trainer(self.trainer, is_training=self.trainer.state.fn == TrainerFn.FITTING)
        return []

    def check_trainer(self, trainer: Trainer, *, is_training: bool = True) -> None:
        """Refuse settings with which no run is right; it can be called before anything is loaded.

        Args:
            trainer: The trainer that is to run this module.
            is_training: It is to train it, not only to evaluate it.

        Raises:
            UserError: Names the setting, and what would be right.
        """
        if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):  # their subclasses shard or translate
            raise UserError(
                f"trainer.strategy {type(trainer.strategy).__name__} is not supported; use auto or ddp, with which "
                "every device has the whole model."
            )

    # ----------------------------------------------------------------------------------------------------- the road

    def complete(self, samples: Sequence[Sample[Any]]) -> list[ParsedCompletion]:
        """Greedy completions of loaded samples, in their order, parsed and not scored: they need no target."""
        if not samples:
            return []
        found: dict[int, ParsedCompletion] = {}
        with evaluation_mode(self.policy):
            prompts = self.policy.encode(self.task, samples)
            for indices in plan_eval_batches(prompts.lengths, self.max_new_tokens, self.eval_batch_tokens):
                parsed = self._complete_at_once(prompts.select(indices), [samples[index] for index in indices])
                found |= zip(indices, parsed, strict=True)
        return [found[index] for index in range(len(samples))]

    def _complete_at_once(self, prompts: PromptBatch, samples: Sequence[Sample[Any]]) -> list[ParsedCompletion]:
        rollout = self.policy.generate(
            self.policy.prefill(prompts),
            group_size=1,
            max_new_tokens=self.max_new_tokens,
            seeds=[0] * len(samples),
            is_greedy=True,
        )
        return parse_completions(
            self.task,
            self.codec,
            samples=samples,
            image_sizes=prompts.image_sizes,
            completions=self.policy.processor.decode(rollout.completions),
            lengths=[len(completion) for completion in rollout.completions],
            truncated=rollout.is_truncated,
        )

    def score_greedy(self, samples: Sequence[Sample[Any]]) -> list[ScoredCompletion]:
        """Greedy completions of loaded samples, in their order, scored with the metrics of evaluation."""
        return score_completions(self.task, self.complete(samples), is_evaluation=True)

    def validation_step(self, batch: list[Sample[Any]], batch_idx: int) -> list[ScoredCompletion]:  # type: ignore[override]  # for the callbacks
        """Answer greedily and accumulate."""
        scored_completions = self.score_greedy(batch)
        update_metrics(self.val_metrics, scored_completions)
        return scored_completions

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole split."""
        self.log_dict(self.val_metrics.compute(), sync_dist=True, batch_size=1)
        self.val_metrics.reset()

    def on_test_start(self) -> None:
        """Begin the metrics of every source."""
        self.begin_test()

    def test_step(  # type: ignore[override]  # for the callbacks
        self, batch: list[Sample[Any]], batch_idx: int, dataloader_idx: int = 0
    ) -> list[ScoredCompletion]:
        """As `validation_step`, for one source; a batch may be empty where little is left for many devices."""
        scored_completions = self.score_greedy(batch)
        self.update_test(scored_completions, dataloader_idx)
        return scored_completions

    def on_test_epoch_end(self) -> None:
        """Log the metrics of every source, as test/METRIC or, where there are several, test/SOURCE/METRIC."""
        self.end_test()
        for metrics in self.test_metrics:
            self.log_dict(metrics.compute(), batch_size=1)

    def predict_step(self, batch: Iterable[Sample[Any]], batch_idx: int) -> list[ParsedCompletion]:
        """Answer greedily; nobody knows what would be right."""
        return self.complete(list(batch))

    # ------------------------------------------------------------------------------------------- metrics of the test

    def begin_test(self) -> None:
        """Begin the metrics of every source of the data module."""
        sources = self._test_sources()
        fresh = make_metrics(self.task).to(self.device)
        prefixes = ["test/"] if len(sources) == 1 else [f"test/{source}/" for source in sources]
        self.test_metrics = [fresh.clone(prefix=prefix) for prefix in prefixes]

    def update_test(self, scored_completions: Sequence[ScoredCompletion], dataloader_idx: int = 0) -> None:
        """Count scored completions for one of the sources, by the index of its loader."""
        update_metrics(self.test_metrics[dataloader_idx], scored_completions)

    def end_test(self) -> dict[str, dict[str, float]]:
        """Metrics of all devices together, by source and by name without stage; also kept as `test_results`."""
        self.test_results = {
            source: {name.removeprefix(str(metrics.prefix)): float(value) for name, value in metrics.compute().items()}
            for source, metrics in zip(self._test_sources(), self.test_metrics, strict=True)
        }
        return self.test_results

    def _test_sources(self) -> Sequence[str]:
        """Names of the sources, one for each test loader."""
        return getattr(getattr(self.trainer, "datamodule", None), "tested_sources", ("",))


def check_token_budget(name: str, value: int | None) -> None:
    """Refuse a budget of tokens that holds none.

    Raises:
        UserError: Names the option.
    """
    if value is not None and value < 1:
        raise UserError(f"{name} is {value}; it must be 1 or more, or null.")


@contextmanager
def evaluation_mode(policy: Policy) -> Iterator[None]:
    """A policy without dropout for a while, in whatever mode it is before and after."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)
