import json
from pathlib import Path

import pytest

from perception_r1.cli import main
from perception_r1.commands.reader import load_reader
from perception_r1.policy.families.qwen2_vl import Qwen2VLCodec
from perception_r1.policy.load import PolicyConfig, model_path
from perception_r1.policy.policy import Policy
from tests.public_data import picture

CONFIGS = Path(__file__).parents[2] / "configs"
GOOD = {"question": "cup", "box": [10, 20, 50, 80]}


@pytest.fixture
def fit(tmp_path, monkeypatch, folder, capsys):
    """Runs a short training on rows of which the second is too wide for any model and the fifth too long for this."""
    monkeypatch.chdir(tmp_path)
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
    assert "rows.jsonl:5: A prompt has" in caplog.text


def test_or_stops_before_any_weight_is_read(fit, monkeypatch):
    monkeypatch.setattr(Policy, "load", lambda *args, **options: pytest.fail("the weights were read"))
    for more in ({}, {"model": "tiny"}):
        status, error = fit(**more)
        assert status == 2
        assert error.startswith("perception-r1 fit: error: rows.jsonl:2: A picture has 4100 x 20 pixels")


def test_the_embedded_model_is_known_by_its_name():
    codec, processor = load_reader(PolicyConfig(name="tiny", max_pixels=50_000))
    known_codec, known = load_reader(PolicyConfig(name=model_path("tiny"), max_pixels=50_000))
    assert codec is known_codec
    assert isinstance(codec, Qwen2VLCodec)
    assert processor.tokenizer.get_vocab() == known.tokenizer.get_vocab()
    assert processor.image_size(640, 480) == known.image_size(640, 480)
    assert processor.image_size(640, 480).resized_width < 300
