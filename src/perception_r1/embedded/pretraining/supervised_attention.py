"""Supervised attention: while an answer is written, one head of some layers is taught what to attend to.

From the answers alone a network finds out slowly that the digits of a box depend on the few image tokens of one object,
and which words of the prompt choose it: shapes it learns, colours it may never use. The scene knows the object, so
attention itself gets a loss, as in translation with known alignments (arXiv 1608.00112, arXiv 1609.04186).

Legend: A answer tokens of a question, F image tokens, D head size, T tokens of a row.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from perception_r1.data.synthetic.worlds import Scene
from perception_r1.embedded.pretraining.dense import owners
from perception_r1.policy.attention import shared_prompt_attention
from perception_r1.policy.families import VisionLanguageModel

_NAME = "shared_prompt_with_scores"
_DECISIVE = 3
"""So many tokens of a box, its start, its bracket and its first digit, tell which object is meant."""
_BLANKS = "\u0120\u010a"
"""A space and a new line in byte-level tokens."""
_ANSWER = "<answer>"
_FLOOR = 1e-6
"""Keeps the loss finite where no attention falls on the object at all."""


def attention_targets(scene: Scene, things: Sequence[int], answer: Sequence[str]) -> Tensor:
    """[A, F] what to attend to while each token is predicted: 1 at the image token that shows most of a thing.

    A row of zeros tells nothing: the token belongs to no thing.

    Args:
        scene: The scene.
        things: Numbers of the things that the answer lists, in its order: objects with their boxes, or characters.
        answer: Its tokens, boxes in Qwen2-VL's form.
    """
    at_points = owners(scene)
    seen = np.stack([(at_points == number).sum(1) for number in range(-1, len(scene.things))])
    shares = torch.from_numpy((seen / seen.max(1, keepdims=True).clip(1)).astype(np.float32))[1:]  # [things, F]
    targets = torch.zeros(len(answer), len(at_points))
    names = [scene.things[number].name for number in things]
    written = _objects(names, answer) if "<|object_ref_start|>" in answer else _characters(len(things), answer)
    for target, indices in zip(targets, written, strict=False):
        if indices:
            target.copy_(shares[[things[index] for index in indices]].amax(0))
    return targets


def _objects(names: Sequence[str], answer: Sequence[str]) -> Iterator[Sequence[int]]:
    """For each token the objects, by their numbers in the answer, of which it may tell something.

    Until the first digit of a box, those that fit what is written and are not listed yet; then only its own.
    """
    present, entry = 0, answer.index("<|object_ref_start|>")  # the object, and the first token about it
    for number, token in enumerate(answer):
        written = answer[entry:number]
        box = written[written.index("<|box_start|>") :] if "<|box_start|>" in written else []
        is_named = len(written) > 1 or len(box) > 0
        left = range(present, len(names)) if number >= entry else ()
        fitting = [index for index in left if not is_named or names[index] == names[present]]
        yield fitting[:1] if len(box) >= _DECISIVE else fitting
        if token == "<|box_end|>":
            present, entry = present + 1, number + 1


def _characters(count: int, answer: Sequence[str]) -> Iterator[Sequence[int]]:
    """For each token the characters that it writes, by their numbers; before a space or a new line, the next one."""
    texts = [token.strip(_BLANKS) for token in answer]
    done = -("".join(texts).find(_ANSWER) + len(_ANSWER)) if _ANSWER in "".join(texts) else 0
    for text in texts:
        after = done + len(text)
        yield [index for index in range(max(done, 0), max(after, done + 1)) if 0 <= index < count and done >= 0]
        done = after


def keep_scores(model: VisionLanguageModel) -> None:
    """Let every attention layer of the language model keep what `attention_loss` needs of the last row."""
    model.set_attn_implementation({"text_config": _NAME})


def _attention(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    module.first_head = query[0, 0], key[0, 0] * kwargs["scaling"]  # type: ignore[assignment]
    return shared_prompt_attention(module, query, key, *args, **kwargs)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def attention_loss(layer: nn.Module, looking: Tensor, image_tokens: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log of the first head's attention on the targets, as a share of its attention on the image.

    Args:
        layer: An attention layer behind `keep_scores`.
        looking: [A] where the answer tokens of an image's questions are predicted in the row.
        image_tokens: [F] where the image stands in the row.
        targets: [A, F] of `attention_targets`.
    """
    is_told = targets.any(1)
    queries, keys = cast(tuple[Tensor, Tensor], layer.first_head)  # [T, D]
    attention = (queries[looking[is_told]] @ keys[image_tokens].mT).softmax(-1)
    on_targets: Tensor = (attention * targets[is_told]).sum(-1)
    return -(on_targets + _FLOOR).log().sum()
