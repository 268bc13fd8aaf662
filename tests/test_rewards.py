"""Rewards for other trainers: called as TRL and verl call them, they give what `score` gives."""

import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from trl import GRPOTrainer

from perception_r1.cli import main
from perception_r1.errors import UserError
from perception_r1.policy.families import CODECS
from perception_r1.records import ImageSize, LabelledBox
from perception_r1.rewards import trl_reward, verl_reward

SIZE = {"width": 640, "height": 480}
IMAGE_SIZE = ImageSize(width=640, height=480, resized_width=644, resized_height=476)
ROWS = {
    "grounding": {"question": "red cup", "box": [64, 48, 320, 240]},
    "counting": {"label": "cup", "points": [[192, 144], [500, 300]]},
    "detection": {"objects": [{"box": [64, 48, 320, 240], "label": "cup"}]},
    "ocr": {"text": "two\nlines"},
}
"""A row of every task."""


def answers(task, codec):
    """A good answer, one that is off, and none."""
    if task == "ocr":
        return ["two\nlines", "two limes", ""]
    boxes = [(0.1, 0.1, 0.5, 0.5), (0.15, 0.1, 0.55, 0.5)]
    texts = [CODECS[codec].format_boxes([LabelledBox(label="cup", box=box)], IMAGE_SIZE) for box in boxes]
    return [*texts, "nothing"]


def expected(task, codec, row, texts, tmp_path, capsys):
    """What `score` prints."""
    lines = [json.dumps({**row, **SIZE, "completion": text}) + "\n" for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    options = ["--categories", '["cup"]'] if task == "detection" else []
    assert main(["score", str(tmp_path / "rows.jsonl"), "--task", task, "--codec", codec, *options]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def options_of(task):
    return {"categories": ("cup",)} if task == "detection" else {}


def rewards_in_trl(reward, inputs, prompts, completions, ids=None):
    """Rewards as TRL's trainer asks for them; there is no trainer around it but what this method reads."""
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=lambda values: values, is_main_process=True),
        reward_funcs=[reward],
        reward_processing_classes=[None],
        reward_func_names=[reward.__name__],
        state=SimpleNamespace(global_step=3),
        args=SimpleNamespace(report_to=[]),
        environments=None,
        _log_completion_extra=lambda name, values: None,
        _log_metric=lambda name, value: None,
    )
    return GRPOTrainer._calculate_rewards(trainer, inputs, prompts, completions, ids or [[0]] * len(prompts))[:, 0]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("is_chat", [False, True])
def test_trl_gets_the_rewards_of_score(task, codec, is_chat, tmp_path, capsys):
    texts = answers(task, codec)
    told = expected(task, codec, ROWS[task], texts, tmp_path, capsys)
    inputs = [{"prompt": "?", "image": Image.new("RGB", (640, 480)), **ROWS[task]} for _ in texts]
    completions = [[{"role": "assistant", "content": text}] for text in texts] if is_chat else texts
    rewards = rewards_in_trl(trl_reward(task, codec=codec, **options_of(task)), inputs, ["?"] * len(texts), completions)
    assert rewards.tolist() == pytest.approx([line["reward"] for line in told], abs=1e-6)
    assert rewards[0] > rewards[1] >= rewards[2]


def test_trl_strips_special_tokens_and_a_tokenizer_brings_them_back(folder):
    from perception_r1.policy.load import load_processor

    tokenizer = load_processor(folder).tokenizer
    text = answers("grounding", "qwen2_vl")[0]
    ids = tokenizer(text)["input_ids"]
    stripped = tokenizer.decode(ids, skip_special_tokens=True)
    inputs = [{**ROWS["grounding"], **SIZE}]
    call = lambda reward: float(rewards_in_trl(reward, inputs, ["?"], [stripped], [ids])[0])  # noqa: E731
    assert call(trl_reward("grounding", codec="qwen2_vl")) == 0
    assert call(trl_reward("grounding", codec="qwen2_vl", tokenizer=tokenizer)) == pytest.approx(2)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("form", [dict, json.dumps])
def test_verl_gets_the_rewards_of_score_with_components_and_metrics(task, codec, form, tmp_path, capsys):
    texts = answers(task, codec)
    compute_score = verl_reward(task, codec=codec, **options_of(task))
    assert list(inspect.signature(compute_score).parameters)[:4] == [
        "data_source",
        "solution_str",
        "ground_truth",
        "extra_info",
    ]
    for text, line in zip(texts, expected(task, codec, ROWS[task], texts, tmp_path, capsys), strict=True):
        found = compute_score(
            data_source="cups", solution_str=text, ground_truth=form({**ROWS[task], **SIZE}), extra_info={"index": 1}
        )
        components = {f"reward/{name}": value for name, value in line["components"].items()}
        assert found == {"score": line["reward"], **components, **line["metrics"]}


def test_options_are_those_of_the_task():
    row = json.dumps({**ROWS["grounding"], **SIZE})
    text = answers("grounding", "qwen2_vl")[0]
    assert verl_reward("grounding", codec="qwen2_vl", iou_weight=3.0)("x", text, row)["score"] == pytest.approx(4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trl_reward("poetry", codec="qwen2_vl"), "task must be one of .*, not 'poetry'"),
        (lambda: verl_reward("ocr", codec="gpt"), "codec must be one of .*, not 'gpt'"),
        (lambda: trl_reward("ocr", codec="qwen2_vl", weight=1), "the task ocr has no such option"),
        (lambda: trl_reward("grounding", codec="qwen2_vl", iou_weight=-1), "iou_weight must be a number from 0 on"),
        (lambda: trl_reward("ocr", codec="qwen2_vl", min_pixels=9, max_pixels=3), "min_pixels must be from 1"),
        (lambda: trl_reward("ocr", codec="qwen2_vl")(["x"]), "completion 1: text: is missing"),
        (
            lambda: verl_reward("ocr", codec="qwen2_vl")("pages", "x", "{"),
            "ground truth of pages must be a JSON object",
        ),
        (
            lambda: verl_reward("ocr", codec="qwen2_vl")("pages", "x", "[]"),
            "ground truth of pages must be a JSON object",
        ),
        (
            lambda: verl_reward("grounding", codec="qwen2_vl")("refs", "x", ROWS["grounding"]),
            "the ground truth of refs: width: is missing",
        ),
    ],
)
def test_what_a_user_can_get_wrong_is_one_sentence(make, message):
    with pytest.raises(UserError, match=message):
        make()
