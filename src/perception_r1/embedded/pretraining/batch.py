"""Scenes with their questions as tensors: all questions about an image share it.

The engine computes a prompt once and lets a group of completions attend to it. In pretraining the part of the chat up
to the image plays the prompt, and each question with its answer plays a completion; only the answer is learnt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from perception_r1.data.synthetic.worlds import Scene
from perception_r1.embedded.pretraining.dense import dense_targets
from perception_r1.embedded.pretraining.questions import Question
from perception_r1.embedded.pretraining.supervised_attention import attention_targets
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.policy import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainingBatch:
    """Images of equal numbers of questions.

    Attributes:
        prompts: The chats up to the end of the image, B entries.
        continuations: Questions with their answers, those of an image after one another.
        answer_lengths: Answer tokens of each continuation, at its end.
        tasks: Task of each continuation.
        targets: What is at the points of the images; see `dense_targets`.
        attention_targets: What to attend to during the answer of each continuation; see `attention_targets`.
    """

    prompts: PromptBatch
    continuations: list[Tensor]
    answer_lengths: list[int]
    tasks: list[str]
    targets: Tensor
    attention_targets: list[Tensor]

    @property
    def kind(self) -> str:
        """What the images are: "page" or "scene"."""
        return "page" if "ocr" in self.tasks else "scene"


def make_batch(policy: Policy, scenes: Sequence[tuple[Scene, list[Question]]]) -> PretrainingBatch:
    """Encode scenes; those of equal size become neighbours, as the engine likes them."""
    scenes = sorted(scenes, key=lambda scene: scene[0].image.size)
    asked = [(scene, question) for scene, questions in scenes for question in questions]
    chats = [_chat(question.prompt) for _, question in asked]
    images = [[scene.image] for scene, _ in asked]
    firsts = [sum(len(questions) for _, questions in scenes[:number]) for number in range(len(scenes))]
    image_only = policy.encode([chats[first] for first in firsts], [images[first] for first in firsts])
    vision_end = policy.model.config.vision_end_token_id
    cuts = [int((ids == vision_end).nonzero()[-1]) + 1 for ids in image_only.input_ids]
    texts = policy.processor.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    rests = [str(text).partition("<|vision_end|>")[2] for text in texts]
    rows = policy.processor.tokenizer(rests, add_special_tokens=False)["input_ids"]
    answers = policy.encode_targets([question.answer for _, question in asked])
    tokens = [policy.processor.tokenizer.convert_ids_to_tokens(answer.tolist()) for answer in answers]
    positions = [ids[:, :cut] for ids, cut in zip(image_only.position_ids, cuts, strict=True)]
    return PretrainingBatch(
        prompts=replace(
            image_only,
            input_ids=tuple(ids[:cut] for ids, cut in zip(image_only.input_ids, cuts, strict=True)),
            position_ids=tuple(positions),
            next_positions=tuple(int(position.max()) + 1 for position in positions),
        ),
        continuations=[torch.cat([torch.tensor(row), answer]) for row, answer in zip(rows, answers, strict=True)],
        answer_lengths=[len(answer) for answer in answers],
        tasks=[question.task for _, question in asked],
        targets=dense_targets([scene for scene, _ in scenes]),
        attention_targets=[
            attention_targets(scene, question.things, answer)
            for (scene, question), answer in zip(asked, tokens, strict=True)
        ],
    )


def _chat(prompt: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
