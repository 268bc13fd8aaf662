import json
from pathlib import Path

import pytest

from perception_r1.cli import main
from perception_r1.commands.reader import load_reader
from perception_r1.data.module import TaskDataModule
from perception_r1.embedded.warmup import EmbeddedConfig
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.tasks.grounding import GroundingData
from tests.public_data import picture

CONFIGS = Path(__file__).parents[2] / "configs"
GOOD = {"question": "cup", "box": [10, 20, 50, 80]}


@pytest.fixture
def fit(tmp_path, monkeypatch, folder, capsys):
    """Runs a short training on rows of which the second is too wide for any model and the fifth too long for this."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    for number in range(6):
        picture(tmp_path / f"{number}.png", number)
    picture(tmp_path / "1.png", size=(4100, 20))
    rows = [GOOD | {"image": f"{number}.png"} for number in range(6)]
    rows[1] |= {"box": [10, 2, 50, 8]}
    rows[4] |= {"question": "cup " * 300}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*more: str, model: str = str(folder)) -> tuple[int, str]:
        names = ("default.yaml", "task/grounding.yaml", "model/tiny.yaml", "tiny/grounding.yaml")
        files = [word for name in names for word in ("-c", str(CONFIGS / name))]
        small = ["--trainer.max_steps=3", "--data.batch_size=2", "--data.train_file=rows.jsonl", "--data.shuffle=false"]
        small += ["--model.max_new_tokens=4", "--trainer.val_check_interval=3", f"--model.policy.name={model}"]
        status = main(["fit", *files, *small, "--model.policy.max_prompt_length=300", *more])
        return status, capsys.readouterr().err

    return call


def test_a_run_leaves_out_what_its_model_cannot_take(fit, caplog):
    assert fit("--data.on_bad_row=skip") == (0, "")
    assert "rows.jsonl: 2 of 6 rows cannot be used and are left out" in caplog.text
    assert "rows.jsonl:2: A picture has 4100 x 20 pixels" in caplog.text
    assert "rows.jsonl:5: The prompt has" in caplog.text


def test_or_stops_before_any_weight_is_read(fit, monkeypatch):
    monkeypatch.setattr(Policy, "load", lambda *args, **options: pytest.fail("the weights were read"))
    monkeypatch.setattr("perception_r1.commands.training.warm_policy", lambda *args, **options: pytest.fail("warmed"))
    for more in ({}, {"model": "tiny"}):
        status, error = fit(**more)
        assert status == 2
        assert error.startswith("perception-r1: error: rows.jsonl:2: A picture has 4100 x 20 pixels")


def test_the_embedded_policy_counts_as_its_warm_start_will(tmp_path, folder):
    """It is built without its warm start, and gone when its processor is there."""
    data: TaskDataModule = GroundingData(num_train=300)
    _, processor = load_reader(PolicyConfig(name="tiny"), EmbeddedConfig(), data, seed=0)
    again = load_reader(PolicyConfig(name="tiny"), EmbeddedConfig(), data, seed=1)[1]
    assert processor.tokenizer.get_vocab() == again.tokenizer.get_vocab()
    codec, other = load_reader(PolicyConfig(name=str(folder)), None, data, seed=0)
    assert codec.name == "qwen2_vl"
    assert other.tokenizer.get_vocab() != processor.tokenizer.get_vocab()
