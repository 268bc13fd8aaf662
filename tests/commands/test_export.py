"""Exported folders, compared with the policy that they come from by the plain classes of transformers and peft."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers import Qwen2VLForConditionalGeneration as PlainQwen2VL

from perception_r1.cli import main
from perception_r1.commands import export
from perception_r1.commands.runs import checkpoint_path, load_checkpoint, open_run
from perception_r1.policy.decoder import Decoder
from perception_r1.policy.families import QWEN_FAMILIES
from perception_r1.policy.load import LoraConfig, PolicyConfig, load_processor
from perception_r1.policy.policy import Policy
from perception_r1.policy.processor import Processor
from tests.policy import oracle

NUM_TOKENS = 12
FILES = {"config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
FILES |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "training_config.yaml"}
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md", "training_config.yaml"}


def run_export(run, folder, *options):
    assert main(["export", str(run), "--to", str(folder), *options]) == 0
    return folder


def fails(capsys, *arguments):
    """The sentence of a command that fails."""
    assert main(["export", *map(str, arguments)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("perception-r1 export: error: ")
    assert text.count("\n") == 1
    return text


def trained_policy(run, name="best"):
    opened = open_run(run)
    return load_checkpoint(opened.policy, checkpoint_path(opened, name))[0]


def plain_inputs(folder, text="Where is it?", size=(84, 56)):
    """Tensors of one prompt as transformers' own tokenizer and image processor make them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder)(images=[oracle.noise(*size)], return_tensors="pt")
    chat = tokenizer.apply_chat_template(oracle.chat(text), tokenize=False, add_generation_prompt=True)
    num_features = int(pixels["image_grid_thw"].prod()) // 4
    chat = chat.replace("<|image_pad|>", "<|image_pad|>" * num_features)
    encoded = tokenizer(chat, return_tensors="pt")
    is_image = encoded["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return {**encoded, **pixels, "mm_token_type_ids": is_image.int()}


def policy_inputs(policy, text="Where is it?", size=(84, 56)):
    return policy.processor.encode([oracle.chat(text)], [[oracle.noise(*size)]], max_tokens=None)


def greedy_tokens(model, inputs, suppress_tokens):
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=NUM_TOKENS, suppress_tokens=suppress_tokens.tolist())
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def assert_same_answers(policy, model, inputs, *, tolerance=1e-4):
    """Equal logits of the first token, equal log-probabilities of all, and the same greedy tokens."""
    prompts = policy_inputs(policy)
    with torch.no_grad():
        logits = Decoder(policy.model).first_logits(policy.prefill(prompts))
        torch.testing.assert_close(model(**inputs).logits[:, -1], logits, atol=tolerance, rtol=tolerance)
        params = policy.sampling_params(max_new_tokens=NUM_TOKENS, is_greedy=True)
        rollout = policy.generate(policy.prefill(prompts), group_size=1, params=params, seeds=[0])
        completion = rollout.completions[0]
        assert greedy_tokens(model, inputs, policy.suppress_tokens) == completion.tolist()
        expected = oracle.logprobs(model, prompts, completion, policy.suppress_tokens, 1.0)
        torch.testing.assert_close(policy(prompts, [completion])[0], expected, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """The best checkpoint of the full training."""
    return run_export(runs["full"], tmp_path_factory.mktemp("export") / "full")


@pytest.fixture(scope="module")
def merged(runs, tmp_path_factory):
    """The last checkpoint of the training of an adapter, merged."""
    return run_export(runs["lora"], tmp_path_factory.mktemp("export") / "merged", "--ckpt", "last")


def test_a_folder_has_the_files_of_the_hub(exported):
    assert {path.name for path in exported.iterdir()} == FILES
    assert {path.name for path in exported.parent.iterdir()} == {"full"}  # nothing is left beside it


def test_weights_have_the_names_of_the_hub_and_the_values_of_the_checkpoint(runs, exported, folder):
    written = load_file(exported / "model.safetensors")
    assert written.keys() == load_file(folder / "model.safetensors").keys()
    state = torch.load(runs["full"] / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    for name, place in {
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight": "model.language_model.layers.1.mlp.up_proj.weight",
        "visual.blocks.0.attn.qkv.bias": "model.visual.blocks.0.attn.qkv.bias",
        "visual.merger.mlp.0.weight": "model.visual.merger.mlp.0.weight",
    }.items():
        assert torch.equal(written[name], state[f"policy.network.{place}"])
        assert not torch.equal(written[name], load_file(folder / "model.safetensors")[name])


def test_plain_transformers_answers_as_the_trained_policy(runs, exported):
    model, report = PlainQwen2VL.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.float32
    policy = trained_policy(runs["full"])
    assert_same_answers(policy, model.eval(), plain_inputs(exported))


def test_the_checkpoint_asked_for_is_exported(runs, exported, tmp_path):
    file = runs["full"] / "checkpoints" / "last.ckpt"
    last = run_export(runs["full"], tmp_path / "last", "--ckpt", str(file))
    weights, others = load_file(last / "model.safetensors"), load_file(exported / "model.safetensors")
    assert not torch.equal(weights["model.norm.weight"], others["model.norm.weight"])
    text = (last / "README.md").read_text()
    assert "from `last.ckpt` at step 3" in text
    assert "holds the weights of step" not in text


def test_an_adapter_is_merged(runs, merged, folder):
    name = "model.layers.2.self_attn.q_proj.weight"
    state = torch.load(runs["lora"] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    place = "policy.network.base_model.model.model.language_model.layers.2.self_attn.q_proj."
    first, second = (state[f"{place}lora_{matrix}.default.weight"] for matrix in "AB")
    expected = load_file(folder / "model.safetensors")[name] + 6 / 2 * second @ first
    written = load_file(merged / "model.safetensors")
    torch.testing.assert_close(written[name], expected)
    assert written.keys() == load_file(folder / "model.safetensors").keys()
    assert second.abs().max() > 0.01
    policy = trained_policy(runs["lora"], "last")
    assert_same_answers(policy, PlainQwen2VL.from_pretrained(merged).eval(), plain_inputs(merged), tolerance=1e-3)


def test_an_adapter_alone_fits_its_base_by_peft(runs, tmp_path, folder):
    adapter = run_export(runs["lora"], tmp_path / "adapter", "--adapter", "--ckpt", "last")
    assert {path.name for path in adapter.iterdir()} == ADAPTER_FILES
    model = PeftModel.from_pretrained(PlainQwen2VL.from_pretrained(folder), adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    assert "library_name: peft" in (adapter / "README.md").read_text()
    assert_same_answers(trained_policy(runs["lora"], "last"), model.eval(), plain_inputs(folder))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_can_be_written_in_another_type(runs, exported, tmp_path, dtype):
    folder = run_export(runs["full"], tmp_path / dtype, "--dtype", dtype)
    written, full = load_file(folder / "model.safetensors"), load_file(exported / "model.safetensors")
    assert written.keys() == full.keys()
    assert all(torch.equal(value, full[name].to(getattr(torch, dtype))) for name, value in written.items())
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    assert PlainQwen2VL.from_pretrained(folder).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_an_adapter_over_half_precision_is_rounded_once(model_folders, tmp_path, dtype):
    config = PolicyConfig(name=str(model_folders["qwen2_vl"]), dtype="bfloat16", lora=LoraConfig(r=2))
    policy = Policy.load(config)
    oracle.shake(policy.network)
    layer = policy.network.base_model.model.model.language_model.layers[0].mlp.down_proj
    update = 32 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = (layer.base_layer.weight.float() + update.detach()).to(dtype or torch.bfloat16)
    export.save_merged(policy, tmp_path, dtype=dtype)
    written = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in written.values()} == {expected.dtype}
    assert torch.equal(written["model.layers.0.mlp.down_proj.weight"], expected)


@pytest.mark.parametrize("family", QWEN_FAMILIES)
@pytest.mark.parametrize("is_tied", [True, False])
def test_every_family_is_written_as_the_plain_classes_read_it(grouped_folders, tmp_path, family, is_tied):
    source = tmp_path / "source"
    config = AutoConfig.from_pretrained(grouped_folders[family])
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = is_tied
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(source)
    load_processor(grouped_folders[family]).save(source)
    policy = Policy.load(PolicyConfig(name=str(source))).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    export.save_merged(policy, tmp_path / "written")
    written = load_file(tmp_path / "written" / "model.safetensors")
    assert written.keys() == load_file(source / "model.safetensors").keys()
    assert ("lm_head.weight" in written) != is_tied
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "written", output_loading_info=True)
    assert not any(report.values())
    assert_same_answers(policy, model.eval(), plain_inputs(tmp_path / "written"))


def test_the_processor_of_the_run_is_written(runs, exported):
    encoded, again = policy_inputs(trained_policy(runs["full"])), load_processor(exported)
    other = again.encode([oracle.chat("Where is it?")], [[oracle.noise(84, 56)]], max_tokens=None)
    assert torch.equal(encoded.input_ids[0], other.input_ids[0])
    assert torch.equal(encoded.pixel_values[0], other.pixel_values[0])
    assert encoded.image_sizes == other.image_sizes


def test_special_tokens_have_the_name_that_transformers_4_knows(runs, exported):
    """It takes `extra_special_tokens` for a mapping, and breaks on the list that version 5 writes."""
    config = json.loads((exported / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in config
    assert "<|box_start|>" in config["additional_special_tokens"]
    again, before = AutoTokenizer.from_pretrained(exported), trained_policy(runs["full"]).processor.tokenizer
    assert again.all_special_tokens == before.all_special_tokens
    assert again.all_special_ids == before.all_special_ids
    text = "<|box_start|>(1,2),(3,4)<|box_end|><|im_end|>"
    assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == "(1,2),(3,4)"


def test_bounds_on_pixels_are_those_of_the_run(folder, tmp_path):
    policy = Policy.load(PolicyConfig(name=str(folder), min_pixels=1568, max_pixels=3136))
    export.save_merged(policy, tmp_path)
    for size, grid in (((28, 28), [1, 4, 4]), ((280, 280), [1, 4, 4])):  # 1568 pixels are above one tile of 28 x 28
        pixels = AutoImageProcessor.from_pretrained(tmp_path)(images=[oracle.noise(*size)], return_tensors="pt")
        assert pixels["image_grid_thw"].tolist() == [grid]


def test_settings_of_the_base_model_s_processor_are_kept(runs, tmp_path, copy_folder):
    base, run = copy_folder("base"), tmp_path / "version_0"
    (base / "video_preprocessor_config.json").write_text('{"fps": 2}')
    own = json.loads((base / "preprocessor_config.json").read_text())
    settings = {"processor_class": "Qwen2VLProcessor", "image_processor": own}
    (base / "processor_config.json").write_text(json.dumps(settings))
    shutil.copytree(runs["full"], run)
    for path in (run / "run.json", run / "config.yaml"):
        path.write_text(path.read_text().replace(open_run(runs["full"]).policy.name, str(base)))
    written = run_export(run, tmp_path / "written")
    assert json.loads((written / "video_preprocessor_config.json").read_text()) == {"fps": 2}
    assert json.loads((written / "processor_config.json").read_text()) == {"processor_class": "Qwen2VLProcessor"}
    (base / "processor_config.json").write_text("[]")  # nothing that could be kept
    assert not (run_export(run, tmp_path / "again") / "processor_config.json").exists()


def test_weights_may_be_read_by_whom_the_other_files_may(exported):
    assert (exported / "model.safetensors").stat().st_mode == (exported / "config.json").stat().st_mode


def test_the_working_directory_can_be_filled(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(runs["full"]), "--to", "."]) == 0
    assert (tmp_path / "model.safetensors").exists()


def test_every_setting_of_the_run_comes_along(runs, exported):
    assert (exported / "training_config.yaml").read_bytes() == (runs["full"] / "config.yaml").read_bytes()
    assert main(["fit", "--config", str(exported / "training_config.yaml"), "--print_config"]) == 0


def test_nothing_is_overwritten(runs, tmp_path, capsys):
    taken, file = tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    file.write_text("mine")
    for place in (taken, file):
        assert "exists and is not an empty folder" in fails(capsys, runs["full"], "--to", place)
    assert (taken / "mine.txt").read_text() == file.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine.txt", "taken"]


def test_an_empty_folder_is_filled(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    assert {path.name for path in run_export(runs["full"], tmp_path / "empty").iterdir()} == FILES


def test_an_export_that_breaks_off_leaves_nothing(runs, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Processor, "save", stop)  # the weights are written by then
    assert main(["export", str(runs["full"]), "--to", str(tmp_path / "deep" / "folder")]) == 130
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "deep" / "folder").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--adapter"], "trained no adapter"),
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, not 'int8'"),
        (["--ckpt", "none.ckpt"], "there is no checkpoint none.ckpt"),
        (["--nonsense", "1"], "nonsense"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_sentence(runs, tmp_path, capsys, arguments, words):
    assert words in fails(capsys, runs["full"], "--to", tmp_path / "to", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_no_run_and_a_place_is_needed(folder, runs, tmp_path, capsys):
    assert "there is no run in" in fails(capsys, folder, "--to", tmp_path / "to")
    assert "there is no run in" in fails(capsys, tmp_path / "nowhere", "--to", tmp_path / "to")
    assert "to" in fails(capsys, runs["full"])
    (tmp_path / "file").write_text("")
    assert "cannot be written" in fails(capsys, runs["full"], "--to", tmp_path / "file" / "to")


def test_help_is_no_error(capsys):
    assert main(["export", "--help"]) == 0
    assert "--adapter" in capsys.readouterr().out
