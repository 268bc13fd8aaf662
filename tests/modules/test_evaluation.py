"""What a policy answers greedily, and the metrics that validation and test make of it."""

from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

from perception_r1.callbacks.before_after import BeforeAfter
from perception_r1.data.loading import Batch
from perception_r1.data.sources import JsonLines
from perception_r1.modules import SFT
from perception_r1.modules.base import PolicyModule
from perception_r1.policy.load import LoraConfig
from perception_r1.policy.policy import Policy
from perception_r1.tasks.grounding import GroundingData
from tests.evaluation.evaluating import answer_by_lot, write_sources
from tests.modules.toy import Lottery, fit, make_data, make_module, make_trainer


def odd_samples(count=7):
    """Samples whose prompts have many lengths."""
    data = make_data(num_val=count)
    data.setup("validate")
    sizes = [(28 * (1 + index % 3), 28 * (1 + index % 2)) for index in range(count)]
    found = list(data.samples("val"))
    for index, (width, height) in enumerate(sizes):
        image = found[index].image.resize((width, height), Image.Resampling.NEAREST)
        found[index] = replace(found[index], image=image, width=width, height=height)
    return found


@pytest.fixture
def module(folder):
    module = make_module(folder, max_new_tokens=6)
    module.policy = Policy.load(module.policy_config).double().eval()
    return module


@pytest.mark.parametrize("budget", [1, 60, 100, 10_000])
def test_a_budget_of_tokens_changes_no_answer_and_no_order(module, monkeypatch, budget):
    samples = odd_samples()
    whole = module.score_greedy(Batch(samples))
    assert [scored.sample.id for scored in whole] == [sample.id for sample in samples]
    assert len({scored.completion for scored in whole}) > 1
    sizes = []
    real = type(module.policy).generate

    def generate(policy, prompts, **options):
        sizes.append(len(prompts.lengths) * (max(prompts.lengths) + options["params"].max_new_tokens))
        assert len(prompts.lengths) == 1 or sizes[-1] <= budget
        return real(policy, prompts, **options)

    monkeypatch.setattr(type(module.policy), "generate", generate)
    module.eval_batch_tokens = budget
    assert module.score_greedy(Batch(samples)) == whole
    assert (len(sizes) == 1) == (budget == 10_000)


def test_nothing_to_answer_is_no_work(module):
    assert module.score_greedy(Batch([])) == []


def test_validation_takes_all_sources_together(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(PolicyModule, "score_greedy", answer_by_lot)
    files = write_sources(tmp_path, "grounding", {"one": 5, "two": 4})
    data = GroundingData(val={name: JsonLines(file) for name, file in files.items()}, eval_batch_size=2)
    module = make_module(folder, task=data.task)
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    trainer.validate(module, data, verbose=False)
    scored_completions = answer_by_lot(module, list(data.samples("val")))
    assert len(scored_completions) == 9
    expected = torch.tensor([scored.score.reward for scored in scored_completions], dtype=torch.float64).mean()
    assert float(trainer.callback_metrics["val/reward"]) == pytest.approx(float(expected), rel=1e-6)
    assert not any("one" in name for name in trainer.callback_metrics)


@pytest.mark.parametrize(("limit", "sizes"), [(1.0, {"one": 5, "two": 4}), (1, {"one": 1, "two": 2})])
def test_metrics_before_and_after_are_those_of_a_test_source_by_source(folder, tmp_path, monkeypatch, limit, sizes):
    monkeypatch.setattr(PolicyModule, "score_greedy", answer_by_lot)
    files = write_sources(tmp_path, "grounding", {"one": 5, "two": 4})
    sources = {name: JsonLines(file) for name, file in files.items()}
    data = GroundingData(train=sources, test=sources, eval_batch_size=2, batch_size=2)
    module, callback = make_module(folder, SFT, task=data.task), BeforeAfter()
    fit(folder, tmp_path, module, [callback], max_steps=1, data=data, limit_test_batches=limit)
    trainer = make_trainer(tmp_path, limit_test_batches=limit)
    trainer.test(module, data, verbose=False)
    expected = {}
    for name, size in sizes.items():
        samples = [sample for sample in data.samples("test") if sample.source == name][:size]
        rewards = [scored.score.reward for scored in answer_by_lot(module, samples)]
        expected[f"{name}/reward"] = pytest.approx(sum(rewards) / size)
    assert {name: callback.before[name] for name in expected} == expected
    tested = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {f"test/{name}": pytest.approx(value) for name, value in callback.after.items()} == tested
    assert callback.before == callback.after


def test_a_module_says_what_it_trains(folder):
    module = make_module(folder, task=Lottery(spread=0.5), policy={"lora": LoraConfig(r=2)})
    module.policy = Policy.load(module.policy_config)
    sizes = {name: parameter.numel() for name, parameter in module.policy.named_parameters()}
    assert module.describe() == {
        "task": {"class_path": "tests.modules.toy.Lottery", "init_args": asdict(Lottery(spread=0.5))},
        "policy": {
            "name": str(folder),
            "num_parameters": sum(sizes.values()),
            "num_trainable": sum(size for name, size in sizes.items() if "lora_" in name),
        },
    }
    assert module.monitor == "val/reward/luck"


def test_answers_are_given_without_dropout_and_training_goes_on_with_it(folder, monkeypatch):
    modes, generate = [], Policy.generate
    spy = lambda self, *a, **k: modes.append(self.model.training) or generate(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(Policy, "generate", spy)
    module = make_module(folder)
    module.policy = Policy.load(module.policy_config)
    for is_training in (True, False):
        module.policy.train(is_training)
        module.complete(Batch(odd_samples(2)))
        assert module.policy.model.training == is_training
    assert modes == [False, False]
