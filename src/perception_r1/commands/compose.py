"""A run's configuration by the names of its parts: files of `configs`, merged so that later ones have the last word.

    fit --task counting --model tiny --data coco --recipe detection --variant lora

stands for default.yaml, task/counting.yaml, model/tiny.yaml, tiny/counting.yaml (what this model needs for this task,
where there is such a file), data/coco.yaml, recipes/detection.yaml and variant/lora.yaml. `--model` may also be a hub
id or a folder, `--data` a file of JSON lines to train on. `--protocol published` adds protocol/published.yaml and
protocol/published/counting.yaml, `--engine vllm` engine/vllm.yaml. A file of ./configs comes before that of the
checkout.
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
    "protocol": "how an evaluation asks, strict or published, a name in configs/protocol (default: strict)",
    "engine": "what writes completions, a name in configs/engine (default: the engine of this package)",
}
"""The options that name parts, with their help."""

_DEFAULT_MODEL = "tiny"
_FOLDERS = (Path("configs"), Path(__file__).parents[3] / "configs")
_STANDALONE = re.compile(r"-h|--help.*|--\w+\.help.*|-c.*|--config(=.*)?")
"""Options with which a command line needs no task: it asks for help, or brings a configuration of its own."""

_Config = dict[str, Any]


def compose(argv: Sequence[str]) -> list[str]:
    """Options that LightningCLI knows: the configuration that the parts make, ahead of all that was given besides.

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
        configs[-1], merged = _merge(configs[-1], layer), _merge(merged, layer)
    return [f"--config={OmegaConf.to_yaml(OmegaConf.create(config))}" for config in configs] + rest


def engine_settings(name: str) -> _Config:
    """The class of an engine and its options, from the file of this name in configs/engine.

    Raises:
        UserError: There is no such file.
    """
    settings: _Config = _read(f"engine/{name}", "--engine")["model"]["init_args"]["engine"]
    return settings


def _layers(parts: Mapping[str, Sequence[str]]) -> Iterator[_Config]:
    """The configurations of the parts, in the order in which they are merged."""
    task, model = parts["task"][-1], parts.get("model", [_DEFAULT_MODEL])[-1]
    yield _read("default")
    yield _read(f"task/{task}", "--task")
    if _find(f"model/{model}") is None and ("/" in model or Path(model).is_dir()):
        yield {"model": {"init_args": {"policy": {"name": model}}}}
    else:
        others = ", a hub id such as Qwen/Qwen2-VL-2B-Instruct, or a folder; a class is given as --model.class_path"
        yield _read(f"model/{model}", "--model", others)
    if _find(f"{model}/{task}") is not None:
        yield _read(f"{model}/{task}")
    for data in parts.get("data", [])[-1:]:
        if _find(f"data/{data}") is None and (Path(data).suffix or Path(data).is_file()):
            yield {"data": {"init_args": {"train_file": data}}}
        else:
            yield _read(f"data/{data}", "--data", ", or a file of JSON lines; a class is given as --data.class_path")
    for recipe in parts.get("recipe", [])[-1:]:
        yield _read(f"recipes/{recipe}", "--recipe")
    for variant in parts.get("variant", []):
        yield _read(f"variant/{variant}", "--variant")
    for protocol in parts.get("protocol", [])[-1:]:
        yield _read(f"protocol/{protocol}", "--protocol")
        if _find(f"protocol/{protocol}/{task}") is not None:
            yield _read(f"protocol/{protocol}/{task}")
    for engine in parts.get("engine", [])[-1:]:
        yield _read(f"engine/{engine}", "--engine", "; a class is given as --model.engine")


def _read(name: str, option: str = "", others: str = "") -> _Config:
    """A file of the configuration, named by an option that may also be something else (`others`).

    Raises:
        UserError: There is no such file, it cannot be read, or it holds something else.
    """
    path, (folder, _, value) = _find(name), name.rpartition("/")
    if path is None and not option:
        raise UserError(f"there is no configs/{name}.yaml, here or beside the package: work in a checkout, or give -c")
    if path is None:
        known = ", ".join(_known(folder))
        raise UserError(f"{option} {value}: there is no configs/{name}.yaml; give one of {known}{others}")
    try:
        return _merge(OmegaConf.load(path), {})
    except (OSError, TypeError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is no configuration ({' '.join(str(error).split())})") from error


def _find(name: str) -> Path | None:
    """The file of this name in the first of the folders that has it."""
    return next((path for folder in _FOLDERS if (path := folder / f"{name}.yaml").is_file()), None)


def _known(folder: str) -> list[str]:
    """Names of the files in a folder of the configuration."""
    return sorted({path.stem for configs in _FOLDERS for path in configs.glob(f"{folder}/*.yaml")})


def _merge(config: Any, layer: _Config) -> _Config:
    """Both as dictionaries, with what refers to other settings left as it is written."""
    return cast(_Config, OmegaConf.to_container(OmegaConf.merge(config, layer)))


def _changes_class(config: Any, layer: Any) -> bool:
    """Whether a layer puts another class where a configuration has one."""
    if not (isinstance(config, dict) and isinstance(layer, dict)):
        return False
    paths = {part["class_path"] for part in (config, layer) if "class_path" in part}
    return len(paths) > 1 or any(_changes_class(config[key], layer[key]) for key in layer if key in config)
