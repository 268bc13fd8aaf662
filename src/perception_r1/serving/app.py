"""The addresses of a served model, with aiohttp: the interface, the page, and limits of both.

    GET  /health, /v1/models
    POST /v1/chat/completions     OpenAI's chat interface
    GET  /                        the page
    GET  /tasks                   what it may ask
    POST /answer                  its questions: a task, what is looked for, and a picture

Nothing is read from the disk but the four files of the page. Requests must be JSON, which pages of other sites cannot
send, and must name this machine as they know it, so that no other site's name can lead here.

A question is counted from before its first byte is read until it is answered, and refused where too many are open. Two
threads unpack the pictures of one question after the other, so that no more of them are in memory as they were sent.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from aiohttp import web

from perception_r1.engines.base import EngineError
from perception_r1.errors import UserError
from perception_r1.policy.batch import Chat, PromptBatch
from perception_r1.records import ImageSize, Sample
from perception_r1.serving.chat import as_chunks, read_pictures, read_request, write_answer
from perception_r1.serving.fields import check_fields, given, read_text
from perception_r1.serving.generation import Answer, Completion, CompletionParams, Generator, check_sampling
from perception_r1.task import Task

SERVER_OPTIONS: Mapping[str, Any] = {"handler_cancellation": True, "auto_decompress": False}
"""Of aiohttp: what nobody waits for any more is forgotten, and nothing compressed is unpacked."""
_PAGE = Path(__file__).parent / "page"
_STYLES = Path(__file__).parents[1] / "styles"
_FILES = {
    "/": _PAGE / "index.html",
    "/page.js": _PAGE / "page.js",
    "/page.css": _PAGE / "page.css",
    "/base.css": _STYLES / "base.css",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_MAX_QUERY = 500
"""Characters of what is looked for."""
_MAX_GROUP_SIZE = 16
_NUM_WORKERS = 2
"""Questions whose pictures are unpacked at once."""
_log = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


class BusyError(Exception):
    """Too many requests are open already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a request may cost.

    Attributes:
        max_bytes: Of a request, its pictures as base64 included.
        max_pixels: Of all its pictures together, before they are shrunk.
        max_new_tokens: Of a completion.
        max_requests: That are open at once; others are refused.
        timeout: Seconds until an answer is given up.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    max_new_tokens: int = 2048
    max_requests: int = 64
    timeout: float = 120.0


class Served:
    """A model at its addresses.

    Args:
        generator: Answers; it runs.
        name: Of the model.
        tasks: What the page offers.
        limits: What a request may cost.
        hosts: Names under which this machine may be called; None: any.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        name: str,
        tasks: Sequence[Task[Any, Any]],
        limits: Limits,
        hosts: Sequence[str] | None = None,
    ) -> None:
        self.generator, self.name, self.limits = generator, name, limits
        self.tasks = {task.name: task for task in tasks}
        self._hosts = None if hosts is None else frozenset(hosts)
        self._workers = ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix="pictures")
        self._num_open = 0

    def app(self) -> web.Application:
        """What a server runs."""
        app = web.Application(client_max_size=self.limits.max_bytes, middlewares=[self._guard])
        for path in _FILES:
            app.router.add_get(path, self._file)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/tasks", self._tasks)
        app.router.add_post("/answer", self._answer)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check where a request comes from, bound its time, and turn errors into one sentence of JSON."""
        try:
            self._check(request)
            async with asyncio.timeout(self.limits.timeout):
                if request.method == "POST":
                    with self._opened():
                        response = await handler(request)
                else:
                    response = await handler(request)
        except Exception as error:
            if request.transport is None:  # the client is gone
                raise
            response = self._refusal(error)
        response.headers.update(_HEADERS)
        return response

    def _check(self, request: web.Request) -> None:
        if self._hosts is not None and _hostname(request) not in self._hosts:
            raise web.HTTPForbidden(reason="This server only answers to the name of this machine.")
        if request.method == "POST" and request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(reason="The request must be of the type application/json.")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise web.HTTPUnsupportedMediaType(reason="The request must not be compressed.")

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Count a request as long as it is open."""
        if self._num_open >= self.limits.max_requests:
            raise BusyError
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    def _refusal(self, error: Exception) -> web.Response:
        """An error in one sentence."""
        match error:
            case EngineError():  # what answers for the model is lost, or refuses
                _log.error("%s", error)
                return _error(503, str(error))
            case UserError():
                return _error(400, str(error))
            case BusyError():
                return _error(503, "Too many requests wait; try again later.")
            case TimeoutError():
                return _error(504, f"There was no answer within {self.limits.timeout:g} seconds.")
            case web.HTTPRequestEntityTooLarge():
                return _error(413, f"The request is larger than {self.limits.max_bytes / 2**20:g} MB.")
            case web.HTTPException():
                return _error(error.status, error.reason)
        _log.error("A request failed.", exc_info=error)  # the next one may do better
        return _error(500, "The model failed at this request; the server's own output says why.")

    async def _file(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(_FILES[request.path])

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "ok" if self.generator.is_alive() else "dead"})

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [{"id": self.name, "object": "model"}]})

    async def _tasks(self, request: web.Request) -> web.StreamResponse:
        found = [{"name": task.name, "prompt": task.prompt("…"), "asks": _asks(task)} for task in self.tasks.values()]
        return web.json_response({"model": self.name, "tasks": found})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body, longest, settings = await _json(request), self.limits.max_new_tokens, self.generator.settings
        asked = read_request(body, max_new_tokens=longest, model=self.name, settings=settings)
        check_sampling(asked.sampling, max_new_tokens=longest, max_group_size=_MAX_GROUP_SIZE)
        prompt = await self._in_worker(lambda: self._encode(asked.chat, asked.pictures))
        answer = write_answer(asked, await self._complete(prompt, asked.sampling, asked.seed), model=self.name)
        if not asked.is_streamed:
            return web.json_response(answer)
        events = [*(json.dumps(chunk) for chunk in as_chunks(asked, answer)), "[DONE]"]
        text = "".join(f"data: {event}\n\n" for event in events)
        return web.Response(text=text, content_type="text/event-stream")

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        task, query, url = self._read_question(await _json(request))
        prompt = await self._in_worker(lambda: self._ask(task, query, url))
        answer = await self._complete(prompt, CompletionParams(max_new_tokens=self.limits.max_new_tokens))
        return web.json_response(self._read(task, prompt.image_sizes[0], answer.completions[0]))

    def _read_question(self, body: Any) -> tuple[Task[Any, Any], str, str]:
        """Task, query and data URL of what the page asks."""
        fields = given(body) if isinstance(body, Mapping) else {}
        name, query, url = (fields.get(key, "") for key in ("task", "query", "image"))
        task = self.tasks.get(name) if isinstance(name, str) else None
        if task is None:
            raise UserError(f"task must be one of {', '.join(self.tasks)}.")
        check_fields(fields, ("task", "query", "image"))
        query = read_text(query, "query", max_length=_MAX_QUERY).strip()
        if _asks(task) and not query:
            raise UserError("The query is empty: this task needs one.")
        if query and not _asks(task):
            raise UserError(f"The task {task.name} looks for nothing: leave out the query.")
        if not isinstance(url, str):
            raise UserError("image must be a data URL.")
        return task, query, url

    def _encode(self, chat: Chat, urls: Sequence[str]) -> PromptBatch:
        return self.generator.encode(chat, read_pictures(urls, max_pixels=self.limits.max_pixels))

    def _ask(self, task: Task[Any, Any], query: str, url: str) -> PromptBatch:
        (image,) = read_pictures([url], max_pixels=self.limits.max_pixels)
        width, height = image.size
        sample = Sample(id="picture", image=image, width=width, height=height, query=query, target=None)
        return self.generator.encode(task.messages(sample), [image])

    async def _in_worker(self, encode: Callable[[], PromptBatch]) -> PromptBatch:
        """What one of the workers makes; what it has not begun in time it never begins."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, encode)

    async def _complete(self, prompt: PromptBatch, sampling: CompletionParams, seed: int | None = None) -> Answer:
        return await asyncio.wrap_future(self.generator.submit(prompt, sampling, seed))

    def _read(self, task: Task[Any, Any], image_size: ImageSize, completion: Completion) -> dict[str, Any]:
        """What the page shows of an answer; shapes in fractions of the picture."""
        prediction = task.parse_completion(completion.text, self.generator.policy.codec, image_size)
        is_read = prediction is not None
        overlays = task.overlays(prediction) if is_read else ()
        return {
            "width": image_size.width,
            "height": image_size.height,
            "completion": completion.text,
            "is_truncated": completion.is_truncated,
            "is_read": is_read,
            "description": task.describe(prediction) if is_read else "",
            "overlays": [{"shape": list(overlay.shape), "caption": overlay.caption} for overlay in overlays],
            "prediction": task.serialize_prediction(prediction, image_size),
        }


def _asks(task: Task[Any, Any]) -> bool:
    """Whether the prompt has a slot for what is looked for."""
    return task.prompt("a") != task.prompt("b")


def _hostname(request: web.Request) -> str | None:
    """The name by which this machine was called, without its port."""
    try:
        return urlsplit(f"//{request.host}").hostname
    except ValueError:  # a bracket without its partner
        return None


async def _json(request: web.Request) -> Any:
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError, web.RequestPayloadError) as error:
        raise UserError("The request is no JSON.") from error


def _error(status: int, message: str) -> web.Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return web.json_response({"error": {"message": message, "type": kind}}, status=status)
