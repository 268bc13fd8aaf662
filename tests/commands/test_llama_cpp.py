"""What convert_hf_to_gguf.py of llama.cpp reads in an exported folder: files, keys, names of weights, and the card.

The names of weights are looked up in the table that the converter itself looks them up in, which comes with the package
`gguf`; files and keys are those of its files conversion/base.py, qwenvl.py and qwen3vl.py (in the source distribution
0.3.36 of llama-cpp-python).
"""

import json
import re
from dataclasses import replace

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from perception_r1.cli import main
from perception_r1.commands import export
from perception_r1.embedded.model import SMALL, build_model_folder
from perception_r1.policy.families import CODECS, QWEN_FAMILIES
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy

gguf = pytest.importorskip("gguf")

DEPTH = 4
"""Layers of the vision tower: the converter's table takes the merger's last layer, number 2, for one of its layers."""
ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
"""Names by which it knows the families."""
TAKEN_APART = {
    "qwen2_vl": r"visual\.patch_embed\.proj\.weight",
    "qwen2_5_vl": r"visual\.patch_embed\.proj\.weight",
    "qwen3_vl": r"visual\.(patch_embed\.proj|(deepstack_merger_list\.\d+|merger)\.(norm|linear_fc[12]))\.(weight|bias)",
}
"""Weights of the vision tower that it renames on its own."""


@pytest.fixture(scope="module", params=[name for name in CODECS if name in QWEN_FAMILIES])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """A model of a family as `export` writes it."""
    source, place = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("exported")
    build_model_folder(source, family=family, seed=0, size=replace(SMALL, vision_depth=DEPTH))
    export.save_merged(Policy.load(PolicyConfig(name=str(source), max_pixels=200_000)), place)
    return place


def names(folder):
    """Names of the weights: of the language model, and of the vision tower."""
    every = set(load_file(folder / "model.safetensors"))
    vision = {name for name in every if "visual." in name}
    return every - vision, vision


def test_every_weight_of_the_language_model_has_a_name_in_gguf(family, folder):
    kind = gguf.MODEL_ARCH.QWEN3VL if family == "qwen3_vl" else gguf.MODEL_ARCH.QWEN2VL
    table = gguf.get_tensor_name_map(kind, SMALL.num_layers)
    text, _ = names(folder)
    found = {name: table.get_name(name.replace("language_model.", ""), (".weight", ".bias")) for name in text}
    assert len(text) > 10 * SMALL.num_layers
    assert [name for name, new in found.items() if new is None] == []
    assert len(set(found.values())) == len(found)
    assert {"token_embd.weight", "output_norm.weight", "blk.2.attn_q.weight"} <= set(found.values())


def test_every_weight_of_the_vision_tower_has_a_name_in_gguf(family, folder):
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, DEPTH)
    _, vision = names(folder)
    prefix = "model.visual." if family == "qwen3_vl" else "visual."
    assert all(name.startswith(prefix) for name in vision)
    renamed = {name.removeprefix("model.") for name in vision}
    mapped = {name for name in renamed if not re.fullmatch(TAKEN_APART[family], name)}
    assert len(renamed) - len(mapped) == {"qwen2_vl": 1, "qwen2_5_vl": 1, "qwen3_vl": 2 + 6 + 6}[family]
    if family != "qwen3_vl":  # there it splits queries, keys and values
        assert sum(".qkv." in name for name in mapped) == 2 * DEPTH
        mapped = {name.replace(".qkv.", f".{part}.") for name in mapped for part in "qkv"}
    assert [name for name in sorted(mapped) if table.get_name(name, (".weight", ".bias")) is None] == []


def test_the_configuration_has_the_keys_that_are_read(family, folder):
    config = AutoConfig.from_pretrained(folder).to_dict()
    assert config["architectures"] == [ARCHITECTURES[family]]
    assert config["model_type"] == family
    written = json.loads((folder / "config.json").read_text())
    for text in (config["text_config"], written["text_config"]):
        rope = text["rope_parameters"]
        assert (rope["rope_theta"], rope["mrope_section"]) == (SMALL.rope_theta, list(SMALL.mrope_section))
        sizes = {"hidden_size": SMALL.hidden_size, "intermediate_size": SMALL.intermediate_size}
        sizes |= {"num_hidden_layers": SMALL.num_layers, "num_attention_heads": SMALL.num_heads}
        sizes |= {"num_key_value_heads": SMALL.num_key_value_heads, "vocab_size": text["vocab_size"]}
        assert {name: text[name] for name in sizes} == sizes
        assert {"max_position_embeddings", "rms_norm_eps"} <= text.keys()
    vision = config["vision_config"]
    assert (vision["depth"], vision["num_heads"]) == (DEPTH, SMALL.vision_num_heads)
    own = {
        "qwen2_vl": {"embed_dim"},
        "qwen2_5_vl": {"intermediate_size", "fullatt_block_indexes"},
        "qwen3_vl": {"intermediate_size", "num_position_embeddings", "deepstack_visual_indexes"},
    }
    assert {"hidden_size", "patch_size", "spatial_merge_size", *own[family]} <= vision.keys()


def test_tokenizer_and_image_processor_have_the_files_and_keys_that_are_read(folder):
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {
        path.name for path in folder.iterdir()
    }
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert len(settings["image_mean"]) == len(settings["image_std"]) == 3
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "Qwen2Tokenizer"  # version 4 has it too
    assert not isinstance(config.get("extra_special_tokens"), list)  # version 4, on which it runs, takes no list
    special = gguf.SpecialVocab(folder, load_merges=True)
    assert special.special_token_ids.keys() >= {"eos", "pad"}
    assert len(special.merges) == len(json.loads((folder / "tokenizer.json").read_text())["model"]["merges"])
    assert special.chat_template == (folder / "chat_template.jinja").read_text()


def test_the_card_is_read(runs, tmp_path):
    assert main(["export", str(runs["full"]), "--to", str(tmp_path / "to"), "--ckpt", "last"]) == 0
    metadata = gguf.Metadata.load(model_path=tmp_path / "to")
    assert metadata.tags == ["perception-r1", "visual-perception", "sft", "grounding", "image-text-to-text"]
