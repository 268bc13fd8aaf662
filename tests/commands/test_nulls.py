import pytest

from perception_r1.cli import main


@pytest.mark.parametrize(
    "option",
    ["data.held_out_share", "data.num_val", "model.kl_coef", "model.temperature", "trainer.callbacks.patience"],
)
def test_null_is_refused_where_a_class_cannot_take_it(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    callback = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/reward"]
    assert main(["fit", "--task", "counting", *callback, f"--{option}=null"]) == 2
    assert capsys.readouterr().err == f"perception-r1 fit: error: --{option} must not be null\n"


def test_null_is_taken_where_it_means_something(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--model.final_group_size=null", "--data.global_batch_size=null", "--data.longest_first=null"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    assert main(["data", "check", "--task", "counting", "--data.train_file", str(rows), *options]) == 2
    assert "is empty, it needs at least one row" in capsys.readouterr().err


def test_types_that_only_a_checker_knows_are_no_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--task", "counting", "--trainer.logger", "WandbLogger"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("perception-r1 fit: error: ")
    assert "wandb" in error
    assert error.count("\n") == 1
