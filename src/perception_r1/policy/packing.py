"""The layout of a packed row, and how a batch is cut into rows.

A row holds all its prompts one after another, then their completions one after another, without padding. Each
completion stands there without its last token, which is predicted but never read. The layout is worked out on the host,
from lengths alone, and goes to the device in one copy.

Legend: B prompts, G completions per prompt, N = B*G completions, C longest completion input of a bucket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from perception_r1.policy.batch import move_together
from perception_r1.policy.prompt_states import LayerStates


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
        buckets: Of prompts.
        predictor_indices: [targets] where each token of the completions, one after another, is predicted in the row.
        recorded: Takes up what each layer leaves of the prompts, bucket by bucket; None: nothing does.
        known: What was recorded before, of the only prompt; the row then holds completions alone. None: it holds all.
    """

    buckets: tuple[LengthBucket, ...]
    predictor_indices: Tensor
    recorded: dict[int, list[LayerStates]] | None = None
    known: Mapping[int, LayerStates] | None = None

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


def pack_behind(
    prompt: int, completions: Sequence[int], known: Mapping[int, LayerStates], device: torch.device
) -> Packing:
    """The row of some completions alone, whose only prompt is known.

    Predictors are numbered as if the row began with the prompt's last token.

    Args:
        prompt: Its number of tokens.
        completions: G numbers of tokens, none 0.
        known: What each layer has left of the prompt.
        device: Where the tensors are to be.
    """
    starts = list(accumulate((length - 1 for length in completions[:-1]), initial=0))  # of each in the row
    predictors = [
        torch.cat([torch.tensor([0]), 1 + start + torch.arange(length - 1)])
        for start, length in zip(starts, completions, strict=True)
    ]
    predictor_indices, rows, inputs = move_together([torch.cat(predictors), *_bucket_rows(starts, completions)], device)
    bucket = LengthBucket(
        start=0,
        num_prompts=1,
        length=prompt,
        group_size=len(completions),
        rows=rows,
        inputs=None if len(inputs) == len(rows) else inputs,
    )
    return Packing(buckets=(bucket,), predictor_indices=predictor_indices, known=known)


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
