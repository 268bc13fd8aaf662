"""What a prompt leaves in the layers of the language model, which is all that its completions need to know of it.

Legend: n prompts, P tokens of each, K key-value heads, D head size, V value heads, D_k and D_v sizes of keys and of
values in linear attention, C channels and W width of its convolution, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor


class KeysAndValues(NamedTuple):
    """What full attention leaves of prompts: it grows with them.

    Attributes:
        keys: [n, K, P, D].
        values: [n, K, P, D].
    """

    keys: Tensor
    values: Tensor


class LinearStates(NamedTuple):
    """What linear attention leaves of prompts, however long they are.

    Attributes:
        recurrent: [n, V, D_k, D_v] what has been read, in at least fp32.
        inputs: [n, C, W - 1] the last inputs of the convolution; zeros where a prompt has fewer tokens.
    """

    recurrent: Tensor
    inputs: Tensor


LayerStates: TypeAlias = KeysAndValues | LinearStates
"""What a layer leaves of prompts, by its kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptStates:
    """A single prompt for several passes over its completions, which need not compute it again.

    Attributes:
        layers: What each layer has left, by its number; n = 1.
        hidden: [1, H] last hidden state of the last token, which predicts the first completion token.
    """

    layers: Mapping[int, LayerStates]
    hidden: Tensor

    def copy(self) -> "PromptStates":
        """The same values, to collect gradients."""
        layers = {number: type(states)(*map(_leaf, states)) for number, states in self.layers.items()}
        return PromptStates(layers=layers, hidden=_leaf(self.hidden))

    def tensors(self) -> list[Tensor]:
        """All of them, in an order."""
        return [self.hidden, *(tensor for number in sorted(self.layers) for tensor in self.layers[number])]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()
