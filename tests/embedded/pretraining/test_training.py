import dataclasses
import json

import pytest
import torch

from perception_r1.data.synthetic.render import COLOURS, SHAPES
from perception_r1.embedded.model import build_model_folder
from perception_r1.embedded.pretraining.batch import make_batch
from perception_r1.embedded.pretraining.dense import dense_targets
from perception_r1.embedded.pretraining.questions import NUM_QUESTIONS, corpus, page, shape_scene
from perception_r1.embedded.pretraining.training import DenseHead, Settings, SumsOfLosses, count_terms, train
from perception_r1.policy.families import CODECS
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy

CODEC = CODECS["qwen2_vl"]
SETTINGS = Settings(
    num_steps=4, dense_steps=1, cooldown_steps=2, warmup_steps=2, num_scenes=3, num_pages=2, dense_scale=1
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    build_model_folder(folder, family="qwen2_vl", seed=0, corpus=corpus())
    return folder


def test_questions_of_a_scene_are_the_same_in_every_run():
    for index in range(5):
        (first, asked), (second, again) = shape_scene(index, CODEC), shape_scene(index, CODEC)
        assert first.image.tobytes() == second.image.tobytes()
        assert asked == again
        assert len(asked) == NUM_QUESTIONS
        assert {question.task for question in asked} <= {"detection", "counting", "grounding"}


def test_mixed_scenes_are_harder_on_the_whole():
    sizes = [
        sum(len(shape_scene(index, CODEC, is_mixed=is_mixed)[0].things) for index in range(60))
        for is_mixed in (False, True)
    ]
    assert sizes[0] < sizes[1]


def test_answers_that_share_an_image_cost_what_they_cost_alone(start):
    """The oracle is the policy on complete prompts, one for each question."""
    policy = Policy.load(PolicyConfig(name=str(start))).double()
    scenes = [shape_scene(index, CODEC) for index in range(3)]
    batch = make_batch(policy, scenes)
    head = DenseHead(policy.model.config.get_text_config().hidden_size).double()
    batch = dataclasses.replace(batch, prompts=_double(batch.prompts), targets=batch.targets.double())
    losses = SumsOfLosses(policy, head)(batch, has_answers=True)
    questions = [(scene, question) for scene, asked in scenes for question in asked]
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.prompt}]}]
        for _, question in questions
    ]
    prompts = _double(policy.encode(chats, [[scene.image] for scene, _ in questions]))
    answers = policy.encode_targets([question.answer for _, question in questions])
    with torch.no_grad():
        logprobs = policy(prompts, answers).sum(1)
    tasks = [question.task for _, question in questions]
    for task in set(tasks):
        alone = -sum(value for value, name in zip(logprobs.tolist(), tasks, strict=True) if name == task)
        assert float(losses[task].detach()) == pytest.approx(alone, rel=1e-5)


def test_dense_targets_tell_what_is_at_a_point():
    scene = next(found for found in (shape_scene(index, CODEC)[0] for index in range(20)) if found.things)
    targets = dense_targets([scene]).numpy()
    assert targets.shape == (25, 16, 6)
    for token, point in ((0, 0), (7, 5), (12, 10), (24, 15)):
        y, x = 28 * (token // 5) + 7 * (point // 4) + 3, 28 * (token % 5) + 7 * (point % 4) + 3
        owner = scene.owner[y, x]
        if owner < 0:
            assert not targets[token, point].any()
            continue
        thing = scene.things[owner]
        name, colour, *box = targets[token, point]
        assert (SHAPES[int(name) - 1], list(COLOURS)[int(colour) - 1]) == (thing.name, thing.colour)
        assert box == pytest.approx([side / 140 for side in thing.box])


def test_terms_are_counted_as_the_losses_sum_them(start):
    policy = Policy.load(PolicyConfig(name=str(start)))
    pages = [page(index, CODEC) for index in range(2)]
    counts = count_terms(make_batch(policy, pages))
    assert counts["ocr"] == sum(len(row) for row in policy.encode_targets([asked[0].answer for _, asked in pages]))
    assert counts["page/name"] == sum(scene.owner.size // 49 for scene, _ in pages)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(start, tmp_path, capsys):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    train(tmp_path / "whole", start, SETTINGS, rank=0, world_size=1)
    stopped = dataclasses.replace(SETTINGS, num_steps=2, cooldown_steps=0)
    whole_until_then = dataclasses.replace(SETTINGS, cooldown_steps=0)
    train(tmp_path / "parts", start, stopped, rank=0, world_size=1)
    with (tmp_path / "parts" / "curve.jsonl").open("a") as curve:
        curve.write('{"step": 3}\n')  # done, but not saved
    train(tmp_path / "parts", start, whole_until_then, rank=0, world_size=1)
    (tmp_path / "again").mkdir()
    train(tmp_path / "again", start, whole_until_then, rank=0, world_size=1)
    whole, parts, again = (
        Policy.load(PolicyConfig(name=str(tmp_path / name / "model"))).state_dict()
        for name in ("whole", "parts", "again")
    )
    assert all(torch.equal(parts[name], again[name]) for name in again)
    curves = [
        [json.loads(line) for line in (tmp_path / name / "curve.jsonl").open()] for name in ("whole", "parts", "again")
    ]
    assert [[entry["step"] for entry in curve] for curve in curves] == [[1, 2, 3, 4]] * 3
    assert [entry["detection"] for entry in curves[1][1:]] == [entry["detection"] for entry in curves[2][1:]]
    assert any(not torch.equal(whole[name], again[name]) for name in again)  # the cool-down has an effect
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" (100%)")[0] for line in lines if "(100%)" in line] == [
        f"pretraining {steps}" for steps in ("4/4", "2/2", "4/4", "4/4")
    ]
    assert f"detection {curves[2][-1]['detection']:.4g}" in lines[-1]


def _double(prompts):
    return dataclasses.replace(prompts, pixel_values=tuple(pixels.double() for pixels in prompts.pixel_values))
