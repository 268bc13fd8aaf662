"""Prompts that worker processes encode ahead of the step are those that the module encodes itself, bit by bit."""

import multiprocessing
import os
import pickle
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from perception_r1.callbacks.checkpoints import Checkpoints
from perception_r1.callbacks.log_samples import LogSamples
from perception_r1.data.encoding import PromptEncoder
from perception_r1.data.loading import Batch
from perception_r1.data.sources import JsonLines
from perception_r1.errors import UserError
from perception_r1.modules import GRPO, SFT
from perception_r1.modules.encoding import encode_prompts, prompt_encoder
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.tasks.grounding import Grounding
from tests.evaluation.evaluating import write_sources
from tests.modules.toy import Log, Lottery, fit, make_data, make_module, make_trainer, trained_weights
from tests.policy.test_batch import assert_same

pytestmark = pytest.mark.slow

VALIDATION = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}


class Handed(Callback):
    """What the module got: whether prompts came with each batch, and whether its images did."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append((batch.prompts is not None, all(hasattr(sample.image, "size") for sample in batch)))

    def on_validation_batch_start(self, trainer, module, batch, batch_idx):
        self.on_train_batch_start(trainer, module, batch, batch_idx)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("rows"), "grounding", {"one": 12, "two": 5})


def data_of(task, rows, num_workers, **options):
    sources = {split: {"": JsonLines(rows[name])} for split, name in {"train": "one", "val": "two"}.items()}
    options = {"batch_size": 3, "num_workers": num_workers} | options
    return make_data(task, **options, **sources)


@pytest.mark.parametrize("kind", [GRPO, SFT])
def test_training_and_validation_do_not_depend_on_workers(folder, tmp_path, rows, kind):
    ends = []
    for num_workers in (0, 2):
        options = {"num_prompts": 2, "min_reward_std": 0.2} if kind is GRPO else {}
        task = Lottery() if kind is GRPO else Grounding()
        module, log, handed = make_module(folder, kind, task=task, **options), Log(), Handed()
        data = data_of(task, rows, num_workers)
        _, trainer = fit(folder, tmp_path, module, [log, handed, LogSamples(2)], max_steps=6, data=data, **VALIDATION)
        ends.append((trained_weights(module), log.steps, {**trainer.callback_metrics}))
        assert set(handed.batches) == {(num_workers > 0, num_workers == 0)}
    (weights, steps, metrics), (other_weights, other_steps, other_metrics) = ends
    assert all(torch.equal(other_weights[name], value) for name, value in weights.items())
    assert steps == other_steps
    assert len(steps) == 6
    named = [name for name in metrics if name.startswith("val/") and "seconds" not in name]
    assert [other_metrics[name] for name in named] == [metrics[name] for name in named] != []


def test_scenes_come_with_their_image_and_their_prompt(folder, tmp_path):
    handed = Handed()
    fit(folder, tmp_path, callbacks=[handed], max_steps=2, data=make_data(num_workers=1))
    assert handed.batches == [(True, True)] * 2


def test_a_run_with_workers_is_resumed_exactly(folder, tmp_path, rows):
    ends = []
    for name, stops in (("whole", (5,)), ("resumed", (2, 5))):  # four batches an epoch
        for steps in stops:
            module = make_module(folder, num_prompts=2, min_reward_std=0.2)
            last = tmp_path / name / "version_0" / "checkpoints" / "last.ckpt"
            options = {"max_steps": steps, "ckpt_path": last if last.exists() else None}
            fit(folder, tmp_path / name, module, [Checkpoints()], data=data_of(module.task, rows, 2), **options)
        ends.append(trained_weights(module))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_an_evaluation_with_workers_gives_the_same_answers(folder, tmp_path, rows):
    found = []
    for num_workers in (0, 2):
        module = make_module(folder)
        trainer = make_trainer(tmp_path)
        trainer.test(module, data_of(module.task, rows, num_workers, eval_split="val"), verbose=False)
        found.append(module.test_results())
    assert found[0] == found[1]


def test_an_encoder_needs_no_model_and_leaves_images_where_they_are(folder, rows):
    policy, task = Policy.load(PolicyConfig(name=str(folder))), Grounding()
    data = data_of(task, rows, 0)
    data.setup("fit")
    samples = list(data.samples("train"))
    prompts = PromptEncoder(processor=policy.processor, task=task)(samples)
    assert {pixels.dtype for pixels in prompts.pixel_values} == {torch.uint8}
    assert not any(hasattr(sample.image, "size") for sample in samples)
    assert_same(policy.receive(prompts), encode_prompts(policy, task, samples))


def ignores_ctrl_c(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = int(re.search(r"^SigIgn:\s*(\w+)$", status, re.MULTILINE)[1], 16)
    return bool(ignored >> (signal.SIGINT - 1) & 1)


def test_workers_leave_ctrl_c_to_the_training_process(rows):
    data = data_of(Grounding(), rows, 2)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    seen = [next(batches)]
    workers = multiprocessing.active_children()
    while not all(ignores_ctrl_c(worker.pid) for worker in workers):  # the other one may only just begin
        time.sleep(0.01)
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)  # as a terminal does
    seen += batches
    assert len(workers) == 2
    assert len(seen) == len(list(data.samples("train"))) // 3
    assert len({sample.id for batch in seen for sample in batch}) == 3 * len(seen)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fault", ["image", "length"])
def test_what_cannot_be_encoded_ends_in_the_same_sentence_with_and_without_workers(
    folder, tmp_path, num_workers, fault
):
    rows = write_sources(tmp_path, "grounding", {"one": 8, "two": 2})
    policy = {"max_prompt_length": 5} if fault == "length" else {}
    module = make_module(folder, policy=policy)
    data = data_of(module.task, rows, num_workers)
    data.setup("fit")
    (tmp_path / "one" / "3.png").write_bytes(b"spoilt")
    sentence = r"cannot read .*3\.png as an image" if fault == "image" else r"A prompt has \d+ tokens but max_prompt"
    with pytest.raises(UserError, match=f"^{sentence}.*$") as caught:
        fit(folder, tmp_path / "run", module, data=data, max_steps=8)
    assert "\n" not in str(caught.value)
    assert "worker" not in str(caught.value)


def test_an_encoder_can_be_sent_to_a_process_that_begins_from_nothing(folder, rows):
    policy, task = Policy.load(PolicyConfig(name=str(folder))), Grounding()
    data = data_of(task, rows, 0)
    data.setup("fit")
    encoder, samples = prompt_encoder(policy, task), list(data.samples("train"))[:2]
    assert_same(pickle.loads(pickle.dumps(encoder))(samples), encoder(samples))


def test_on_a_gpu_only_the_pixels_of_a_batch_are_pinned(folder, rows, monkeypatch):
    policy, task = Policy.load(PolicyConfig(name=str(folder))), Grounding()
    data = data_of(task, rows, 2)
    data.setup("fit")
    for device, is_pinned in (("cpu", False), ("cuda", True)):
        strategy = SimpleNamespace(root_device=torch.device(device))
        data.trainer = SimpleNamespace(strategy=strategy, global_rank=0, world_size=1)
        assert data.train_dataloader().pin_memory == data.val_dataloader().pin_memory == is_pinned
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda pixels: pinned.append(pixels.dtype) or pixels.clone())
    samples = list(data.samples("train"))[:2]
    batch = Batch(samples, prompt_encoder(policy, task)(samples))
    before = batch.prompts
    assert_same(batch.pin_memory().prompts, before)
    assert pinned == [torch.uint8] * 2
    assert Batch(samples).pin_memory().prompts is None
