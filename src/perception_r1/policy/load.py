"""From a hub id or folder to a network: family, dtype, adapter, what is trained."""

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from perception_r1.errors import UserError
from perception_r1.policy.families import FAMILIES, Family, family_of
from perception_r1.policy.processor import Processor

EMBEDDED = "tiny"
"""Name of the model that comes with this package."""
_MOST_TOLD = 300
"""Characters of the reason why a model cannot be read."""
_EMBEDDED_FOLDER = Path(__file__).parents[1] / "embedded" / EMBEDDED

Dtype: TypeAlias = Literal["float32", "bfloat16"]
"""Types of weights."""
TEXT_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|in_proj_\w+|out_proj)"
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
        name: Hub id (Qwen/Qwen2-VL-2B-Instruct), a local folder in the hub's layout, or `tiny`: the model that comes
            with this package.
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


def model_path(name: str) -> str:
    """What transformers loads: the folder in this package for `tiny`, else the hub id or folder itself."""
    return str(_EMBEDDED_FOLDER) if name == EMBEDDED else name


def load_model(config: PolicyConfig) -> PreTrainedModel:
    """Weights of the policy, without adapter, everything trainable.

    Raises:
        UserError: The folder does not exist, its family is not one of ours or computes in another way, or weights are
            missing or unexpected.
    """
    family = model_family(config.name)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            model_path(config.name),
            trust_remote_code=False,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            ignore_mismatched_sizes=True,  # they are in the report, and refused below
            output_loading_info=True,
        )
    except (OSError, ImportError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"The model {config.name} cannot be loaded: {error}") from error
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise UserError(
                f"{config.name} does not fit {family.name}: {len(names)} {kind.replace('_', ' ')}, first {names[0]}."
            )
    family.check(config.name, model.config)
    family.prepare(model)
    return cast(PreTrainedModel, model)


class WithoutWeights(nn.Module):
    """In place of a model whose weights another engine has: what its configuration says, and nothing that computes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.config: PretrainedConfig = AutoConfig.from_pretrained(model_path(name), trust_remote_code=False)
        try:
            self.generation_config = GenerationConfig.from_pretrained(model_path(name))
        except OSError:  # the file is not needed
            self.generation_config = GenerationConfig.from_model_config(self.config)


def load_processor(name: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Processor:
    """The processor of a hub id or folder, or `tiny`; see `Processor.load`."""
    family = model_family(str(name))
    return family.processor.load(model_path(str(name)), min_pixels=min_pixels, max_pixels=max_pixels)


def model_family(name: str) -> Family:
    """The family of a hub id or folder.

    Raises:
        UserError: Nothing is there, or it is no family that is known here.
    """
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise UserError(f"There is no model folder {name}.")
    try:
        family: str = AutoConfig.from_pretrained(model_path(name), trust_remote_code=False).model_type
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:_MOST_TOLD]
        raise UserError(
            f"No model configuration that is known here could be read from {name}: give a hub id, a folder with a "
            f"config.json, or tiny; known families: {', '.join(FAMILIES)} ({reason})."
        ) from error
    if family not in FAMILIES:
        raise UserError(f"{name} is of the family {family}; known families: {', '.join(FAMILIES)}.")
    return FAMILIES[family]


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
