"""What the language model has computed of prompts, from which any number of completions can be written.

Legend: B prompts, P prompt tokens (longest), K key-value heads, D head size, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from perception_r1.policy.prompt_states import KeysAndValues, LinearStates


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptCache:
    """What the language model has computed of prompts, in the order in which they were given.

    Attributes:
        keys_and_values: Of each layer of full attention, by its number: [B, K, P, D], filled on the right.
        linear_states: Of each layer of linear attention, by its number.
        lengths: Tokens of each prompt, B entries.
        input_ids: Ids of each prompt, on the CPU, B entries.
        hidden: [B, H] last hidden state of the last token, which predicts the first completion token.
        next_positions: Position of the first completion token of each prompt, B entries.
    """

    keys_and_values: Mapping[int, KeysAndValues]
    linear_states: Mapping[int, LinearStates]
    lengths: tuple[int, ...]
    input_ids: tuple[Tensor, ...]
    hidden: Tensor
    next_positions: tuple[int, ...]

    def tensors(self) -> list[Tensor]:
        """What the layers hold."""
        layers = (*self.keys_and_values.values(), *self.linear_states.values())
        return [tensor for states in layers for tensor in states]
