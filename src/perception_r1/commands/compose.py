"""A run's configuration by the names of its parts: files of `configs`, merged so that later ones have the last word.

    fit --task counting --model tiny --data coco --recipe detection --variant lora

stands for default.yaml, task/counting.yaml, model/tiny.yaml, tiny/counting.yaml (what this model needs for this task,
where there is such a file), data/coco.yaml, recipes/detection.yaml and variant/lora.yaml. `--model` may also be a hub
id or a folder, `--data` a file of JSON lines to train on. A file of ./configs comes before that of the checkout.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from perception_r1.commands.options import first_options
from perception_r1.errors import UserError

PARTS = {
    "task": "what to train or test",
    "model": "a name in configs/model, a hub id or a folder (default: tiny)",
    "data": "a name in configs/data or a file of JSON lines (default: synthetic scenes)",
    "recipe": "the settings of a published training, a name in configs/recipes",
    "variant": "a deviation, a name in configs/variant; may be given several times",
}
"""The options that name parts, with their help."""

_DEFAULT_MODEL = "tiny"
_FOLDERS = (Path("configs"), Path(__file__).parents[3] / "configs")
_STANDALONE = re.compile(r"-h|--help.*|--\w+\.help.*|-c.*|--config(=.*)?")
"""Options with which a command line needs no task: it asks for help, or brings a configuration of its own."""

_Config = dict[str, Any]


def compose(argv: Sequence[str]) -> list[str]:
    """Put the configuration that the parts make in their place, ahead of all that was given besides.

    Args:
        argv: Options of a run, those that name parts among them.

    Returns:
        Options that LightningCLI knows.

    Raises:
        UserError: A part is unknown or damaged, or there is none and no configuration either.
    """
    parts, rest = first_options(argv, *PARTS)
    if "task" not in parts:
        tasks = ", ".join(_known("task"))
        if parts:
            raise UserError(f"--{next(iter(parts))} goes with --task, one of {tasks}")
        if not any(_STANDALONE.fullmatch(word) for word in argv):
            raise UserError(f"--task is needed, one of {tasks}; or -c with a complete configuration")
        return rest
    configs: list[_Config] = [{}]
    merged: _Config = {}
    for layer in _layers(parts):
        if _changes_class(merged, layer):  # a configuration of its own: the parser then leaves out what the new
            configs.append({})  # class does not take
        configs[-1] = _plain(OmegaConf.merge(configs[-1], layer))
        merged = _plain(OmegaConf.merge(merged, layer))
    return [f"--config={OmegaConf.to_yaml(OmegaConf.create(config))}" for config in configs] + rest


def _layers(parts: Mapping[str, Sequence[str]]) -> Iterator[_Config]:
    """The configurations of the parts, in the order in which they are merged."""
    task, model = parts["task"][-1], parts.get("model", [_DEFAULT_MODEL])[-1]
    yield _load("default.yaml")
    yield _named("task", task)
    if _find(f"model/{model}.yaml") is None and ("/" in model or Path(model).is_dir()):
        yield {"model": {"init_args": {"policy": {"name": model}}}}
    else:
        yield _named("model", model, ", a hub id such as Qwen/Qwen2-VL-2B-Instruct, or a folder")
    if _find(f"{model}/{task}.yaml") is not None:
        yield _load(f"{model}/{task}.yaml")
    for data in parts.get("data", [])[-1:]:
        if _find(f"data/{data}.yaml") is None and (Path(data).suffix or Path(data).is_file()):
            yield {"data": {"init_args": {"train_file": data}}}
        else:
            yield _named("data", data, ", or a file of JSON lines")
    for recipe in parts.get("recipe", [])[-1:]:
        yield _named("recipe", recipe, folder="recipes")
    for variant in parts.get("variant", []):
        yield _named("variant", variant)


def _named(part: str, name: str, others: str = "", folder: str | None = None) -> _Config:
    """The configuration of a part.

    Raises:
        UserError: There is no file of this name.
    """
    path = f"{folder or part}/{name}.yaml"
    if _find(path) is None:
        known = ", ".join(_known(folder or part))
        by_class = f"; a class is given as --{part}.class_path" if part in ("model", "data") else ""
        raise UserError(f"--{part} {name}: there is no configs/{path}; give one of {known}{others}{by_class}")
    return _load(path)


def _load(name: str) -> _Config:
    """A file of the configuration.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    path = _find(name)
    if path is None:
        raise UserError(f"there is no configs/{name}, here or beside the package: work in a checkout, or give -c")
    try:
        return _plain(OmegaConf.load(path))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is no configuration ({' '.join(str(error).split())})") from error


def _find(name: str) -> Path | None:
    """The file of this name in the first of the folders that has it."""
    return next((folder / name for folder in _FOLDERS if (folder / name).is_file()), None)


def _known(folder: str) -> list[str]:
    """Names of the files in a folder of the configuration."""
    return sorted({path.stem for configs in _FOLDERS for path in configs.glob(f"{folder}/*.yaml")})


def _plain(config: Any) -> _Config:
    """As dictionaries, with what refers to other settings as it is written."""
    found = OmegaConf.to_container(config, resolve=False)
    if not isinstance(found, dict):
        raise ValueError("it must have names and values")
    return cast(_Config, found)


def _changes_class(config: Any, layer: Any) -> bool:
    """Whether a layer puts another class where a configuration has one."""
    if not (isinstance(config, Mapping) and isinstance(layer, Mapping)):
        return False
    if config.get("class_path", layer.get("class_path")) != layer.get("class_path", config.get("class_path")):
        return True
    return any(_changes_class(config[key], layer[key]) for key in layer if key in config)
