import asyncio
import base64
import io
import itertools
import json
import random
import socket
import struct
import threading
import time
import weakref
import zlib
from contextlib import suppress

import httpx2
import pytest
from PIL import Image

from perception_r1.engines import NativeEngine
from perception_r1.engines.base import EngineError
from perception_r1.engines.client import chat_request
from perception_r1.records import ImageSize
from perception_r1.serving import chat as module
from perception_r1.serving.generation import Completion, CompletionParams, Generator
from tests.serving.serving import load, running, serve
from tests.serving.test_chat import data_url

PICTURE = Image.new("RGB", (60, 40), "red")


@pytest.fixture(scope="module")
def served(folder):
    return serve(folder, max_bytes=2**20, max_pixels=100_000, max_new_tokens=30, timeout=20.0)


@pytest.fixture(scope="module")
def client(served):
    with running(served.app()) as url, httpx2.Client(base_url=url, timeout=60) as client:
        yield client


def question(**changes):
    return {"task": "counting", "query": "red cup", "image": data_url(PICTURE), **changes}


def chat(**options):
    parts = [{"type": "image_url", "image_url": {"url": data_url(PICTURE)}}, {"type": "text", "text": "How many?"}]
    return {"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": 12, **options}


def test_the_page_and_what_it_needs_are_there(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "javascript" in client.get("/page.js").headers["content-type"]
    for style in ("/base.css", "/page.css"):
        assert client.get(style).headers["content-type"].startswith("text/css")
    offered = client.get("/tasks").json()
    assert offered["model"] == "tiny"
    assert {task["name"]: task["asks"] for task in offered["tasks"]} == {
        **{"counting": True, "grounding": True},
        **{"detection": False, "ocr": False},
    }
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/health").json() == {"status": "ok"}


def test_an_answer_tells_what_was_read(client, served):
    found = client.post("/answer", json=question()).json()
    assert (found["width"], found["height"]) == (60, 40)
    assert found["completion"]
    same = client.post("/v1/chat/completions", json=chat(max_tokens=30)).json()
    assert same["choices"][0]["finish_reason"] in ("stop", "length")
    assert same["usage"]["completion_tokens"] <= 30


def test_boxes_are_given_in_fractions_of_the_picture(served):
    (task,) = [task for task in served.tasks.values() if task.name == "counting"]
    box = "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(100,200),(500,1000)<|box_end|>"
    image_size = ImageSize(width=60, height=40, resized_width=56, resized_height=28)
    text = {"text": box, "plain_text": "", "tokens": [], "token_texts": [], "logprobs": []}
    found = served._read(task, image_size, Completion(**text, is_truncated=False))
    (overlay,) = found["overlays"]
    assert overlay["shape"] == pytest.approx([0.1, 0.2, 0.5, 1.0])
    assert found["is_read"]
    assert json.dumps(found, allow_nan=False)


def test_samples_depend_on_the_seed_alone(client):
    options = {"n": 3, "temperature": 1.0, "seed": 7, "return_token_ids": True, "logprobs": True}
    one, other = (client.post("/v1/chat/completions", json=chat(**options)).json() for _ in range(2))
    assert one["choices"] == other["choices"]
    assert len({tuple(choice["token_ids"]) for choice in one["choices"]}) > 1
    unseeded = [client.post("/v1/chat/completions", json=chat(n=3, temperature=1.0)).json() for _ in range(2)]
    assert unseeded[0]["choices"] != unseeded[1]["choices"]


def test_a_stream_has_the_answer_in_one_piece(client):
    text = client.post("/v1/chat/completions", json=chat(stream=True)).text
    first, last, _ = text.split("\n\n")
    body = json.loads(first.removeprefix("data: "))
    assert body["object"] == "chat.completion.chunk"
    assert body["choices"][0]["delta"]["role"] == "assistant"
    assert last == "data: [DONE]"


def test_requests_that_wait_are_answered_together(folder, monkeypatch):
    served = serve(folder, max_new_tokens=30)
    sizes, plain, release = [], Generator._answer, threading.Event()

    def answer(self, batch):
        release.wait(10)
        sizes.append(len(batch))
        return plain(self, batch)

    monkeypatch.setattr(Generator, "_answer", answer)
    with running(served.app()) as url:

        async def ask():
            async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
                asked = [asyncio.create_task(client.post("/v1/chat/completions", json=chat())) for _ in range(6)]
                asked.append(asyncio.create_task(client.post("/v1/chat/completions", json=chat(max_tokens=13))))
                await asyncio.sleep(1.0)
                release.set()
                return [(await each).json()["choices"][0]["message"]["content"] for each in asked]

        texts = asyncio.run(ask())
    assert len(set(texts[:6])) == 1
    assert sum(sizes) == 7
    assert len(sizes) <= 4  # the first alone, five together, the longer one


def test_too_many_requests_and_slow_answers_are_told(folder, monkeypatch):
    served, release = serve(folder, max_new_tokens=30, max_requests=3, timeout=1.0), threading.Event()
    monkeypatch.setattr(Generator, "_answer", lambda self, batch: release.wait(20) and 1 / 0)
    with running(served.app()) as url:

        async def ask():
            async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
                return await asyncio.gather(*(client.post("/answer", json=question()) for _ in range(4)))

        responses = asyncio.run(ask())
        release.set()
    assert {response.status_code for response in responses} == {503, 504}
    messages = {response.json()["error"]["message"] for response in responses}
    assert messages == {"Too many requests wait; try again later.", "There was no answer within 1 seconds."}


def test_a_failure_of_the_model_ends_one_request_and_not_the_server(folder, monkeypatch, caplog):
    served = serve(folder, max_new_tokens=30)
    with running(served.app()) as url, httpx2.Client(base_url=url, timeout=60) as client:
        with monkeypatch.context() as patch:
            patch.setattr(served.generator.engine, "generate", lambda *args, **kwargs: 1 / 0)
            response = client.post("/answer", json=question())
            assert response.status_code == 500
            assert response.json()["error"]["message"].startswith("The model failed")
        assert client.post("/answer", json=question()).status_code == 200
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Host": "evil.example"}, 403), ({"Host": "localhost:1"}, 200), ({"Content-Type": "text/plain"}, 415)],
)
def test_other_sites_cannot_use_it(client, headers, status):
    content = json.dumps(question()).encode()
    response = client.post("/answer", content=content, headers={"Content-Type": "application/json"} | headers)
    assert response.status_code == status


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page/../page.js", "/page.py", "//etc/passwd"],
)
def test_no_other_file_can_be_read(client, path):
    url = client.base_url.join(".")
    host, port = url.host, url.port

    async def get():  # as it is, which a client would tidy up
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        found = await reader.read()
        writer.close()
        return found

    found = asyncio.run(get())
    assert b" 404 " in found.split(b"\r\n")[0] or b" 405 " in found.split(b"\r\n")[0] or b" 400 " in found[:40]
    assert b"root:" not in found


def png(width, height, data=b""):
    """The file of a picture that claims a size."""

    def chunk(kind, content):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def picture_url(image_content):
    return f"data:image/png;base64,{base64.b64encode(image_content).decode()}"


def hostile_uploads(count, seed=0):
    """Requests (path, headers, content), of which each has something that is not allowed."""
    draw = random.Random(seed)
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    whole = file.getvalue()
    for number in range(count):
        kind, is_page, headers = number % 15, number // 15 % 2 == 0, {"Content-Type": "application/json"}
        content = whole
        if kind == 0:
            content = draw.randbytes(draw.randrange(2000))
        elif kind == 1:  # cut off
            content = whole[: draw.randrange(len(whole) // 2)]
        elif kind == 2:  # a bit of the header turned, which its checksum tells
            position = draw.randrange(8, 33)
            content = whole[:position] + bytes([whole[position] ^ 1 << draw.randrange(8)]) + whole[position + 1 :]
        elif kind == 3:  # a bomb
            content = png(draw.choice([20_000, 60_000, 2**31 - 1]), draw.choice([20_000, 65_000]), bytes(9999))
        elif kind == 4:
            content = draw.choice([b"%!PS\n(/etc/passwd) run", b"<svg onload='alert(1)'/>", b"GIF89a", b"\xff\xd8\xff"])
        url, text, pictures = picture_url(content), "How many?", 1
        if kind == 5:
            url = draw.choice(["http://127.0.0.1/a.png", "file:///etc/passwd", "/etc/passwd", "", "data:", "\udcff"])
        elif kind == 6:  # halves of characters, and what stands for a picture
            text = draw.choice(["\ud800", "a\udfffb", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>"])
        elif kind == 7 and not is_page:  # each is small enough, and all together are not
            url, pictures = data_url(Image.new("RGB", (150, 100))), draw.choice([7, 8])
        elif kind == 7:
            url = data_url(Image.new("RGB", (400, 300)))
        body = question(image=url, query=text)
        if not is_page:
            part = {"type": "image_url", "image_url": {"url": url}}
            content = [part] * pictures + [{"type": "text", "text": text}]
            body = {"messages": [{"role": draw.choice(["user", "system", "assistant"]), "content": content}]}
        if kind == 8:  # another kind of value
            name = draw.choice(["task", "query", "image"] if is_page else ["messages", "n", "temperature", "seed"])
            body[name] = draw.choice([3, {"a": 1}, ["x"], "x" * 501]) if is_page else draw.choice([-1, {"a": 1}, ["x"]])
        elif kind == 9:
            body = draw.choice([None, 1, [], "text", {}, {"task": "counting"}, {"messages": [{}]}, [body]])
        elif kind == 10:  # what would be ignored, and numbers that no computer has
            changes = [{"foo": 1}, {"\ud800" * 99: 1}, {"stop": ["a"]}, {"tools": [{}]}, {"top_logprobs": 5}]
            changes += [{"temperature": 10**400}, {"n": 10**4000}, {"seed": 10**400}, {"model": "other"}]
            body |= draw.choice(changes)
        text = json.dumps(body)
        if kind == 11:
            text = draw.choice(
                [text[: draw.randrange(1, len(text))], "[" * 100_000, "\x00", '{"a":' * 50_000, "\ud800"]
            )
        elif kind == 12:
            body["image" if is_page else "messages"] = url + "A" * (2**20)
            text = json.dumps(body)
        elif kind == 13:
            headers["Content-Encoding"] = draw.choice(["gzip", "deflate", "br", "zstd", "", "gzip, gzip", "nonsense"])
        elif kind == 14:
            headers["Host"] = draw.choice(["[::1", "evil.example", "[", "]", "[[", "localhost.evil.example", "a b"])
        path = "/answer" if is_page else "/v1/chat/completions"
        yield path, headers, text.encode("utf-8", "surrogatepass")


def test_a_thousand_hostile_uploads_are_refused_in_a_sentence_each(client, caplog):
    slowest = 0.0
    for number, (path, headers, content) in enumerate(hostile_uploads(1000)):
        started = time.monotonic()
        response = client.post(path, content=content, headers=headers)
        slowest = max(slowest, time.monotonic() - started)
        assert 400 <= response.status_code < 500, (number, response.text)
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert 5 < len(error["message"]) < 400
        assert "\n" not in error["message"]
        assert "Traceback" not in error["message"]
    assert client.post("/answer", json=question()).status_code == 200
    assert client.post("/v1/chat/completions", json=chat()).status_code == 200
    assert slowest < 20
    assert not [record for record in caplog.records if record.exc_info]  # no client fills the log


def test_what_a_client_breaks_off_is_no_failure(client, caplog):
    url = client.base_url.join(".")
    head = b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for rest in (b"Content-Length: 500\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc"):
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(head + rest)
            time.sleep(0.2)
    assert client.post("/answer", json=question()).status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_messages_that_the_chat_template_refuses_are_refused(served, client, monkeypatch):
    template = "{{ raise_exception('Roles must\nalternate.') }}"
    monkeypatch.setattr(served.generator.policy.processor.tokenizer, "chat_template", template)
    response = client.post("/v1/chat/completions", json=chat())
    assert response.status_code == 400
    told = (
        "The model's chat template does not take this chat (TemplateError: Roles must alternate); use roles and parts"
    )
    assert response.json()["error"]["message"].startswith(told)


def test_an_engine_that_is_lost_is_no_fault_of_the_request(served, client, monkeypatch):
    def lost(*args, **options):
        raise EngineError("No server has answered for 3 s.")

    monkeypatch.setattr(served.generator.engine, "generate", lost)
    response = client.post("/answer", json=question())
    assert response.status_code == 503
    assert response.json()["error"] == {"message": "No server has answered for 3 s.", "type": "server_error"}


def test_what_our_own_client_says_of_the_model_is_taken(served, client):
    policy = served.generator.policy
    params = policy.sampling_params(max_new_tokens=9, is_greedy=True)
    told = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    request = chat_request(told, [PICTURE], group_size=1, params=params, seed=0, template_options={})
    assert {"stop_token_ids", "logit_bias"} <= request.keys()
    assert client.post("/v1/chat/completions", json=request).status_code == 200
    request["logit_bias"] = dict(list(request["logit_bias"].items())[1:])
    refused = client.post("/v1/chat/completions", json=request)
    assert refused.json()["error"]["message"] == "logit_bias cannot be chosen here: leave it out."


# ------------------------------------------------------------------------------------------------------- memory


async def post_all(url, bodies, timeout=60.0):
    """Status of each request, None where its client has not waited; all are sent at once."""

    async def post(client, body):
        with suppress(httpx2.TimeoutException):
            return (await client.post("/v1/chat/completions", json=body)).status_code

    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=timeout, limits=limits) as client:
        return await asyncio.gather(*(post(client, body) for body in bodies))


def test_no_number_of_requests_has_the_pictures_of_more_than_two_unpacked(folder, monkeypatch):
    served = serve(folder, max_new_tokens=30, max_requests=20)
    alive, most, count = set(), [], itertools.count()
    load_image, encode = module.load_image, served.generator.encode

    def load(source):
        image = load_image(source)
        alive.add(number := next(count))
        weakref.finalize(image, alive.discard, number)
        most.append(len(alive))
        return image

    def slow_encode(*args):
        time.sleep(0.05)  # others would unpack theirs now
        return encode(*args)

    monkeypatch.setattr(module, "load_image", load)
    monkeypatch.setattr(served.generator, "encode", slow_encode)
    eight = chat(max_tokens=1)
    eight["messages"][0]["content"] *= 8
    with running(served.app()) as url:
        statuses = asyncio.run(post_all(url, [eight] * 50))
    assert set(statuses) == {200, 503}
    assert 20 <= statuses.count(200) < 50
    assert 8 <= max(most) <= 16


def test_requests_of_every_sampling_are_counted(folder, monkeypatch):
    served, release = serve(folder, max_new_tokens=30, max_requests=4), threading.Event()
    plain = Generator._answer
    monkeypatch.setattr(Generator, "_answer", lambda self, batch: release.wait(20) and plain(self, batch))
    bodies = [chat(max_tokens=1, temperature=number / 10) for number in range(12)]
    threading.Timer(2.0, release.set).start()
    with running(served.app()) as url:
        statuses = asyncio.run(post_all(url, bodies))
    assert (statuses.count(200), statuses.count(503)) == (4, 8)


@pytest.mark.parametrize("who", ["client", "server"])
def test_what_nobody_waits_for_any_more_is_forgotten(folder, monkeypatch, who):
    served = serve(folder, max_new_tokens=30, timeout=1.0 if who == "server" else 60.0)
    release = threading.Event()
    batches = []

    def answer(self, batch):
        batches.append(len(batch))
        release.wait(120)
        raise EngineError("enough")

    monkeypatch.setattr(Generator, "_answer", answer)
    with running(served.app()) as url:
        bodies = [chat(temperature=number / 10) for number in range(6)]
        statuses = asyncio.run(post_all(url, bodies, timeout=1.0 if who == "client" else 60.0))
        assert set(statuses) == {504 if who == "server" else None}
        deadline = time.monotonic() + 20
        while (served.generator.num_waiting or served._num_open) and time.monotonic() < deadline:
            time.sleep(0.02)
        left = served.generator.num_waiting, served._num_open
        release.set()
    assert left == (0, 0)
    assert batches == [1]  # the one that had begun


def test_a_batch_has_no_more_pixels_than_may_be_unless_one_request_has(folder):
    generator = Generator(load(folder), NativeEngine())  # it does not run
    told = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    prompt = generator.encode(told, [PICTURE])
    size = sum(values.numel() for values in prompt.pixel_values)
    for most, expected in [(10 * size, [5]), (2 * size, [2, 2, 1]), (2 * size - 1, [1] * 5), (1, [1] * 5)]:
        generator.max_batch_values = most
        for _ in range(5):
            generator.submit(prompt, CompletionParams(max_new_tokens=3))
        assert [len(generator._next_batch()) for _ in expected] == expected
        assert generator.num_waiting == 0
