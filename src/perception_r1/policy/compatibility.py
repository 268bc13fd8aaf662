"""Whether the files of a model folder belong together: tokenizer and image processor beside the configuration."""

from typing import Any

from perception_r1.errors import UserError
from perception_r1.policy.processor import Processor

_CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
"""A chat as all tasks have them."""


def check_fits(processor: Processor, config: Any, name: str) -> None:
    """Refuse tokenizer, chat template or image processor of another model, or of half a download.

    Raises:
        UserError: Which part does not fit, and in what.
    """
    tokenizer, token = f"The tokenizer of {name}", processor.feature_token
    if not processor.encode_text("a"):
        raise UserError(f"{tokenizer} knows no text; is the file tokenizer.json missing?")
    if processor.image_token_id != config.image_token_id:
        raise UserError(
            f"{tokenizer} does not fit the model: {token} is token {processor.image_token_id} there, and "
            f"{config.image_token_id} in config.json."
        )
    num_tokens = processor.tokenizer.vocab_size  # without added ones, of which some models have more than weights
    vocab_size = config.get_text_config().vocab_size
    if num_tokens > vocab_size:
        raise UserError(f"{tokenizer} does not fit the model: it has {num_tokens} tokens, and the model {vocab_size}.")
    if processor.prompt_texts([_CHAT])[0].count(processor.image_token) != 1:
        raise UserError(f"The chat template of {name} ignores pictures; use that of the model itself.")
    _check_images(processor, config, f"The image processor of {name}")


def _check_images(processor: Processor, config: Any, what: str) -> None:
    images = processor.image_processor
    for option, wanted in {"do_resize": True, **processor.image_options(config)}.items():
        found = dict(getattr(images, option)) if isinstance(wanted, dict) else getattr(images, option)
        if found != wanted:
            raise UserError(f"{what} does not fit the model: {option} is {found}, and has to be {wanted}.")
    if not all(type(bound) is int and bound > 0 for bound in processor.pixel_bounds):
        raise UserError(f"{what} has a size of {dict(images.size)}, and has to name the fewest and most pixels.")
