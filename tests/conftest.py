"""Fixtures of all tests: tiny models of every family, built once, and one thread per process."""

import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import rich
import torch
import transformers
from rich.console import Console
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.integrations import moe

from perception_r1.cli import main
from perception_r1.embedded.model import build_model_folder
from perception_r1.policy.families import FAMILIES, QWEN_FAMILIES
from tests import tiny_models

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _experts_in_any_type() -> Iterator[None]:
    """Torch's product over experts knows no float64, in which the engine is compared; transformers has another."""
    plain = moe._can_use_grouped_mm
    with pytest.MonkeyPatch.context() as monkeypatch:
        exact = lambda rows, weight, offs: weight.dtype != torch.float64 and plain(rows, weight, offs)  # noqa: E731
        monkeypatch.setattr(moe, "_can_use_grouped_mm", exact)
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor change what the user's runs have checked."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PERCEPTION_R1_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """What a trainer writes into the environment: a rank makes a later one wait for its partner, a seed changes it."""
    yield
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model with random weights of every family, in the hub's layout."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        if family in QWEN_FAMILIES:
            build_model_folder(folder, family=family, seed=0)
        else:
            tiny_models.BUILDERS[family](folder)
    return folders


@pytest.fixture(scope="session")
def grouped_folders(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same with fewer key-value heads than heads, as the real models have, and other weights."""
    folders = {}
    for family, source in model_folders.items():
        folders[family] = tmp_path_factory.mktemp(f"{family}-grouped")
        shutil.copytree(source, folders[family], dirs_exist_ok=True)
        config = AutoConfig.from_pretrained(source)
        config.text_config.num_key_value_heads = config.text_config.num_attention_heads // 2
        torch.manual_seed(1)
        model = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():  # ones and zeros would hide many an error
                parameter.data += 0.1 * torch.randn(parameter.shape)
        for name, parameter in model.named_parameters():
            if name.endswith(".A_log"):  # states that decay as fast as fresh ones would tell nothing of their prompt
                parameter.data -= 4
        model.generation_config = transformers.GenerationConfig.from_pretrained(source)
        model.save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="session")
def folder(model_folders: dict[str, Path]) -> Path:
    """A tiny Qwen2-VL."""
    return model_folders["qwen2_vl"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, where it and playwright are installed."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def runs(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of short trainings on grounding that change weights: "full" of all of them, "lora" of an adapter."""
    options = ["--task=grounding", "--variant=sft", f"--model.policy.name={model_folders['qwen2_vl']}"]
    options += ["--trainer.max_steps=3", "--trainer.val_check_interval=2", "--log_samples.num_samples=0"]
    options += ["--data.batch_size=2", "--data.num_val=2", "--data.num_test=2"]
    options += ["--model.max_new_tokens=6", "--model.optimizer.lr=0.003"]
    adapter = ["--model.policy.lora.r=2", "--model.policy.lora.lora_alpha=6", "--model.optimizer.lr=0.05"]
    found = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("runs"))
        monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seeding everything sets it; so it is restored
        for name, more in {"full": [], "lora": adapter}.items():
            arguments = ["fit", *options, f"--run_name={name}-sft", *more]
            monkeypatch.setattr(sys, "argv", ["perception-r1", *arguments])
            assert main(arguments) == 0
            found[name] = Path.cwd() / "logs" / f"{name}-sft" / "version_0"
    return found


@pytest.fixture
def copy_folder(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the tiny Qwen2-VL, to be spoilt."""

    def copy(name: str = "copy") -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    return copy


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    """The global console, writing to a string as if to a file; `console.file.getvalue()` reads it."""
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    monkeypatch.setattr(rich, "_console", console)
    return console
