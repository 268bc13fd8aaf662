"""Fields of a request: what one says is read and checked, or refused in a sentence; nothing is ignored.

What is null or empty says nothing. A setting that this interface does not offer may still be named with the value that
changes nothing, as some clients do with all of them.
"""

from collections.abc import Collection, Mapping
from typing import Any

from perception_r1.errors import UserError

NO_OPS: Mapping[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "continue_final_message": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "top_k": (-1, 0),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
}
"""Settings of OpenAI and vLLM that are not offered, and the values at which they change nothing."""
_MAX_INTEGER = 2**63
_MAX_SHOWN = 40


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something."""
    return {name: value for name, value in fields.items() if not (value is None or value == [] or value == {})}


def check_fields(
    fields: Mapping[str, Any], known: Collection[str], allowed: Mapping[str, tuple[object, ...]] | None = None
) -> None:
    """Refuse what would be ignored.

    Args:
        fields: Those that say something.
        known: Names of those that are read.
        allowed: Of others, the values that may be said.

    Raises:
        UserError: There is another, or one with another value.
    """
    for name, value in fields.items():
        if name in known:
            continue
        shown = name if name.isidentifier() and len(name) <= _MAX_SHOWN else "A field of the request"
        if not allowed or name not in allowed:
            raise UserError(f"{shown} is not known here: leave it out.")
        if value not in allowed[name]:
            raise UserError(f"{shown} cannot be chosen here: leave it out.")


def read_text(value: Any, name: str, *, max_length: int) -> str:
    """Text that a tokenizer can read.

    Raises:
        UserError: It is none, too long, or has half of a character in it, which only JSON's escapes can write.
    """
    if not isinstance(value, str) or len(value) > max_length:
        raise UserError(f"{name} must be text of at most {max_length:,} characters.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} has half of a character in it (a lone surrogate).") from error
    return value


def read_integer(fields: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number of at most 63 bits."""
    value = fields.get(name, default)
    if type(value) is not int or abs(value) >= _MAX_INTEGER:
        raise UserError(f"{name} must be a whole number.")
    return value


def read_number(fields: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number."""
    value = fields.get(name, default)
    if type(value) not in (int, float) or not abs(value) < _MAX_INTEGER:  # NaN is not below anything
        raise UserError(f"{name} must be a number.")
    return float(value)


def read_flag(fields: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """Yes or no."""
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false.")
    return value
