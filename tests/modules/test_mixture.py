"""A run of several tasks: every completion is scored by its own task, and metrics are of one task each."""

import json
import math

import pytest
import torch

from perception_r1.callbacks.before_after import BeforeAfter
from perception_r1.callbacks.checkpoints import Checkpoints
from perception_r1.callbacks.run_card import RunCard
from perception_r1.commands.runs import open_run
from perception_r1.data.mixed import MixedData
from perception_r1.evaluation.callback import Evaluation
from perception_r1.metrics import make_metrics
from perception_r1.modules import GRPO, SFT
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.scoring import parse_completions, score_completions
from perception_r1.tasks.counting import CountingData
from perception_r1.tasks.detection import DetectionData
from perception_r1.tasks.grounding import GroundingData
from tests.modules.toy import Log, fit, make_module, make_trainer, trained_weights

SIZES = {"num_train": 9, "num_val": 2, "num_test": 3}


def mixed(**options):
    tasks = {"where": GroundingData(**SIZES), "many": CountingData(**SIZES), "all": DetectionData(**SIZES)}
    return MixedData(tasks, **({"batch_size": 3, "eval_batch_size": 2} | options))


def made(data, kind=GRPO, **options):
    options = {"group_size": 2, "kl_coef": 0.0, **options} if kind is GRPO else options
    return make_module("tiny", kind, task=data.task, **({"max_new_tokens": 40} | options))


def test_each_completion_is_read_and_scored_by_its_own_task():
    data = mixed()
    data.setup("test")
    samples = list(data.samples("test"))
    policy = Policy.load(PolicyConfig(name="tiny"))
    sizes = [policy.processor.image_size(sample.width, sample.height) for sample in samples]
    tasks = [data.task.tasks[sample.source] for sample in samples]
    texts = [
        task.target_text(sample, policy.codec, size) for task, sample, size in zip(tasks, samples, sizes, strict=True)
    ]
    parsed = parse_completions(data.task, policy.codec, samples=samples, image_sizes=sizes, completions=texts)
    scored = score_completions(data.task, parsed, is_evaluation=True)
    for task, sample, size, text, found in zip(tasks, samples, sizes, texts, scored, strict=True):
        prediction = task.parse_completion(text, policy.codec, size)
        assert found.prediction == prediction
        assert found.score.reward == task.score(prediction, sample.target).reward > 0.9


def test_a_training_step_logs_the_metrics_of_each_task(tmp_path):
    data, log = mixed(), Log()
    fit(tmp_path, tmp_path, made(data), [log], data=data, max_steps=2, limit_val_batches=1.0, val_check_interval=2)
    step = log.steps[2]
    names = {
        name: {f"train/{name}/{metric}" for metric in make_metrics(task, is_evaluation=False).compute()}
        for name, task in data.task.tasks.items()
    }
    for name in data.parts:
        assert names[name] <= set(step)
        assert 0 <= step[f"train/{name}/reward"] <= 4
    rewards = [step[f"train/{name}/reward"] for name in data.parts]
    assert step["train/reward"] == pytest.approx(sum(rewards) / 3)  # as many completions of each


def test_the_best_checkpoint_is_the_one_with_the_best_mean_of_primary_metrics(tmp_path):
    data = mixed()
    module = made(data)
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    (values,) = trainer.validate(module, datamodule=data, verbose=False)
    primary = [values[f"val/{name}/{task.primary_metric}"] for name, task in data.task.tasks.items()]
    known = [value for value in primary if not math.isnan(value)]
    assert values[module.monitor] == pytest.approx(sum(known) / len(known))


def test_an_evaluation_has_metrics_and_a_report_of_every_task(tmp_path):
    data = mixed()
    trainer = make_trainer(tmp_path, [Evaluation(num_samples=2)])
    trainer.test(made(data), datamodule=data, verbose=False)
    folder = tmp_path / "version_0"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics) == ["where", "many", "all"]
    for name, task in data.task.tasks.items():
        assert task.primary_metric in metrics[name]
    alone = CountingData(**SIZES, eval_batch_size=2)
    other = make_trainer(tmp_path, [Evaluation(num_samples=2)], version=1)
    other.test(make_module("tiny", SFT, task=alone.task, max_new_tokens=40), datamodule=alone, verbose=False)
    assert json.loads((tmp_path / "version_1" / "metrics.json").read_text())["test"] == metrics["many"]
    report = (folder / "report.md").read_text()
    assert report.startswith("# Evaluation of grounding, counting, detection")
    assert report.count("Both columns read the same answers") == 1
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert {row["source"] for row in rows} == set(data.parts)
    assert len(rows) == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"), [(GRPO, {}), (GRPO, {"scale_rewards": "task"}), (SFT, {})], ids=["GRPO", "task", "SFT"]
)
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path, kind, options):
    weights = []
    for name, stops in (("whole", (5,)), ("resumed", (2, 5))):
        for steps in stops:
            data = mixed()
            last = tmp_path / name / "version_0" / "checkpoints" / "last.ckpt"
            module = made(data, kind, decay="constant", **options)
            settings = {"ckpt_path": last if last.exists() else None, "max_steps": steps, "data": data}
            fit(tmp_path, tmp_path / name, module, [Checkpoints()], limit_val_batches=1.0, **settings)
        weights.append(trained_weights(module))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.slow
def test_a_run_can_be_opened_again_with_all_its_tasks(tmp_path):
    data = mixed()
    module = made(data)
    callbacks = [RunCard(), BeforeAfter(), Checkpoints()]
    fit(tmp_path, tmp_path, module, callbacks, data=data, max_steps=1)
    card = json.loads((tmp_path / "version_0" / "run.json").read_text())
    assert list(card["tasks"]) == ["where", "many", "all"]
    assert {"where/accuracy_50", "many/count_accuracy", "all/ap50"} <= set(card["after"])
    settings = {"class_path": "GRPO", "init_args": {"policy": {"name": "tiny"}, "max_new_tokens": 40}}
    config = {"model": settings, "trainer": {"precision": None}}
    (tmp_path / "version_0" / "config.yaml").write_text(json.dumps(config))
    assert open_run(tmp_path / "version_0").task == data.task
