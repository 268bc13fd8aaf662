"""One run of the study, in a process of its own: train, then measure on every level.

    python benchmarks/study/run.py '{"task": "counting", "training": "grpo", "seed": 0, ...}' RESULT.json

Only the CPU-seconds of training steps count towards a run's budget: neither its start nor its validations.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from study.worlds import DATA, levels

from perception_r1.cli import main as perception_r1
from perception_r1.commands.runs import checkpoint_path, load_checkpoint, open_run
from perception_r1.data.loading import Batch
from perception_r1.geometry import iou_matrix, match
from perception_r1.metrics import make_metrics, update_metrics
from perception_r1.modules.encoding import encode_prompts
from perception_r1.modules.evaluation import MEAN_OF_PRIMARY, EvaluationModule, evaluation_mode
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.records import Box, LoadedSample
from perception_r1.scoring import ScoredCompletion, score_completions
from perception_r1.task import Task, tasks_of
from perception_r1.tasks import TASKS

GROUP_SIZE = 8
"""Answers that are sampled to an image."""
NUM_SAMPLED = 100
"""Held-out images of training that are answered by sampling."""
TEMPERATURES = (1.0, 0.5)
"""Of sampling from the base; what is trained is sampled from at the first of them."""
MAX_NEW_TOKENS = 520
"""Enough for the most crowded image."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run is.

    Attributes:
        task: Name of the task, or "all".
        training: One of `TRAININGS`, or "base": nothing is trained.
        seed: Of scenes and sampling; all trainings of a seed are tested on the same scenes.
        labels: Labelled images, seen as often as it takes; 0 for ever new ones.
        phases: Options and steps of each training in turn; a later one starts from the weights of the one before.
        folder: Where its trainings lie.
        num_tested: Held-out images of pretraining and of training; half as many of the levels beyond.
        part: The part of the study: the result is measured on every level in "main", on that of training in others, and
            only validated in none.
    """

    task: str
    training: str
    seed: int
    labels: int
    phases: list[tuple[list[str], int]]
    folder: str
    num_tested: int
    part: str = "main"


class CpuSeconds(Callback):
    """Write the CPU-seconds of the training steps to `cpu.json` in the run's folder."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Take the time."""
        self._started = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Take it again: optimiser and logging included."""
        self.seconds.append(time.process_time() - self._started)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was seen."""
        (Path(str(trainer.log_dir)) / "cpu.json").write_text(json.dumps([round(value, 4) for value in self.seconds]))


def train(run: Run) -> tuple[Path | None, list[list[float]]]:
    """Do the trainings of a run; its last folder, and the CPU-seconds of all steps of each."""
    start: list[str] = []
    seconds, folder = [], None
    for number, (options, num_steps) in enumerate(run.phases):
        folder = Path(run.folder) / f"phase_{number}"
        data = ["--data.num_train", str(run.labels)] if run.labels else []
        command = [
            *("fit", "--task", run.task, *options, *start, *data, "--seed_everything", str(run.seed)),
            *("--trainer.max_steps", str(num_steps), "--trainer.callbacks+=study.run.CpuSeconds"),
            *("--trainer.val_check_interval", str(max(1, num_steps // 4))),
            *("--before_after.enabled", "false", "--log_samples.num_samples", "0"),
            *("--trainer.logger.init_args.save_dir", run.folder, "--trainer.logger.init_args.name", "."),
            *("--trainer.logger.init_args.version", folder.name),
        ]
        if perception_r1(command):
            raise RuntimeError(f"training failed: {' '.join(command)}")
        seconds.append(json.loads((folder / "cpu.json").read_text()))
        exported = folder / "model"
        if number + 1 < len(run.phases):
            if perception_r1(["export", str(folder), "--to", str(exported)]):
                raise RuntimeError(f"export of {folder} failed")
            start = ["--model.policy.name", str(exported)]
    return folder, seconds


def best_validation(folder: Path, metric: str) -> float:
    """The best validation of the primary metric, which chose the checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return max(event.value for event in events.Scalars(f"val/{metric}"))


def load(folder: Path | None, task_name: str) -> tuple[dict[str, Task[Any, Any]], Policy]:
    """Tasks by name and policy of a run, or of the base."""
    if folder is None:
        return {task_name: DATA[task_name]().task}, Policy.load(PolicyConfig(name="tiny")).eval()
    opened = open_run(folder)
    policy, _ = load_checkpoint(opened.policy, checkpoint_path(opened, "best"))
    return {task.name: task for task in tasks_of(opened.task).values()}, policy


def measure(run: Run, folder: Path | None) -> dict[str, Any]:
    """What `measure_task` finds; of a run on all tasks, of each of them ("by_task")."""
    tasks, policy = load(folder, run.task)
    found = {name: measure_task(run, task, policy, is_base=folder is None) for name, task in tasks.items()}
    return {"by_task": found} if run.task == "all" else found[run.task]


def measure_task(run: Run, task: Task[Any, Any], policy: Policy, *, is_base: bool) -> dict[str, Any]:
    """Greedy metrics on every level, what sampling finds, and how far the policy is from the base.

    Of trainings on few labels: greedy metrics on the level of training and beyond.
    """
    module = EvaluationModule(task, policy=PolicyConfig(name="tiny"), max_new_tokens=MAX_NEW_TOKENS)
    module.policy = policy
    found: dict[str, Any] = {"levels": {}}
    is_main = run.part == "main"
    left_out = {"pretraining"} if run.labels else set()
    tested = {
        name: world
        for name, world in levels(task.name).items()
        if name == "training" or (is_main and name not in left_out)
    }
    for name, world in tested.items():
        num_test = run.num_tested if name in ("pretraining", "training") else run.num_tested // 2
        data = DATA[task.name](task=task, world=world, seed=run.seed, num_test=num_test)
        data.setup("test")
        samples = list(data.samples("test"))
        answers = [answer for batch in in_batches(samples, 50) for answer in module.score_greedy(Batch(batch))]
        metrics = make_metrics(task)
        update_metrics(metrics, answers)
        values = {tag: float(value) for tag, value in metrics.compute().items() if not value.isnan()}
        found["levels"][name] = values | (box_metrics(answers) if task.name in ("counting", "detection") else {})
        if name == "training" and is_main and not run.labels:
            temperatures = TEMPERATURES if is_base else TEMPERATURES[:1]
            base, chosen = Policy.load(PolicyConfig(name="tiny")).eval(), samples[:NUM_SAMPLED]
            found["sampled"] = {f"{each:g}": sample(module, base, chosen, answers, each) for each in temperatures}
    return found


def sample(
    module: EvaluationModule,
    base: Policy,
    samples: Sequence[LoadedSample[Any]],
    greedy: Sequence[ScoredCompletion],
    temperature: float,
) -> dict[str, float]:
    """What G sampled answers to each image hold, and their divergence from the base in nats per token."""
    policy, rewards, values, agree, gaps, num_tokens = module.policy, [], [], [], 0.0, 0
    name = module.task.primary_metric.removeprefix("reward/")
    answered = iter(greedy)
    for batch in in_batches(list(samples), 10):
        with evaluation_mode(policy):
            prompts = encode_prompts(policy, module.task, batch)
            rollout = policy.generate(
                policy.prefill(prompts),
                group_size=GROUP_SIZE,
                params=policy.sampling_params(max_new_tokens=MAX_NEW_TOKENS, temperature=temperature),
                seeds=range(len(batch)),
            )
            own, before = (each(prompts, rollout.completions, temperature) for each in (policy, base))
        gaps += float((own - before).sum())
        num_tokens += sum(len(completion) for completion in rollout.completions)
        scored = score_completions(module.task, module.parse(batch, prompts, rollout), is_evaluation=True)
        for group in in_batches(scored, GROUP_SIZE):
            rewards.append([answer.score.reward for answer in group])
            values.append([primary(answer, name) for answer in group])
            if module.task.name == "counting":
                first = next(answered)
                same = mean(count_of(answer) == count_of(first) for answer in group)
                agree.append((same, first.score.metrics["count_accuracy"]))
    found = {"mean_reward": mean(map(mean, rewards)), "best_reward": mean(map(max, rewards))}
    found |= {"mean": mean(map(mean, values)), "best": mean(map(max, values))}
    found |= {"kl_per_token": gaps / num_tokens, "tokens": num_tokens / GROUP_SIZE / len(rewards)}
    return found | ({"count_calibration_error": calibration_error(agree)} if agree else {})


def count_of(answer: ScoredCompletion) -> int | None:
    """How many objects an answer counts; None where it cannot be read."""
    return None if answer.prediction is None else int(answer.prediction.count)


def primary(answer: ScoredCompletion, name: str) -> float:
    """The primary metric of one answer; of detection, whose AP is one of many images, its F1."""
    score = answer.score
    return score.metrics.get(name, score.components.get(name, score.components.get("f1", 0.0)))


def calibration_error(pairs: Sequence[tuple[float, float]]) -> float:
    """Expected calibration error of the count: an image's confidence is the share of samples with the greedy count."""
    bins: dict[float, list[float]] = {}
    for confidence, is_right in pairs:
        bins.setdefault(confidence, []).append(is_right)
    return sum(len(rights) * abs(mean(rights) - confidence) for confidence, rights in bins.items()) / len(pairs)


def box_metrics(answers: Sequence[ScoredCompletion]) -> dict[str, float]:
    """Mean IoU, and the shares of objects and of boxes that meet at IoU 0.5 or more.

    Boxes and objects of an image are paired so that their IoU is highest in sum, whatever their names. In the mean, an
    object without a box has 0, and so has a box without an object: neither listing less nor listing more can raise it.
    """
    overlaps: list[float] = []
    num_objects = num_boxes = num_slots = 0
    for answer in answers:
        targets, found = boxes_of(answer.sample.target), boxes_of(answer.prediction)
        matrix = iou_matrix(found, targets)
        overlaps += [float(matrix[pair]) for pair in match(-matrix, "bipartite")] if found and targets else []
        num_objects, num_boxes = num_objects + len(targets), num_boxes + len(found)
        num_slots += max(len(targets), len(found))
    num_met = sum(overlap >= 0.5 for overlap in overlaps)
    return {
        "mean_iou": sum(overlaps) / max(1, num_slots),
        "box_recall": num_met / max(1, num_objects),
        "box_precision": num_met / max(1, num_boxes),
    }


def boxes_of(answer: Any) -> Sequence[Box]:
    """The boxes of a target or a prediction of counting or detection; none where there is nothing to read."""
    return [item.box for item in answer.objects] if hasattr(answer, "objects") else getattr(answer, "boxes", None) or ()


def in_batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Parts of a sequence in turn."""
    return (items[start : start + size] for start in range(0, len(items), size))


def main() -> int:
    """Do a run and write what came of it."""
    run, path = Run(**json.loads(sys.argv[1])), Path(sys.argv[2])
    torch.set_num_threads(1)
    folder, seconds = train(run)
    result = {name: value for name, value in asdict(run).items() if name != "folder"}
    result |= {"torch": torch.__version__, "cpu_seconds": [round(sum(each), 1) for each in seconds]}
    if folder is not None:
        counted = seconds[-1][2:] or seconds[-1]
        result["cpu_seconds_per_step"] = round(mean(counted), 4)
        metric = MEAN_OF_PRIMARY if run.task == "all" else TASKS[run.task].primary_metric
        result["best_validation"] = best_validation(folder, metric)
    if run.part:
        result |= measure(run, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.replace(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
