"""A training pass on the meta device, which has shapes but no values: whatever asks it for a value raises.

So no number travels from the device to the host between encoding and the optimiser, and none from tensors that lie on
the wrong one of the two.
"""

import math

import pytest
import torch
from transformers import AttentionInterface

from perception_r1.grpo.loss import LossConfig, grpo_loss
from perception_r1.policy.load import LoraConfig, PolicyConfig
from perception_r1.policy.packing import plan_micro_batches
from perception_r1.policy.policy import Policy
from tests.policy import oracle

INDICES = (2, 0, 1, 3, 4)
"""Prompts of three lengths, not in order, one of them with two images."""
LENGTHS = [3, 7, 1, 5, 4, 2, 6, 6, 2, 1]
"""Two completions of each."""

KINDS = {
    "full": {},
    "checkpointed": {"gradient_checkpointing": True},
    "LoRA": {"lora": LoraConfig(r=2)},
    "LoRA everywhere": {"lora": LoraConfig(r=2, target_modules="all-linear")},
    "frozen vision": {"freeze_vision": True},
    "eager vision": {"attn_implementation": "eager"},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def policy(request, grouped_folders, family):
    """A policy of each family and each kind of training, without values."""
    dtype = "bfloat16" if family.endswith("_moe") else "float32"  # the only one in which experts have no values
    config = PolicyConfig(name=str(grouped_folders[family]), dtype=dtype, **request.param)
    return Policy.load(config).to("meta").train()


ONE_KIND = pytest.mark.parametrize("policy", [{}], indirect=True, ids=["full"])


def encode(policy):
    """Prompts with real images, encoded on the host and then moved, as a policy on a device encodes them."""
    chosen = [oracle.CHATS[index] for index in INDICES]
    chats = [oracle.chat(text, len(sizes)) for text, sizes in chosen]
    prompts = policy.encode(chats, [[oracle.noise(*size) for size in sizes] for _, sizes in chosen])
    assert {pixels.device.type for pixels in prompts.pixel_values} == {"meta"}
    return prompts


def update(policy, prompts, budget=None):
    """One optimiser step, micro-batch by micro-batch; returns the number of micro-batches."""
    completions = oracle.random_completions(LENGTHS)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    micro_batches = plan_micro_batches(prompts.lengths, LENGTHS, range(len(prompts)), budget)
    for micro_batch in micro_batches:
        selected, rows = prompts.select(micro_batch.prompts), [completions[row] for row in micro_batch.rows]
        with torch.no_grad():
            reference_logprobs = policy(selected, rows)
        logprobs = policy(selected, rows, 0.7)
        assert logprobs.shape == (len(rows), max(map(len, rows)))
        output = grpo_loss(
            logprobs,
            logprobs.detach(),
            reference_logprobs,
            advantages=torch.zeros(len(rows), device="meta"),
            weights=torch.zeros(len(rows), device="meta"),
            is_token=torch.zeros(logprobs.shape, dtype=torch.bool, device="meta"),
            config=LossConfig(kl_coef=0.04),
        )
        output.loss.backward()
    assert all(parameter.grad is not None for parameter in trained if parameter is not policy.model.lm_head.weight)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    return len(micro_batches)


def test_a_training_pass_reads_nothing_back_from_the_device(policy):
    prompts = encode(policy)
    if policy.is_vision_frozen:
        prompts = policy.encode_images(prompts)
    assert update(policy, prompts) == 1


@ONE_KIND
@pytest.mark.slow
@pytest.mark.parametrize(("budget", "num_parts"), [(70, {4, 6}), (1, {10})], ids=["some", "split"])
def test_nor_do_micro_batches(policy, budget, num_parts):
    assert update(policy, encode(policy), budget) in num_parts  # prompts of InternVL are longer


def test_a_prefill_reads_nothing_back_from_the_device(policy):
    cache = policy.eval().prefill(encode(policy))
    prompts, room = len(INDICES), max(cache.lengths)
    assert {tensor.device.type for tensor in (*cache.tensors(), cache.hidden)} == {"meta"}
    assert {keys.shape[::2] for keys, _ in cache.keys_and_values.values()} == {(prompts, room)}


@ONE_KIND
@pytest.mark.parametrize("family", oracle.PATCH_FAMILIES, indirect=True)
def test_flash_attention_in_the_tower_gets_segments_on_the_device_and_their_longest_from_the_host(policy, monkeypatch):
    lengths = []

    def attend(module, query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **kwargs):
        assert cu_seq_lens_q.device.type == cu_seq_lens_k.device.type == "meta"
        lengths.append((max_length_q, max_length_k))
        return query.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", attend)
    policy.model.model.visual.config._attn_implementation = "flash_attention_2"
    prompts = encode(policy)
    update(policy, prompts)
    largest = max(map(math.prod, prompts.image_grids))  # no image is larger than a window
    assert set(lengths) == {(largest, largest)}


PLANTED = {
    "item": lambda hidden: hidden.sum().item(),
    "tolist": lambda hidden: hidden.tolist(),
    "float": lambda hidden: float(hidden.mean()),
    "bool": lambda hidden: bool((hidden > 0).all()),
    "mask": lambda hidden: hidden[hidden > 0],
    "nonzero": lambda hidden: hidden.nonzero(),
    "copy": lambda hidden: hidden.cpu(),
    "other device": lambda hidden: hidden + torch.ones(hidden.shape),
}


@ONE_KIND
@pytest.mark.parametrize("family", ["qwen2_vl"], indirect=True)
@pytest.mark.parametrize("read", PLANTED.values(), ids=PLANTED.keys())
@pytest.mark.parametrize("module", ["visual", "language_model"])
def test_a_planted_reading_is_noticed(policy, module, read):
    def reading(module, args, output):
        read(output.last_hidden_state)

    getattr(policy.model.model, module).register_forward_hook(reading)
    with pytest.raises((RuntimeError, NotImplementedError)):
        update(policy, encode(policy))


@ONE_KIND
@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_sizes_that_lie_on_the_device_are_noticed(policy):
    prompts = encode(policy)
    with pytest.raises(RuntimeError, match="meta"):
        policy.model.model.get_image_features(
            torch.cat(prompts.pixel_values), torch.tensor(prompts.image_grids, device="meta")
        )
