"""The form of OpenAI's chat interface, with vLLM's fields for tokens: requests are read, answers are written.

A request is hostile: only what is named here is read, pictures come in the request itself and never from an address or
a file, and every number is checked.
"""

import base64
import binascii
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from perception_r1.data.images import load_image, read_size
from perception_r1.errors import UserError
from perception_r1.policy.batch import Chat
from perception_r1.records import ImageBytes
from perception_r1.serving.generation import Answer, Completion, CompletionParams

MAX_IMAGES = 8
"""Most pictures of a request."""
MAX_MESSAGES = 64
"""Most messages of a request, and most parts of a message."""
_MAX_SEED = 2**63
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """A request as it was read.

    Attributes:
        chat: Messages; their pictures stand as `{"type": "image"}`.
        pictures: Data URLs, in their order.
        sampling: How completions are written.
        seed: On which they depend, if it was given.
        has_logprobs: Log-probabilities are wanted.
        has_tokens: Ids of tokens are wanted.
        has_special_tokens: Text is wanted with special tokens, with which some families write boxes.
        is_streamed: The answer is wanted as a stream of events.
    """

    chat: Chat
    pictures: list[str]
    sampling: CompletionParams
    seed: int | None
    has_logprobs: bool
    has_tokens: bool
    has_special_tokens: bool
    is_streamed: bool


def read_request(body: Any, *, max_new_tokens: int) -> ChatRequest:
    """A request from JSON.

    Args:
        body: Anything.
        max_new_tokens: Longest completion where the request does not say.

    Raises:
        UserError: Something is missing or wrong.
    """
    if not isinstance(body, Mapping):
        raise UserError("The request must be a JSON object.")
    chat, pictures = _read_messages(body.get("messages"))
    seed = body.get("seed")
    if seed is not None and not (type(seed) is int and 0 <= seed < _MAX_SEED):
        raise UserError("seed must be a whole number of at least 0.")
    length = body.get("max_completion_tokens", body.get("max_tokens"))
    return ChatRequest(
        chat=chat,
        pictures=pictures,
        sampling=CompletionParams(
            group_size=_integer(body, "n", 1),
            max_new_tokens=max_new_tokens if length is None else _integer({"max_tokens": length}, "max_tokens", 1),
            temperature=_number(body, "temperature", 0.0),
            top_p=_number(body, "top_p", 1.0),
            repetition_penalty=_number(body, "repetition_penalty", 1.0),
        ),
        seed=seed,
        has_logprobs=body.get("logprobs") is True,
        has_tokens=body.get("return_token_ids") is True,
        has_special_tokens=body.get("skip_special_tokens") is False,
        is_streamed=body.get("stream") is True,
    )


def read_picture(url: str, *, max_pixels: int) -> Image.Image:
    """The picture in a data URL.

    Raises:
        UserError: It is something else, or has more pixels.
    """
    head, comma, data = url.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise UserError("A picture must be a data URL, data:image/...;base64,...; addresses and files are not read.")
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError("The data URL of a picture is no base64.") from error
    source = ImageBytes("the picture", lambda: content)
    width, height = read_size(source)
    if width * height > max_pixels:
        raise UserError(f"The picture has {width} x {height} pixels; {max_pixels} are the most.")
    return load_image(source)


def write_answer(request: ChatRequest, answer: Answer, *, model: str) -> dict[str, Any]:
    """An answer as JSON."""
    num_written = sum(len(completion.tokens) for completion in answer.completions)
    num_read = len(answer.prompt_ids)
    body: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(request, index, each) for index, each in enumerate(answer.completions)],
        "usage": {
            "prompt_tokens": num_read,
            "completion_tokens": num_written,
            "total_tokens": num_read + num_written,
        },
    }
    return body | ({"prompt_token_ids": answer.prompt_ids} if request.has_tokens else {})


def as_chunk(body: Mapping[str, Any]) -> dict[str, Any]:
    """The whole answer as the only chunk of a stream."""
    choices = [
        {name: value for name, value in choice.items() if name != "message"} | {"delta": choice["message"]}
        for choice in body["choices"]
    ]
    return {**body, "object": "chat.completion.chunk", "choices": choices}


def _choice(request: ChatRequest, index: int, completion: Completion) -> dict[str, Any]:
    content = completion.text if request.has_special_tokens else completion.plain_text
    choice: dict[str, Any] = {
        "index": index,
        "message": {"role": "assistant", "content": content},
        "finish_reason": "length" if completion.is_truncated else "stop",
        "logprobs": None,
    }
    if request.has_logprobs:
        pairs = zip(completion.token_texts, completion.logprobs, strict=True)
        choice["logprobs"] = {
            "content": [
                {"token": token, "logprob": max(value, -9999.0), "bytes": list(token.encode()), "top_logprobs": []}
                for token, value in pairs
            ]
        }
    return choice | ({"token_ids": completion.tokens} if request.has_tokens else {})


def _read_messages(messages: Any) -> tuple[Chat, list[str]]:
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        raise UserError(f"messages must be a list of 1 to {MAX_MESSAGES} messages.")
    chat: Chat = []
    pictures: list[str] = []
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise UserError(f"A message needs a role, one of {', '.join(_ROLES)}.")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not 1 <= len(content) <= MAX_MESSAGES:
            raise UserError(f"The content of a message must be text, or a list of 1 to {MAX_MESSAGES} parts.")
        chat.append({"role": message["role"], "content": [_read_part(part, pictures) for part in content]})
    if not 1 <= len(pictures) <= MAX_IMAGES:
        raise UserError(f"A request must have 1 to {MAX_IMAGES} pictures, and this one has {len(pictures)}.")
    return chat, pictures


def _read_part(part: Any, pictures: list[str]) -> dict[str, str]:
    """A part of a message; the picture of one that has it is put with the others."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, Mapping) else image
        if isinstance(url, str):
            pictures.append(url)
            return {"type": "image"}
    raise UserError('A part of a message must be {"type": "text", "text": ...} or {"type": "image_url", ...}.')


def _integer(body: Mapping[str, Any], name: str, default: int) -> int:
    value = body.get(name)
    value = default if value is None else value
    if type(value) is not int:
        raise UserError(f"{name} must be a whole number.")
    return value


def _number(body: Mapping[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    value = default if value is None else value
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"{name} must be a number.")
    return float(value)
