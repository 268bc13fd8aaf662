"""What the language model has computed of prompts, from which any number of completions can be written.

Legend: B prompts, P prompt tokens (longest), K key-value heads, D head size, H hidden size.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptCache:
    """What the language model has computed of prompts, in the order in which they were given.

    Attributes:
        keys: Of each layer [B, K, P, D], filled on the right.
        values: Of each layer [B, K, P, D], filled on the right.
        lengths: Tokens of each prompt, B entries.
        input_ids: Ids of each prompt, on the CPU, B entries.
        hidden: [B, H] last hidden state of the last token, which predicts the first completion token.
        next_positions: Position of the first completion token of each prompt, B entries.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: tuple[int, ...]
    input_ids: tuple[Tensor, ...]
    hidden: Tensor
    next_positions: tuple[int, ...]
