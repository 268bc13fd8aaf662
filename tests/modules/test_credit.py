"""Advantages of boxes: each token has that of its own box."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from perception_r1.errors import UserError
from perception_r1.grpo.advantages import reward_to_go_advantages
from perception_r1.modules import GRPO
from perception_r1.modules.advantages import box_advantages
from perception_r1.modules.resampling import Round
from perception_r1.policy.families import CODECS
from perception_r1.policy.load import load_processor
from perception_r1.policy.policy import Policy
from perception_r1.policy.rollout import Rollout
from perception_r1.records import ImageSize, LabelledBox, Sample
from perception_r1.scoring import parse_completions, prefix_rewards, score_completions
from perception_r1.tasks.counting import Counting, CountingTarget
from perception_r1.tasks.detection import Detection, DetectionData, DetectionTarget
from tests.modules.toy import Log, fit, make_module

SIZE = ImageSize(width=200, height=100, resized_width=196, resized_height=112)
CAT, DOG = (
    LabelledBox(label="cat", box=(0.1, 0.1, 0.4, 0.6)),
    LabelledBox(label="dog", box=(0.5, 0.2, 0.9, 0.8)),
)
FALSE = LabelledBox(label="cat", box=(0.7, 0.0, 0.8, 0.1))


def answered(module, target, *lists):
    """A group of completions of one prompt."""
    codec = module.codec
    texts = [codec.format_boxes(objects, SIZE) for objects in lists]
    completions = module.policy.encode_targets(texts)
    sample = Sample(id="a", image=Path(), width=200, height=100, query="cat", target=target)
    parsed = parse_completions(
        module.task,
        codec,
        samples=[sample] * len(texts),
        image_sizes=[SIZE] * len(texts),
        completions=module.policy.processor.decode(completions),
    )
    rollout = Rollout(
        completions=completions,
        logprobs=[torch.zeros(len(row)) for row in completions],
        is_truncated=[False] * len(texts),
        entropies=[torch.zeros(len(row)) for row in completions],
    )
    return Round(
        samples=[sample],
        prompts=None,
        rollout=rollout,
        scored_completions=score_completions(module.task, parsed),
    )


def advantages(module, found):
    return module.advantages.compute(module, found, module.task)


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def module(request, model_folders):
    task = Detection(categories=("cat", "dog"))
    made = make_module(model_folders[request.param], GRPO, task=task, credit_assignment="box", scale_rewards="none")
    made.policy = Policy.load(made.policy_config)
    return made


def parts_of(module, completion, row):
    """Text of each run of tokens with one advantage, and that advantage."""
    gains, tokens = row.tolist(), completion.tolist()
    runs: list[tuple[str, float]] = []
    for token, gain in zip(tokens, gains, strict=False):
        text = module.policy.processor.decode([torch.tensor([token])])[0]
        if runs and runs[-1][1] == gain:
            runs[-1] = runs[-1][0] + text, gain
        else:
            runs.append((text, gain))
    return runs


def test_a_box_is_not_blamed_for_the_one_before_it(module):
    answer = answered(module, DetectionTarget(objects=(CAT, DOG)), [FALSE, DOG], [CAT, DOG])
    found = advantages(module, answer)
    full = [each.score.reward for each in answer.scored_completions]
    after = [
        [reward for _, reward in prefix_rewards(module.task, module.codec, each)] for each in answer.scored_completions
    ]
    assert full[0] < full[1]
    gains = [(full[0] - after[0][k] - full[1] + after[1][k]) / 2 for k in range(3)]
    runs = parts_of(module, answer.rollout.completions[0], found[0])
    assert [gain for _, gain in runs] == pytest.approx(gains, abs=1e-6)
    assert gains[0] < 0 < gains[1]  # the second box of this completion gained more than that of the other
    assert gains[2] == 0
    assert ["cat" in text for text, _ in runs] == [True, False, False]
    assert ["dog" in text for text, _ in runs] == [False, True, False]
    assert runs[-1][0].endswith("<|im_end|>")
    module.advantages.credit_assignment = "completion"
    assert advantages(module, answer).shape == (2,)


def test_stopping_early_is_compared_with_what_others_still_gained(module):
    target = DetectionTarget(objects=(CAT, DOG))
    answer = answered(module, target, [CAT], [CAT, DOG])
    found = advantages(module, answer)
    stop = float(found[0][len(answer.rollout.completions[0]) - 1])
    (goes_on,) = [gain for text, gain in parts_of(module, answer.rollout.completions[1], found[1]) if "dog" in text]
    assert stop < 0 < goes_on
    assert stop == pytest.approx(-goes_on, abs=1e-6)


def test_an_empty_list_counts_from_where_all_begin(module):
    answer = answered(module, DetectionTarget(objects=()), [], [FALSE])
    found = advantages(module, answer)
    assert [each.score.reward for each in answer.scored_completions] == [3.0, 0.25]
    assert float(found[0][0]) == pytest.approx(1.375)
    assert float(found[1][0]) == pytest.approx(-1.375)


@pytest.mark.parametrize("text", ["é", "naïve 猫 text", "<|box_start|>(1,2)", "🐈🐈", "a\nb  "])
def test_ends_of_tokens_are_those_of_the_text(folder, text):
    processor = load_processor(folder)
    (row,) = processor.encode_targets([text], 0)
    ends = processor.token_ends(row[:-1])
    assert ends[-1] == len(text)
    assert ends == sorted(ends)
    for count, end in enumerate(ends, 1):
        assert processor.decode([row[:count]])[0].rstrip("\ufffd") == text[:end]


def test_a_step_with_advantages_of_boxes(tmp_path):
    log = Log()
    data = DetectionData(num_train=8, num_val=2, num_test=2, batch_size=2)
    options = {"max_new_tokens": 60, "group_size": 3, "kl_coef": 0.0, "credit_assignment": "box"}
    module = make_module("tiny", GRPO, task=data.task, micro_batch_tokens=200, **options)
    fit(tmp_path, tmp_path, module, [log], data=data, max_steps=1)
    assert log.steps[1]["train/advantage_std"] > 0
    assert log.steps[1]["train/grad_norm"] > 0


@pytest.mark.parametrize(
    "options", [{"advantage_estimator": "rloo"}, {"task": Counting(think=True)}], ids=["estimator", "think"]
)
def test_what_does_not_go_with_it_is_refused(options):
    with pytest.raises(UserError, match="credit_assignment box goes with advantage_estimator grpo, and not with think"):
        make_module(Path("none"), GRPO, credit_assignment="box", **options)


def test_counting_gains_box_by_box():
    task, target = Counting(), CountingTarget(count=2, points=((0.25, 0.35), (0.7, 0.5)))
    codec = CODECS["qwen2_vl"]
    text = codec.format_boxes([replace(CAT), replace(DOG, label="cat"), FALSE], SIZE)
    sample = Sample(id="a", image=Path(), width=200, height=100, query="cat", target=target)
    (parsed,) = parse_completions(task, codec, samples=[sample], image_sizes=[SIZE], completions=[text])
    rewards = [reward for _, reward in prefix_rewards(task, codec, parsed)]
    assert rewards == pytest.approx([0.0, 0.5, 1.0, 2 / 3], abs=0.01)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_token_that_ends_a_box_and_goes_on_behind_it_belongs_to_that_box(codec):
    texts = [codec.format_boxes(objects, SIZE) for objects in ([FALSE, FALSE], [CAT, FALSE])]
    sample = Sample(id="a", image=Path(), width=200, height=100, query="", target=DetectionTarget(objects=(CAT, DOG)))
    task = Detection(categories=("cat", "dog"))
    sizes = {"samples": [sample] * 2, "image_sizes": [SIZE] * 2}
    scored = score_completions(task, parse_completions(task, codec, completions=texts, **sizes))
    (first, _), (second, _) = codec.parse_prefixes(texts[0], SIZE)
    offsets = [[first - 1, first + 1, second, len(text) + 1] for text in texts]  # "...4", "]," or the like, rest, end
    rows = [torch.arange(4)] * 2
    rollout = Rollout(completions=rows, logprobs=rows, is_truncated=[False] * 2, entropies=rows)
    processor = SimpleNamespace(token_ends=lambda row: offsets[0])
    policy = SimpleNamespace(codec=codec, processor=processor)
    found = Round(samples=[sample], prompts=None, rollout=rollout, scored_completions=scored)
    parts, owners = box_advantages(task, policy, found, scale="none", dtype=torch.float64)
    assert owners[0].tolist() == [0, 0, 1, 2]
    assert [len(row) for row in parts] == [3, 3]


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_the_gradient_is_that_of_the_expected_reward_where_answers_break_off(codec):
    """Over all groups of two completions: the first box is one of two, the second one is there or breaks off."""
    task = Detection(categories=("cat", "dog"))
    sample = Sample(id="a", image=Path(), width=200, height=100, query="", target=DetectionTarget(objects=(CAT, DOG)))
    pairs = [(first, second) for first in (0, 1) for second in (0, 1)]
    rewards = {}
    for first, second in pairs:
        text = codec.format_boxes([[CAT, FALSE][first], DOG], SIZE)
        offsets = [end for end, _ in codec.parse_prefixes(text, SIZE)]
        text = text[: offsets[1] - 6] if second else text
        (parsed,) = parse_completions(task, codec, samples=[sample], image_sizes=[SIZE], completions=[text])
        prefixes = [reward for _, reward in prefix_rewards(task, codec, parsed)]
        (scored,) = score_completions(task, [parsed])
        rewards[first, second] = [*prefixes, scored.score.reward]
        assert len(prefixes) == 3 - second
    logits = torch.randn(3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def logprobs(leaf, pair):
        return torch.stack([leaf[0].log_softmax(0)[pair[0]], leaf[1 + pair[0]].log_softmax(0)[pair[1]]])

    exact = logits.clone().requires_grad_()
    sum(logprobs(exact, pair).sum().exp() * rewards[pair][-1] for pair in pairs).backward()
    expected = torch.zeros_like(logits)
    for one in pairs:
        for other in pairs:
            gains = reward_to_go_advantages([rewards[one], rewards[other]], 2, scale="none")
            leaf = logits.clone().requires_grad_()
            rows = torch.stack([logprobs(leaf, one), logprobs(leaf, other)])
            gain = torch.tensor([row[:2] for row in gains], dtype=torch.float64)
            (rows.sum().exp().detach() * (gain * rows).sum() / 2).backward()
            expected += leaf.grad
    torch.testing.assert_close(expected, exact.grad / 2, rtol=1e-12, atol=1e-12)
