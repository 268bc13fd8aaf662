import json

import pytest
import torch
from PIL import Image

from perception_r1.errors import UserError
from perception_r1.modules import SFT
from perception_r1.modules.encoding import encode_prompts
from perception_r1.policy.load import LoraConfig
from perception_r1.policy.policy import Policy
from perception_r1.tasks.counting import Counting, CountingData
from perception_r1.tasks.grounding import Grounding
from tests.modules.toy import Gradients, Log, fit, make_data, make_module
from tests.policy import oracle


def make_sft(folder, **options):
    return make_module(folder, SFT, task=Grounding(), **options)


def answers_of(module, samples):
    """Right answers as token ids, written by hand in the form of Qwen2-VL."""
    rows = []
    for sample in samples:
        x1, y1, x2, y2 = (round(1000 * number) for number in sample.target.box)
        box = f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
        text = f"<|object_ref_start|>{sample.query}<|object_ref_end|>{box}<|im_end|>"
        rows.append(torch.tensor(module.policy.processor.tokenizer(text)["input_ids"]))
    return rows


def first_batch(data):
    data.setup("fit")
    return next(iter(data.train_dataloader())).samples


def test_the_loss_is_the_cross_entropy_of_the_answers_tokens_alone(folder, tmp_path):
    log, module = Log(), make_sft(folder)
    fit(folder, tmp_path, module, [log], max_steps=1)
    samples = first_batch(make_data(Grounding()))
    start, plain = Policy.load(module.policy_config), oracle.plain_model(folder, torch.float32)
    losses = []
    for sample, score_greedy in zip(samples, answers_of(module, samples), strict=True):
        prompt = encode_prompts(start, Grounding(), [sample])
        with torch.no_grad():
            losses.append(-oracle.logprobs(plain, prompt, score_greedy, start.suppress_tokens, 1.0))
    assert log.steps[1]["train/loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert log.steps[1]["train/answer_length"] == len(torch.cat(losses)) / len(samples)


def test_training_lowers_the_loss(folder, tmp_path):
    log = Log()
    fit(folder, tmp_path, make_sft(folder, decay="constant"), [log], max_steps=12)
    assert log.steps[12]["train/loss"] < 0.8 * log.steps[1]["train/loss"]


def test_micro_batches_change_no_gradient(folder, tmp_path):
    def first(budget):
        gradients, data = Gradients(), make_data(Grounding(), batch_size=3)
        module = make_sft(folder, micro_batch_tokens=budget)
        fit(folder, tmp_path, module, [gradients], max_steps=1, precision="64-true", data=data)
        return gradients.first

    whole, micro_batches = first(None), first(120)
    for name, gradient in micro_batches.items():
        scale = max(float(whole[name].abs().max()), 1e-9)
        torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-6 * scale, msg=name)


def test_the_policy_learns_in_training_mode(folder, tmp_path, monkeypatch):
    modes = []
    plain = Policy.forward
    spy = lambda self, *a, **k: modes.append(self.model.training) or plain(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(Policy, "forward", spy)
    options = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
    fit(folder, tmp_path, make_sft(folder, policy={"lora": LoraConfig(lora_dropout=0.1)}), **options)
    assert modes == [True, True]


def test_rows_that_give_only_a_count_cannot_be_learnt_from(folder, tmp_path):
    rows = []
    for index in range(8):
        Image.new("RGB", (56, 56), (index, 0, 0)).save(tmp_path / f"{index}.png")
        rows.append({"image": f"{index}.png", "label": "cup", "count": 2, "id": f"row-{index}"})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = CountingData(train_file=tmp_path / "data.jsonl", batch_size=2)
    with pytest.raises(UserError, match=r"sample row-\d: .*needs points or boxes, not a count alone"):
        fit(folder, tmp_path, make_module(folder, SFT, task=Counting()), data=data)


def test_micro_batches_must_be_positive(folder):
    with pytest.raises(UserError, match="micro_batch_tokens"):
        make_sft(folder, micro_batch_tokens=0)
