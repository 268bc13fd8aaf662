"""From a hub id or folder to a network: family, dtype, adapter, what is trained."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from perception_r1.errors import UserError, reading
from perception_r1.policy.compatibility import check_fits
from perception_r1.policy.families import FAMILIES, Family, family_of
from perception_r1.policy.processor import Processor

EMBEDDED = "tiny"
"""Name of the model that comes with this package."""
_EMBEDDED_FOLDER = Path(__file__).parents[1] / "embedded" / EMBEDDED

Dtype: TypeAlias = Literal["float32", "bfloat16"]
"""Types of weights."""
TEXT_LINEARS = (
    r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|gate_up_proj|down_proj|in_proj_\w+|out_proj)"
)
"""Every linear layer of the language model but gates of experts, by the names of transformers."""


@dataclass(kw_only=True)
class LoraConfig:
    """A low-rank adapter instead of full fine-tuning.

    Attributes:
        r: Rank of the update of each adapted matrix.
        lora_alpha: Scale of the update is lora_alpha / r.
        lora_dropout: Dropout before the adapter's first matrix.
        target_modules: Regular expression over module names; by default all linear layers of the language model.
    """

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: str = TEXT_LINEARS


@dataclass(kw_only=True)
class PolicyConfig:
    """Which model is trained, and what of it.

    Attributes:
        name: Hub id (Qwen/Qwen2-VL-2B-Instruct), a local folder in the hub's layout (`~` is the home folder), or
            `tiny`: the model that comes with this package.
        dtype: Type of the weights. Mixed precision is the trainer's own setting (`--trainer.precision bf16-mixed`).
        attn_implementation: Attention of the vision tower; the language model has its own, which shares prompts.
        freeze_vision: Leave the vision tower as it is.
        gradient_checkpointing: Recompute activations in backward: less memory, about a third more time.
        lora: Train a low-rank adapter; null trains the weights themselves.
        min_pixels: Smaller pictures are enlarged to this many pixels; null keeps the model's bound.
        max_pixels: Larger pictures are shrunk to this many pixels; null keeps the model's bound.
        max_prompt_length: A longer prompt is an error; a prompt is never cut. Null accepts any length.
    """

    name: str = "tiny"
    dtype: Dtype = "float32"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    freeze_vision: bool = False
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_prompt_length: int | None = None

    def __post_init__(self) -> None:
        self.name = os.path.expanduser(self.name)


def model_path(name: str) -> str:
    """What transformers loads: the folder in this package for `tiny`, else the hub id or folder itself."""
    return str(_EMBEDDED_FOLDER) if name == EMBEDDED else name


def load_model(config: PolicyConfig) -> PreTrainedModel:
    """Weights of the policy, without adapter, everything trainable.

    Raises:
        UserError: The folder does not exist or its files are damaged, its family is not one of ours or computes in
            another way, or weights are quantised, missing or unexpected.
    """
    family = model_family(config.name)
    settings = AutoConfig.from_pretrained(model_path(config.name), trust_remote_code=False)
    family.check(config.name, settings)
    _read_generation_config(config.name, settings)  # transformers goes on without one that is damaged
    with reading(f"The model {config.name} cannot be loaded", "use the files that belong together"):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            model_path(config.name),
            trust_remote_code=False,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            ignore_mismatched_sizes=True,  # they are in the report, and refused below
            output_loading_info=True,
        )
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise UserError(
                f"{config.name} does not fit {family.name}: {len(names)} {kind.replace('_', ' ')}, first {names[0]}."
            )
    family.prepare(model)
    return cast(PreTrainedModel, model)


class WithoutWeights(nn.Module):
    """In place of a model whose weights another engine has: what its configuration says, and nothing that computes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.config: PretrainedConfig = AutoConfig.from_pretrained(model_path(name), trust_remote_code=False)
        self.generation_config = _read_generation_config(name, self.config)


def load_processor(name: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Processor:
    """The processor of a hub id or folder, or `tiny`; a bound of None is the model's own.

    Raises:
        UserError: Files are missing, damaged or do not fit the model's configuration, a bound is not positive or not
            known to the family, or `min_pixels` exceeds `max_pixels`.
    """
    family, path = model_family(str(name)), model_path(str(name))
    what = f"Tokenizer and image processor of {name} cannot be loaded"
    with reading(what, "use the files that belong to the model"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        processor = family.processor.load(path, config)
        check_fits(processor, config, str(name))
    if min_pixels is not None and min_pixels < 1:
        raise UserError(f"min_pixels is {min_pixels}; it must be 1 or more.")
    processor.set_bounds(min_pixels, max_pixels)
    return processor


def model_family(name: str) -> Family:
    """The family of a hub id or folder.

    Raises:
        UserError: Nothing is there, or it is no family that is known here.
    """
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise UserError(f"There is no model folder {name}.")
    folder = Path(model_path(name))
    if (folder / ADAPTER_CONFIG_NAME).is_file() and not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{name} has an adapter alone; give a whole model, such as an export without --adapter.")
    known = f"known families: {', '.join(FAMILIES)}"
    what = f"No model configuration that is known here could be read from {name}"
    with reading(what, f"give a hub id, a folder with a {CONFIG_NAME}, or tiny; {known}"):
        config = AutoConfig.from_pretrained(model_path(name), trust_remote_code=False)
        settings, _ = PretrainedConfig.get_config_dict(model_path(name))
    if config.model_type not in FAMILIES:
        raise UserError(f"{name} is of the family {config.model_type}; {known}.")
    for part in ("text_config", "vision_config"):
        # without them a part is of default sizes, which are those of a large model
        if not isinstance(settings.get(part, settings if part == "text_config" else None), dict):
            raise UserError(f"{CONFIG_NAME} of {name} has no usable {part}; use the file that belongs to the model.")
    return FAMILIES[config.model_type]


def prepare_for_training(model: PreTrainedModel, config: PolicyConfig) -> nn.Module:
    """Freeze, adapt and checkpoint as the configuration says; the result is the module to train.

    Raises:
        UserError: The adapter's target expression fits no module, or its r is not positive.
    """
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.freeze_vision:
        for module in family_of(model).vision_modules(model):
            module.requires_grad_(False)
    if config.lora is None:
        return model
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    try:
        return get_peft_model(model, PeftLoraConfig(**asdict(config.lora)))
    except ValueError as error:
        raise UserError(f"model.policy.lora does not fit the model: {error}") from error


def _read_generation_config(name: str, config: PretrainedConfig) -> GenerationConfig:
    """That of a hub id or folder, or what the model's configuration says where there is none."""
    has_file = (Path(model_path(name)) / GENERATION_CONFIG_NAME).is_file()
    with reading(f"{GENERATION_CONFIG_NAME} of {name} cannot be read", "mend it, or leave it out"):
        try:
            return GenerationConfig.from_pretrained(model_path(name))
        except OSError:
            if has_file:
                raise
            return GenerationConfig.from_model_config(config)
