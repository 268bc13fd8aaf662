"""Model folders whose files do not belong together, or are odd, are refused before anything is computed."""

import json
import shutil
from pathlib import Path

import pytest

from perception_r1.cli import main
from perception_r1.errors import UserError
from perception_r1.planning.policy import empty_model
from perception_r1.policy.load import LoraConfig, PolicyConfig, load_processor
from perception_r1.policy.policy import Policy
from tests.policy.oracle import chat, noise

PROCESSOR = "preprocessor_config.json"


@pytest.fixture
def place(model_folders, tmp_path):
    """Copies the folder of a family, so that it can be damaged."""

    def copy(family="qwen2_vl"):
        return shutil.copytree(model_folders[family], tmp_path / "model")

    return copy


def change(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_refused(folder, *reasons):
    """With weights and without, by one sentence that names the folder."""
    for load in (Policy.load, Policy.without_weights):
        with pytest.raises(UserError) as caught:
            load(PolicyConfig(name=str(folder)))
        sentence = str(caught.value)
        assert all(reason in sentence for reason in (str(folder), *reasons)), sentence
        assert "\n" not in sentence


@pytest.mark.parametrize(
    ("family", "options", "reasons"),
    [
        ("qwen2_vl", {"patch_size": 16}, ["patch_size is 16, and has to be 14"]),
        ("qwen3_vl", {"patch_size": 14}, ["patch_size is 14, and has to be 16"]),
        ("qwen2_vl", {"merge_size": 1}, ["merge_size is 1, and has to be 2"]),
        ("qwen2_5_vl", {"temporal_patch_size": 1}, ["temporal_patch_size is 1, and has to be 2"]),
        ("qwen2_vl", {"do_resize": False}, ["do_resize is False, and has to be True"]),
        ("gemma3", {"do_resize": False}, ["do_resize is False, and has to be True"]),
        ("qwen2_vl", {"size": {"height": 224, "width": 224}}, ["{'height': 224, 'width': 224}", "fewest and most"]),
        ("qwen2_vl", {"size": {"shortest_edge": "a", "longest_edge": 5}}, ["'a'", "fewest and most"]),
        ("internvl", {"size": {"height": 56, "width": 56}}, ["size is {'height': 56, 'width': 56}", "'height': 28"]),
        ("gemma3", {"size": {"height": 28, "width": 56}}, ["size is {'height': 28, 'width': 56}", "'height': 28"]),
        ("internvl", {"size": {"shortest_edge": 448}}, ["size is {'shortest_edge': 448}", "'height': 28"]),
        ("qwen2_vl", {"image_mean": "dark"}, ["cannot be loaded"]),
    ],
    ids=str,
)
def test_an_image_processor_that_does_not_fit_is_refused(place, family, options, reasons):
    folder = place(family)
    change(folder, PROCESSOR, **options)
    assert_refused(folder, *reasons)


def test_a_tokenizer_that_does_not_fit_is_refused(place):
    folder = place()
    token = load_processor(folder).image_token_id
    change(folder, "config.json", image_token_id=5)
    assert_refused(folder, f"<|image_pad|> is token {token} there, and 5 in config.json")
    change(folder, "config.json", image_token_id=token)
    settings = json.loads((folder / "config.json").read_text())["text_config"]
    change(folder, "config.json", text_config=settings | {"vocab_size": 100})
    assert_refused(folder, "tokens, and the model 100")


def test_half_a_download_is_noticed(place):
    folder = place()
    (folder / "tokenizer.json").unlink()
    assert_refused(folder, "is the file tokenizer.json missing?")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('only tools') }}", "TemplateError: only tools"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages[7]['role'] }}", "UndefinedError"),
        ("{{ messages[0]['content'][1]['text'] }}", "ignores pictures"),
    ],
)
def test_a_chat_template_that_fails_is_refused(place, template, reason):
    folder = place()
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=reason):
        load_processor(folder)


def test_a_chat_that_the_template_refuses_is_told_apart(place):
    folder = place()
    path = folder / "chat_template.jinja"
    path.write_text(
        "{% if messages[-1]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + path.read_text()
    )
    processor = load_processor(folder)
    with pytest.raises(UserError, match=r"does not take this chat \(TemplateError: no tools\)"):
        processor.encode([[*chat(""), {"role": "tool", "content": "a"}]], [[noise(28, 28)]], max_tokens=None)


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "fp8"])
def test_quantised_weights_are_refused_where_they_would_be_computed_with(place, method):
    folder = place()
    change(folder, "config.json", quantization_config={"quant_method": method, "bits": 4})
    config = PolicyConfig(name=str(folder))
    for load in (Policy.load, empty_model):
        with pytest.raises(UserError, match=rf"quantised \({method}\).*give the model that it was made from"):
            load(config)
    assert not Policy.without_weights(config).has_weights


ODD = ["null", "[]", "3", '"a"', "{", ""]


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", PROCESSOR, "generation_config.json"]
)
def test_files_that_hold_something_else_are_refused(place, name, text):
    folder = place()
    (folder / name).write_text(text)
    assert_refused(folder)


@pytest.mark.parametrize("text", [*ODD, "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_holds_something_else_is_refused(place, text):
    folder = place()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="cannot be loaded"):
        Policy.load(PolicyConfig(name=str(folder)))


@pytest.mark.parametrize("value", [None, [], "large"])
@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_configuration_without_a_part_is_not_taken_for_one_of_default_sizes(place, part, value):
    folder = place()
    change(folder, "config.json", **{part: value})
    assert_refused(folder)


@pytest.mark.parametrize("token", ["stop", -1, 10**9, 1.5, True])
def test_end_tokens_must_be_tokens(place, token):
    folder = place()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": token}))
    for load in (Policy.load, Policy.without_weights):
        with pytest.raises(UserError):
            load(PolicyConfig(name=str(folder)))


def test_a_missing_generation_config_is_no_error(place):
    folder = place()
    expected = Policy.load(PolicyConfig(name=str(folder))).eos_token_ids.tolist()
    (folder / "generation_config.json").unlink()
    found = Policy.load(PolicyConfig(name=str(folder))).eos_token_ids.tolist()
    assert found == expected[:1]  # that of the tokenizer


def test_an_adapter_alone_is_named_as_such(folder, tmp_path):
    Policy.load(PolicyConfig(name=str(folder), lora=LoraConfig(r=2))).save(tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert_refused(tmp_path, "an adapter alone", "export without --adapter")


def test_a_path_may_begin_with_the_home_folder(place, monkeypatch, tmp_path, capsys):
    place()
    monkeypatch.setenv("HOME", str(tmp_path))
    config = PolicyConfig(name="~/model")
    assert config.name == str(tmp_path / "model")
    assert Policy.load(config).has_weights
    with pytest.raises(UserError, match=f"no model folder {tmp_path}/other"):
        Policy.load(PolicyConfig(name="~/other"))
    configs = Path(__file__).parents[2] / "configs"
    files = [word for name in ("default", "model/tiny") for word in ("-c", str(configs / f"{name}.yaml"))]
    files += ["-c", str(configs / "task" / "counting.yaml"), "-c", str(configs / "tiny" / "counting.yaml")]
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *files, "--model.policy.name=~/other"]) != 0
    assert f"no model folder {tmp_path}/other" in capsys.readouterr().err
