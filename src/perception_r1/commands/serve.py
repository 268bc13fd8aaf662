"""`perception-r1 serve`: a run or a model behind an OpenAI-compatible interface, with a page to try it on pictures."""

import socket
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import jsonargparse
import torch
from aiohttp import web

from perception_r1.commands.engine import HELP, read_engine
from perception_r1.commands.options import known, new_parser, parse, run_command
from perception_r1.commands.runs import Run, is_run, open_policy, open_run
from perception_r1.engines import GenerationEngine, NativeEngine
from perception_r1.engines.base import EngineContext
from perception_r1.errors import UserError
from perception_r1.policy.load import PolicyConfig
from perception_r1.serving.app import SERVER_OPTIONS, Limits, Served
from perception_r1.serving.generation import Generator
from perception_r1.task import Task, tasks_of
from perception_r1.tasks import TASKS

_LOCAL = ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str]) -> int:
    """Serve until it is stopped; the result is the exit status."""
    return run_command("serve", _serve, argv)


def _serve(argv: Sequence[str]) -> int:
    engine, rest = read_engine(argv)
    options = read_options(rest)
    run = open_run(Path(options.model)) if is_run(Path(options.model)) else None
    limits = Limits(
        max_bytes=int(options.max_upload_mb * 2**20),
        max_pixels=options.max_upload_pixels,
        max_new_tokens=options.max_new_tokens,
        max_requests=options.max_requests,
        timeout=options.timeout,
    )
    with _listen(options.host, options.port) as listener:  # before the model is read: the port may be taken
        generator = _generator(run, options, engine or NativeEngine())
        generator.start()
        hosts = _LOCAL if options.host in _LOCAL else None
        name = Path(options.model).name if run is None else "-".join(run.folder.parts[-2:])
        served = Served(generator, name=name, tasks=_tasks(run, options.tasks), limits=limits, hosts=hosts)
        address = f"http://{options.host}:{listener.getsockname()[1]}"
        sys.stderr.write(f"Serving {name} at {address}, and its interface at {address}/v1. Ctrl-C stops it.\n")
        web.run_app(served.app(), sock=listener, print=None, access_log=None, **SERVER_OPTIONS)
    return 0


def read_options(argv: Sequence[str]) -> jsonargparse.Namespace:
    """The options of a command line, but for those of the engine.

    Raises:
        UserError: One is wrong.
    """
    options = parse(_parser(), argv)
    for name in ("max_new_tokens", "max_upload_mb", "max_upload_pixels", "max_requests", "timeout"):
        if options[name] <= 0:
            raise UserError(f"--{name} is {options[name]}; it must be above 0")
    return options


def _parser() -> jsonargparse.ArgumentParser:
    limits = Limits()
    parser = new_parser(
        "serve",
        "Serve a model: an OpenAI-compatible interface under /v1, and a page to try it on pictures.",
        "Whoever can reach the address can use it; only this machine can, unless --host says otherwise.",
    )
    parser.add_argument("model", help="Folder of a run, or a model: hub id or folder in the hub's layout.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen at; 0.0.0.0 for all networks.")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen at; 0 takes a free one.")
    parser.add_argument(
        "--tasks", type=list[str] | None, help=f"What the page offers, of {', '.join(TASKS)}; else the run's, or all."
    )
    parser.add_argument("--ckpt", type=str | None, help="Checkpoint of a run: best (the default), last, or a file.")
    parser.add_argument("--min_pixels", type=int | None, help="Smaller pictures are enlarged to this many pixels.")
    parser.add_argument("--max_pixels", type=int | None, help="Larger pictures are shrunk to this many pixels.")
    parser.add_argument("--max_new_tokens", type=int, default=limits.max_new_tokens, help="Longest completion.")
    parser.add_argument("--max_upload_mb", type=float, default=limits.max_bytes / 2**20, help="Largest request.")
    parser.add_argument("--max_upload_pixels", type=int, default=limits.max_pixels, help="Most pixels of a request.")
    parser.add_argument("--max_requests", type=int, default=limits.max_requests, help="Most requests at once.")
    parser.add_argument("--timeout", type=float, default=limits.timeout, help="Seconds for an answer.")
    parser.add_argument("--engine", type=str | None, help=HELP)  # see commands/engine.py
    return parser


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: The address is not one of this machine, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {host}, port {port} ({error}): give another --port or --host") from error


def _tasks(run: Run | None, names: list[str] | None) -> list[Task[Any, Any]]:
    """The tasks of a run as it was trained, others as they are without options."""
    trained = {} if run is None else {task.name: task for task in tasks_of(run.task).values()}
    chosen = names or list(trained or TASKS)
    return [trained[name] if name in trained else known("--tasks", name, TASKS)() for name in chosen]


def _generator(run: Run | None, options: jsonargparse.Namespace, engine: GenerationEngine) -> Generator:
    """The model with what answers for it.

    Raises:
        UserError: The model or the checkpoint cannot be used.
    """
    config = PolicyConfig(name=options.model) if run is None else run.policy
    given = {name: options[name] for name in ("min_pixels", "max_pixels") if options[name] is not None}
    config = replace(config, **given)
    policy = open_policy(run, config, ckpt=options.ckpt, engine=engine)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "32-true" if run is None else run.precision
    autocast: AbstractContextManager[object] = nullcontext()
    if precision == "bf16-mixed":
        autocast = torch.autocast(device, torch.bfloat16)
    elif precision == "bf16-true":
        policy = policy.bfloat16()
    policy = policy.to(device).eval()
    dtype = "bfloat16" if precision.startswith("bf16") else config.dtype
    engine.connect(policy, EngineContext(config=config, dtype=dtype, run_id=uuid4().hex))
    return Generator(policy, engine, autocast=autocast)
