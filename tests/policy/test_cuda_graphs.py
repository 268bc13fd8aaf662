from functools import partial
from itertools import count

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from perception_r1.policy import policy as policy_module
from perception_r1.policy.cache import StaticCache
from perception_r1.policy.cuda_graphs import GraphGenerator, warm_up
from perception_r1.policy.decoder import Decoder
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.policy.prefill import prefill
from perception_r1.policy.rollout import SamplingParams, generate, sample_token
from tests.policy import oracle

MANY_ENDS = torch.arange(0, 270, 6)
"""So many end tokens that rows end at many different indices."""


ONE_FAMILY = pytest.mark.parametrize("family", ["qwen2_vl"], indirect=True)
BOTH_KINDS = pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_5"], indirect=True)
"""Without linear attention and with it: its states change with every step."""


class Captures:
    """Stands in for the capture of CUDA graphs, with its warm-up, and counts captured steps and replays.

    Args:
        is_traced: Record the operations of one step, and run these from then on, on the tensors that the step read and
            wrote while it was recorded: as a CUDA graph does. Otherwise the step itself is run again.
    """

    def __init__(self, is_traced: bool = False) -> None:
        self.is_traced = is_traced
        self.num_steps = self.num_replays = 0

    def new(self):
        return self

    def __call__(self, step):
        self.num_steps += 1
        warm_up(step)
        unused = torch.zeros(1)
        run = make_fx(lambda unused: step(), tracing_mode="real")(unused) if self.is_traced else lambda unused: step()

        def replay():
            self.num_replays += 1
            run(unused)

        return replay


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["run", "traced"])
def captures(request):
    return Captures(request.param)


def sampling_of(policy, **options):
    defaults = {
        "max_new_tokens": 12,
        "eos_token_ids": MANY_ENDS,
        "suppress_tokens": policy.suppress_tokens,
        "temperature": 0.7,
    }
    return SamplingParams(**(defaults | options))


def rollouts(policy, generator, indices=(0, 1, 2), *, group_size=3, seeds=None, **options):
    """What a generator writes, and what the eager path writes."""
    prompts = prefill(policy.model, oracle.encode(policy.processor, indices))
    settings = {"group_size": group_size, "params": sampling_of(policy, **options), "seeds": seeds or indices}
    return generator.generate(prompts, **settings), generate(Decoder(policy.model), prompts, **settings)


def assert_same(one, other):
    assert [row.tolist() for row in one.completions] == [row.tolist() for row in other.completions]
    assert one.is_truncated == other.is_truncated
    for row, expected in zip(one.logprobs, other.logprobs, strict=True):
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(one.entropies), torch.cat(other.entropies), rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_greedy", [False, True])
@pytest.mark.parametrize("group_size", [1, 3])
def test_a_step_in_fixed_buffers_writes_what_the_eager_path_writes(policy, group_size, is_greedy):
    generator = GraphGenerator(Decoder(policy.model), Captures().new)
    temperature = 1.0 if is_greedy else 0.7
    one, other = rollouts(policy, generator, group_size=group_size, temperature=temperature, is_greedy=is_greedy)
    assert_same(one, other)
    assert is_greedy or len({len(row) for row in one.completions}) > 1


@pytest.mark.parametrize(("group_size", "is_greedy"), [(1, True), (3, False)])
def test_a_recorded_step_that_is_run_again_and_again_writes_the_same(policy, group_size, is_greedy):
    generator = GraphGenerator(Decoder(policy.model), Captures(is_traced=True).new)
    assert_same(*rollouts(policy, generator, group_size=group_size, is_greedy=is_greedy))


@ONE_FAMILY
def test_a_repetition_penalty_begins_anew_with_every_rollout(policy, captures):
    generator, options = GraphGenerator(Decoder(policy.model), captures.new), {"is_greedy": True, "group_size": 1}
    for indices, penalty in (((0, 1, 2), 1.6), ((2, 0, 1), 1.6), ((2, 0, 1), 1.0)):
        one, other = rollouts(policy, generator, indices, repetition_penalty=penalty, **options)
        assert_same(one, other)
    assert captures.num_steps == 2


@BOTH_KINDS
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3])
def test_the_warm_up_stays_within_the_buffers_of_short_completions(policy, captures, max_new_tokens):
    generator = GraphGenerator(Decoder(policy.model), captures.new)
    for _ in range(2):
        one, other = rollouts(policy, generator, max_new_tokens=max_new_tokens)
        assert_same(one, other)
    assert captures.num_steps == 1


@ONE_FAMILY
def test_a_recording_would_notice_a_step_that_counts_outside_its_buffers(policy, monkeypatch):
    def first_two_tokens(captures):
        turns = count()

        def sample_another(*args):
            tokens, *values = sample_token(*args)
            return (tokens + next(turns)) % 270, *values

        monkeypatch.setattr("perception_r1.policy.cuda_graphs.sample_token", sample_another)
        generator = GraphGenerator(Decoder(policy.model), captures.new)
        rollout, _ = rollouts(policy, generator, eos_token_ids=torch.tensor([287]))
        return torch.stack(rollout.completions)[:, :2]

    again, recorded = first_two_tokens(Captures()), first_two_tokens(Captures(is_traced=True))
    assert torch.equal(again, (recorded + torch.tensor([0, 1])) % 270)


@BOTH_KINDS
def test_other_prompts_reuse_the_step_and_find_no_trace_of_the_first(policy, captures):
    generator = GraphGenerator(Decoder(policy.model), captures.new)
    assert_same(*rollouts(policy, generator, (1, 2, 0)))
    for indices in ((2, 0, 3), (0, 3, 4), (1, 1, 2)):
        one, other = rollouts(policy, generator, indices, seeds=[7, 8, 9])
        assert_same(one, other)
    assert captures.num_steps == 1


@BOTH_KINDS
@pytest.mark.parametrize("is_adapted", [False, True])
def test_weights_that_were_changed_in_place_are_used_from_the_next_rollout_on(policy, adapted, captures, is_adapted):
    policy = adapted if is_adapted else policy
    generator = GraphGenerator(Decoder(policy.model), captures.new)
    before, _ = rollouts(policy, generator)
    with torch.no_grad():
        for name, parameter in policy.network.named_parameters():
            if "lora_" in name or not is_adapted:
                parameter.add_(torch.linspace(-0.05, 0.05, parameter.numel()).view(parameter.shape))
    one, other = rollouts(policy, generator)
    assert_same(one, other)
    means = [float(torch.cat(each.entropies).mean()) for each in (one, before)]
    assert means[0] != pytest.approx(means[1], rel=1e-3)
    assert captures.num_steps == 1


@ONE_FAMILY
def test_the_four_steps_used_last_are_kept(policy):
    captures = Captures()
    generator = GraphGenerator(Decoder(policy.model), captures.new)

    def num_captured(*lengths):
        before = captures.num_steps
        for length in lengths:
            assert_same(*rollouts(policy, generator, max_new_tokens=length))
        return captures.num_steps - before

    assert num_captured(1, 2, 3, 4) == 4
    assert num_captured(1, 3, 4, 1) == 0
    assert num_captured(5) == 1
    assert num_captured(1, 3, 4, 5) == 0
    assert num_captured(2) == 1


@ONE_FAMILY
@pytest.mark.parametrize("change", [{"indices": (0, 1)}, {"group_size": 2}, {"temperature": 0.5}, {"is_greedy": True}])
def test_a_step_of_another_shape_or_sampling_is_captured_anew(policy, change):
    captures = Captures()
    generator = GraphGenerator(Decoder(policy.model), captures.new)
    assert_same(*rollouts(policy, generator))
    assert_same(*rollouts(policy, generator, **change))
    assert captures.num_steps == 2


@ONE_FAMILY
def test_longer_prompts_get_more_room(policy, monkeypatch):
    monkeypatch.setattr("perception_r1.policy.cuda_graphs._PROMPT_BUCKET", 32)
    captures = Captures()
    generator = GraphGenerator(Decoder(policy.model), captures.new)
    for indices, num_steps in (((2, 0), 1), ((0, 3), 1), ((1, 0), 2), ((4, 2), 2)):
        assert_same(*rollouts(policy, generator, indices))
        assert captures.num_steps == num_steps


@ONE_FAMILY
def test_replaying_stops_soon_after_the_last_row_has_ended(policy):
    captures = Captures()
    generator = GraphGenerator(Decoder(policy.model), captures.new)
    one, other = rollouts(policy, generator, group_size=2, max_new_tokens=200)
    assert_same(one, other)
    assert not any(one.is_truncated)
    longest = max(map(len, one.completions))
    assert longest <= captures.num_replays < longest + 8
    captures.num_replays = 0
    rollouts(policy, generator, max_new_tokens=11, eos_token_ids=torch.tensor([287]))
    assert captures.num_replays == 11


def test_a_policy_keeps_its_steps_until_its_weights_move_or_change_their_type(folder, monkeypatch):
    captures = Captures()
    monkeypatch.setattr(policy_module, "GraphGenerator", partial(GraphGenerator, make_capture=captures.new))
    monkeypatch.setattr(Policy, "device", torch.device("cuda"))
    policy = Policy.load(PolicyConfig(name=str(folder))).eval()
    policy.eos_token_ids = MANY_ENDS
    prompts = oracle.encode(policy.processor)
    options = {"group_size": 2, "params": sampling_of(policy, max_new_tokens=6), "seeds": [1, 2, 3]}

    def num_captured():
        before = captures.num_steps
        cache = policy.prefill(prompts)
        rollout = policy.generate(cache, **options)
        if not torch.is_autocast_enabled("cpu"):  # rounding to bfloat16 may turn a draw
            eager = generate(Decoder(policy.model), cache, **options)
            assert [row.tolist() for row in rollout.completions] == [row.tolist() for row in eager.completions]
        return captures.num_steps - before

    assert [num_captured(), num_captured()] == [1, 0]
    policy.double()
    assert [num_captured(), num_captured()] == [1, 0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        policy.float()
        assert [num_captured(), num_captured()] == [1, 0]
    assert num_captured() == 1
    policy.half().float()  # as a round trip to another device: the same parameters in new memory
    assert [num_captured(), num_captured()] == [1, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("group_size", [1, 3])
def test_graphs_of_cuda_write_what_the_eager_path_writes_there(policy, group_size):
    policy = policy.cuda()
    policy.eos_token_ids = MANY_ENDS.cuda()
    params = sampling_of(policy, eos_token_ids=policy.eos_token_ids)
    for indices in ((0, 1, 2), (2, 0, 3)):
        prompts = policy.prefill(oracle.encode(policy.processor, indices).to("cuda"))
        one = policy.generate(prompts, group_size=group_size, params=params, seeds=indices)
        other = generate(Decoder(policy.model), prompts, group_size=group_size, params=params, seeds=indices)
        assert_same(one, other)


@ONE_FAMILY
def test_a_rollout_outlives_the_next_one(policy):
    generator = GraphGenerator(Decoder(policy.model), Captures().new)
    one, expected = rollouts(policy, generator, seeds=[1, 2, 3])
    rollouts(policy, generator, seeds=[4, 5, 6])
    assert_same(one, expected)


@ONE_FAMILY
def test_an_adapter_can_be_switched_off_in_place(adapted, monkeypatch):
    monkeypatch.setattr("perception_r1.policy.decoder._MAX_COPIED_WEIGHTS", 0)
    generator = GraphGenerator(Decoder(adapted.model), Captures(is_traced=True).new)
    assert_same(*rollouts(adapted, generator))
    with adapted.without_adapter():
        assert_same(*rollouts(adapted, generator))


@ONE_FAMILY
def test_other_end_tokens_are_heeded(policy):
    generator = GraphGenerator(Decoder(policy.model), Captures().new)
    assert_same(*rollouts(policy, generator, max_new_tokens=40))
    assert_same(*rollouts(policy, generator, max_new_tokens=40, eos_token_ids=torch.tensor([287])))


@ONE_FAMILY
def test_buffers_that_are_too_large_to_be_kept_are_captured_anew(policy):
    captures = Captures()
    generator = GraphGenerator(Decoder(policy.model), captures.new)
    assert_same(*rollouts(policy, generator, max_new_tokens=4))
    (step,) = generator._captured.values()
    config, group_size, prompts, room = policy.model.config.get_text_config(), 3, 3, 256
    size = config.hidden_size // config.num_attention_heads * config.num_key_value_heads * 8  # in float64
    assert step.num_bytes == 2 * config.num_hidden_layers * prompts * (room + group_size * 4) * size
    for factor, num_steps in ((1.0, 1), (0.99, 2)):
        captures.num_steps = 0
        generator = GraphGenerator(Decoder(policy.model), captures.new, max_kept_bytes=int(factor * step.num_bytes))
        for _ in range(2):
            assert_same(*rollouts(policy, generator, max_new_tokens=4))
        assert captures.num_steps == num_steps


@ONE_FAMILY
def test_of_small_buffers_those_used_last_are_kept(policy):
    captures = Captures()
    generator = GraphGenerator(Decoder(policy.model), captures.new)
    for length in (1, 2):
        assert_same(*rollouts(policy, generator, max_new_tokens=length))
    bound = sum(step.num_bytes for step in generator._captured.values())
    generator = GraphGenerator(Decoder(policy.model), captures.new, max_kept_bytes=bound)
    captures.num_steps = 0
    for length in (1, 2, 1, 3, 1):
        assert_same(*rollouts(policy, generator, max_new_tokens=length))
    assert captures.num_steps == 4  # 3 takes the place of both: the bound is that of 1 and 2


@pytest.fixture
def small_buckets(monkeypatch):
    for name, value in {"_TOKEN_BUCKET": 4, "_MIN_STEPS": 4, "_CHECK_INTERVAL": 2}.items():
        monkeypatch.setattr(f"perception_r1.policy.cuda_graphs.{name}", value)


@BOTH_KINDS
@pytest.mark.parametrize("options", [{}, {"is_greedy": True, "group_size": 1, "repetition_penalty": 1.6}], ids=str)
def test_attention_reads_more_and_more_of_what_is_written(policy, captures, small_buckets, options):
    generator, no_end = GraphGenerator(Decoder(policy.model), captures.new), torch.tensor([287])
    for num_captured in (5, 0):  # of widths 4, 8, 16, 32 and 37
        before = captures.num_steps
        assert_same(*rollouts(policy, generator, max_new_tokens=37, eos_token_ids=no_end, **options))
        assert captures.num_steps - before == num_captured
    (step,) = generator._captured.values()
    assert sorted(step._replays) == [4, 8, 16, 32, 37]


@BOTH_KINDS
@pytest.mark.parametrize(
    "options",
    [{}, {"group_size": 1, "indices": (0, 1, 2, 3, 4)}, {"group_size": 5, "repetition_penalty": 1.6}],
    ids=str,
)
def test_finished_rows_leave_buffers_that_are_not_kept(policy, captures, small_buckets, monkeypatch, options):
    sizes = []
    select_rows = StaticCache.select_rows

    def note(cache, rows):
        select_rows(cache, rows)
        sizes.append(rows.numel())
        assert cache.num_rows == rows.shape[1]

    monkeypatch.setattr(StaticCache, "select_rows", note)
    num_rollouts = 1 if captures.is_traced else 3  # to record steps takes long
    for max_kept_bytes in (2**30, 0)[captures.is_traced :]:
        generator = GraphGenerator(Decoder(policy.model), captures.new, max_kept_bytes=max_kept_bytes)
        for number in range(num_rollouts):
            seeds = range(5 * number, 5 * number + 5)
            indices = options.get("indices", (0, 1, 2))
            settings = options | {"max_new_tokens": 40, "seeds": [*seeds][: len(indices)]}
            assert_same(*rollouts(policy, generator, **settings))
        assert bool(sizes) == (max_kept_bytes == 0)
        assert generator.is_empty == (max_kept_bytes == 0)
    assert len(sizes) >= num_rollouts
