"""The parts of a configuration make what the files that they name make one after another."""

import shutil
from pathlib import Path

import pytest
import yaml

from perception_r1.cli import main
from perception_r1.commands import compose as module
from perception_r1.commands.compose import compose
from perception_r1.errors import UserError
from perception_r1.evaluation.paper import GENERATION
from perception_r1.tasks import TASKS
from tests.evaluation.evaluating import DATA

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted(path.stem for path in (CONFIGS / "model").iterdir())


@pytest.fixture
def printed(capsys):
    """What a command line comes to."""

    def run(*words):
        assert main(["fit", *map(str, words), "--print_config"]) == 0
        out, errors = capsys.readouterr()
        assert errors == ""
        return yaml.safe_load(out)

    return run


def files(*names):
    """Files for the parser, which merges them by itself."""
    return [word for name in names for word in ("-c", CONFIGS / f"{name}.yaml")]


@pytest.mark.parametrize("task", TASKS)
def test_a_task_alone_is_trained_with_the_embedded_model(printed, task):
    config = printed("--task", task)
    assert config == printed(*files("default", f"task/{task}", "model/tiny", f"tiny/{task}"))
    assert (config["task"], config["run_name"]) == (task, task)
    assert config["data"]["class_path"].endswith(f".{task.capitalize()}Data")
    assert config["model"]["init_args"]["policy"]["name"] == "tiny"
    assert config["data"]["init_args"]["world"]["init_args"]["skew"] < DATA[task]().world.skew  # harder


def test_all_tasks_are_trained_in_the_worlds_of_each(printed):
    config = printed("--task", "all")
    assert config["data"]["class_path"].endswith(".MixedData")
    assert list(config["data"]["init_args"]["tasks"]) == ["grounding", "counting", "detection", "ocr"]
    for task, part in config["data"]["init_args"]["tasks"].items():
        alone = printed("--task", task)["data"]
        assert part["class_path"] == alone["class_path"]
        assert part["init_args"]["world"] == alone["init_args"]["world"]
        assert part["init_args"]["task"] == alone["init_args"]["task"]
    changed = printed("--task", "all", "--data.tasks.ocr.init_args.num_val", 7, "--data.weights", '{"ocr": 2}')
    assert changed["data"]["init_args"]["tasks"]["ocr"]["init_args"]["num_val"] == 7
    assert changed["data"]["init_args"]["weights"] == {"ocr": 2}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_model_goes_with_every_kind_of_training(printed, model):
    own = [f"{model}/grounding"] if (CONFIGS / model / "grounding.yaml").exists() else []
    names = ["default", "task/grounding", f"model/{model}", *own]
    for variant in ([], ["sft"]):
        config = printed("--task=grounding", f"--model={model}", *(f"--variant={name}" for name in variant))
        assert config == printed(*files(*names, *(f"variant/{name}" for name in variant)))
        assert config["model"]["class_path"].endswith("SFT" if variant else "GRPO")
        assert config["run_name"] == ("grounding-sft" if variant else "grounding")


@pytest.mark.parametrize("task", GENERATION)
def test_the_published_protocol_generates_as_the_published_answers_were(printed, task):
    parts = "--task", task, "--model", "qwen2_vl_2b"
    config = printed(*parts, "--variant", "think", "--protocol", "published")
    settings, published = config["model"]["init_args"], GENERATION[task]
    assert settings["max_new_tokens"] == published.max_new_tokens
    assert settings["repetition_penalty"] == published.repetition_penalty
    assert settings["policy"]["max_pixels"] is None
    options = config["data"]["init_args"]["task"]["init_args"]
    assert (options["prompt_template"], options["think"]) == (published.prompt_template, False)
    assert printed(*parts, "--protocol", "strict") == printed(*parts)


def test_all_parts_are_merged_in_their_order_whatever_the_order_on_the_command_line(printed):
    names = ("default", "task/detection", "model/qwen2_5_vl_3b", "data/coco", "recipes/detection")
    expected = printed(*files(*names, "variant/lora", "variant/think"))
    parts = ["--variant", "lora", "--recipe=detection", "--data", "coco", "--variant=think", "--model", "qwen2_5_vl_3b"]
    assert printed(*parts, "--task", "detection") == expected
    assert expected["model"]["init_args"]["policy"]["lora"]["r"] == 16
    assert expected["model"]["init_args"]["final_group_size"] == 16


def test_settings_that_a_new_class_does_not_take_are_left_out_in_silence(printed):
    config = printed("--task", "detection", "--model", "tiny", "--recipe", "detection", "--variant", "sft")
    assert "kl_coef" not in config["model"]["init_args"]
    assert "final_group_size" not in config["model"]["init_args"]
    assert config["model"]["init_args"]["micro_batch_tokens"] == 8192


def test_files_and_options_of_the_user_have_the_last_word(printed, tmp_path):
    (tmp_path / "mine.yaml").write_text("data: {init_args: {batch_size: 5, num_val: 6}}")
    config = printed("--data.num_val=7", "-c", tmp_path / "mine.yaml", "--task", "ocr", "--data.num_test=8")
    assert [config["data"]["init_args"][name] for name in ("batch_size", "num_val", "num_test")] == [5, 6, 8]


def test_options_below_model_and_data_are_no_parts(printed):
    config = printed("--task", "ocr", "--model.group_size", 4, "--data.batch_size=3", "--model.optimizer", "SGD")
    assert config["model"]["init_args"]["group_size"] == 4
    assert config["data"]["init_args"]["batch_size"] == 3
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.SGD"


@pytest.mark.parametrize("name", ["Qwen/Qwen2-VL-2B-Instruct", "folder"])
def test_a_model_may_be_a_hub_id_or_a_folder(printed, folder, name):
    name = str(folder) if name == "folder" else name
    expected = printed(*files("default", "task/ocr"), "--model.policy.name", name)
    assert printed("--task", "ocr", "--model", name) == expected


def test_data_may_be_a_file_of_rows(printed):
    assert printed("--task", "ocr", "--data", "rows.jsonl")["data"]["init_args"]["train_file"] == "rows.jsonl"


def test_a_folder_of_configurations_here_comes_first_and_may_hold_some_of_the_parts(printed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "task").mkdir(parents=True)
    text = (CONFIGS / "task" / "ocr.yaml").read_text()
    (tmp_path / "configs" / "task" / "mine.yaml").write_text(text.replace("task: ocr", "task: mine"))
    config = printed("--task", "mine", "--model", "tiny")
    assert config["run_name"] == "mine"
    assert config["data"]["init_args"]["batch_size"] == 16  # of the checkout's model
    (tmp_path / "configs" / "model").mkdir()
    shutil.copy(CONFIGS / "model" / "tiny.yaml", tmp_path / "configs" / "model")
    with (tmp_path / "configs" / "model" / "tiny.yaml").open("a") as file:
        file.write("    num_val: 3\n")
    assert printed("--task", "mine")["data"]["init_args"]["num_val"] == 3
    with pytest.raises(UserError, match=r"give one of all, counting, detection, grounding, mine, ocr$"):
        compose(["--task", "cup"])


MODEL_NAMES = ", ".join(MODELS)
DATA_NAMES = ", ".join(sorted(path.stem for path in (CONFIGS / "data").iterdir()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--task is needed, one of all, counting, detection, grounding, ocr; or -c with a complete configuration"),
        (["--trainer.max_steps", "3"], "--task is needed, one of all, counting"),
        (["--model", "tiny"], "--model goes with --task, one of all, counting, detection, grounding, ocr"),
        (["-c", "x.yaml", "--variant", "lora"], "--variant goes with --task, one of all, counting"),
        (
            ["--task", "cup"],
            "--task cup: there is no configs/task/cup.yaml; give one of all, counting, detection, grounding, ocr",
        ),
        (
            ["--task", "ocr", "--model", "GRPO"],
            f"--model GRPO: there is no configs/model/GRPO.yaml; give one of {MODEL_NAMES}, a hub id such as "
            "Qwen/Qwen2-VL-2B-Instruct, or a folder; a class is given as --model.class_path",
        ),
        (
            ["--task=ocr", "--data=CountingData"],
            f"--data CountingData: there is no configs/data/CountingData.yaml; give one of {DATA_NAMES}, or a file of "
            "JSON lines; a class is given as --data.class_path",
        ),
        (
            ["--task", "ocr", "--protocol", "x"],
            "--protocol x: there is no configs/protocol/x.yaml; give one of published, ",
        ),
        (["--task", "ocr", "--recipe", "x"], "--recipe x: there is no configs/recipes/x.yaml; give one of counting, "),
        (["--task", "ocr", "--variant=sft", "--variant=x"], "--variant x: there is no configs/variant/x.yaml; give"),
        (["--task"], "argument --task: expected one argument"),
    ],
)
@pytest.mark.parametrize("command", [["fit"], ["validate"], ["test"], ["data", "check"]])
def test_a_part_that_is_unknown_or_missing_is_one_sentence(capsys, command, words, message):
    assert main([*command, *words]) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert f"{command[0]}: error: {message}" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("text", ["a: [", "- a list", "a: ${b"])
def test_a_damaged_file_is_one_sentence(capsys, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "task").mkdir(parents=True)
    (tmp_path / "configs" / "task" / "mine.yaml").write_text(text)
    assert main(["fit", "--task", "mine"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("perception-r1 fit: error: configs/task/mine.yaml is no configuration (")
    assert errors.count("\n") == 1


def test_without_any_folder_of_configurations_the_way_out_is_told(monkeypatch):
    monkeypatch.setattr(module, "_FOLDERS", ())
    with pytest.raises(UserError, match=r"there is no configs/default\.yaml, here or beside the package"):
        compose(["--task", "ocr"])


def test_a_class_may_be_given_by_its_path(printed):
    assert printed("--task", "ocr", "--model.class_path", "SFT")["model"]["class_path"].endswith("SFT")


@pytest.mark.parametrize(
    "words", [["-c", "x.yaml"], ["--config=x.yaml"], ["-h"], ["--help"], ["--data.help", "OcrData"]]
)
def test_complete_configurations_and_help_need_no_task(words):
    assert compose([*words, "--seed_everything", "1"]) == [*words, "--seed_everything", "1"]
