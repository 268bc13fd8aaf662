"""Supervised attention, compared with a count of pixels and with the attention that transformers itself reports."""

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from perception_r1.embedded.model import build_model_folder
from perception_r1.embedded.pretraining.batch import make_batch
from perception_r1.embedded.pretraining.dense import DenseHead
from perception_r1.embedded.pretraining.questions import corpus, page, shape_scene
from perception_r1.embedded.pretraining.supervised_attention import attention_targets
from perception_r1.embedded.pretraining.training import SEEN_LAYERS, SumsOfLosses, count_terms
from perception_r1.policy.families import CODECS
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.records import ImageSize

CODEC = CODECS["qwen2_vl"]
SIZE = ImageSize(width=140, height=140, resized_width=140, resized_height=140)
SCENES = [shape_scene(index, CODEC) for index in range(12)]
NAME, BOX = ["<|object_ref_start|>", "a", "<|object_ref_end|>"], ["<|box_start|>", "(", "1", "2", ")", "<|box_end|>"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    build_model_folder(folder, family="qwen2_vl", seed=0, corpus=corpus())
    return folder


def seen(scene, number):
    """Points of an object at each image token, a point every seven pixels, as shares of the most at any of them."""
    counts = [
        sum(scene.owner[28 * row + y, 28 * column + x] == number for y in range(3, 28, 7) for x in range(3, 28, 7))
        for row in range(scene.owner.shape[0] // 28)
        for column in range(scene.owner.shape[1] // 28)
    ]
    return torch.tensor(counts) / max(1, *counts)


def any_of(scene, numbers):
    return torch.stack([seen(scene, number) for number in numbers]).amax(0)


def test_an_answer_looks_at_what_may_be_meant():
    """Two of one name and one of another: name and box, another box under that name, another name and box."""
    scene = next(scene for scene, _ in SCENES if len({thing.name for thing in scene.things}) > 1)
    names = [thing.name for thing in scene.things]
    first = next(number for number, name in enumerate(names) if name != names[0])
    things = [0, 0, first]
    answer = ["<think>", *NAME, *BOX, *BOX, *NAME, *BOX, "<|im_end|>"]
    expected = [
        torch.zeros(25),  # no object is written about
        *[any_of(scene, [0, first])] * 2,  # the name is still open
        *[seen(scene, 0)] * (1 + 6),  # those of the name, then this one
        any_of(scene, [0, first]),  # another box of this name, or another name
        *[seen(scene, 0)] * 5,
        *[seen(scene, first)] * (3 + 6),
        torch.zeros(25),
    ]
    torch.testing.assert_close(attention_targets(scene, things, answer), torch.stack(expected))


def test_only_objects_not_listed_yet_are_looked_at():
    scene = next(scene for scene, _ in SCENES if len(scene.things) > 3)
    alike = scene.things[0].name
    numbers = [number for number, thing in enumerate(scene.things) if thing.name == alike]
    others = [number for number in range(len(scene.things)) if number not in numbers]
    targets = attention_targets(scene, numbers + others, [*NAME, *BOX])
    torch.testing.assert_close(targets[:2], any_of(scene, numbers + others).expand(2, -1))
    torch.testing.assert_close(targets[2:6], any_of(scene, numbers).expand(4, -1))
    torch.testing.assert_close(targets[6:], seen(scene, numbers[0]).expand(3, -1))


def test_an_answer_without_objects_tells_nothing():
    assert not attention_targets(SCENES[0][0], [], ["<|im_end|>"]).any()


@pytest.mark.parametrize("is_thinking", [False, True])
def test_a_page_is_read_character_by_character(is_thinking):
    pages = (page(index, CODEC) for index in range(200))
    several = ((scene, asked[0]) for scene, asked in pages if set(scene.values["text"]) & set(" \n"))
    scene, question = next(found for found in several if ("<think>" in found[1].answer) is is_thinking)
    text = scene.values["text"]
    before, after = ("<think></think><answer>", "</answer>") if is_thinking else ("", "")
    assert question.answer == before + text + after
    tokens = [char.replace(" ", "\u0120").replace("\n", "\u010a") for char in question.answer] + ["<|im_end|>"]
    read = [len(text[:index].replace(" ", "").replace("\n", "")) for index in range(len(text))]  # before each character
    expected = [torch.zeros(len(seen(scene, 0)))] * len(before) + [seen(scene, number) for number in read]
    expected += [torch.zeros(len(seen(scene, 0)))] * (len(after) + 1)
    torch.testing.assert_close(attention_targets(scene, question.things, tokens), torch.stack(expected))
    joined = attention_targets(scene, question.things, [*before, text[:2], "<|im_end|>"])
    assert text[:2].isalnum()
    torch.testing.assert_close(joined[len(before)], any_of(scene, [0, 1]))


def test_questions_name_the_things_that_their_answers_list():
    for scene, asked in SCENES:
        for question in asked:
            parsed = [
                tuple(round(side * 140) for side in item.box)
                for item in CODEC.parse_boxes(question.answer.split("<answer>")[-1].split("</answer>")[0], SIZE).items
            ]
            assert parsed == [scene.things[number].box for number in question.things]


def test_loss_is_that_of_the_attention_transformers_reports(start):
    policy = Policy.load(PolicyConfig(name=str(start)))
    batch = make_batch(policy, SCENES[:3])
    head = DenseHead(policy.model.config.get_text_config().hidden_size)
    loss = SumsOfLosses(policy, head)(batch, has_answers=True)["scene/attention"]
    model = Qwen2VLForConditionalGeneration.from_pretrained(start, attn_implementation="eager", dtype=torch.float32)
    image_id, total, told = model.config.image_token_id, 0.0, 0
    asked = [(scene, question) for scene, questions in SCENES[:3] for question in questions]
    for (scene, question), targets in zip(asked, batch.attention_targets, strict=True):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.prompt}]}]
        prompt = policy.encode([chat], [[scene.image]])
        ids = torch.cat([prompt.input_ids[0], *policy.encode_targets([question.answer])])[None]
        with torch.no_grad():
            output = model(
                input_ids=ids,
                pixel_values=prompt.pixel_values[0],
                image_grid_thw=torch.tensor([[1, 10, 10]]),
                mm_token_type_ids=(ids == image_id).int(),
                output_attentions=True,
            )
        attention = output.attentions[SEEN_LAYERS][0, 0]  # the small model has one layer behind those
        looks = attention[-1 - len(targets) : -1][:, ids[0] == image_id]
        for row, target in zip(looks / looks.sum(1, keepdim=True), targets, strict=True):
            if target.any():
                total, told = total - float(((row * target).sum() + 1e-6).log()), told + 1
    assert float(loss.detach()) == pytest.approx(total, rel=1e-4)
    assert count_terms(batch)["scene/attention"] == told
