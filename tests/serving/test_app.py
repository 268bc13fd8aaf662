import asyncio
import base64
import io
import json
import random
import struct
import threading
import time
import zlib

import httpx2
import pytest
from PIL import Image

from perception_r1.records import Sample
from perception_r1.serving.generation import Completion, Generator
from tests.serving.serving import running, serve
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
    sample = Sample(id="picture", image=PICTURE, width=60, height=40, query="cup", target=None)
    text = {"text": box, "plain_text": "", "tokens": [], "token_texts": [], "logprobs": []}
    found = served._read(task, sample, Completion(**text, is_truncated=False))
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
    served, release = serve(folder, max_new_tokens=30, timeout=1.0), threading.Event()
    monkeypatch.setattr(Generator, "_answer", lambda self, batch: release.wait(20) and 1 / 0)
    served.generator._waiting.maxsize = 1
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


def hostile_uploads(count, seed=0):
    """Requests of which none has a whole picture of an allowed size in it."""
    draw = random.Random(seed)
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    whole = file.getvalue()
    for number in range(count):
        kind = number % 10
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
        else:
            content = whole
        url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        body = question(image=url)
        if kind == 5:
            body = question(
                image=draw.choice(["http://127.0.0.1/a.png", "file:///etc/passwd", "/etc/passwd", "", "data:"])
            )
        elif kind == 6:
            body[draw.choice(["task", "query", "image"])] = draw.choice([None, 3, [], {}, ["x"], True, "x" * 501])
        elif kind == 7:
            body = draw.choice([None, 1, [], "text", {}, {"task": "counting"}, [body]])
        text = json.dumps(body)
        if kind == 8:
            text = draw.choice(
                [text[: draw.randrange(1, len(text))], "[" * 100_000, "\x00", '{"a":' * 50_000, "\ud800"]
            )
        elif kind == 9:
            text = json.dumps(question(image=url + "A" * (2**20)))
        yield text.encode("utf-8", "surrogatepass")


def test_a_thousand_hostile_uploads_are_refused_in_a_sentence_each(client):
    headers, slowest = {"Content-Type": "application/json"}, 0.0
    for number, content in enumerate(hostile_uploads(1000)):
        started = time.monotonic()
        path = ("/answer", "/v1/chat/completions")[number // 10 % 2]
        response = client.post(path, content=content, headers=headers)
        slowest = max(slowest, time.monotonic() - started)
        assert 400 <= response.status_code < 500, (number, response.text)
        message = response.json()["error"]["message"]
        assert 5 < len(message) < 400
        assert "\n" not in message
        assert "Traceback" not in message
    assert client.post("/answer", json=question()).status_code == 200
    assert slowest < 20
