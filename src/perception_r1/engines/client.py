"""One OpenAI-compatible server: what is asked of it over HTTP, and of vLLM's own server besides.

Legend: G completions of a prompt, T tokens of a completion.
"""

import base64
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
from PIL import Image
from torch import Tensor

from perception_r1.engines.base import NEVER
from perception_r1.errors import UserError
from perception_r1.policy.batch import Chat
from perception_r1.policy.policy import Policy
from perception_r1.policy.rollout import SamplingParams

API_KEY = "PERCEPTION_R1_API_KEY"
"""Environment variable with the key that servers ask for; an option would end up in the files of a run."""
_MAX_SEED = 2**31
_TOLD = 300
"""Characters that are told of a server's own words."""


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
        failure: Why it did not answer when it failed last.
    """

    def __init__(self, url: str, *, timeout: float, max_requests: int) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.is_lost = False
        self.failure = ""
        key = os.environ.get(API_KEY)
        self._client = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx2.Limits(max_connections=max_requests + 1),  # one is left for what is asked between completions
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0)),
        )

    def is_healthy(self) -> bool:
        """Whether it can answer now."""
        try:
            self.models()
        except (ServerLostError, UserError) as error:
            self.failure = str(error)
            return False
        return True

    def models(self) -> list[str]:
        """Names of the models that it serves; raises as `complete`."""
        return [str(model["id"]) for model in self._ask("GET", "/v1/models")["data"]]

    def complete(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a chat, as JSON.

        Raises:
            ServerLostError: There is none.
            UserError: The server refuses the request.
        """
        answer: dict[str, Any] = self._ask("POST", "/v1/chat/completions", request)
        return answer

    def weight_version(self) -> str:
        """What `load_weights` was told last; raises as `complete`."""
        return str(self._ask("GET", "/weight_info")["weight_version"])

    def logprobs_mode(self) -> str:
        """Of which distribution vLLM tells log-probabilities; raises as `complete`."""
        info = self._ask("GET", "/server_info?config_format=json")
        return str(info["vllm_config"]["model_config"]["logprobs_mode"])

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

    def _ask(self, method: str, path: str, content: Any = None) -> Any:
        response = self._send(method, path, content)
        try:
            return response.json()
        except ValueError as error:
            raise UserError(f"The server {self.url} answers {path} with something else than JSON.") from error

    def _send(self, method: str, path: str, content: Any = None) -> httpx2.Response:
        try:
            response = self._client.request(method, path, json=content)
        except httpx2.TransportError as error:
            raise ServerLostError(f"{type(error).__name__}: {error}") from error
        except httpx2.InvalidURL as error:
            raise UserError(f"{self.url} is no address of a server: {error}") from error
        said = " ".join(response.text[:_TOLD].split()) if response.status_code >= 400 else ""
        if response.status_code >= 500:
            raise ServerLostError(f"{response.status_code} for {path}: {said}")
        if response.status_code >= 400:
            raise UserError(f"The server {self.url} refuses {path} ({response.status_code}): {said}")
        return response


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


def read_completions(answer: Any, input_ids: Tensor, group_size: int, policy: Policy) -> list[Completion]:
    """The completions of an answer to `chat_request`.

    Args:
        answer: JSON.
        input_ids: [P] tokens of the prompt as the policy reads it.
        group_size: G.
        policy: One that has weights is trained or compared, and needs the tokens themselves; for another the text will
            do, which a server tells that knows nothing of tokens.

    Raises:
        UserError: The answer is none, or to another prompt.
    """
    try:
        told = answer.get("prompt_token_ids")
        if told is not None and told != input_ids.tolist():
            raise UserError(
                f"The server reads a prompt as {len(told)} tokens that are not the {len(input_ids)} of this program: "
                "let it serve the same model, with the same min_pixels and max_pixels (--mm-processor-kwargs)."
            )
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        completions = [_read_choice(choice, policy) for choice in choices]
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"The server's answer is none to a chat ({type(error).__name__}: {error}).") from error
    if len(completions) != group_size:
        raise UserError(f"The server gives {len(completions)} completions where {group_size} were asked for.")
    return completions


def _read_choice(choice: Mapping[str, Any], policy: Policy) -> Completion:
    is_truncated = choice["finish_reason"] == "length"
    tokens, told = choice.get("token_ids"), choice.get("logprobs")
    if tokens is None:
        if policy.has_weights:
            raise UserError("The server does not tell tokens (return_token_ids): vLLM does, from version 0.10.2 on.")
        end = [] if is_truncated else [int(policy.eos_token_ids[0])]
        tokens = policy.processor.encode_text(choice["message"]["content"] or "") + end
    completion = torch.tensor(tokens, dtype=torch.long)
    logprobs = torch.full((len(completion),), float("nan"))
    if told is not None and len(told["content"]) == len(completion):
        logprobs = torch.tensor([float(each["logprob"]) for each in told["content"]])
    elif policy.has_weights:
        raise UserError("The server does not tell the log-probability of every token.")
    return Completion(tokens=completion, logprobs=logprobs, is_truncated=is_truncated)
