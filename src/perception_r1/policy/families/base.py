"""What the engine has to know of a model family; each is one file in this folder."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from perception_r1.codecs import Codec
from perception_r1.errors import UserError
from perception_r1.policy.attention import NAME as SHARED_PROMPT
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.decoder_layers import DecoderLayer
from perception_r1.policy.processor import Processor

VisionLanguageModel: TypeAlias = Any
"""A `...ForConditionalGeneration` of one of the families, for which transformers has no common type."""


class Family(ABC):
    """A family of vision-language models.

    Attributes:
        name: `model_type` of its configuration.
        codec: How it writes boxes.
        processor: How it reads chats and pictures.
        shares_prompts: Whether the engine lets completions share their prompt, else `policy/repeated.py` computes it
            once for each of them; image features then have nothing for further layers.
        vision_tokens: Tokens around pictures that its configuration does not name; none of them is ever written.
        decoder_layer: A layer of its language model for one token per row.
        layer_types: Kinds of layers by which a token may know of those before it, as its configuration names them.
        no_mask: Argument that tells its language model to mask nothing by itself.
    """

    name: ClassVar[str]
    codec: ClassVar[Codec]
    processor: ClassVar[type[Processor]]
    shares_prompts: ClassVar[bool] = True
    vision_tokens: ClassVar[tuple[str, ...]] = ()
    decoder_layer: ClassVar[type[DecoderLayer]] = DecoderLayer
    layer_types: ClassVar[frozenset[str]] = frozenset({"full_attention"})
    no_mask: ClassVar[Any] = None

    def check(self, name: str, config: Any) -> None:
        """Refuse, with a `UserError`, a model of the family that computes in a way that is not known here."""
        quantised = getattr(config, "quantization_config", None)
        if quantised is not None:
            method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
            raise UserError(
                f"The weights of {name} are quantised ({method}), and this engine computes with float32 and bfloat16 "
                "alone; give the model that it was made from."
            )
        kinds = set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
        if self.shares_prompts and not kinds <= self.layer_types:
            known = ", ".join(sorted(self.layer_types))
            raise UserError(f"{name} has layers of {', '.join(sorted(kinds))}; known of {self.name}: {known}.")

    def prepare(self, model: VisionLanguageModel) -> None:
        """Let a model compute as this engine does."""
        if self.shares_prompts:
            model.set_attn_implementation({"text_config": SHARED_PROMPT})

    @abstractmethod
    def encode_images(self, model: VisionLanguageModel, prompts: PromptBatch) -> tuple[Tensor, ...]:
        """Run the vision tower once on every image; see `PromptBatch.image_features`."""

    @abstractmethod
    def vision_modules(self, model: VisionLanguageModel) -> list[nn.Module]:
        """All that makes features of pixels."""

    @abstractmethod
    def vision_blocks(self, model: VisionLanguageModel) -> list[nn.Module]:
        """The layers of the vision tower."""

    def position_ids(self, positions: Tensor) -> Tensor:
        """Rotary positions [3, rows, tokens] as the language model takes them: one for each token, or three."""
        return positions[0]

    def mask_inputs(self, is_image: Tensor) -> dict[str, Tensor]:
        """What a model whose prompts are not shared wants to know of its tokens: [rows, tokens] which are features."""
        return {}

    def named_weights(self, model: VisionLanguageModel) -> Iterator[tuple[str, Tensor]]:
        """Weights of a causal model by the names and in the layout of the hub's files; a tied weight comes once."""
        tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        yield from revert_weight_conversion(model, tensors).items()

    def save(self, model: VisionLanguageModel, folder: str | Path) -> None:
        """Write a causal model as the hub has it."""
        model.save_pretrained(folder)
