"""Attention of vision towers, in which each image or window attends to itself: those of equal length are one call.

The towers of transformers call their attention once for each; a picture of a megapixel has a hundred windows in every
layer of Qwen2.5-VL. `segmented_attention` is registered with transformers under `NAME`; which segments there are is
worked out on the host.

Legend: T tokens of all images, H heads, D head size; n segments of L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from perception_r1.policy.batch import move_together

NAME = "segmented"


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """How a row of tokens is cut up.

    Attributes:
        shapes: (n, L) of the segments of each length.
        order: [T] tokens with segments of equal length one after another; None: they stand so already.
        inverse: [T] where each token stands in that order.
    """

    shapes: tuple[tuple[int, int], ...]
    order: Tensor | None = None
    inverse: Tensor | None = None


def cut(lengths: Sequence[int], device: torch.device) -> Segments:
    """The segments of these lengths, in the order of the row."""
    ordered = sorted(range(len(lengths)), key=lengths.__getitem__)
    shapes = tuple((len(list(group)), length) for length, group in groupby(sorted(lengths)))
    if len(list(groupby(lengths))) == len(shapes):  # as they stand, equal ones are neighbours
        return Segments(shapes=tuple((len(list(group)), length) for length, group in groupby(lengths)))
    spans = torch.arange(sum(lengths)).split(list(lengths))
    order = torch.cat([spans[index] for index in ordered])
    order, inverse = move_together([order, order.argsort()], device)
    return Segments(shapes=shapes, order=order, inverse=inverse)


def segmented_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    images: Segments | None = None,
    windows: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Full attention within each segment.

    Args:
        module: The attention layer; those that attend within windows have `is_windowed`.
        query: [1, H, T, D].
        key: [1, H, T, D].
        value: [1, H, T, D].
        attention_mask: Unused.
        dropout: Of attention weights; zero in these families.
        scaling: Of the scores.
        images: The segments that are images; None: the tower itself has cut them up, and this is one of them.
        windows: Those that are windows.
        **kwargs: Unused.

    Returns:
        [1, T, H, D] and no weights.
    """
    is_windowed = windows is not None and getattr(module, "is_windowed", False)
    segments = (windows if is_windowed else images) or Segments(shapes=((1, query.shape[2]),))
    rows = [tensor[0] for tensor in (query, key, value)]  # [H, T, D]
    if segments.order is not None:
        rows = [tensor.index_select(1, segments.order) for tensor in rows]
    attended, start = [], 0
    for count, length in segments.shapes:
        end = start + count * length
        q, k, v = (
            tensor[:, start:end].unflatten(1, (count, length)).transpose(0, 1) for tensor in rows
        )  # [n, H, L, D]
        found = F.scaled_dot_product_attention(q, k, v, scale=scaling, dropout_p=dropout)
        attended.append(found.transpose(1, 2).flatten(0, 1))  # [n*L, H, D]
        start = end
    joined = torch.cat(attended) if len(attended) > 1 else attended[0]
    return (joined if segments.inverse is None else joined.index_select(0, segments.inverse))[None], None


AttentionInterface.register(NAME, segmented_attention)
