"""Image features of patches: the tower runs on the device, and what it needs to know of sizes is computed on the host.

The towers of transformers work out positions, windows and segments from a tensor of sizes; on the device that means
waiting for it many times a pass. They also take the results from outside, and so they do here.

Legend: I images, H hidden size of the language model.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import is_flash_attention_requested
from transformers.vision_utils import (
    get_vision_attention_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from perception_r1.policy.batch import PromptBatch, to_device
from perception_r1.policy.families.base import VisionLanguageModel
from perception_r1.policy.segments import NAME as SEGMENTED
from perception_r1.policy.segments import cut


def simplify_tower(model: VisionLanguageModel) -> None:
    """Let the tower compute the same in fewer and larger products.

    Equal segments are attended to in one call, where its attention is torch's own. Patches, which do not
    overlap, are embedded by one product: as a convolution they take several times as long.
    """
    visual = model.model.visual
    visual.patch_embed.forward = partial(_embed_patches, visual.patch_embed.proj)
    if visual.config._attn_implementation == "sdpa":
        model.set_attn_implementation({"vision_config": SEGMENTED})
        full = getattr(visual, "fullatt_block_indexes", range(len(visual.blocks)))
        for number, block in enumerate(visual.blocks):
            block.attn.is_windowed = number not in full


def _embed_patches(convolution: nn.Conv3d, pixels: Tensor) -> Tensor:
    """[patches, width] from [patches, values]."""
    weight = convolution.weight
    return F.linear(pixels.to(weight.dtype), weight.flatten(1), convolution.bias)


def encode_images(model: VisionLanguageModel, prompts: PromptBatch) -> tuple[Tensor, ...]:
    """Run the vision tower once on every image; see `PromptBatch.image_features`."""
    pixels, grids = torch.cat(prompts.pixel_values), torch.tensor(prompts.image_grids)
    geometry = _geometry(model.model.visual, grids, pixels.device)
    encoded = model.model.get_image_features(pixels, grids, return_dict=True, **geometry)
    images = [image[None] for image in encoded.pooler_output]  # each [1, tokens, H]
    sizes = [image.shape[1] for image in images]
    for layer in getattr(encoded, "deepstack_features", None) or []:
        of_images = layer.split(sizes) if torch.is_tensor(layer) else layer  # by the version of transformers
        images = [torch.cat([image, more[None]]) for image, more in zip(images, of_images, strict=True)]
    return tuple(images)


def _geometry(visual: Any, grids: Tensor, device: torch.device) -> dict[str, Any]:
    """What a tower would compute itself from [I, 3] grids on the CPU, by the names under which it takes it."""
    merge_size = visual.spatial_merge_size
    moved = {"position_ids": get_vision_position_ids(grids, merge_size)}
    cu_seqlens, max_seqlen = get_vision_attention_seqlens(grids, visual.config)
    segments = {"cu_seqlens": cu_seqlens}
    longest = {"max_seqlen": max_seqlen}
    if hasattr(visual, "window_size"):  # Qwen2.5-VL attends within windows
        window_index, windows = get_vision_window_index(grids, merge_size, visual.window_size, visual.patch_size)
        moved["window_index"], segments["cu_window_seqlens"] = window_index, windows
        longest["max_window_seqlen"] = int(windows.diff().max())
    if hasattr(visual, "num_grid_per_side"):  # Qwen3-VL interpolates learned positions
        moved["interp_indices"], moved["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=merge_size,
        )
    shared: dict[str, Any] = {}
    if is_flash_attention_requested(visual.config):  # the kernel reads them; other attention is cut up on the host
        moved |= segments
    elif visual.config._attn_implementation == SEGMENTED:
        names = {"cu_seqlens": "images", "cu_window_seqlens": "windows"}
        shared = {names[name]: cut(ends.diff().tolist(), device) for name, ends in segments.items()}
        segments = {name: ends[[0, -1]] for name, ends in segments.items()}  # one call for all of them
    named = longest | segments | {name: to_device(tensor, device) for name, tensor in moved.items()}
    return shared | {f"image_{name}": value for name, value in named.items()}
