"""Model cards, read back by the hub's own library."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from perception_r1.cli import main
from perception_r1.commands.card_metadata import Export, Origin, origins
from perception_r1.commands.card_usage import usage
from perception_r1.commands.evaluations import evaluations_of
from perception_r1.commands.runs import checkpoint_path, load_checkpoint, open_run
from perception_r1.commands.settings import class_defaults, deviations
from perception_r1.engines import NativeEngine
from perception_r1.errors import UserError
from perception_r1.policy.families import FAMILIES
from perception_r1.policy.families.qwen_vl import QwenVLProcessor
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.task import THINK_REQUEST
from tests.engines.test_vllm import SAME

QUESTION = "Output the bounding box of the red cup in the image."
CARD = "---\nlicense: other\nlicense_name: research\nlicense_link: LICENSE\nbase_model: someone/base\n---\n\n# A base\n"


def export(run: Path, folder: Path, *options: str) -> ModelCard:
    assert main(["export", str(run), "--to", str(folder), *options]) == 0
    return ModelCard.load(folder / "README.md")


def rows_of(text: str, heading: str) -> dict[str, list[str]]:
    """The table of a section: first cell -> the others."""
    lines = text.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return {first: rest for first, *rest in rows[1:]}


@pytest.fixture
def copied(runs, tmp_path) -> Path:
    """A copy of the full training in a folder of its own, to be spoilt."""
    return Path(shutil.copytree(runs["full"], tmp_path / "logs" / "grounding" / "version_0"))


def change(path: Path, change_json) -> None:
    card = json.loads(path.read_text())
    change_json(card)
    path.write_text(json.dumps(card))


def test_a_card_tells_the_run(runs, tmp_path):
    text, run = export(runs["full"], tmp_path / "to").text, json.loads((runs["full"] / "run.json").read_text())
    for words in (
        "| task | grounding |",
        "| training | SFT |",
        "model, from `best.ckpt` at step 2",
        "`Output the bounding box of the {query} in the image.`",
        f"| base model | {Path(run['policy']['name']).name} |",
        "| boxes in answers | between box tokens, in thousandths of the image |",
        f"torch {run['versions']['torch']}",
        f"torchmetrics {run['versions']['torchmetrics']}",
        "holds the weights of step 2",
        "```bash\nperception-r1 fit --task=grounding --variant=sft ",
        "--run_name=full-sft",
        "is that of its base model",
    ):
        assert words in text
    assert str(runs["full"].parents[2]) not in text.partition("```bash\nperception-r1 fit")[0]  # no path of the machine


def test_metrics_have_their_margins(runs, tmp_path):
    rows = rows_of(export(runs["full"], tmp_path / "to").text, "Metrics")
    card = json.loads((runs["full"] / "run.json").read_text())
    assert rows.keys() == card["after"].keys()
    for name, cells in rows.items():
        for cell, when in zip(cells, ("before", "after"), strict=True):
            margin = card["margins_of_error"][when][name]
            assert cell == f"{card[when][name]:.4f}" + (f" ± {margin:.4f}" if margin is not None else "")


def test_a_metric_without_a_margin_stands_alone_and_one_that_is_not_known_is_a_dash(copied, tmp_path):
    def spoil(card):
        card["before"] = {}
        card["after"] = {"reward": 0.5, "accuracy_50": 0.25, "ap": None}
        card["margins_of_error"] = {"after": {"reward": None, "accuracy_50": 0.125, "ap": None}}

    change(copied / "run.json", spoil)
    rows = rows_of(export(copied, tmp_path / "to").text, "Metrics")
    assert rows == {"reward": ["-", "0.5000"], "accuracy_50": ["-", "0.2500 ± 0.1250"], "ap": ["-", "-"]}


def test_a_card_tells_the_data(runs, tmp_path):
    rows = rows_of(export(runs["full"], tmp_path / "to").text, "Data")
    scenes = "synthetic scenes (GroundingWorld)"
    assert rows == {"train": ["8,192", scenes], "val": ["2", scenes], "test": ["2", scenes]}


def test_data_of_the_hub_is_named_by_its_id_and_files_without_their_folders(copied, tmp_path):
    hub = {"name": "allenai/pixmo-count (train)", "hub_id": "allenai/pixmo-count"}
    train = {"num_samples": 10_000, "is_held_out": False, "sources": {"pixmo": hub}, "world": None}
    file = {"name": "/home/me/secret/rows.jsonl", "hub_id": None}
    val = {"num_samples": 7, "is_held_out": True, "sources": {"": file}, "world": None}
    assert origins(train) == [Origin(source="pixmo", name="allenai/pixmo-count", is_on_hub=True)]
    change(copied / "run.json", lambda card: card["data"].update(splits={"counting/train": train, "val": val}))
    card = export(copied, tmp_path / "to")
    assert rows_of(card.text, "Data") == {
        "counting/train": ["10,000", "allenai/pixmo-count"],
        "val": ["7", "rows.jsonl, held out"],
    }
    assert card.data.datasets == ["allenai/pixmo-count"]


def test_a_card_tells_the_settings_that_differ_from_the_defaults(runs, tmp_path):
    rows = rows_of(export(runs["lora"], tmp_path / "to").text, "Training")
    assert rows["model.optimizer.lr"] == ["0.05"]
    assert rows["model.policy.lora.r"] == ["2"]
    assert rows["model.max_new_tokens"] == ["6"]
    assert rows["data.batch_size"] == ["2"]
    assert rows["seed"] == ["0"]
    assert rows["trainer.precision"] == ['"bf16-mixed"' if rows.get("model.policy.dtype") else '"32-true"']
    defaults = {"model.optimizer.eps", "model.policy.name", "model.policy.freeze_vision", "data.shuffle", "data.task"}
    assert not defaults & rows.keys()


def test_metadata_is_what_the_hub_knows(runs, tmp_path):
    data = export(runs["full"], tmp_path / "to").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert data.tags == ["perception-r1", "visual-perception", "sft", "grounding"]
    assert data.get("base_model") is data.get("license") is data.get("datasets") is None  # of a folder without a card
    assert data.eval_results is None  # the run ended at another step


def test_the_last_weights_have_the_metrics_of_the_run_as_their_model_index(runs, tmp_path):
    data = export(runs["full"], tmp_path / "to", "--ckpt", "last").data
    after = json.loads((runs["full"] / "run.json").read_text())["after"]
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {name: value for name, value in after.items() if not name.startswith("reward/")}
    assert {result.dataset_name for result in data.eval_results} == {"synthetic scenes (GroundingWorld)"}
    assert {result.dataset_split for result in data.eval_results} == {"test"}


def test_license_and_base_are_those_of_the_base_models_card(copied, copy_folder, tmp_path):
    base, name = copy_folder("base"), json.loads((copied / "run.json").read_text())["policy"]["name"]
    (base / "README.md").write_text(CARD)
    for path in (copied / "run.json", copied / "config.yaml"):
        path.write_text(path.read_text().replace(name, str(base)))
    card = export(copied, tmp_path / "to")
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "research", "LICENSE")
    assert card.data.base_model == "someone/base"
    assert "that of its base model, base: research." in card.text
    (base / "README.md").write_text("---\n- [broken\n---\n")
    assert export(copied, tmp_path / "again").data.get("license") is None


def python_of(text: str) -> str:
    return text.partition("```python\n")[2].partition("```")[0]


def bounds_of(processor_file: Path) -> str:
    size = json.loads(processor_file.read_text())["size"]
    return f'size={{"shortest_edge": {size["shortest_edge"]}, "longest_edge": {size["longest_edge"]}}}'


def test_an_adapter_says_how_it_is_put_on_its_base_and_how_pictures_are_sized(runs, model_folders, tmp_path):
    card = export(runs["lora"], tmp_path / "to", "--adapter")
    assert card.data.library_name == "peft"
    assert "PeftModel.from_pretrained(base" in card.text
    assert "pip install peft transformers torchvision pillow" in card.text
    code = python_of(card.text)
    compile(code, "README.md", "exec")
    assert f'folder = "{model_folders["qwen2_vl"].name}"' in code
    assert bounds_of(model_folders["qwen2_vl"] / "preprocessor_config.json") in code
    assert "vllm serve" not in card.text


def exported(run: Path, policy: Policy) -> Export:
    """As if a run had trained a model."""
    return Export(
        run=open_run(run),
        checkpoint=run / "checkpoints" / "best.ckpt",
        step=2,
        family=policy.family.name,
        codec=policy.codec,
        processor=policy.processor,
        is_adapter=False,
        evaluations=[],
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_card_names_vllm_where_it_was_compared_with_our_own_engine(runs, model_folders, family):
    policy = Policy.load(PolicyConfig(name=str(model_folders[family])), is_trained=False)
    text = "\n\n".join(usage(exported(runs["full"], policy)))
    compile(python_of(text), "README.md", "exec")
    assert ("vllm serve" in text) == (family in {*SAME, "internvl"})
    if "vllm serve" in text:
        options = json.loads(text.partition("--mm-processor-kwargs '")[2].partition("'")[0])
        assert options == policy.processor.hub_options
    if family == "internvl":
        assert options["use_fast"] is False
        assert "use_fast" not in python_of(text)


def run_card(text: str, folder: Path, monkeypatch, capsys) -> str:
    """What the Python of a card prints about a picture."""
    pixels = torch.randint(256, (210, 300, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(folder / "picture.jpg")
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(python_of(text), "README.md", "exec"), {})
    return capsys.readouterr().out.removesuffix("\n")


@torch.no_grad()
def answer_of(policy: Policy, folder: Path, max_new_tokens: int) -> str:
    """What our own engine answers to the same question."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompts = policy.encode([chat], [[Image.open(folder / "picture.jpg").convert("RGB")]])
    params = policy.sampling_params(max_new_tokens=max_new_tokens, is_greedy=True)
    rollout = NativeEngine().generate(policy, prompts, group_size=1, params=params, seeds=[0])
    return policy.processor.decode(rollout.completions)[0]


@pytest.mark.vllm  # its environment has torchvision
@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family != "gemma3"]
)  # whose tiny model is not whole
def test_the_python_of_a_card_answers_as_our_own_engine_does(
    runs, model_folders, family, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(model_folders[family], tmp_path / "folder")
    policy = Policy.load(PolicyConfig(name=str(folder)), is_trained=False).eval()
    text = "\n\n".join(usage(exported(runs["full"], policy)))
    assert run_card(text, folder, monkeypatch, capsys) == answer_of(policy, folder, 6)


@pytest.mark.vllm
def test_the_python_of_an_adapters_card_answers_as_the_run_does(runs, model_folders, tmp_path, monkeypatch, capsys):
    text = export(runs["lora"], tmp_path, "--adapter").text
    (tmp_path / model_folders["qwen2_vl"].name).symlink_to(model_folders["qwen2_vl"])
    run = open_run(runs["lora"])
    policy, _ = load_checkpoint(run.policy, checkpoint_path(run, "best"))
    assert run_card(text, tmp_path, monkeypatch, capsys) == answer_of(policy.eval(), tmp_path, 6)


def test_a_card_of_a_model_that_can_think_says_that_it_answers_at_once(runs, tmp_path, monkeypatch):
    load = QwenVLProcessor.load

    def can_think(*args, **options):
        processor = load(*args, **options)
        processor.template_options = {"enable_thinking": False}
        return processor

    monkeypatch.setattr(QwenVLProcessor, "load", can_think)
    text = export(runs["full"], tmp_path / "to").text
    code = python_of(text)
    compile(code, "README.md", "exec")
    assert 'return_tensors="pt", enable_thinking=False,\n' in code
    assert """ \\\n    --default-chat-template-kwargs '{"enable_thinking": false}'\n""" in text


def test_a_card_says_how_a_folder_is_loaded(runs, tmp_path):
    text = export(runs["full"], tmp_path / "to").text
    settings = json.loads((tmp_path / "to" / "preprocessor_config.json").read_text())["size"]
    bounds = {"size": {name: settings[name] for name in ("shortest_edge", "longest_edge")}}
    assert f"vllm serve . --mm-processor-kwargs '{json.dumps(bounds)}'" in text
    assert "pip install transformers torchvision pillow" in text
    code = python_of(text)
    compile(code, "README.md", "exec")
    assert '"text": "Output the bounding box of the red cup in the image."' in code
    assert "max_new_tokens=6" in code


def test_a_prompt_that_asks_for_thoughts_is_told_whole(copied, tmp_path):
    change(copied / "run.json", lambda card: card["task"]["init_args"].update(think=True))
    text = export(copied, tmp_path / "to").text
    assert f"in the image.{THINK_REQUEST}`" in text
    assert json.dumps(f"Output the bounding box of the red cup in the image.{THINK_REQUEST}") in text


# -------------------------------------------------------------------------------------------------- evaluations


@pytest.fixture
def evaluated(copied, tmp_path) -> Path:
    """An evaluation of the best checkpoint, as `perception-r1 test` leaves it behind."""
    folder = copied.parent / "eval-0123456789ab"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        "ckpt_path: elsewhere/version_0/checkpoints/best.ckpt\ndata: {init_args: {eval_split: val}}\n"
    )
    (folder / "metrics.json").write_text('{"coco": {"reward": 1.25, "reward/iou": 0.5, "ap": 0.75, "ap_large": null}}')
    (folder / "margins_of_error.json").write_text(
        '{"coco": {"reward": 0.0625, "reward/iou": 0.1, "ap": 0.125, "ap_large": null}}'
    )
    (folder / "predictions.jsonl").write_text('{"source": "coco"}\n' * 1200)
    return folder


def test_evaluations_of_exactly_these_weights_are_told(copied, evaluated, tmp_path):
    card = export(copied, tmp_path / "to")
    text = card.text.partition("## Evaluations of these weights")[2].partition("\n## ")[0]
    assert [line for line in text.splitlines() if line.startswith("| val")] == [
        "| val | coco | 1,200 | reward | 1.2500 ± 0.0625 |",
        "| val | coco | 1,200 | reward/iou | 0.5000 ± 0.1000 |",
        "| val | coco | 1,200 | ap | 0.7500 ± 0.1250 |",
        "| val | coco | 1,200 | ap_large | - |",
    ]
    found = [(one.dataset_name, one.dataset_split, one.metric_type, one.metric_value) for one in card.data.eval_results]
    assert found == [("coco", "val", "reward", 1.25), ("coco", "val", "ap", 0.75)]
    other = export(copied, tmp_path / "last", "--ckpt", "last")
    assert "## Evaluations" not in other.text


def test_an_evaluation_of_older_weights_is_none_of_these(copied, evaluated):
    checkpoint = copied / "checkpoints" / "best.ckpt"
    assert [found.name for found in evaluations_of(checkpoint)] == [evaluated.name]
    later = (evaluated / "margins_of_error.json").stat().st_mtime_ns + 1
    os.utime(checkpoint, ns=(later, later))
    assert evaluations_of(checkpoint) == []


def test_an_evaluation_of_the_untrained_model_is_none_of_these(copied, evaluated):
    (evaluated / "config.yaml").write_text("ckpt_path: null\n")
    assert evaluations_of(copied / "checkpoints" / "best.ckpt") == []


def test_a_damaged_evaluation_is_one_sentence(copied, evaluated):
    (evaluated / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"the evaluation .*eval-0123456789ab cannot be read .*: remove or repeat it"):
        evaluations_of(copied / "checkpoints" / "best.ckpt")


def test_an_evaluation_by_the_command_line_is_found(copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = json.loads((copied / "run.json").read_text())["policy"]["name"]
    options = ["--task=grounding", f"--model.policy.name={name}", "--data.num_test=3", "--model.max_new_tokens=6"]
    assert main(["test", *options, "--ckpt_path=best"]) == 0
    (found,) = evaluations_of(copied / "checkpoints" / "best.ckpt")
    assert (found.split, found.num_samples) == ("test", {"test": 3})
    assert {"reward", "accuracy_50"} <= found.margins["test"].keys() <= found.metrics["test"].keys()


# ----------------------------------------------------------------------------------------------------- settings


def test_a_class_goes_by_its_own_signature_and_by_those_of_its_bases():
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "eps": 1e-6, "betas": [0.9, 0.999]}}
    assert dict(deviations({"optimizer": optimizer}, {})) == {"optimizer": "AdamW", "optimizer.eps": 1e-6}
    defaults = class_defaults("perception_r1.modules.GRPO")
    assert (defaults["group_size"], defaults["repetition_penalty"]) == (8, 1.0)


def test_a_class_that_is_not_there_is_one_sentence():
    with pytest.raises(UserError, match=r"there is no class nowhere\.Nothing"):
        class_defaults("nowhere.Nothing")
