"""What the families of Qwen-VL share: their tokens, and models of any size."""

from abc import abstractmethod
from typing import Any, ClassVar

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from perception_r1.policy.families.patches import PatchFamily, PatchProcessor


class QwenVLProcessor(PatchProcessor):
    """See `PatchProcessor`."""

    image_token = feature_token = "<|image_pad|>"
    other_placeholders = ("<|video_pad|>",)
    image_processor_class = Qwen2VLImageProcessorPil
    smart_resize = staticmethod(smart_resize)

    @property
    def hub_options(self) -> dict[str, Any]:
        """See `Processor`."""
        return {"size": self.size}


class QwenVL(PatchFamily):
    """A family of Qwen-VL.

    Attributes:
        patch_size: Side of a patch of its own image processor, in pixels.
    """

    processor = QwenVLProcessor
    patch_size: ClassVar[int] = 14

    @abstractmethod
    def small_config(self, text: dict[str, Any], vision: dict[str, Any], **common: Any) -> Any:
        """A configuration of any size, to pretrain or to test with; see `embedded/model.py`.

        Args:
            text: Settings of the language model that all families share; what this one has besides is added.
            vision: Those of the vision tower, with `hidden_size` and `out_hidden_size`.
            **common: Those of the whole model.
        """
