"""Validation, test, before and after training and prediction answer alike: in one precision, with the same tokens."""

import json
import shutil
from functools import partial

import pytest
import torch
import yaml

import perception_r1.modules.advantages as advantages_module
from perception_r1.callbacks.before_after import BeforeAfter
from perception_r1.cli import main
from perception_r1.data.sources import JsonLines
from perception_r1.modules import GRPO, SFT
from perception_r1.policy.cuda_graphs import GraphGenerator
from perception_r1.policy.decoder import Decoder
from perception_r1.policy.policy import Policy
from perception_r1.tasks.ocr import OcrData
from tests.evaluation.evaluating import write_sources
from tests.modules.toy import fit, make_data, make_module, make_trainer

NUM_TOKENS = 12
BF16 = (True, torch.bfloat16)
"""Autocast state of bf16-mixed."""


@pytest.fixture
def greedy(monkeypatch):
    """What every greedy generation saw and gave: autocast state, tokens, log-probabilities."""
    seen, real = [], Policy.generate

    def generate(self, prompts, *, params, **options):
        rollout = real(self, prompts, params=params, **options)
        state = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        if params.is_greedy:
            values = torch.cat(rollout.logprobs).tolist()
            seen.append((state, [completion.tolist() for completion in rollout.completions], values))
        return rollout

    monkeypatch.setattr(Policy, "generate", generate)
    return seen


@pytest.fixture
def rows(tmp_path):
    """A file of five pages, whose pictures lie beside it."""
    return write_sources(tmp_path, "ocr", {"pages": 5})["pages"]


def make(folder, file):
    source = {"pages": JsonLines(file)}
    data = OcrData(train=source, val=source, test=source, batch_size=2, eval_batch_size=8)
    module = make_module(folder, SFT, task=data.task, max_new_tokens=NUM_TOKENS)
    module.optimizer_factory = partial(torch.optim.SGD, lr=0.0)  # the policy stays what it is
    return module, data


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_all_of_them_give_the_same_answers_and_metrics(folder, tmp_path, capsys, greedy, rows, precision):
    module, data = make(folder, rows)
    callback, options = BeforeAfter(), {"precision": precision, "limit_val_batches": 1.0}
    every_step = {"val_check_interval": 1, "check_val_every_n_epoch": None, "max_steps": 1}
    _, trainer = fit(folder, tmp_path, module, [callback], data=data, **every_step, **options)
    metrics = [callback.before, callback.after]
    metrics += [{name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}]
    metrics[-1] = {name: value for name, value in metrics[-1].items() if "seconds" not in name}
    for name in ("validate", "test"):
        trainer = make_trainer(tmp_path, **options)
        getattr(trainer, name)(module, data, verbose=False)
        metrics.append(trainer.callback_metrics)
    capsys.readouterr()
    words = ["--task", "ocr", "--max_new_tokens", str(NUM_TOKENS), "--precision", precision]
    pictures = [str(rows.parent / f"{index}.png") for index in range(5)]
    assert main(["predict", str(folder), *pictures, *words]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(greedy) == 6  # before, validation, after, validate, test, predict
    assert [state == BF16 for state, _, _ in greedy] == [precision == "bf16-mixed"] * 6
    assert all(found[1:] == greedy[0][1:] for found in greedy)
    completions = module.policy.processor.decode([torch.tensor(row) for row in greedy[0][1]])
    assert sorted(line["completion"] for line in lines) == sorted(completions)  # generated from short to long prompts
    plain = [{name.partition("val/")[2] or name: float(value) for name, value in found.items()} for found in metrics]
    plain = [{name.removeprefix("test/"): value for name, value in found.items()} for found in plain]
    assert {"reward", "reward/similarity", "edit_distance"} <= plain[0].keys()
    assert all(found == pytest.approx(plain[0], abs=1e-7) for found in plain)


def test_a_run_is_asked_in_the_precision_of_its_training(runs, tmp_path, capsys, greedy, rows):
    run = shutil.copytree(runs["full"], tmp_path / "version_0")
    words = [str(run), str(rows.parent / "0.png"), "--query", "cup"]
    for precision, more, expected in (
        ("bf16-mixed", [], BF16),
        ("32-true", [], None),
        (None, [], None),
        ("bf16-mixed", ["--precision", "32-true"], None),
        ("32-true", ["--precision", "bf16-mixed"], BF16),
    ):
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["trainer"]["precision"] = precision
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        assert main(["predict", *words, *more]) == 0
        ((enabled, dtype), _, _) = greedy.pop()
        assert ((enabled, dtype) if enabled else None) == expected
    assert main(["predict", *words, "--precision", "8-bit"]) == 2
    assert "--precision" in capsys.readouterr().err


def test_rewards_are_compared_in_full_precision_also_by_a_trainer_in_pure_bf16(folder, tmp_path, monkeypatch):
    seen, plain = [], advantages_module.group_advantages
    spy = lambda rewards, *a, **k: seen.append(rewards.dtype) or plain(rewards, *a, **k)  # noqa: E731
    monkeypatch.setattr(advantages_module, "group_advantages", spy)
    fit(folder, tmp_path, make_module(folder, GRPO), max_steps=1, precision="bf16-true")
    assert seen == [torch.float32]


def test_buffers_that_decoding_keeps_serve_evaluation_and_training_in_any_order(folder, tmp_path, monkeypatch):
    """On a GPU a policy keeps them for captured steps; here the steps run as they are, in the same buffers."""

    def generate(self, prompts, **options):
        if self._graphs is None:
            self._graphs = GraphGenerator(Decoder(self.model), lambda: lambda step: step)
        return self._graphs.generate(prompts, **options)

    monkeypatch.setattr(Policy, "generate", generate)
    module, data = make_module(folder), make_data()
    make_trainer(tmp_path, limit_val_batches=1.0).validate(module, data, verbose=False)
    validation = {"limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None}
    _, trainer = fit(folder, tmp_path, module, [BeforeAfter()], data=data, **validation)
    assert trainer.global_step == 2
