"""The layout of a packed row, and how a batch is cut into rows.

A row holds all its prompts one after another, then their completions one after another, without padding. Each
completion stands there without its last token, which is predicted but never read. The layout is worked out on the host,
from lengths alone, and goes to the device in one copy.

Legend: B prompts, G completions per prompt, N = B*G completions, C longest completion input of a bucket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from perception_r1.policy.batch import move_together
from perception_r1.policy.prompt_states import LayerStates, PromptStates


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthBucket:
    """Neighbouring prompts of the same length, whose attention is computed together.

    Attributes:
        start: First token of the first prompt in a row that holds prompts.
        num_prompts: n prompts.
        length: P tokens of each.
        group_size: G completions of each.
        rows: [n*G*C] indices of the completions' input tokens, each completion filled up to C with any index.
        inputs: [inputs of the bucket] which of `rows` are real; None: all.
    """

    start: int
    num_prompts: int
    length: int
    group_size: int
    rows: Tensor
    inputs: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """A row; its buckets hold all prompts, in their order.

    Attributes:
        buckets: Of prompts.
        predictor_indices: [targets] where each token of the completions, one after another, is predicted in the row.
        recorded: Takes up what each layer leaves of the prompts, bucket by bucket; None: nothing does.
        known: What was recorded before; the row then holds completions alone. None: it holds all.
    """

    buckets: tuple[LengthBucket, ...]
    predictor_indices: Tensor
    recorded: dict[int, list[LayerStates]] | None = None
    known: Mapping[int, Sequence[LayerStates]] | None = None

    def record(self, module: Any, states: list[LayerStates]) -> None:
        """Note what a layer leaves of the prompts; what checkpointing computes a second time is not passed on."""
        if self.recorded is not None:
            self.recorded.setdefault(module.layer_idx, states)


def pack(prompts: Sequence[int], completions: Sequence[int], device: torch.device) -> Packing:
    """The row of some prompts and their completions.

    Args:
        prompts: B numbers of tokens; equal ones should be neighbours.
        completions: N numbers of tokens, the G completions of a prompt after one another, none 0; or none at all.
        device: Where the tensors are to be.
    """
    ends = list(accumulate(prompts))
    return _pack(prompts, completions, [end - 1 for end in ends], ends[-1], device)


def pack_behind(states: PromptStates, completions: Sequence[int], device: torch.device) -> Packing:
    """The row of some completions alone, whose prompts are known.

    Predictors are numbered as if the row began with the last token of each prompt.

    Args:
        states: What each layer has left of B prompts.
        completions: N numbers of tokens, the G completions of a prompt after one another, none 0.
        device: Where the tensors are to be.
    """
    lengths = states.lengths
    packing = _pack(lengths, completions, range(len(lengths)), 0, device, num_before=len(lengths))
    return replace(packing, known=states.layers)


def _pack(
    prompts: Sequence[int],
    completions: Sequence[int],
    last_tokens: Sequence[int],
    start: int,
    device: torch.device,
    num_before: int = 0,
) -> Packing:
    """A row whose completions begin at a token.

    Args:
        prompts: B numbers of tokens.
        completions: N numbers of tokens.
        last_tokens: Where the last token of each prompt stands among what predicts.
        start: Of the completions in the row.
        device: Where the tensors are to be.
        num_before: How many predictors stand before those of the row.
    """
    group_size = len(completions) // len(prompts)
    starts = list(accumulate((length - 1 for length in completions), initial=start))  # of each in the row
    predictors = [torch.empty(0, dtype=torch.long)]
    for number, (first, length) in enumerate(zip(starts, completions, strict=False)):
        predictors += [torch.tensor([last_tokens[number // group_size]])]
        predictors += [num_before + torch.arange(first, first + length - 1)]
    tensors = [torch.cat(predictors)]
    shapes, done, before = [], 0, 0
    for length, members in groupby(prompts):
        count = len(list(members))
        chosen = slice(done * group_size, (done + count) * group_size)
        tensors += _bucket_rows(starts[chosen], completions[chosen])
        shapes.append({"start": before, "num_prompts": count, "length": length})
        done, before = done + count, before + count * length
    predictor_indices, *found = move_together(tensors, device)
    buckets = [
        LengthBucket(**shape, group_size=group_size, rows=rows, inputs=None if len(inputs) == len(rows) else inputs)
        for shape, rows, inputs in zip(shapes, found[::2], found[1::2], strict=True)
    ]
    return Packing(buckets=tuple(buckets), predictor_indices=predictor_indices)


def _bucket_rows(starts: Sequence[int], completions: Sequence[int]) -> list[Tensor]:
    """`rows` and `inputs` of a bucket, of which the latter may be all."""
    step = torch.arange(max(completions, default=1) - 1)
    is_input = step < torch.tensor(completions, dtype=torch.long)[:, None] - 1  # [n*G, C]
    rows = torch.where(is_input, torch.tensor(starts, dtype=torch.long)[:, None] + step, 0)
    return [rows.flatten(), is_input.flatten().nonzero()[:, 0]]


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Numbers of the prompts and completions computed at once: whole groups, or some completions of a single one.

    Attributes:
        prompts: Numbers of the prompts.
        rows: Numbers of the completions.
        part: Which part of a group that is split, from 0 on.
        num_parts: Into how many it is split; 1: these are whole groups.
    """

    prompts: list[int]
    rows: list[int]
    part: int = 0
    num_parts: int = 1

    @property
    def is_last_part(self) -> bool:
        """No other part of the group follows."""
        return self.part + 1 == self.num_parts


def plan_micro_batches(
    prompts: Sequence[int], completions: Sequence[int], chosen: Sequence[int], budget: int | None
) -> list[MicroBatch]:
    """Cut a batch into micro-batches of at most `budget` tokens, in order.

    A group is split only if it exceeds the budget by itself; every part has room for the prompt as well. A completion
    that exceeds the budget together with its prompt is a micro-batch of its own.

    Args:
        prompts: B numbers of tokens, and whatever else a prompt takes of the budget.
        completions: N numbers of tokens, the G completions of a prompt after one another.
        chosen: Which prompts take part.
        budget: Tokens of prompts and completions in a micro-batch; None: everything is one.

    >>> [micro_batch.rows for micro_batch in plan_micro_batches([10, 10, 10], [5, 5, 5, 5, 5, 40], [0, 1, 2], 40)]
    [[0, 1, 2, 3], [4], [5]]
    """
    group_size = len(completions) // len(prompts)
    micro_batches: list[MicroBatch] = []
    room = 0  # what the last one can still take in
    for prompt in chosen:
        rows = list(range(prompt * group_size, (prompt + 1) * group_size))
        size = prompts[prompt] + sum(completions[row] for row in rows)
        if budget is None or size <= budget:
            if not micro_batches or (budget is not None and size > room):
                micro_batches.append(MicroBatch(prompts=[], rows=[]))
                room = budget or 0
            micro_batches[-1].prompts.append(prompt)
            micro_batches[-1].rows.extend(rows)
            room -= size
            continue
        parts: list[list[int]] = []
        room = 0
        for row in rows:
            if completions[row] > room:
                parts.append([])
                room = budget - prompts[prompt]
            parts[-1].append(row)
            room -= completions[row]
        micro_batches += [
            MicroBatch(prompts=[prompt], rows=part, part=number, num_parts=len(parts))
            for number, part in enumerate(parts)
        ]
        room = 0  # the next group begins anew
    return micro_batches


def plan_eval_batches(prompts: Sequence[int], max_new_tokens: int, budget: int | None) -> list[list[int]]:
    """Cut prompts that each write one completion into batches of similar length.

    Args:
        prompts: Numbers of tokens.
        max_new_tokens: Longest completion.
        budget: Tokens in one batch, filling included; None: everything is one batch. A prompt that exceeds it by itself
            is a batch of its own.

    Returns:
        Indices of the prompts, batch by batch, longer prompts first: what does not fit into memory then shows at once.

    >>> plan_eval_batches([10, 40, 12, 11], max_new_tokens=10, budget=70)
    [[1], [2, 3, 0]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda index: -prompts[index]):
        longest = prompts[batches[-1][0]] if batches else 0
        if batches and (budget is None or (len(batches[-1]) + 1) * (longest + max_new_tokens) <= budget):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
