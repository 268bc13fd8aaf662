"""The addresses of a served model, with aiohttp: the interface, the page, and limits of both.

    GET  /health, /v1/models
    POST /v1/chat/completions     OpenAI's chat interface
    GET  /                        the page
    GET  /tasks                   what it may ask
    POST /answer                  its questions: a task, what is looked for, and a picture

Nothing is read from the disk but the four files of the page. Requests must be JSON, which pages of other sites cannot
send, and must name this machine as they know it, so that no other site's name can lead here.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from aiohttp import web
from PIL import Image

from perception_r1.errors import UserError
from perception_r1.records import ImageSize, Sample
from perception_r1.scoring import parse_completions
from perception_r1.serving.chat import as_chunk, read_picture, read_request, write_answer
from perception_r1.serving.generation import BusyError, Completion, CompletionParams, Generator, check_sampling
from perception_r1.task import Task

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
_log = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a request may cost.

    Attributes:
        max_bytes: Of a request, its pictures as base64 included.
        max_pixels: Of a picture, before it is shrunk.
        max_new_tokens: Of a completion.
        timeout: Seconds until an answer is given up.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    max_new_tokens: int = 2048
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
        self._decoding = asyncio.Semaphore(2)  # pictures that are unpacked at once

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
            if self._hosts is not None and urlsplit(f"//{request.host}").hostname not in self._hosts:
                raise web.HTTPForbidden(reason="This server only answers to the name of this machine.")
            if request.method == "POST" and request.content_type != "application/json":
                raise web.HTTPUnsupportedMediaType(reason="The request must be of the type application/json.")
            async with asyncio.timeout(self.limits.timeout):
                response = await handler(request)
        except UserError as error:
            response = _error(400, str(error))
        except BusyError as error:
            response = _error(503, str(error))
        except TimeoutError:
            response = _error(504, f"There was no answer within {self.limits.timeout:g} seconds.")
        except web.HTTPRequestEntityTooLarge:
            response = _error(413, f"The request is larger than {self.limits.max_bytes / 2**20:g} MB.")
        except web.HTTPException as error:
            response = _error(error.status, error.reason)
        except Exception:  # the next request may do better
            _log.exception("A request failed.")
            response = _error(500, "The model failed at this request; the server's own output says why.")
        response.headers.update(_HEADERS)
        return response

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
        asked = read_request(await _json(request), max_new_tokens=self.limits.max_new_tokens)
        check_sampling(asked.sampling, max_new_tokens=self.limits.max_new_tokens, max_group_size=_MAX_GROUP_SIZE)
        pictures = [await self._picture(url) for url in asked.pictures]
        future = await asyncio.to_thread(self.generator.submit, asked.chat, pictures, asked.sampling, asked.seed)
        body = write_answer(asked, await asyncio.wrap_future(future), model=self.name)
        if not asked.is_streamed:
            return web.json_response(body)
        text = f"data: {json.dumps(as_chunk(body))}\n\ndata: [DONE]\n\n"
        return web.Response(text=text, content_type="text/event-stream")

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await _json(request)
        named = ("task", "query", "image")
        name, query, url = (body.get(key) if isinstance(body, Mapping) else None for key in named)
        task = self.tasks.get(name) if isinstance(name, str) else None
        if task is None:
            raise UserError(f"task must be one of {', '.join(self.tasks)}.")
        if not isinstance(query, str) or len(query) > _MAX_QUERY:
            raise UserError(f"query must be text of at most {_MAX_QUERY} characters.")
        if _asks(task) and not query.strip():
            raise UserError("The query is empty: this task needs one.")
        if not isinstance(url, str):
            raise UserError("image must be a data URL.")
        image = await self._picture(url)
        width, height = image.size
        sample = Sample(id="picture", image=image, width=width, height=height, query=query.strip(), target=None)
        sampling = CompletionParams(max_new_tokens=self.limits.max_new_tokens)
        future = await asyncio.to_thread(self.generator.submit, task.messages(sample), [image], sampling)
        answer = await asyncio.wrap_future(future)
        return web.json_response(self._read(task, sample, answer.completions[0]))

    async def _picture(self, url: str) -> Image.Image:
        async with self._decoding:
            return await asyncio.to_thread(read_picture, url, max_pixels=self.limits.max_pixels)

    def _read(self, task: Task[Any, Any], sample: Sample[Any], completion: Completion) -> dict[str, Any]:
        """What the page shows of an answer; shapes in fractions of the picture."""
        policy = self.generator.policy
        image_size: ImageSize = policy.processor.image_size(sample.width, sample.height)
        (parsed,) = parse_completions(
            task, policy.codec, samples=[sample], image_sizes=[image_size], completions=[completion.text]
        )
        is_read = parsed.prediction is not None
        overlays = task.overlays(parsed.prediction) if is_read else ()
        return {
            "width": sample.width,
            "height": sample.height,
            "completion": completion.text,
            "is_truncated": completion.is_truncated,
            "is_read": is_read,
            "description": task.describe(parsed.prediction) if is_read else "",
            "overlays": [{"shape": list(overlay.shape), "caption": overlay.caption} for overlay in overlays],
            "prediction": task.serialize_prediction(parsed.prediction, image_size),
        }


def _asks(task: Task[Any, Any]) -> bool:
    """Whether the prompt has a slot for what is looked for."""
    return task.prompt("a") != task.prompt("b")


async def _json(request: web.Request) -> Any:
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise UserError("The request is no JSON.") from error


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "invalid_request_error"}}, status=status)
