"""Where things lie in a packed row, and how a batch is cut into rows.

A row holds all its prompts one after another, then their completions one after another, without padding. Each
completion is laid down without its last token, which is predicted but never read.

Legend: B prompts, G completions per prompt, N = B*G completions, M tokens of all prompts, R input tokens of all
completions, C longest completion input of a tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthBucket:
    """Neighbouring prompts of the same length, whose attention is computed together.

    Attributes:
        start: First token of the first prompt in the row.
        num_prompts: n prompts.
        length: P tokens of each.
        group_size: G completions of each.
        rows: [n*G*C] places of the completions' input tokens, each completion filled up to C with any place.
        inputs: [inputs of the tile] which of `rows` are real; None: all.
    """

    start: int
    num_prompts: int
    length: int
    group_size: int
    rows: Tensor
    inputs: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """A row.

    Attributes:
        tiles: All prompts, in their order.
        steps: [R] how far behind its prompt each completion input stands: 0, 1, 2 ...
        owners: [R] prompt to which each completion input belongs.
        predictors: [targets] place whose hidden state predicts each completion token, completion by completion.
    """

    buckets: tuple[LengthBucket, ...]
    steps: Tensor
    prompt_indices: Tensor
    predictor_indices: Tensor


def pack(prompts: Sequence[int], completions: Sequence[int], device: torch.device) -> Packing:
    """The row of some prompts and their completions.

    Args:
        prompts: B numbers of tokens; equal ones should be neighbours.
        completions: N numbers of tokens, the G completions of a prompt after one another, none 0; or none at all.
        device: Where the tensors are to be.
    """
    group_size = len(completions) // len(prompts)
    inputs = torch.tensor(completions, dtype=torch.long) - 1  # [N]
    starts = sum(prompts) + inputs.cumsum(0) - inputs  # [N] first input of each completion
    ends = torch.tensor(prompts).cumsum(0).repeat_interleave(group_size)  # [N] end of its prompt
    buckets, done = [], 0
    for length, members in groupby(prompts):
        count = len(list(members))
        chosen = slice(done * group_size, (done + count) * group_size)
        buckets.append(
            _bucket(int(sum(prompts[:done])), count, length, group_size, starts[chosen], inputs[chosen], device)
        )
        done += count
    prompt_indices = torch.arange(len(prompts)).repeat_interleave(group_size)
    places = torch.arange(len(completions)).repeat_interleave(inputs)  # [R] completion of each input
    steps = torch.arange(len(places)) - (inputs.cumsum(0) - inputs)[places]
    targets = torch.arange(len(completions)).repeat_interleave(inputs + 1)
    behind = torch.arange(len(targets)) - ((inputs + 1).cumsum(0) - inputs - 1)[targets]  # 0 for a first token
    predictor_indices = torch.where(behind == 0, ends[targets] - 1, starts[targets] + behind - 1)
    return Packing(
        buckets=tuple(buckets),
        steps=steps.to(device),
        prompt_indices=prompt_indices[places].to(device),
        predictor_indices=predictor_indices.to(device),
    )


def _bucket(
    start: int, count: int, length: int, group_size: int, starts: Tensor, inputs: Tensor, device: torch.device
) -> LengthBucket:
    step = torch.arange(int(inputs.max()) if len(inputs) else 0)
    is_input = step < inputs[:, None]  # [n*G, C]
    rows = torch.where(is_input, starts[:, None] + step, 0).flatten()
    real = None if bool(is_input.all()) else is_input.flatten().nonzero()[:, 0].to(device)
    return LengthBucket(
        start=start, num_prompts=count, length=length, group_size=group_size, rows=rows.to(device), inputs=real
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """What is computed at once: whole groups, or some completions of a single one.

    Attributes:
        prompts: Prompts of the batch.
        rows: Completions of the batch, the same number for each prompt.
    """

    prompts: list[int]
    rows: list[int]


def plan_micro_batches(
    prompts: Sequence[int], completions: Sequence[int], chosen: Sequence[int], budget: int | None
) -> list[MicroBatch]:
    """Cut a batch into parts of at most `budget` tokens, in order.

    A group is split only if it exceeds the budget by itself; then its prompt is computed once per part. A completion
    that exceeds the budget together with its prompt is a part of its own.

    Args:
        prompts: B numbers of tokens.
        completions: N numbers of tokens, the G completions of a prompt after one another.
        chosen: Which prompts take part.
        budget: Tokens of prompts and completions in one part; None: everything is one part.

    >>> [part.rows for part in plan_micro_batches([10, 10, 10], [5, 5, 5, 5, 5, 40], [0, 1, 2], 40)]
    [[0, 1, 2, 3], [4], [5]]
    """
    group_size = len(completions) // len(prompts)
    micro_batches: list[MicroBatch] = []
    room = 0  # what the last part can still take in
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
        room = 0  # the next group begins a part of its own
    return micro_batches


def plan_eval_batches(prompts: Sequence[int], max_new_tokens: int, budget: int | None) -> list[list[int]]:
    """Cut prompts that each write one completion into batches of similar length.

    Args:
        prompts: Numbers of tokens.
        max_new_tokens: Longest completion.
        budget: Places for tokens in one batch, filling included; None: everything is one batch. A prompt that exceeds
            it by itself is a batch of its own.

    Returns:
        Places of the prompts, batch by batch, longer prompts first: what does not fit into memory then shows at once.

    >>> plan_eval_batches([10, 40, 12, 11], max_new_tokens=10, budget=70)
    [[1], [2, 3, 0]]
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(prompts)), key=lambda place: -prompts[place]):
        longest = prompts[batches[-1][0]] if batches else 0
        if batches and (budget is None or (len(batches[-1]) + 1) * (longest + max_new_tokens) <= budget):
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches
