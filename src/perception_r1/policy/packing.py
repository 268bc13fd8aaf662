"""The layout of a packed row, and how a batch is cut into rows.

A row holds all its prompts one after another, then their completions one after another, without padding. Each
completion stands there without its last token, which is predicted but never read. The layout is worked out on the host,
from lengths alone, and goes to the device in one copy.

Legend: B prompts, G completions per prompt, N = B*G completions, C longest completion input of a bucket.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from perception_r1.policy.batch import move_together


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthBucket:
    """Neighbouring prompts of the same length, whose attention is computed together.

    Attributes:
        start: First token of the first prompt in the row.
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
        predictor_indices: [targets] where each token of the completions, one after another, is predicted in the row.
    """

    buckets: tuple[LengthBucket, ...]
    predictor_indices: Tensor


def pack(prompts: Sequence[int], completions: Sequence[int], device: torch.device) -> Packing:
    """The row of some prompts and their completions.

    Args:
        prompts: B numbers of tokens; equal ones should be neighbours.
        completions: N numbers of tokens, the G completions of a prompt after one another, none 0; or none at all.
        device: Where the tensors are to be.
    """
    group_size = len(completions) // len(prompts)
    prompt_ends = list(accumulate(prompts))
    starts = list(accumulate((length - 1 for length in completions), initial=prompt_ends[-1]))  # of each in the row
    predictors = [torch.empty(0, dtype=torch.long)]
    for number, (start, length) in enumerate(zip(starts, completions, strict=False)):
        last_of_prompt = prompt_ends[number // group_size] - 1
        predictors += [torch.tensor([last_of_prompt]), torch.arange(start, start + length - 1)]
    tensors = [torch.cat(predictors)]
    shapes, done = [], 0
    for length, members in groupby(prompts):
        count = len(list(members))
        chosen = slice(done * group_size, (done + count) * group_size)
        tensors += _bucket_rows(starts[chosen], completions[chosen])
        shapes.append({"start": prompt_ends[done] - length, "num_prompts": count, "length": length})
        done += count
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
    """Numbers of the prompts and completions computed at once: whole groups, or some completions of a single one."""

    prompts: list[int]
    rows: list[int]


def plan_micro_batches(
    prompts: Sequence[int], completions: Sequence[int], chosen: Sequence[int], budget: int | None
) -> list[MicroBatch]:
    """Cut a batch into micro-batches of at most `budget` tokens, in order.

    A group is split only if it exceeds the budget by itself; then its prompt is computed once per micro-batch. A
    completion that exceeds the budget together with its prompt is a micro-batch of its own.

    Args:
        prompts: B numbers of tokens.
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
        room = 0
        for row in rows:
            if completions[row] > room:
                micro_batches.append(MicroBatch(prompts=[prompt], rows=[]))
                room = budget - prompts[prompt]
            micro_batches[-1].rows.append(row)
            room -= completions[row]
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
