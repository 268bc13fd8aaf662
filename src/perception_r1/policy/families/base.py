"""What the engine has to know of a model family; each is one file in this folder."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from perception_r1.codecs import Codec
from perception_r1.policy.decoder_layers import DecoderLayer


class Family(ABC):
    """A family that computes as Qwen-VL does, but for what it overrides.

    Attributes:
        name: `model_type` of its configuration.
        codec: How it writes boxes.
        patch_size: Side of a patch of its own image processor, in pixels.
        decoder_layer: A layer of its language model for one token per row.
        layer_types: Kinds of layers by which a token may know of those before it, as its configuration names them.
    """

    name: ClassVar[str]
    codec: ClassVar[Codec]
    patch_size: ClassVar[int] = 14
    decoder_layer: ClassVar[type[DecoderLayer]] = DecoderLayer
    layer_types: ClassVar[frozenset[str]] = frozenset({"full_attention"})

    def named_weights(self, model: Any) -> Iterator[tuple[str, Tensor]]:
        """Weights of a causal model by the names and in the layout of the hub's files; a tied weight comes once."""
        tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        yield from revert_weight_conversion(model, tensors).items()

    def save(self, model: Any, folder: str | Path) -> None:
        """Write a causal model as the hub has it."""
        model.save_pretrained(folder)

    @abstractmethod
    def small_config(self, text: dict[str, Any], vision: dict[str, Any], **common: Any) -> Any:
        """A configuration of any size, to pretrain or to test with; see `embedded/model.py`.

        Args:
            text: Settings of the language model that all families share; what this one has besides is added.
            vision: Those of the vision tower, with `hidden_size` and `out_hidden_size`.
            **common: Those of the whole model.
        """
