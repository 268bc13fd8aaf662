import json

import pytest
import torch

from perception_r1.policy.decoder import Decoder
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.policy.prefill import prefill
from perception_r1.policy.rollout import SamplingParams, generate
from tests.policy import oracle

ENDS = torch.tensor([271, 272])
"""The two end tokens of the tiny tokenizer."""


def rollout_of(model, prompts, **options):
    return generate(Decoder(model), prefill(model, prompts), **options)


def sampling_of(policy, *, eos_token_ids=None, **options):
    ends = policy.eos_token_ids if eos_token_ids is None else torch.tensor(eos_token_ids)
    return SamplingParams(
        **({"max_new_tokens": 8} | options), eos_token_ids=ends, suppress_tokens=policy.suppress_tokens
    )


def greedy(policy, indices, **options):
    prompts = oracle.encode(policy.processor, indices)
    params = sampling_of(policy, is_greedy=True, **options)
    return rollout_of(policy.model, prompts, group_size=1, params=params, seeds=[0] * len(prompts))


def rows(rollout):
    return [completion.tolist() for completion in rollout.completions]


def until_end(row, ends):
    """The tokens up to and including the first end token."""
    return next((row[: index + 1] for index, token in enumerate(row) if token in ends), row)


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.05, 1.6, 0.8])
def test_greedy_answers_equal_those_of_transformers(policy, plain, repetition_penalty):
    expected = []
    for index in range(3):
        prompt = oracle.encode(policy.processor, [index])
        generated = plain.generate(
            **oracle.inputs(plain, prompt),
            do_sample=False,
            max_new_tokens=12,
            suppress_tokens=policy.suppress_tokens.tolist(),
            repetition_penalty=repetition_penalty,
        )
        expected.append(until_end(generated[0, prompt.lengths[0] :].tolist(), ENDS.tolist()))
    assert rows(greedy(policy, [0, 1, 2], max_new_tokens=12, repetition_penalty=repetition_penalty)) == expected


def test_a_penalty_changes_what_is_written(policy):
    answers = [rows(greedy(policy, [0, 1, 2], max_new_tokens=12, repetition_penalty=value)) for value in (1.0, 1.6)]
    assert answers[0] != answers[1]


def sampled(policy, **options):
    prompts = oracle.encode(policy.processor)
    return rollout_of(policy.model, prompts, group_size=1, params=sampling_of(policy, **options), seeds=[1, 2, 3])


def test_any_end_token_stops_a_row_and_is_kept(policy):
    free = rows(sampled(policy, eos_token_ids=[287]))
    ends = [free[0][0], free[1][3], free[2][6]]
    rollout = sampled(policy, eos_token_ids=ends)
    assert rows(rollout) == [until_end(row, ends) for row in free]
    assert rollout.is_truncated == [not set(row) & set(ends) for row in free]
    assert len({len(row) for row in rows(rollout)}) > 1


def test_an_end_token_at_the_limit_is_no_truncation(policy):
    free = rows(sampled(policy, eos_token_ids=[287]))
    rollout = sampled(policy, eos_token_ids=[free[0][-1]])
    assert free[0].index(free[0][-1]) == 7
    assert (rows(rollout)[0], rollout.is_truncated[0]) == (free[0], False)
    assert sampled(policy, eos_token_ids=[287]).is_truncated == [True] * 3


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.9), (0.7, 0.4), (1.0, 1e-9)])
def test_every_token_is_drawn_from_the_exact_softmax_of_the_plain_model(policy, plain, temperature, top_p):
    seeds, group_size, length = [11, 22, 33], 3, 6
    params = sampling_of(policy, max_new_tokens=length, temperature=temperature, top_p=top_p)
    prompts = oracle.encode(policy.processor)
    rollout = rollout_of(policy.model, prompts, group_size=group_size, params=params, seeds=seeds)
    entropies = []
    for index, completion in enumerate(rollout.completions):
        prompt, member = index // group_size, index % group_size
        generator = torch.Generator().manual_seed(seeds[prompt])
        uniforms = torch.rand(group_size, length, dtype=torch.float64, generator=generator)[member]
        single = oracle.encode(policy.processor, [prompt])
        with torch.no_grad():
            probs = oracle.distributions(plain, single, completion, policy.suppress_tokens, temperature, top_p).exp()
        for token, row, uniform in zip(completion.tolist(), probs, uniforms.tolist(), strict=False):
            before = float(row[:token].sum())
            assert before - 1e-9 <= uniform < before + float(row[token]) + 1e-9
        entropies.append(torch.special.entr(probs).sum(1))
    expected = torch.cat(entropies).to(rollout.entropies[0])
    torch.testing.assert_close(torch.cat(rollout.entropies), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_frequencies_of_first_tokens_are_their_probabilities(folder, temperature):
    policy, plain = Policy.load(PolicyConfig(name=str(folder))), oracle.plain_model(folder)
    prompt = oracle.encode(policy.processor, [0])
    params = sampling_of(policy, max_new_tokens=1, temperature=temperature)
    counts = torch.zeros(288, dtype=torch.float64)
    num_draws = 0
    for seed in range(6):
        rollout = rollout_of(policy.model, prompt, group_size=1000, params=params, seeds=[seed])
        counts += torch.cat(rollout.completions).bincount(minlength=288)
        num_draws += 1000
    with torch.no_grad():
        probs = oracle.distributions(plain, prompt, torch.tensor([0]), policy.suppress_tokens, temperature)[0].exp()
    expected = probs * num_draws
    is_common = expected >= 5
    observed = torch.cat([counts[is_common], counts[~is_common].sum()[None]])
    wanted = torch.cat([expected[is_common], expected[~is_common].sum()[None]])
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    assert freedom > 20
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5
    assert counts[policy.suppress_tokens].sum() == 0


def test_banned_tokens_are_never_written_however_probable(folder):
    policy = Policy.load(PolicyConfig(name=str(folder)))
    with torch.no_grad():  # the tied head makes them the most probable tokens by far
        policy.model.lm_head.weight[policy.suppress_tokens] = 100 * policy.model.lm_head.weight[97]
        policy.model.lm_head.weight[policy.suppress_tokens[1:]] *= -1
    prompts = oracle.encode(policy.processor)
    for is_greedy in (True, False):
        params = sampling_of(policy, is_greedy=is_greedy)
        rollout = rollout_of(policy.model, prompts, group_size=4, params=params, seeds=[1, 2, 3])
        assert not torch.isin(torch.cat(rollout.completions), policy.suppress_tokens).any()


def test_a_completion_depends_on_its_prompt_and_seed_alone(policy):
    def sample(indices, seeds, group_size=4):
        prompts = oracle.encode(policy.processor, indices)
        params = sampling_of(policy, eos_token_ids=list(range(0, 270, 9)), max_new_tokens=10)
        rollout = rollout_of(policy.model, prompts, group_size=group_size, params=params, seeds=seeds)
        return list(zip(rows(rollout), rollout.is_truncated, strict=True))

    together = sample([0, 1, 2], [5, 6, 7])
    assert together == sample([0, 1, 2], [5, 6, 7])
    assert sample([1], [6]) == together[4:8]
    assert sample([2, 0], [7, 5]) == together[8:] + together[:4]
    assert sample([0, 1, 2], [5, 8, 7])[4:8] != together[4:8]
    assert len({len(row) for row, _ in together}) > 2
    assert len({tuple(row) for row, _ in together}) > 6


def test_sampling_touches_no_global_random_state(folder):
    policy = Policy.load(PolicyConfig(name=str(folder)))
    before = torch.get_rng_state()
    prompts = oracle.encode(policy.processor, [0])
    rollout_of(policy.model, prompts, group_size=2, params=sampling_of(policy), seeds=[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_sampled_completions_have_the_log_probabilities_of_the_sampler(policy, plain, exact_layers):
    prompts = oracle.encode(policy.processor)
    params = sampling_of(policy, max_new_tokens=6, temperature=0.7)
    rollout = policy.generate(policy.prefill(prompts), group_size=2, params=params, seeds=[1, 2, 3])
    with torch.no_grad():
        logprobs = policy(prompts, rollout.completions, 0.7)
        for index, completion in enumerate(rollout.completions):
            single = oracle.encode(policy.processor, [index // 2])
            expected = oracle.logprobs(plain, single, completion, policy.suppress_tokens, 0.7)
            torch.testing.assert_close(logprobs[index, : len(completion)], expected, rtol=0, atol=1e-12)


def test_the_checkpoint_s_own_sampling_settings_do_not_leak_in(folder, copy_folder):
    other = copy_folder()
    path = other / "generation_config.json"
    settings = {"do_sample": True, "top_k": 1, "top_p": 0.01, "temperature": 0.01, "repetition_penalty": 5.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    def sample(source):
        policy = Policy.load(PolicyConfig(name=str(source)))
        prompts = oracle.encode(policy.processor)
        params = sampling_of(policy)
        sampled = policy.generate(policy.prefill(prompts), group_size=3, params=params, seeds=[1, 2, 3])
        return rows(sampled) + rows(greedy(policy, [0, 1, 2]))

    assert sample(other) == sample(folder)


def test_the_text_s_length_limit_holds_for_every_row(folder):
    policy = Policy.load(PolicyConfig(name=str(folder)))
    prompts = policy.prefill(oracle.encode(policy.processor))
    params = sampling_of(policy, max_new_tokens=1)
    rollout = policy.generate(prompts, group_size=2, params=params, seeds=[1, 2, 3])
    assert [len(completion) for completion in rollout.completions] == [1] * 6


def test_a_tall_picture_does_not_confuse_positions(policy, plain, exact_layers):
    prompt = policy.processor.encode([oracle.chat("?")], [[oracle.noise(28, 400)]], max_tokens=None)
    both = policy.processor.encode(
        [oracle.chat("?"), oracle.chat("a longer prompt of more tokens")],
        [[oracle.noise(28, 400)], [oracle.noise(400, 28)]],
        max_tokens=None,
    )
    params = sampling_of(policy, max_new_tokens=5)
    rollout = policy.generate(policy.prefill(both), group_size=2, params=params, seeds=[1, 2])
    with torch.no_grad():
        logprobs = policy(both, rollout.completions)
        for completion, row in zip(rollout.completions[:2], logprobs, strict=False):
            expected = oracle.logprobs(plain, prompt, completion, policy.suppress_tokens, 1.0)
            torch.testing.assert_close(row[: len(completion)], expected, rtol=0, atol=1e-12)


MANY_ENDS = torch.arange(0, 270, 6)
"""So many that rows end at many different indices."""


def ragged(policy, indices=(0, 1, 2, 3), group_size=4):
    """Prompts and a rollout in which many rows end long before the limit."""
    policy.eos_token_ids = MANY_ENDS
    prompts = oracle.encode(policy.processor, indices)
    params = sampling_of(policy, max_new_tokens=16, temperature=0.7)
    rollout = policy.generate(policy.prefill(prompts), group_size=group_size, params=params, seeds=range(len(indices)))
    return prompts, rollout


def spy_on_rows(monkeypatch):
    """A list that grows with every step of a decoder: the rows that it was given."""
    counts = []
    plain = Decoder.__call__
    spy = lambda self, tokens, cache: counts.append(len(tokens)) or plain(self, tokens, cache)  # noqa: E731
    monkeypatch.setattr(Decoder, "__call__", spy)
    return counts


def assert_trained_as_sampled(policy, prompts, rollout, temperature):
    with torch.no_grad():
        trained = policy(prompts, rollout.completions, temperature)
    for sampled, row in zip(rollout.logprobs, trained, strict=True):
        torch.testing.assert_close(sampled, row[: len(sampled)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (3, 0, 4, 4, 3, 0)], ids=["ragged", "equal"])
@pytest.mark.parametrize("kind", ["policy", "adapted"])
def test_the_sampler_s_log_probabilities_are_those_of_the_training_pass(
    request, family, exact_layers, monkeypatch, kind, indices, group_size
):
    policy, counts = request.getfixturevalue(kind), spy_on_rows(monkeypatch)
    prompts, rollout = ragged(policy, indices, group_size=group_size)
    assert len(set(counts)) >= (2 if group_size == 1 else 3)
    assert_trained_as_sampled(policy, prompts, rollout, 0.7)


def test_a_switched_off_adapter_is_not_sampled_from(adapted, policy, exact_layers):
    with adapted.without_adapter():
        prompts, rollout = ragged(adapted)
        assert_trained_as_sampled(adapted, prompts, rollout, 0.7)
    assert rows(rollout) == rows(ragged(policy)[1])
    assert rows(rollout) != rows(ragged(adapted)[1])


def test_rows_that_have_ended_leave_soon(policy, monkeypatch):
    counts = spy_on_rows(monkeypatch)
    _, rollout = ragged(policy)
    assert len(counts) == max(map(len, rollout.completions)) - 1
    for step, count in enumerate(counts):
        unfinished = [[len(row) > step + 1 for row in rollout.completions[at : at + 4]] for at in range(0, 16, 4)]
        needed = sum(map(any, unfinished)) * max(map(sum, unfinished))
        assert needed <= count <= max(needed, needed / 0.75)
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] <= counts[0] / 2


def test_entropies_are_those_of_written_tokens_alone(policy, plain, exact_layers):
    _, rollout = ragged(policy)
    entropies = []
    for index, completion in enumerate(rollout.completions):
        prompt = oracle.encode(policy.processor, [index // 4])
        with torch.no_grad():
            probs = oracle.distributions(plain, prompt, completion, policy.suppress_tokens, 0.7).exp()
        entropies.append(torch.special.entr(probs).sum(1))
    assert len({len(row) for row in entropies}) > 3
    assert [len(row) for row in rollout.entropies] == [len(row) for row in rollout.completions]
    torch.testing.assert_close(torch.cat(rollout.entropies), torch.cat(entropies), rtol=1e-10, atol=1e-12)


def test_a_rollout_encodes_each_picture_and_reads_each_prompt_token_once(policy):
    pictures, tokens = [], []
    model = policy.model.model
    vision = policy.family.vision_modules(policy.model)[0]
    vision.register_forward_pre_hook(lambda *_: pictures.append(1))
    model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    prompts, _ = ragged(policy)
    assert pictures == [1]  # all pictures at once
    assert tokens == [sum(prompts.lengths)]


def test_what_another_call_left_in_the_model_does_not_matter(policy):
    prompts, rollout = ragged(policy)
    with torch.no_grad():
        logprobs = policy(prompts, rollout.completions)
        policy.model.model.rope_deltas = torch.full((16, 1), 12345)
        assert torch.equal(policy(prompts, rollout.completions), logprobs)
    again = ragged(policy)[1]
    assert rows(again) == rows(rollout)
    assert all(torch.equal(one, other) for one, other in zip(again.logprobs, rollout.logprobs, strict=True))


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("part", ["all", "language model"])
def test_half_precision_samples_nearly_what_it_trains(policy, part, group_size):
    policy.float()
    for module in [policy.model] if part == "all" else [policy.model.model.language_model, policy.model.lm_head]:
        module.to(torch.bfloat16)
    prompts, rollout = ragged(policy, group_size=group_size)
    with torch.no_grad():
        trained = policy(prompts, rollout.completions, 0.7)
    gaps = [(sampled - row[: len(sampled)]).abs() for sampled, row in zip(rollout.logprobs, trained, strict=True)]
    assert {gap.dtype for gap in gaps} == {torch.float32}
    assert 0 < float(torch.cat(gaps).mean()) < 0.1
