"""One OpenAI-compatible server: what is asked of it over HTTP, and of vLLM's own server besides.

Legend: G completions of a prompt, T tokens of a completion.
"""

import base64
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import torch
from PIL import Image
from torch import Tensor

from perception_r1.engines.base import NEVER, EngineError
from perception_r1.errors import UserError
from perception_r1.policy.batch import Chat
from perception_r1.policy.policy import Policy
from perception_r1.policy.rollout import SamplingParams

API_KEY = "PERCEPTION_R1_API_KEY"
"""Environment variable with the key that servers ask for; an option would end up in the files of a run."""
_MAX_SEED = 2**31
_TOLD = 300
"""Characters that are told of a server's own words."""
_ROUNDING = 1e-3
"""By which a log-probability may exceed 0."""
_Value = TypeVar("_Value")


class ServerLostError(Exception):
    """The server cannot be reached, or has failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One completion of a server.

    Attributes:
        tokens: [T] ids, the end token included, on the CPU.
        logprobs: [T] of each token as it was drawn; NaN where the server does not tell.
        is_truncated: The length limit came before an end token.
    """

    tokens: Tensor
    logprobs: Tensor
    is_truncated: bool


class Server:
    """A server by its address.

    Args:
        url: `http://host:port`, with or without the `/v1` of its interface.
        timeout: Longest time for an answer, in seconds.
        max_requests: Most requests at once.

    Attributes:
        url: The address without `/v1`.
        is_lost: It is left out until it answers again.
        lost_at: When it was last seen to be lost, by the monotonic clock.
        failure: Why it did not answer when it failed last.

    Raises:
        UserError: There can be no server at the address, or the key cannot be sent.
    """

    def __init__(self, url: str, *, timeout: float, max_requests: int) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.is_lost = False
        self.lost_at = 0.0
        self.failure = ""
        self._first_model: str | None = None
        try:
            self._client = httpx2.Client(
                base_url=self.url,
                headers=_headers(),
                limits=httpx2.Limits(max_connections=max_requests + 1),  # one for what is asked between completions
                timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0)),
            )
        except httpx2.InvalidURL as error:
            raise UserError(f"{url} is no address of a server: {error}.") from error
        if self._client.base_url.scheme not in ("http", "https") or not self._client.base_url.host:
            raise UserError(f"{url} is no address of a server; such as http://localhost:8000 is one.")

    def is_healthy(self) -> bool:
        """Whether it can answer now."""
        try:
            self.models()
        except (ServerLostError, EngineError) as error:
            self.failure = str(error)
            return False
        return True

    def models(self) -> list[str]:
        """Names of the models that it serves; raises as `complete`."""
        names = self._read("GET", "/v1/models", lambda answer: [str(model["id"]) for model in answer["data"]])
        if not names:
            raise EngineError(f"The server {self.url} serves no model.")
        return names

    def first_model(self) -> str:
        """The model that it names first, asked for once; raises as `complete`."""
        if self._first_model is None:
            self._first_model = self.models()[0]
        return self._first_model

    def complete(self, request: Mapping[str, Any]) -> Any:
        """The answer to a chat, as JSON.

        Raises:
            ServerLostError: There is none.
            EngineError: The server refuses the request, or answers with something else.
        """
        return self._read("POST", "/v1/chat/completions", lambda answer: answer, request)

    def weight_version(self) -> str:
        """What `load_weights` was told last; raises as `complete`."""
        return self._read("GET", "/weight_info", lambda answer: str(answer["weight_version"]))

    def logprobs_mode(self) -> str:
        """Of which distribution vLLM tells log-probabilities; raises as `complete`."""
        path = "/server_info?config_format=json"
        return self._read("GET", path, lambda answer: str(answer["vllm_config"]["model_config"]["logprobs_mode"]))

    def load_weights(self, folder: Path, version: str) -> None:
        """Let vLLM take over the weights of a folder; raises as `complete`."""
        call = {"method": "load_policy", "kwargs": {"weights_path": str(folder)}}  # see engines/vllm_worker.py
        self._send("POST", "/collective_rpc", call)
        for cache in ("prefix", "encoder"):  # what was computed with the old weights
            self._send("POST", f"/reset_{cache}_cache", {})
        self._send("POST", "/update_weight_version", {"new_version": version})

    def load_adapter(self, folder: Path, name: str) -> None:
        """Let vLLM serve an adapter under a name; raises as `complete`."""
        self._send("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload_adapter(self, name: str) -> None:
        """Let vLLM forget an adapter; raises as `complete`."""
        self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def _read(self, method: str, path: str, read: Callable[[Any], _Value], content: Any = None) -> _Value:
        """What a function reads from the JSON of an answer."""
        response = self._send(method, path, content)
        try:
            return read(response.json())
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise EngineError(
                f"The server {self.url} answers {path} with something that is no such answer "
                f"({type(error).__name__}): {_told(response)}"
            ) from error

    def _send(self, method: str, path: str, content: Any = None) -> httpx2.Response:
        try:
            response = self._client.request(method, path, json=content)
        except httpx2.RequestError as error:
            raise ServerLostError(f"{type(error).__name__}: {error}") from error
        if response.status_code >= 500:
            raise ServerLostError(f"{response.status_code} for {path}: {_told(response)}")
        if response.status_code >= 300:
            raise EngineError(f"The server {self.url} refuses {path} ({response.status_code}): {_told(response)}")
        return response


def _headers() -> dict[str, str]:
    """What every request says: the key, if there is one."""
    key = os.environ.get(API_KEY, "").strip()  # of a file it ends in a line break
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{API_KEY} holds characters that no key has: only printable ASCII can be sent.")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _told(response: httpx2.Response) -> str:
    """The beginning of a server's own words, in one line."""
    return " ".join(response.text[:_TOLD].split())


def chat_request(
    chat: Chat,
    pictures: Sequence[Image.Image],
    *,
    group_size: int,
    params: SamplingParams,
    seed: int,
    template_options: Mapping[str, bool],
) -> dict[str, Any]:
    """The request for G completions of a chat but for the model, with vLLM's own fields for tokens.

    Args:
        chat: Messages; their pictures stand as `{"type": "image"}`.
        pictures: These pictures, in their order; they are sent without loss.
        group_size: G.
        params: How completions are written.
        seed: On which they depend, unless greedy.
        template_options: See `Processor.template_options`.
    """
    left = iter(pictures)
    messages = [
        {**message, "content": [_part(part, left) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in chat
    ]
    return {
        "messages": messages,
        "n": group_size,
        "max_tokens": params.max_new_tokens,
        "temperature": 0.0 if params.is_greedy else params.temperature,
        "top_p": params.top_p,
        "seed": None if params.is_greedy else seed % _MAX_SEED,
        "repetition_penalty": params.repetition_penalty,
        "stop_token_ids": params.eos_token_ids.tolist(),
        "logit_bias": {str(token): NEVER for token in params.suppress_tokens.tolist()},
        "logprobs": True,
        "top_logprobs": 0,
        "skip_special_tokens": False,  # boxes are written with them
        "return_token_ids": True,
        **({"chat_template_kwargs": dict(template_options)} if template_options else {}),
    }


def _part(part: Mapping[str, Any], pictures: Iterator[Image.Image]) -> Mapping[str, Any]:
    if part["type"] != "image":
        return part
    file = io.BytesIO()
    next(pictures).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def read_completions(
    answer: Any, input_ids: Tensor, *, group_size: int, params: SamplingParams, policy: Policy
) -> list[Completion]:
    """The completions of an answer to `chat_request`.

    Args:
        answer: JSON.
        input_ids: [P] tokens of the prompt as the policy reads it.
        group_size: G.
        params: How completions were to be written.
        policy: One that has weights is trained or compared, and needs the tokens themselves; for another the text will
            do, which a server tells that knows nothing of tokens.

    Raises:
        EngineError: The answer is none, or to another prompt, or no such completion can have been sampled.
    """
    try:
        told = answer.get("prompt_token_ids")
        if told is None and policy.has_weights:
            raise EngineError("The server does not tell how it reads a prompt (prompt_token_ids): vLLM does.")
        if told is not None and told != input_ids.tolist():
            raise EngineError(
                f"The server reads a prompt as {len(told)} tokens that are not the {len(input_ids)} of this program: "
                "let it serve the same model, with the same min_pixels and max_pixels (--mm-processor-kwargs)."
            )
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        completions = [_read_choice(choice, params, policy) for choice in choices]
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise EngineError(f"The server's answer is none to a chat ({type(error).__name__}: {error}).") from error
    if len(completions) != group_size:
        raise EngineError(f"The server gives {len(completions)} completions where {group_size} were asked for.")
    return completions


def _read_choice(choice: Mapping[str, Any], params: SamplingParams, policy: Policy) -> Completion:
    is_truncated = choice["finish_reason"] == "length"
    ids, told = choice.get("token_ids"), choice.get("logprobs")
    if ids is None:
        if policy.has_weights:
            raise EngineError("The server does not tell tokens (return_token_ids): vLLM does, from version 0.10.2 on.")
        end = [] if is_truncated else [int(policy.eos_token_ids[0])]
        tokens = torch.tensor(policy.processor.encode_text(choice["message"]["content"] or "") + end, dtype=torch.long)
    else:
        tokens = _read_tokens(ids, params, policy)
    logprobs = torch.full((len(tokens),), float("nan"))
    if told is not None and len(told["content"]) == len(tokens):
        logprobs = torch.tensor([float(each["logprob"]) for each in told["content"]])
        if not (logprobs.isfinite() & (logprobs <= _ROUNDING)).all():
            raise ValueError("a log-probability is no finite number of at most 0")
    elif policy.has_weights:
        raise EngineError("The server does not tell the log-probability of every token.")
    return Completion(tokens=tokens, logprobs=logprobs, is_truncated=is_truncated)


def _read_tokens(ids: Any, params: SamplingParams, policy: Policy) -> Tensor:
    """Token ids of a completion; the training pass can compute no others.

    Raises:
        ValueError: They are none, or cannot have been sampled.
    """
    if not isinstance(ids, list) or any(type(each) is not int for each in ids):
        raise ValueError("token_ids is no list of whole numbers")
    if not 1 <= len(ids) <= params.max_new_tokens:
        raise ValueError(f"{len(ids)} tokens, where 1 to {params.max_new_tokens} were asked for")
    vocab_size = policy.model.config.get_text_config().vocab_size
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"a token is none of the {vocab_size} of the model")
    if never := set(ids) & set(params.suppress_tokens.tolist()):
        raise ValueError(f"token {min(never)} was not to be sampled (logit_bias)")
    return torch.tensor(ids, dtype=torch.long)
