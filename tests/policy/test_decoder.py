import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from perception_r1.policy import decoder as decoder_module
from perception_r1.policy.cache import ContiguousCache, SharedPromptCache
from perception_r1.policy.decoder import Decoder
from perception_r1.policy.fused_linear import FusedLinear
from perception_r1.policy.load import TEXT_LINEARS, PolicyConfig
from perception_r1.policy.policy import Policy
from tests.policy import oracle

INDICES = (0, 1, 2, 3)


def completions_of(num_rows):
    return oracle.random_completions([4] * len(INDICES) * num_rows)


@torch.no_grad()
def distributions(decoder, policy, num_rows=2):
    """[R, 4, V] log-probabilities of every token at four steps of some completions of each prompt, step by step."""
    prompts = policy.prefill(oracle.encode(policy.processor, INDICES))
    tokens = torch.stack(completions_of(num_rows))
    position_embeddings = decoder.position_embeddings(prompts, tokens.shape[1])
    if num_rows == 1:
        cache = ContiguousCache(prompts, position_embeddings, dtype=decoder.dtype)
    else:
        cache = SharedPromptCache(prompts, position_embeddings, num_rows=num_rows, dtype=decoder.dtype)
    logits = [decoder.first_logits(prompts).repeat_interleave(num_rows, 0)]
    logits += [decoder(column, cache) for column in tokens[:, :-1].T]
    return torch.stack(logits, 1).log_softmax(-1)


@torch.no_grad()
def expected(plain, policy, num_rows=2):
    """The same from plain forwards."""
    nothing = torch.tensor([], dtype=torch.long)
    prompts = [oracle.encode(policy.processor, [index]) for index in INDICES for _ in range(num_rows)]
    rows = zip(prompts, completions_of(num_rows), strict=True)
    return torch.stack([oracle.distributions(plain, prompt, row, nothing, 1.0) for prompt, row in rows])


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def change(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.linspace(-0.05, 0.05, parameter.numel()).view(parameter.shape))


@pytest.fixture(params=[False, True], ids=["copied", "in place"])
def is_in_place(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(decoder_module, "_MAX_COPIED_WEIGHTS", 0)
    return request.param


@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_step_is_one_of_the_layers_of_transformers(policy, plain, exact_layers, is_in_place, num_rows):
    assert_same(distributions(Decoder(policy.model), policy, num_rows), expected(plain, policy, num_rows))


def test_a_step_goes_through_the_adapter(adapted, adapted_plain, exact_layers, is_in_place):
    assert_same(distributions(Decoder(adapted.model), adapted), expected(adapted_plain, adapted))


def test_a_step_leaves_an_adapter_out_that_is_switched_off(adapted, plain, exact_layers, is_in_place):
    with adapted.without_adapter():
        found = distributions(Decoder(adapted.model), adapted)
    assert_same(found, expected(plain, adapted))


def test_syncing_weights_takes_over_changed_weights(policy, adapted, is_in_place):
    for changing in (policy, adapted):
        decoder = Decoder(changing.model)
        before = distributions(decoder, changing)
        change(changing.network)
        fresh = distributions(Decoder(changing.model), changing)
        assert float((before - fresh).abs().max()) > 0.01
        assert torch.equal(distributions(decoder, changing), fresh) == is_in_place
        decoder.sync_weights()
        assert torch.equal(distributions(decoder, changing), fresh)


def test_syncing_weights_takes_over_changed_weights_in_mixed_precision(policy):
    policy.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoder = Decoder(policy.model)
        change(policy.network)
        fresh = distributions(Decoder(policy.model), policy)
        assert not torch.equal(distributions(decoder, policy), fresh)
        decoder.sync_weights()
        assert torch.equal(distributions(decoder, policy), fresh)


def test_an_adapter_is_switched_off_and_on_by_syncing_weights(adapted, plain, exact_layers, is_in_place):
    decoder = Decoder(adapted.model)
    with_adapter = distributions(decoder, adapted)
    with adapted.without_adapter():
        decoder.sync_weights()
        assert_same(distributions(decoder, adapted), expected(plain, adapted))
    decoder.sync_weights()
    assert torch.equal(distributions(decoder, adapted), with_adapter)


def test_reading_and_syncing_change_no_weight_of_the_model(adapted, is_in_place):
    before = {name: value.clone() for name, value in adapted.network.state_dict().items()}
    decoder = Decoder(adapted.model)
    distributions(decoder, adapted)
    with adapted.without_adapter():
        decoder.sync_weights()
    decoder.sync_weights()
    assert all(torch.equal(value, before[name]) for name, value in adapted.network.state_dict().items())


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
@pytest.mark.parametrize("kind", ["policy", "adapted"])
@pytest.mark.parametrize(
    "name", ["embed_tokens", "input_layernorm", "q_norm", "o_proj", "down_proj", "q_proj", "language_model.norm"]
)
def test_it_does_not_fit_once_a_weight_lies_elsewhere(request, family, kind, name):
    policy = request.getfixturevalue(kind)
    decoder = Decoder(policy.model)
    named = [parameter for full_name, parameter in policy.model.named_parameters() if name in full_name]
    assert named
    for parameter in named:  # of an adapted layer also the adapter's
        assert decoder.is_compatible(policy.model)
        parameter.data = parameter.data.clone()
        assert not decoder.is_compatible(policy.model)
        decoder = Decoder(policy.model)


def test_it_does_not_fit_after_a_move_there_and_back(policy, adapted):
    for moved in (policy, adapted):
        decoder = Decoder(moved.model)
        moved.float().double()  # the same parameters in new memory, as after the end of a fit on a GPU
        assert moved.model.model.language_model.embed_tokens.weight is decoder._embedding.weight
        assert not decoder.is_compatible(moved.model)


def test_it_does_not_fit_once_its_model_is_in_an_adapter(policy):
    decoder = Decoder(policy.model)
    get_peft_model(policy.model, LoraConfig(r=2, target_modules=TEXT_LINEARS))
    assert not decoder.is_compatible(policy.model)


def test_it_fits_its_model_as_long_as_the_type_stays_the_same(folder):
    one, other = (Policy.load(PolicyConfig(name=str(folder))) for _ in range(2))
    decoder = Decoder(one.model)
    assert decoder.is_compatible(one.model)
    assert not decoder.is_compatible(other.model)
    change(one.network)
    assert decoder.is_compatible(one.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not decoder.is_compatible(one.model)
        mixed = Decoder(one.model)
        assert mixed.is_compatible(one.model)
        assert mixed.dtype == torch.bfloat16
    assert not mixed.is_compatible(one.model)
    one.double()
    assert not decoder.is_compatible(one.model)
    assert Decoder(one.model).is_compatible(one.model)


def test_mixed_precision_computes_nearly_the_same(policy):
    policy.float()
    exact = distributions(Decoder(policy.model), policy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoder = Decoder(policy.model)
        mixed = distributions(decoder, policy)
    assert 0 < float((mixed - exact).abs().mean()) < 0.05


@pytest.mark.parametrize("family", ["qwen2_vl"], indirect=True)
def test_switching_an_adapter_on_changes_no_base_weight(adapted):
    before = {name: value.clone() for name, value in adapted.network.state_dict().items()}
    with adapted.without_adapter():
        decoder = Decoder(adapted.model)
    decoder.sync_weights()
    assert all(torch.equal(value, before[name]) for name, value in adapted.network.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [1, 12, 100])
def test_large_weights_are_packed_and_renewed(num_rows):
    layers = [nn.Linear(256, 1024), nn.Linear(256, 512)]
    fused, rows = FusedLinear(layers, torch.float32), torch.randn(2, num_rows, 256)

    def gap():
        return (fused(rows) - torch.cat([layer(rows) for layer in layers], -1)).abs().max()

    assert gap() < 1e-5
    for layer in layers:
        layer.weight.mul_(2)
        layer.bias.add_(1)
    assert gap() > 0.1
    fused.sync_weights()
    assert gap() < 1e-5
