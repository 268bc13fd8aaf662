import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

from perception_r1.embedded.model import BASE, SPECIAL_TOKENS, build_model_folder
from perception_r1.policy.families import QWEN_FAMILIES
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from tests.policy import oracle

TEXT = (
    '<|object_ref_start|>red cup<|object_ref_end|><|box_start|>(250,1000),(500,75)<|box_end|>\n{"bbox_2d": [1, 28]} ß日'
)


@pytest.mark.parametrize("family", QWEN_FAMILIES)
def test_transformers_loads_the_folder_by_itself(model_folders, family):
    model, report = AutoModelForImageTextToText.from_pretrained(model_folders[family], output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(model_folders[family])
    assert model.config.model_type == family
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n"
    generated = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=2)
    assert generated.shape[1] > len(tokenizer(prompt)["input_ids"])
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


def test_every_special_token_is_one_id(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(token)["input_ids"] for token in SPECIAL_TOKENS]
    assert all(len(row) == 1 for row in ids)
    assert len({row[0] for row in ids}) == len(SPECIAL_TOKENS)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


def test_any_text_survives_the_tokenizer_of_a_saved_folder(tmp_path):
    build_model_folder(tmp_path, family="qwen2_vl", seed=0, corpus=[TEXT])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, "\x00\t\r\n  two  spaces ", "250250", "😀"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    assert len(tokenizer("250")["input_ids"]) == 3


def test_the_seed_decides_the_weights(tmp_path, folder):
    for name, seed in (("same", 0), ("other", 1)):
        build_model_folder(tmp_path / name, family="qwen2_vl", seed=seed)
    weights = {
        name: dict(oracle.plain_model(path).named_parameters())
        for name, path in (("first", folder), ("same", tmp_path / "same"), ("other", tmp_path / "other"))
    }
    assert all(torch.equal(value, weights["same"][name]) for name, value in weights["first"].items())
    assert not all(torch.equal(value, weights["other"][name]) for name, value in weights["first"].items())


def test_building_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_model_folder(tmp_path, family="qwen2_vl", seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_small(model_folders):
    for folder in model_folders.values():
        policy = Policy.load(PolicyConfig(name=str(folder)))
        assert sum(parameter.numel() for parameter in policy.parameters()) < 1_100_000


def test_the_pretrained_model_has_frequencies_for_neighbours_and_for_looks(tmp_path):
    """Within a row and a column of tokens some turn clearly, and over a long answer many hardly turn."""
    build_model_folder(tmp_path, family="qwen2_vl", seed=0, size=BASE)
    text = AutoConfig.from_pretrained(tmp_path).get_text_config()
    rope = Qwen2VLRotaryEmbedding(text)
    time, row, column = rope.inv_freq.split(text.rope_parameters["mrope_section"])
    assert len(rope.inv_freq) == text.hidden_size // text.num_attention_heads // 2
    assert time.min() > 0.5
    assert min(row.max(), column.max()) > 0.1
    assert (rope.inv_freq * 300 < 1).sum() >= 12
