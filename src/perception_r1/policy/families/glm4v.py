"""GLM-4.1V and GLM-4.6V-Flash: boxes as JSON between box tokens, four norms in a layer, heads turned in pairs."""

from collections.abc import Sequence
from functools import partial
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil, smart_resize

from perception_r1.codecs import NOTHING, JsonCodec, ParsedBox, ParsedBoxes
from perception_r1.errors import UserError
from perception_r1.policy.batch import to_device
from perception_r1.policy.decoder_layers import Attention, DecoderLayer
from perception_r1.policy.families.base import VisionLanguageModel
from perception_r1.policy.families.patches import PatchFamily, PatchProcessor
from perception_r1.records import ImageSize, LabelledBox

_START, _END = "<|begin_of_box|>", "<|end_of_box|>"


class Glm4vCodec(JsonCodec):
    """Between box tokens the JSON that GLM-V answers with, or a list of boxes alone, in thousandths.

    Its documentation (https://github.com/zai-org/GLM-V, grounding) has `[[x1,y1,x2,y2], ...]` between the tokens; asked
    for labels too, the models write the JSON. Text around the tokens is passed over; the answer then is not exact.

    >>> image_size = ImageSize(width=1280, height=960, resized_width=1260, resized_height=952)
    >>> text = Glm4vCodec().format_boxes([LabelledBox(label="cat", box=(0.1, 0.2, 0.5, 1.0))], image_size)
    >>> text
    '<|begin_of_box|>[{"label": "cat", "bbox_2d": [100, 200, 500, 1000]}]<|end_of_box|>'
    >>> Glm4vCodec().parse_boxes("It is at <|begin_of_box|>[[100,200,500,1000]]<|end_of_box|>.", image_size)
    ParsedBoxes(items=(ParsedBox(label=None, box=(0.1, 0.2, 0.5, 1.0)),), is_exact=False)
    >>> Glm4vCodec().parse_boxes("[[100,200,500,1000]]", image_size)
    ParsedBoxes(items=(), is_exact=False)
    """

    name = "glm4v"
    description = "as JSON between box tokens, in thousandths of the image"
    entry_types = (dict, list)

    def format_boxes(self, objects: Sequence[LabelledBox], image_size: ImageSize) -> str:
        """See `Codec`; raises a `UserError` for a label that could be read as a token."""
        if odd := [item.label for item in objects if "<|" in item.label]:
            raise UserError(f"a label in the GLM-4V form needs text without '<|', not {odd[0]!r}")
        return f"{_START}{super().format_boxes(objects, image_size)}{_END}"

    def parse_boxes(self, text: str, image_size: ImageSize) -> ParsedBoxes:
        """See `Codec`."""
        before, _, rest = text.partition(_START)
        body, end, behind = rest.partition(_END)
        found = super().parse_boxes(body, image_size) if end else NOTHING
        return ParsedBoxes(items=found.items, is_exact=found.is_exact and not before.strip() + behind.strip())

    def parse_prefixes(self, text: str, image_size: ImageSize) -> list[tuple[int, ParsedBox]]:
        """See `Codec`."""
        before, start, rest = text.partition(_START)
        found = super().parse_prefixes(rest, image_size)
        return [(len(before) + len(start) + end, item) for end, item in found]

    def entry(self, box: list[int], label: str) -> dict[str, Any]:
        """See `JsonCodec`."""
        return {"label": label, self.key: box}


class Glm4vProcessor(PatchProcessor):
    """See `PatchProcessor`."""

    image_token = feature_token = "<|image|>"
    other_placeholders = ("<|video|>",)
    end_of_turn = "<|user|>"
    image_processor_class = Glm4vImageProcessorPil
    smart_resize = partial(smart_resize, num_frames=1, temporal_factor=1)
    counts_frames = True
    max_pixels = 4_816_896


class PairedAttention(Attention):
    """Values of heads are turned with their neighbours."""

    @staticmethod
    def partners(heads: Tensor) -> list[Tensor]:
        """See `Attention`."""
        return [heads.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)]


class Glm4vDecoderLayer(DecoderLayer):
    """A layer that also normalises what it adds."""

    output_norms = ("post_self_attn_layernorm", "post_mlp_layernorm")

    @staticmethod
    def signs(sin: Tensor) -> Tensor:
        """See `DecoderLayer`."""
        first, second = sin.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-first, second], -1).flatten(-2)

    def make_mixer(self, layer: Any, config: Any, dtype: torch.dtype | None) -> Attention:
        """See `DecoderLayer`."""
        return PairedAttention(layer.self_attn, config, dtype, self.normalise)


class Glm4v(PatchFamily):
    """See `Family`."""

    name = "glm4v"
    codec = Glm4vCodec()
    processor = Glm4vProcessor
    vision_tokens = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    decoder_layer = Glm4vDecoderLayer

    def prepare(self, model: VisionLanguageModel) -> None:
        """See `Family`."""
        super().prepare(model)
        embeddings = model.model.visual.embeddings
        embeddings.forward = partial(_add_positions, embeddings.position_embedding)


def _add_positions(
    learned: nn.Embedding, patches: Tensor, lengths: Tensor, grids: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """Patches [N, width] of pictures with grids [I, 3] and their positions in a square, as transformers reads them off.

    There the size of a patch's picture is looked up on the device; here it is known on the host.
    """
    sizes = to_device(grids[:, 1:].repeat_interleave(grids.prod(-1), 0), patches.device)  # [N, 2]
    points = (torch.stack([columns, rows], -1) + 0.5) / sizes.flip(-1) * 2 - 1  # in -1..1
    side = isqrt(learned.num_embeddings)
    square = learned.weight.view(1, side, side, -1).permute(0, 3, 1, 2).to(dtype=torch.float32)
    options: dict[str, Any] = {"mode": "bicubic", "padding_mode": "border", "align_corners": False}
    found = F.grid_sample(square, points[None, :, None], **options)  # [1, width, N, 1]
    return patches + found[0, :, :, 0].T.to(learned.weight.dtype)
