"""The form of OpenAI's chat interface, with vLLM's fields for tokens: requests are read, answers are written.

A request is hostile: pictures come in the request itself and never from an address or a file, and every field is
checked (`fields.py`).
"""

import base64
import binascii
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from perception_r1.data.images import load_image, read_size
from perception_r1.errors import UserError
from perception_r1.policy.batch import Chat
from perception_r1.records import ImageBytes
from perception_r1.serving.fields import NO_OPS, check_fields, given, read_flag, read_integer, read_number, read_text
from perception_r1.serving.generation import Answer, Completion, CompletionParams

MAX_IMAGES = 8
"""Most pictures of a request."""
MAX_MESSAGES = 64
"""Most messages of a request, and most parts of a message."""
MAX_TEXT = 100_000
"""Most characters of a text."""
_READ = frozenset(
    {
        *(
            "model",
            "messages",
            "n",
            "max_tokens",
            "max_completion_tokens",
            "temperature",
            "top_p",
            "repetition_penalty",
            "seed",
        ),
        *("logprobs", "return_token_ids", "skip_special_tokens", "stream", "stream_options"),
        *("user", "metadata"),  # notes of the client's own
    }
)
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
        has_usage: Of a stream, numbers of tokens are wanted at its end.
    """

    chat: Chat
    pictures: list[str]
    sampling: CompletionParams
    seed: int | None
    has_logprobs: bool
    has_tokens: bool
    has_special_tokens: bool
    is_streamed: bool
    has_usage: bool


def read_request(body: Any, *, max_new_tokens: int, model: str, settings: Mapping[str, Any]) -> ChatRequest:
    """A request from JSON.

    Args:
        body: Anything.
        max_new_tokens: Longest completion where the request does not say.
        model: Name of the only model.
        settings: Those that are the model's own; a request may say them and not change them.

    Raises:
        UserError: Something is missing or wrong, or would be ignored.
    """
    if not isinstance(body, Mapping):
        raise UserError("The request must be a JSON object.")
    fields = given(body)
    if fields.get("model", model) != model:
        raise UserError(f"model must be {model}, the only one here, or left out.")
    check_fields(fields, _READ, {**NO_OPS, **{name: (value,) for name, value in settings.items()}})
    chat, pictures = _read_messages(fields.get("messages"))
    seed = read_integer(fields, "seed", 0)
    if seed < 0:
        raise UserError("seed must be a whole number of at least 0.")
    lengths = [read_integer(fields, name, 1) for name in ("max_completion_tokens", "max_tokens") if name in fields]
    if len(set(lengths)) > 1:
        raise UserError("max_tokens and max_completion_tokens are two names of one setting: give one.")
    is_streamed = read_flag(fields, "stream")
    return ChatRequest(
        chat=chat,
        pictures=pictures,
        sampling=CompletionParams(
            group_size=read_integer(fields, "n", 1),
            max_new_tokens=lengths[0] if lengths else max_new_tokens,
            temperature=read_number(fields, "temperature", 0.0),
            top_p=read_number(fields, "top_p", 1.0),
            repetition_penalty=read_number(fields, "repetition_penalty", 1.0),
        ),
        seed=seed if "seed" in fields else None,
        has_logprobs=read_flag(fields, "logprobs"),
        has_tokens=read_flag(fields, "return_token_ids"),
        has_special_tokens=not read_flag(fields, "skip_special_tokens", default=True),
        is_streamed=is_streamed,
        has_usage=_read_stream_options(fields.get("stream_options"), is_streamed=is_streamed),
    )


def read_pictures(urls: Sequence[str], *, max_pixels: int) -> list[Image.Image]:
    """The pictures in data URLs; none is unpacked before all of them are seen to be small enough.

    Args:
        urls: Data URLs.
        max_pixels: Most pixels of all of them together.

    Raises:
        UserError: One is something else, or they have more pixels.
    """
    sources = [_read_data_url(url) for url in urls]
    sizes = [read_size(source) for source in sources]
    if sum(width * height for width, height in sizes) > max_pixels:
        told = " and ".join(f"{width} x {height}" for width, height in sizes)
        if len(sizes) == 1:
            raise UserError(f"The picture has {told} pixels; {max_pixels} are the most.")
        raise UserError(f"The pictures have {told} pixels; {max_pixels} are the most of all together.")
    return [load_image(source) for source in sources]


def _read_data_url(url: str) -> ImageBytes:
    head, comma, data = url.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise UserError("A picture must be a data URL, data:image/...;base64,...; addresses and files are not read.")
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError("The data URL of a picture is no base64.") from error
    return ImageBytes("the picture", lambda: content)


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


def as_chunks(request: ChatRequest, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answer as a stream: one chunk with all of it, and one with the usage if that is wanted."""
    head = {name: value for name, value in body.items() if name not in ("choices", "usage")}
    head["object"] = "chat.completion.chunk"
    choices = [
        {name: value for name, value in choice.items() if name != "message"} | {"delta": choice["message"]}
        for choice in body["choices"]
    ]
    usage = [{**head, "choices": [], "usage": body["usage"]}]
    return [{**head, "choices": choices}, *(usage if request.has_usage else [])]


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


def _read_stream_options(options: Any, *, is_streamed: bool) -> bool:
    """Whether the usage is wanted."""
    if options is None:
        return False
    if not isinstance(options, Mapping) or not is_streamed:
        raise UserError("stream_options must be an object, and goes with stream.")
    check_fields(given(options), ("include_usage",))
    return read_flag(given(options), "include_usage")


def _read_messages(messages: Any) -> tuple[Chat, list[str]]:
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        raise UserError(f"messages must be a list of 1 to {MAX_MESSAGES} messages.")
    chat: Chat = []
    pictures: list[str] = []
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise UserError(f"A message needs a role, one of {', '.join(_ROLES)}.")
        check_fields(given(message), ("role", "content"))
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
        check_fields(given(part), ("type", "text"))
        return {"type": "text", "text": read_text(part["text"], "A text of a message", max_length=MAX_TEXT)}
    if kind == "image_url":
        check_fields(given(part), ("type", "image_url"))
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, Mapping) else image
        if isinstance(url, str):
            check_fields(given(image) if isinstance(image, Mapping) else {}, ("url",), {"detail": ("auto",)})
            pictures.append(url)
            return {"type": "image"}
    raise UserError('A part of a message must be {"type": "text", "text": ...} or {"type": "image_url", ...}.')
