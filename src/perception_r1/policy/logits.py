"""From the logits of the vocabulary head to those of the tokens that may be written.

Legend: R rows, V vocabulary.
"""

import torch
from torch import Tensor

from perception_r1.policy.precision import at_least_fp32

_SORTED_ROWS = 256
"""Rows of logits that are sorted at once: a sorted copy takes three times as much memory."""


def process_logits(
    logits: Tensor, *, suppress_tokens: Tensor, temperature: float, top_p: float = 1.0, written: Tensor | None = None
) -> Tensor:
    """Logits [R, V] over the tokens that may be written, in at least fp32 and divided by the temperature.

    Args:
        logits: [R, V] of the vocabulary head; they are used up, for a copy of them may take a gigabyte.
        suppress_tokens: Ids of tokens that are never written (vision tokens): their logit becomes -inf.
        temperature: Sampling temperature, above 0.
        top_p: Below 1, only the most probable tokens that together reach this probability may be written (nucleus
            sampling, arXiv 1904.09751), and those that are as probable as the last of them.
        written: [R] tokens that were written, which stay whatever their probability is by now.
    """
    logits = logits.to(at_least_fp32(logits.dtype))
    logits = logits.index_fill_(-1, suppress_tokens, float("-inf"))
    logits = logits if temperature == 1.0 else logits.div_(temperature)
    if top_p == 1.0:
        return logits
    is_left_out = logits < nucleus_thresholds(logits.detach(), top_p)
    if written is not None:
        is_left_out.scatter_(1, written[:, None], False)
    return logits.masked_fill_(is_left_out, float("-inf"))


@torch.no_grad()
def nucleus_thresholds(logits: Tensor, top_p: float) -> Tensor:
    """[R, 1] the least logit among the most probable tokens of each row of [R, V] that together reach top_p."""
    thresholds = []
    for rows in logits.split(_SORTED_ROWS):
        ordered = rows.sort(-1, descending=True).values
        probs = ordered.softmax(-1)
        num_kept = (probs.cumsum(-1) - probs < top_p).sum(-1, keepdim=True)
        thresholds.append(ordered.gather(-1, num_kept - 1))
    return torch.cat(thresholds)
