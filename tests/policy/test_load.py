import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from perception_r1.errors import UserError
from perception_r1.policy.load import LoraConfig, PolicyConfig
from perception_r1.policy.policy import Policy


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"] | changes.pop("text_config", {})
    path.write_text(json.dumps(config | {"text_config": text} | changes))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def load(name, **options):
    return Policy.load(PolicyConfig(name=str(name), **options))


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "models/qwen/2b"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(UserError, match=f"no model folder {name}"):
        load(name)


@pytest.mark.parametrize("model_type", ["llama", "no_such_type"])
def test_another_family_is_refused_with_a_list_of_those_known(copy_folder, model_type):
    folder = copy_folder()
    change_config(folder, model_type=model_type)
    with pytest.raises(UserError, match=f"{folder.name}.*known families: qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe"):
        load(folder)


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_an_unusable_config_is_refused(copy_folder, text):
    folder = copy_folder()
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="No model configuration"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json", "tokenizer.json"])
def test_a_missing_file_is_a_clear_error(copy_folder, name):
    folder = copy_folder()
    (folder / name).unlink()
    if name == "tokenizer.json":
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError):
        load(folder)


def test_weights_that_were_cut_off_are_a_clear_error(copy_folder):
    path = copy_folder() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load(path.parent)


def test_missing_and_unexpected_weights_are_errors(copy_folder):
    name = "model.visual.merger.mlp.0.weight"
    missing, unexpected = copy_folder("missing"), copy_folder("unexpected")
    change_weights(missing, lambda weights: weights.pop(next(key for key in weights if "merger.mlp.0.weight" in key)))
    change_weights(unexpected, lambda weights: weights.update({"model.visual.extra": torch.zeros(1)}))
    with pytest.raises(UserError, match=f"does not fit qwen2_vl: 1 missing keys, first {name}"):
        load(missing)
    with pytest.raises(UserError, match=r"1 unexpected keys, first model.visual.extra"):
        load(unexpected)


def test_weights_of_another_size_are_an_error(copy_folder):
    folder = copy_folder()
    change_config(folder, text_config={"intermediate_size": 128})
    with pytest.raises(UserError, match="does not fit qwen2_vl: 9 mismatched keys"):
        load(folder)


@pytest.mark.parametrize("lora", [LoraConfig(target_modules="no_such_layer"), LoraConfig(r=0)])
def test_an_adapter_that_fits_nothing_is_refused(folder, lora):
    with pytest.raises(UserError, match=r"model\.policy\.lora"):
        load(folder, lora=lora)


@pytest.mark.parametrize("bounds", [{"min_pixels": 0}, {"max_pixels": 0}, {"max_pixels": -1}])
def test_pixel_bounds_must_be_positive(folder, bounds):
    with pytest.raises(UserError, match="pixels"):
        load(folder, **bounds)


def test_everything_is_trained_by_default(folder):
    assert all(parameter.requires_grad for parameter in load(folder).parameters())


def test_a_reference_is_frozen_and_has_no_adapter(folder):
    reference = Policy.load(PolicyConfig(name=str(folder), lora=LoraConfig()), is_trained=False)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert not any("lora" in name for name, _ in reference.named_parameters())


def test_a_frozen_vision_tower_is_all_that_is_frozen(folder):
    frozen = {
        name for name, parameter in load(folder, freeze_vision=True).named_parameters() if not parameter.requires_grad
    }
    assert frozen == {name for name, _ in load(folder).named_parameters() if ".visual." in name} != set()


def test_weights_have_the_type_asked_for(folder):
    assert {parameter.dtype for parameter in load(folder, dtype="bfloat16").parameters()} == {torch.bfloat16}


NUM_LINEARS = {
    "glm4v": 6 * 3,
    "qwen3_vl_moe": 4 * 3 + 3 * 2,
    "qwen3_5": 5 * 2 + 4 + 3 * 3,
    "qwen3_5_moe": 5 * 2 + 4 + 3 * 3,
}
"""Of three blocks one has experts in Qwen3-VL-MoE; in Qwen3.5 two have linear attention; in GLM-4V two are joined."""


def test_only_adapters_of_the_language_model_are_trained(model_folders):
    for family, folder in model_folders.items():
        blocks = load(folder).model.model.language_model.layers
        linears = [name for name, module in blocks.named_modules() if isinstance(module, torch.nn.Linear)]
        num_linears = sum(not name.endswith("expert_gate") for name in linears)
        trained = [
            name for name, parameter in load(folder, lora=LoraConfig(r=2)).named_parameters() if parameter.requires_grad
        ]
        assert len(trained) == 2 * num_linears  # two matrices for each
        assert num_linears == NUM_LINEARS.get(family, 7 * 3)
        assert all("lora_" in name and "language_model" in name for name in trained)


def test_a_saved_policy_is_the_same_policy(folder, tmp_path):
    policy = load(folder)
    with torch.no_grad():
        next(policy.parameters()).add_(1.0)
    policy.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert all(torch.equal(one, other) for one, other in zip(policy.parameters(), again.parameters(), strict=True))
    assert again.eos_token_ids.tolist() == policy.eos_token_ids.tolist()


def test_end_tokens_are_those_of_model_and_tokenizer_the_chat_s_own_first(copy_folder):
    folder = copy_folder()
    policy = load(folder)
    ids = policy.processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert policy.eos_token_ids.tolist() == ids
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[1], 7]}))
    assert load(folder).eos_token_ids.tolist() == [ids[0], ids[1], 7]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[1]}))
    assert load(folder).eos_token_ids.tolist() == ids
    shutil.rmtree(folder)


def test_sliding_windows_are_refused(copy_folder):
    folder = copy_folder()
    change_config(folder, text_config={"layer_types": ["full_attention", "full_attention", "sliding_attention"]})
    with pytest.raises(
        UserError, match="layers of full_attention, sliding_attention; known of qwen2_vl: full_attention"
    ):
        load(folder)


class Code:
    """Leaves a folder behind when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_model_s_folder_is_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: "y")  # to whoever asks
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Own: pass\n")
    names = (
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoTokenizer",
        "AutoProcessor",
        "AutoImageProcessor",
    )
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        settings = json.loads((copy / file).read_text())
        settings["auto_map"] = {
            name: ["own.Own", "own.Own"] if name == "AutoTokenizer" else "own.Own" for name in names
        }
        (copy / file).write_text(json.dumps(settings))
    Policy.load(PolicyConfig(name=str(copy)))
    assert not (tmp_path / "ran").exists()


def test_code_in_pickled_weights_is_not_run(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    for file in copy.glob("*.safetensors"):
        file.unlink()
    torch.save({"weight": Code(tmp_path / "ran")}, copy / "pytorch_model.bin")
    with pytest.raises(UserError):
        Policy.load(PolicyConfig(name=str(copy)))
    assert not (tmp_path / "ran").exists()
