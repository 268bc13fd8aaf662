"""A served model in this process, for tests: as it is, or as a server of vLLM that takes over weights."""

import asyncio
import shutil
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

from perception_r1.engines import NativeEngine
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.serving.app import SERVER_OPTIONS, Limits, Served
from perception_r1.serving.generation import Generator
from perception_r1.tasks import TASKS


def load(folder):
    return Policy.load(PolicyConfig(name=str(folder)), is_trained=False).eval()


def serve(folder, **limits):
    """A model at its addresses, with a thread that answers."""
    generator = Generator(load(folder), NativeEngine())
    generator.start()
    tasks = [task() for task in TASKS.values()]
    return Served(generator, name="tiny", tasks=tasks, limits=Limits(**limits), hosts=["127.0.0.1", "localhost"])


@contextmanager
def running(app, port=0):
    """An application at a port, in a thread."""
    loop, started, found = asyncio.new_event_loop(), threading.Event(), []

    async def start():
        runner = web.AppRunner(app, **SERVER_OPTIONS)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        found.append((runner, runner.addresses[0][1]))
        started.set()

    def run():
        asyncio.set_event_loop(loop)
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(30)
    runner, port = found[0]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


class LikeVLLM:
    """What vLLM's server has besides, of which only the weights matter here; `calls` tells what was asked."""

    def __init__(self, folder, *, logprobs_mode="processed_logprobs"):
        self.folder, self.logprobs_mode = folder, logprobs_mode
        self.calls = []
        self.reset()

    def reset(self):
        """Start again: with the weights of the folder."""
        self.served = serve(self.folder, max_new_tokens=64)
        self.version = "default"

    def app(self):
        app = self.served.app()
        app.router.add_get("/weight_info", self.weight_info)
        app.router.add_get("/server_info", self.server_info)
        app.router.add_post("/collective_rpc", self.collective_rpc)
        app.router.add_post("/update_weight_version", self.update_weight_version)
        for name in ("prefix", "encoder"):
            app.router.add_post(f"/reset_{name}_cache", self.nothing)
        return app

    async def weight_info(self, request):
        return web.json_response({"weight_version": self.version})

    async def server_info(self, request):
        return web.json_response({"vllm_config": {"model_config": {"logprobs_mode": self.logprobs_mode}}})

    async def collective_rpc(self, request):
        call = await request.json()
        assert call["method"] == "load_policy"
        self.calls.append(call["kwargs"]["weights_path"])
        with tempfile.TemporaryDirectory() as folder:  # transformers then refuses what is missing or too much
            shutil.copytree(self.folder, folder, dirs_exist_ok=True)
            shutil.copy(Path(call["kwargs"]["weights_path"]) / "model.safetensors", folder)
            self.served.generator.policy = load(folder)
        return web.Response()

    async def update_weight_version(self, request):
        self.version = (await request.json())["new_version"]
        return web.json_response({})

    async def nothing(self, request):
        return web.Response()
