import pytest
import torch

from perception_r1.errors import UserError
from perception_r1.modules.encoding import encode_prompts, encode_targets
from perception_r1.policy.load import LoraConfig, PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.records import Sample
from perception_r1.tasks.grounding import Grounding, GroundingTarget
from tests.policy import oracle


def sample(query="red cup", size=(56, 84)):
    target = GroundingTarget(box=(0.25, 0.25, 0.75, 0.5))
    return Sample(id="1", image=oracle.noise(*size), width=size[0], height=size[1], query=query, target=target)


def test_a_fresh_adapter_changes_nothing_and_switched_off_never_does(folder):
    prompts = oracle.encode(Policy.load(PolicyConfig(name=str(folder))).processor, [0, 1])
    completions = oracle.random_completions([4, 3, 5, 2])
    base = Policy.load(PolicyConfig(name=str(folder))).eval()
    adapted = Policy.load(PolicyConfig(name=str(folder), lora=LoraConfig(r=2))).eval()
    with torch.no_grad():
        expected = base(prompts, completions)
        assert torch.equal(adapted(prompts, completions), expected)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
        assert not torch.allclose(adapted(prompts, completions), expected, atol=0.1)
        with adapted.without_adapter() as reference:
            assert torch.equal(reference(prompts, completions), expected)
        assert not torch.allclose(adapted(prompts, completions), expected, atol=0.1)


END_OF_TURN = {"gemma3": "<end_of_turn>", "glm4v": "<|user|>"}
"""By the chat templates of the hub; all others end with that of Qwen."""


def test_an_answer_is_encoded_as_the_task_writes_it_closed_by_the_end_token(model_folders):
    for family, folder in model_folders.items():
        policy, end = Policy.load(PolicyConfig(name=str(folder))), END_OF_TURN.get(family, "<|im_end|>")
        task, samples = Grounding(), [sample(), sample("blue thing")]
        prompts = encode_prompts(policy, task, samples)
        texts = policy.processor.decode(encode_targets(policy, task, samples, prompts))
        assert texts == [
            task.target_text(sample, policy.codec, image_size) + end
            for sample, image_size in zip(samples, prompts.image_sizes, strict=True)
        ]
        assert [
            task.score(task.parse_completion(t, policy.codec, f), s.target).components["format"]
            for t, f, s in zip(texts, prompts.image_sizes, samples, strict=True)
        ] == [1, 1]


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>", "<|image_pad|>"])
def test_an_answer_that_spells_out_an_end_or_vision_token_is_refused(folder, token):
    policy = Policy.load(PolicyConfig(name=str(folder)))
    with pytest.raises(UserError, match=r"Answer 2 of 2, 'a.*b', spells out a token"):
        policy.encode_targets(["fine", f"a{token}b"])


def test_the_prompt_limit_is_that_of_the_configuration(folder):
    policy = Policy.load(PolicyConfig(name=str(folder), max_prompt_length=20))
    with pytest.raises(UserError, match="max_prompt_length is 20"):
        encode_prompts(policy, Grounding(), [sample()])


def test_vision_tokens_are_suppressed(folder):
    policy = Policy.load(PolicyConfig(name=str(folder)))
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    assert policy.suppress_tokens.tolist() == sorted(policy.processor.tokenizer.convert_tokens_to_ids(names))


@pytest.mark.parametrize(
    ("options", "is_frozen"),
    [
        ({}, False),
        ({"freeze_vision": True}, True),
        ({"lora": LoraConfig(r=2)}, True),
        ({"lora": LoraConfig(r=2, target_modules=r".*visual.*qkv")}, False),
        ({"lora": LoraConfig(r=2, target_modules=r".*visual.*qkv"), "freeze_vision": True}, False),
    ],
    ids=["full", "frozen", "adapter", "adapter in the tower", "adapter in the frozen tower"],
)
def test_the_vision_tower_is_frozen_if_nothing_of_it_is_trained(folder, options, is_frozen):
    assert Policy.load(PolicyConfig(name=str(folder), **options)).is_vision_frozen == is_frozen
