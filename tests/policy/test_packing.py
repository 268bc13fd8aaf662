import random
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from perception_r1.policy.attention import shared_prompt_attention
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.forward import lay_out_row
from perception_r1.policy.packing import pack, plan_eval_batches, plan_micro_batches

CPU = torch.device("cpu")


@st.composite
def batches(draw, smallest=1, smallest_group=0):
    """Tokens of some prompts, with many neighbours of equal length, and of their completions."""
    prompts = draw(st.lists(st.integers(1, 4), min_size=smallest, max_size=5))
    size = len(prompts) * draw(st.integers(smallest_group, 3))
    return prompts, draw(st.lists(st.integers(1, 5), min_size=size, max_size=size))


@st.composite
def choices(draw):
    """A batch, most of its prompts in any order, and a budget that just suffices for some neighbours, or just not."""
    prompts, completions = draw(batches(smallest=3, smallest_group=1))
    group_size = len(completions) // len(prompts)
    chosen = draw(st.permutations(range(len(prompts))))[: draw(st.integers(2, len(prompts)))]
    first = draw(st.integers(0, len(chosen) - 1))
    rows = [prompt * group_size + member for prompt in chosen[first:] for member in range(group_size)]
    rows = rows[: draw(st.integers(1, len(rows)) | st.sampled_from(range(group_size, len(rows) + 1, group_size)))]
    needed = sum(prompts[prompt] for prompt in {row // group_size for row in rows})
    needed += sum(completions[row] for row in rows)
    return prompts, completions, chosen, max(1, needed + draw(st.sampled_from([0, 0, -1, 1])))


def row_of(prompts, completions):
    """The row as a plain list of what stands at each index: kind, number of the prompt or completion, token."""
    read = [("prompt", prompt, token) for prompt, length in enumerate(prompts) for token in range(length)]
    return read + [("completion", row, token) for row, length in enumerate(completions) for token in range(length - 1)]


def runs_of(prompts):
    """Neighbouring prompts of equal length."""
    runs = [[0]]
    for prompt in range(1, len(prompts)):
        if prompts[prompt] == prompts[prompt - 1]:
            runs[-1].append(prompt)
        else:
            runs.append([prompt])
    return runs


@given(batches(), st.integers(0, 2**30))
def test_a_row_holds_the_tokens_and_positions_of_its_prompts_and_then_of_its_completions(batch, seed):
    prompts, completions = batch
    group_size, draw = len(completions) // len(prompts), random.Random(seed)
    ids = [[draw.randrange(3) for _ in range(length)] for length in prompts]  # 2 stands for an image's feature
    positions = [[[draw.randrange(99) for _ in range(length)] for _ in range(3)] for length in prompts]
    following = [draw.randrange(99) for _ in prompts]
    encoded = PromptBatch(
        input_ids=tuple(map(torch.tensor, ids)),
        position_ids=tuple(map(torch.tensor, positions)),
        next_positions=tuple(following),
        chats=(),
        num_images=(),
        image_sizes=(),
        image_grids=(),
        pixel_values=(),
    )
    written = [[draw.randrange(3) for _ in range(length)] for length in completions]
    tokens, position_ids, image_indices = lay_out_row(encoded, list(map(torch.tensor, written)), image_token_id=2)
    expected, images = [], []
    for kind, number, token in row_of(prompts, completions):
        if kind == "prompt":
            images += [len(expected)] if ids[number][token] == 2 else []
            expected.append((ids[number][token], *(axis[token] for axis in positions[number])))
        else:
            expected.append((written[number][token], *[following[number // group_size] + token] * 3))
    assert list(zip(tokens.tolist(), *position_ids.tolist(), strict=True)) == expected
    assert image_indices.tolist() == images


@given(batches())
def test_each_token_is_predicted_where_the_one_before_it_stands(batch):
    prompts, completions = batch
    group_size = len(completions) // len(prompts)
    row = row_of(prompts, completions)
    expected = []
    for number, length in enumerate(completions):
        prompt = number // group_size
        before = [("prompt", prompt, prompts[prompt] - 1)]
        before += [("completion", number, token) for token in range(length - 1)]
        expected += [row.index(token) for token in before]
    assert pack(prompts, completions, CPU).predictor_indices.tolist() == expected


@given(batches())
def test_buckets_are_runs_of_prompts_of_equal_length_with_their_completions(batch):
    prompts, completions = batch
    group_size = len(completions) // len(prompts)
    row = row_of(prompts, completions)
    buckets, runs = pack(prompts, completions, CPU).buckets, runs_of(prompts)
    assert len(buckets) == len(runs)
    for bucket, run in zip(buckets, runs, strict=True):
        assert row[bucket.start] == ("prompt", run[0], 0)
        assert (bucket.num_prompts, bucket.length, bucket.group_size) == (len(run), prompts[run[0]], group_size)
        members = range(run[0] * group_size, (run[-1] + 1) * group_size)
        longest = max((completions[number] - 1 for number in members), default=0)
        slots = [(number, token) for number in members for token in range(longest)]
        real = [slot for slot, (number, token) in enumerate(slots) if token < completions[number] - 1]
        assert len(bucket.rows) == len(slots)
        assert [row[bucket.rows[slot]] for slot in real] == [("completion", *slots[slot]) for slot in real]
        assert all(0 <= index < len(row) for index in bucket.rows.tolist())
        assert (list(range(len(slots))) if bucket.inputs is None else bucket.inputs.tolist()) == real
        assert (bucket.inputs is None) == (len(real) == len(slots))


def test_a_row_without_completions_is_its_prompts_alone():
    packing = pack([2, 2, 3], [], CPU)
    assert [(bucket.start, bucket.num_prompts, len(bucket.rows)) for bucket in packing.buckets] == [
        (0, 2, 0),
        (4, 1, 0),
    ]
    assert len(packing.predictor_indices) == 0


def sees(row, group_size, index, other):
    """Whether a token of the row may attend to another one."""
    (kind, number, token), (other_kind, other_number, other_token) = row[index], row[other]
    if (kind, other_kind) == ("completion", "prompt"):
        return number // group_size == other_number
    return (kind, number) == (other_kind, other_number) and other_token <= token


@given(batches(), st.sampled_from([1, 2]), st.integers(0, 2**30))
def test_attention_over_a_row_is_dense_attention_with_a_mask_written_by_hand(batch, times, seed):
    prompts, completions = batch
    group_size, row = len(completions) // len(prompts), row_of(*batch)
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, heads, len(row), 4, dtype=torch.float64, generator=generator) for heads in (2 * times, 2, 2)
    )
    mask = torch.tensor(
        [[sees(row, group_size, index, other) for other in range(len(row))] for index in range(len(row))]
    )
    scores = query @ key.repeat_interleave(times, 1).mT * 0.3
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    expected = (weights @ value.repeat_interleave(times, 1)).transpose(1, 2)
    packing = pack(prompts, completions, CPU)
    attended, _ = shared_prompt_attention(torch.nn.Module(), query, key, value, None, scaling=0.3, packing=packing)
    torch.testing.assert_close(attended, expected, rtol=0, atol=1e-12)


def size_of(micro_batch, prompts, completions):
    return sum(prompts[prompt] for prompt in micro_batch.prompts) + sum(completions[row] for row in micro_batch.rows)


@given(choices())
def test_every_chosen_completion_is_in_one_micro_batch_and_in_order(choice):
    prompts, completions, chosen, budget = choice
    group_size = len(completions) // len(prompts)
    expected = [prompt * group_size + member for prompt in chosen for member in range(group_size)]
    micro_batches = plan_micro_batches(prompts, completions, chosen, budget)
    assert [row for micro_batch in micro_batches for row in micro_batch.rows] == expected


@given(choices())
@example(([1, 1], [5, 5, 1, 1, 1, 1], [0, 1], 11))
def test_a_micro_batch_has_the_same_number_of_completions_for_each_of_its_prompts(choice):
    prompts, completions, chosen, budget = choice
    group_size = len(completions) // len(prompts)
    for micro_batch in plan_micro_batches(prompts, completions, chosen, budget):
        count = len(micro_batch.rows) // len(micro_batch.prompts)
        assert count > 0
        assert [row // group_size for row in micro_batch.rows] == [
            prompt for prompt in micro_batch.prompts for _ in range(count)
        ]


@given(choices())
def test_no_micro_batch_exceeds_the_budget_but_a_completion_alone_with_its_prompt(choice):
    prompts, completions, chosen, budget = choice
    for micro_batch in plan_micro_batches(prompts, completions, chosen, budget):
        assert size_of(micro_batch, prompts, completions) <= budget or len(micro_batch.rows) == 1


@given(choices())
def test_a_group_that_fits_is_never_split_and_one_that_is_split_stays_alone(choice):
    prompts, completions, chosen, budget = choice
    group_size = len(completions) // len(prompts)
    micro_batches = plan_micro_batches(prompts, completions, chosen, budget)
    for prompt in chosen:
        rows = list(range(prompt * group_size, (prompt + 1) * group_size))
        homes = [micro_batch for micro_batch in micro_batches if prompt in micro_batch.prompts]
        is_compatible = prompts[prompt] + sum(completions[row] for row in rows) <= budget
        assert (len(homes) == 1) if is_compatible else all(home.prompts == [prompt] for home in homes)


@given(choices())
def test_micro_batches_are_as_full_as_the_budget_allows(choice):
    prompts, completions, chosen, budget = choice
    group_size = len(completions) // len(prompts)
    groups = {
        prompt: prompts[prompt] + sum(completions[prompt * group_size : (prompt + 1) * group_size]) for prompt in chosen
    }
    for micro_batch, following in pairwise(plan_micro_batches(prompts, completions, chosen, budget)):
        size, prompt = size_of(micro_batch, prompts, completions), following.prompts[0]
        if micro_batch.prompts == [prompt]:
            assert size + completions[following.rows[0]] > budget
        elif groups[micro_batch.prompts[-1]] <= budget and groups[prompt] <= budget:
            assert size + groups[prompt] > budget


def test_without_a_budget_everything_is_one_micro_batch():
    (micro_batch,) = plan_micro_batches([10, 1000, 10], [5, 5, 5, 5000, 5, 40], [0, 2], None)
    assert (micro_batch.prompts, micro_batch.rows) == ([0, 2], [0, 1, 4, 5])


@pytest.mark.parametrize("budget", [None, 1, 10_000])
def test_without_a_choice_there_are_no_micro_batches(budget):
    assert plan_micro_batches([3, 4], [1, 2, 3, 4], [], budget) == []


lengths = st.lists(st.integers(1, 30), max_size=12)


@given(lengths, st.integers(1, 20), st.none() | st.integers(1, 150))
def test_every_prompt_is_in_one_batch_longest_first(prompts, max_new_tokens, budget):
    batches = plan_eval_batches(prompts, max_new_tokens, budget)
    indices = [index for batch in batches for index in batch]
    assert sorted(indices) == list(range(len(prompts)))
    assert [prompts[index] for index in indices] == sorted(prompts, reverse=True)
    assert all(batches)


@given(lengths, st.integers(1, 20), st.integers(1, 150))
def test_a_batch_keeps_the_budget_with_its_filling_unless_it_is_one_prompt(prompts, max_new_tokens, budget):
    batches = plan_eval_batches(prompts, max_new_tokens, budget)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (max(prompts[index] for index in batch) + max_new_tokens) <= budget
    for batch, after in pairwise(batches):  # and it is as full as the budget allows
        assert (len(batch) + 1) * (prompts[batch[0]] + max_new_tokens) > budget
        assert prompts[after[0]] <= prompts[batch[-1]]


@given(lengths.filter(bool), st.integers(1, 20))
def test_without_a_budget_all_prompts_are_one_batch(prompts, max_new_tokens):
    assert len(plan_eval_batches(prompts, max_new_tokens, None)) == 1
