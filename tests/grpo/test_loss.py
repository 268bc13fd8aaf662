"""The loss and its gradients beside loops over tokens in plain Python."""

import math

import pytest
import torch

from perception_r1.errors import UserError
from perception_r1.grpo.loss import LossConfig, grpo_loss, kl_estimate, sampler_weights, token_weights

LENGTHS = [3, 1, 4, 2]
CLIP_LOW, CLIP_HIGH, KL_COEF = 0.2, 0.3, 0.04


def is_token(lengths=LENGTHS):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def make_batch(lengths=LENGTHS, seed=0):
    """Log-probabilities of policy, old policy and reference, far enough apart for the clip to matter; advantages."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    old = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    policy = old + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    reference = old + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return policy, old, reference, torch.randn(len(lengths), generator=generator, dtype=torch.float64)


def naive_weight(row, lengths, loss_type, max_new_tokens):
    if loss_type == "grpo":
        return 1 / lengths[row] / len(lengths)
    return 1 / sum(lengths) if loss_type == "dapo" else 1 / (len(lengths) * max_new_tokens)


def naive_loss(policy, old, reference, advantages, lengths, loss_type, max_new_tokens):
    """Token by token, in plain Python."""
    loss = kl_sum = clipped = 0.0
    for row, length in enumerate(lengths):
        for place in range(length):
            ratio = math.exp(policy[row][place] - old[row][place])
            bounded = min(max(ratio, 1 - CLIP_LOW), 1 + CLIP_HIGH)
            objective = min(ratio * advantages[row], bounded * advantages[row])
            difference = reference[row][place] - policy[row][place]
            kl = math.exp(difference) - difference - 1
            loss -= naive_weight(row, lengths, loss_type, max_new_tokens) * (objective - KL_COEF * kl)
            kl_sum += kl
            clipped += ratio * advantages[row] > bounded * advantages[row]
    return loss, kl_sum, clipped


def loss_of(policy, old, reference, advantages, weights, mask, kl_coef=KL_COEF):
    return grpo_loss(
        policy,
        old,
        reference,
        advantages=advantages,
        weights=weights,
        is_token=mask,
        config=LossConfig(clip_eps_low=CLIP_LOW, clip_eps_high=CLIP_HIGH, kl_coef=kl_coef),
    )


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_loss_equals_a_loop_over_tokens(loss_type):
    policy, old, reference, advantages = make_batch()
    weights = token_weights(torch.tensor(LENGTHS), loss_type=loss_type, max_new_tokens=10)
    parts = loss_of(policy, old, reference, advantages, weights.double(), is_token())
    loss, kl_sum, clipped = naive_loss(
        policy.tolist(), old.tolist(), reference.tolist(), advantages.tolist(), LENGTHS, loss_type, 10
    )
    assert 0 < clipped < sum(LENGTHS)
    assert float(parts.loss) == pytest.approx(loss, rel=1e-6)
    assert float(parts.kl_sum) == pytest.approx(kl_sum, rel=1e-9)
    assert int(parts.num_clipped) == clipped


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_token_weights_are_those_of_the_definitions(loss_type):
    weights = token_weights(torch.tensor(LENGTHS), loss_type=loss_type, max_new_tokens=10)
    expected = [naive_weight(row, LENGTHS, loss_type, 10) for row in range(len(LENGTHS))]
    assert weights.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_parts_of_a_batch_add_up_to_the_whole(loss_type):
    policy, old, reference, advantages = make_batch()
    weights = token_weights(torch.tensor(LENGTHS), loss_type=loss_type, max_new_tokens=10).double()

    def gradient(pieces):
        leaf = policy.clone().requires_grad_()
        for rows in pieces:
            mask = is_token()[rows]
            loss_of(leaf[rows], old[rows], reference[rows], advantages[rows], weights[rows], mask).loss.backward()
        return leaf.grad

    torch.testing.assert_close(gradient([[0], [1, 2], [3]]), gradient([[0, 1, 2, 3]]), rtol=0, atol=1e-12)


def test_at_the_old_policy_the_ratio_is_one_and_its_gradient_is_the_policy_gradient():
    policy, _, _, advantages = make_batch()
    leaf = policy.clone().requires_grad_()
    weights = token_weights(torch.tensor(LENGTHS), loss_type="grpo", max_new_tokens=10).double()
    parts = loss_of(leaf, leaf.detach(), None, advantages, weights, is_token(), kl_coef=0.0)
    parts.loss.backward()
    assert parts.loss.item() == pytest.approx(-float(advantages.mean()), rel=1e-6)
    assert int(parts.num_clipped) == 0
    expected = (-advantages * weights)[:, None].expand_as(policy).masked_fill(~is_token(), 0.0)
    torch.testing.assert_close(leaf.grad, expected)


def test_a_ratio_beyond_the_clip_pulls_no_further():
    old = torch.zeros(4, 1, dtype=torch.float64)
    policy = torch.tensor([[0.5], [0.5], [-0.5], [-0.5]], dtype=torch.float64).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    mask = torch.ones(4, 1, dtype=torch.bool)
    parts = loss_of(policy, old, None, advantages, torch.ones(4, dtype=torch.float64), mask, kl_coef=0.0)
    parts.loss.backward()
    assert (policy.grad[:, 0] != 0).tolist() == [False, True, True, False]
    assert int(parts.num_clipped) == 2


def test_dapo_weights_of_two_devices_average_to_those_of_one():
    lengths, split = torch.tensor(LENGTHS), 2
    parts = [lengths[:split], lengths[split:]]
    mean = lengths.sum().float() / len(parts)
    options = {"loss_type": "dapo", "max_new_tokens": 10}
    apart = torch.cat([token_weights(part, num_tokens=mean, **options) for part in parts]) / len(parts)
    torch.testing.assert_close(apart, token_weights(lengths, **options))


def test_nothing_behind_the_end_token_counts():
    policy, old, reference, advantages = make_batch()
    weights = token_weights(torch.tensor(LENGTHS), loss_type="grpo", max_new_tokens=10).double()
    leaf = policy.clone().requires_grad_()
    clean = loss_of(policy, old, reference, advantages, weights, is_token())
    for dirt in (7.0, float("-inf"), float("nan")):
        dirty = old.masked_fill(~is_token(), dirt)
        parts = loss_of(leaf, dirty, reference, advantages, weights, is_token())
        assert float(parts.loss) == float(clean.loss)
        assert float(parts.kl_sum) == float(clean.kl_sum)


def test_the_kl_estimate_is_never_negative_and_unbiased():
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(5, dtype=torch.float64, generator=generator).log_softmax(0)
    reference = torch.randn(5, dtype=torch.float64, generator=generator).log_softmax(0)
    estimates = kl_estimate(policy, reference)
    assert (estimates >= 0).all()
    exact = (policy.exp() * (policy - reference)).sum()
    assert float((policy.exp() * estimates).sum()) == pytest.approx(float(exact))


@pytest.mark.parametrize(
    ("options", "is_right"),
    [({}, False), ({"kl_estimator": "k2"}, True), ({"kl_bias_correction": True}, True)],
)
@pytest.mark.parametrize("is_older", [False, True])
def test_the_gradient_of_the_penalty_beside_that_of_the_divergence(options, is_right, is_older):
    """In expectation over what the policy, or an older one, writes: one token out of five."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, dtype=torch.float64, generator=generator)
    reference = torch.randn(5, dtype=torch.float64, generator=generator).log_softmax(0)
    old = (logits + is_older * torch.randn(5, dtype=torch.float64, generator=generator)).log_softmax(0)
    exact = logits.clone().requires_grad_()
    (exact.softmax(0) * (exact.log_softmax(0) - reference)).sum().backward()
    leaf = logits.clone().requires_grad_()
    output = grpo_loss(
        leaf.log_softmax(0)[:, None],
        old[:, None],
        reference[:, None],
        advantages=torch.zeros(5, dtype=torch.float64),
        weights=old.exp(),  # the expectation
        is_token=torch.ones(5, 1, dtype=torch.bool),
        config=LossConfig(kl_coef=1.0, **options),
    )
    output.loss.backward()
    is_right = is_right and not (is_older and "kl_estimator" in options)
    assert torch.allclose(leaf.grad, exact.grad, rtol=1e-10, atol=1e-12) is is_right


@pytest.mark.parametrize(
    "options",
    [
        {"kl_coef": -0.1},
        {"clip_eps_low": 1.1},
        {"sapo_temperature_neg": 0.0},
        {"kl_bias_correction": True, "kl_estimator": "k2"},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        LossConfig(**options)


# --------------------------------------------------------------------------------- other advantages and objectives


def naive_objective(objective, ratio, logp, advantage, low, high):
    """Value and slope in the log-probability of one token whose ratio is its own."""
    bounded = min(max(ratio, 1 - low), 1 + high)
    if objective == "clip":
        is_free = ratio * advantage <= bounded * advantage
        return min(ratio * advantage, bounded * advantage), ratio * advantage * is_free
    if objective == "cispo":
        return bounded * advantage * logp, bounded * advantage
    temperature = 1.0 if advantage > 0 else 1.05
    gate = 1 / (1 + math.exp(-temperature * (ratio - 1)))
    return 4 / temperature * gate * advantage, 4 * gate * (1 - gate) * ratio * advantage


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["clip", "cispo", "sapo"])
def test_objectives_and_their_gradients_equal_a_loop_over_tokens(objective, level):
    policy, old, _, advantages = make_batch(seed=1)  # some completions are beyond the clip, and some are not
    weights = token_weights(torch.tensor(LENGTHS), loss_type="grpo", max_new_tokens=10).double()
    low, high = (CLIP_LOW, CLIP_HIGH) if level == "token" else (0.02, 0.03)  # a mean ratio is closer to 1
    leaf = policy.clone().requires_grad_()
    output = grpo_loss(
        leaf,
        old,
        None,
        advantages=advantages,
        weights=weights,
        is_token=is_token(),
        config=LossConfig(clip_eps_low=low, clip_eps_high=high, objective=objective, importance_sampling_level=level),
    )
    output.loss.backward()
    loss, slopes = 0.0, torch.zeros_like(policy)
    for row, length in enumerate(LENGTHS):
        gaps = [float(policy[row, k] - old[row, k]) for k in range(length)]
        for k in range(length):
            ratio = math.exp(gaps[k] if level == "token" else sum(gaps) / length)
            value, slope = naive_objective(objective, ratio, float(policy[row, k]), float(advantages[row]), low, high)
            loss -= float(weights[row]) * value
            if level == "token" or objective == "cispo":
                slopes[row, k] -= weights[row] * slope
            else:  # a ratio of all tokens: each has its share of the slope of every one
                slopes[row, :length] -= weights[row] * slope / length
    assert output.loss.item() == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(leaf.grad, slopes, rtol=1e-10, atol=1e-12)
    assert (int(output.num_clipped) > 0) == (objective != "sapo")


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["clip", "cispo", "sapo"])
def test_all_objectives_pull_alike_on_the_first_update(objective, level):
    policy, _, _, advantages = make_batch()
    weights = token_weights(torch.tensor(LENGTHS), loss_type="grpo", max_new_tokens=10).double()
    leaf = policy.clone().requires_grad_()
    config = LossConfig(objective=objective, importance_sampling_level=level)
    mask = is_token()
    grpo_loss(leaf, policy, None, advantages=advantages, weights=weights, is_token=mask, config=config).loss.backward()
    torch.testing.assert_close(leaf.grad, (-advantages * weights)[:, None].expand_as(policy).masked_fill(~mask, 0.0))


@pytest.mark.parametrize("objective", ["clip", "cispo", "sapo"])
def test_tokens_keep_advantages_of_their_own_where_a_completion_has_one_ratio(objective):
    """GSPO-token: all tokens of a completion have its ratio, each has its own gradient."""
    policy, old, _, _ = make_batch(seed=1)
    gains = torch.randn(4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weights = token_weights(torch.tensor(LENGTHS), loss_type="grpo", max_new_tokens=10).double()
    leaf = policy.clone().requires_grad_()
    config = LossConfig(
        clip_eps_low=0.02, clip_eps_high=0.03, objective=objective, importance_sampling_level="sequence"
    )
    options = {"advantages": gains, "weights": weights, "is_token": is_token(), "config": config}
    output = grpo_loss(leaf, old, None, **options)
    output.loss.backward()
    loss, slopes = 0.0, torch.zeros_like(policy)
    for row, length in enumerate(LENGTHS):
        ratio = math.exp(sum(float(policy[row, k] - old[row, k]) for k in range(length)) / length)
        for k in range(length):
            gain, logp = float(gains[row, k]), float(policy[row, k])
            value, slope = naive_objective(objective, ratio, logp, gain, 0.02, 0.03)
            loss -= float(weights[row]) * value
            slopes[row, k] -= weights[row] * slope
    assert output.loss.item() == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(leaf.grad, slopes, rtol=1e-10, atol=1e-12)


def test_advantages_of_tokens_equal_a_loop_over_tokens():
    policy, old, _, _ = make_batch()
    gains = torch.randn(4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weights = token_weights(torch.tensor(LENGTHS), loss_type="grpo", max_new_tokens=10).double()
    leaf = policy.clone().requires_grad_()
    loss_of(leaf, old, None, gains, weights, is_token(), kl_coef=0.0).loss.backward()
    for row, length in enumerate(LENGTHS):
        for k in range(max(LENGTHS)):
            ratio = math.exp(float(policy[row, k] - old[row, k]))
            slope = naive_objective("clip", ratio, 0.0, float(gains[row, k]), CLIP_LOW, CLIP_HIGH)[1]
            assert float(leaf.grad[row, k]) == pytest.approx(-float(weights[row]) * slope * (k < length), rel=1e-9)


@pytest.mark.parametrize("correction", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_weights_equal_a_loop_over_tokens(correction):
    policy, old, _, advantages = make_batch(seed=1)
    sampled = make_batch(seed=3)[1]
    cap = 1.5
    found = sampler_weights(old, sampled, is_token(), correction=correction, cap=cap)
    gaps = [[float(old[row, k] - sampled[row, k]) for k in range(length)] for row, length in enumerate(LENGTHS)]
    beyond = 0
    for row, length in enumerate(LENGTHS):
        for k in range(length):
            ratio = math.exp(gaps[row][k] if correction.startswith("token") else sum(gaps[row]))
            beyond += ratio > cap
            expected = ratio if ratio <= cap else cap if correction.endswith("truncate") else 0.0
            assert float(found.expand_as(old)[row, k]) == pytest.approx(expected, rel=1e-12)
    assert 0 < beyond < sum(LENGTHS)
    weights = token_weights(torch.tensor(LENGTHS), loss_type="grpo", max_new_tokens=10).double()
    options = {"advantages": advantages, "weights": weights, "is_token": is_token()}
    options["config"] = LossConfig(clip_eps_low=CLIP_LOW, clip_eps_high=CLIP_HIGH)
    loss = grpo_loss(policy, old, None, **options, importance_weights=found).loss
    each = [
        naive_objective(
            "clip", math.exp(float(policy[row, k] - old[row, k])), 0.0, float(advantages[row]), CLIP_LOW, CLIP_HIGH
        )
        for row, length in enumerate(LENGTHS)
        for k in range(length)
    ]
    indices = [(row, k) for row, length in enumerate(LENGTHS) for k in range(length)]
    expected = -sum(
        float(weights[row] * found.expand_as(old)[row, k]) * value
        for (row, k), (value, _) in zip(indices, each, strict=True)
    )
    assert float(loss) == pytest.approx(expected, rel=1e-9)
