"""What completions need to know of a prompt, so that it need not be computed again for each of several passes.

Legend: P prompt tokens, K key-value heads, D head size, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptStates:
    """What completions need to know of their prompt.

    Attributes:
        layers: Of each layer, by number: keys and values [1, K, P, D].
        hidden: [1, H] last hidden state of the last token, which predicts the first completion token.
    """

    layers: Mapping[int, tuple[Tensor, Tensor]]
    hidden: Tensor

    def copy(self) -> "PromptStates":
        """The same values, to collect gradients."""
        layers = {number: (_leaf(key), _leaf(value)) for number, (key, value) in self.layers.items()}
        return PromptStates(layers=layers, hidden=_leaf(self.hidden))

    def tensors(self) -> list[Tensor]:
        """All of them, in an order."""
        return [self.hidden, *(tensor for number in sorted(self.layers) for tensor in self.layers[number])]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()
