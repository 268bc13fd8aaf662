import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from perception_r1.data.fetch import LOCK, FetchReport, fetch
from perception_r1.data.sources import Download
from perception_r1.errors import UserError

SIZE = 200_000


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.num_open = self.most_open = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        self.server.agents.add(self.headers["User-Agent"])
        kind = self.path.strip("/").partition("-")[0]
        data = body(self.path)
        if kind == "status":
            self.send_error(int(self.path.rpartition("-")[2]))
        elif kind == "busy" and self.server.asked[self.path] == 1:
            self.send_error(503)
        elif kind == "redirect":
            self.answer(302, Location=f"{self.server.url}/ok-1")
        elif kind == "local":
            self.answer(302, Location=f"file://{__file__}")
        elif kind == "ftp":
            self.answer(302, Location="ftp://127.0.0.1/x")
        elif kind == "silent":
            time.sleep(2)
        elif kind == "endless":
            self.answer(200)
            for _ in range(100):
                self.wfile.write(b"x" * SIZE)
        elif kind == "trickle":
            self.answer(200, Content_Length=str(len(data)))
            for _ in range(300):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.02)
        elif kind == "drop" and self.server.asked[self.path] == 1:
            self.answer(200, Content_Length=str(len(data)))
            self.wfile.write(data[: SIZE // 2])
        else:
            self.server.num_open += 1
            self.server.most_open = max(self.server.most_open, self.server.num_open)
            time.sleep(0.05 if kind == "slow" else 0)
            self.server.num_open -= 1
            self.answer(200, Content_Length=str(len(data)))
            self.wfile.write(data)

    def answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


def body(path: str) -> bytes:
    return hashlib.sha256(path.encode()).digest() * (SIZE // 32)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def download(server: Server, folder: Path, name: str, content: str | None = None) -> Download:
    digest = hashlib.sha256(body(f"/{content or name}")).hexdigest()
    return Download(url=f"{server.url}/{name}", sha256=digest, path=folder / digest)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {LOCK}


def failures(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]


def report(fetched: int = 0, present: int = 0, failed: int = 0) -> FetchReport:
    return FetchReport(num_fetched=fetched, num_present=present, num_failed=failed)


def test_files_are_fetched_once_and_only_once(server, tmp_path, capfd):
    folder = tmp_path / "new" / "images"
    wanted = [download(server, folder, f"ok-{number}") for number in range(20)]
    assert fetch([*wanted, *wanted], num_threads=4) == report(fetched=20)
    assert fetch(wanted) == report(present=20)
    assert names(folder) == {item.sha256 for item in wanted}
    assert all(item.path.read_bytes() == body(f"/ok-{number}") for number, item in enumerate(wanted))
    assert set(server.asked.values()) == {1}
    assert [agent for agent in server.agents if not agent.startswith("perception-r1/")] == []
    out, err = capfd.readouterr()
    assert out == ""
    assert "20 fetched, 0 already there, 0 failed" in err
    assert "0 fetched, 20 already there, 0 failed" in err


@pytest.mark.parametrize(
    ("name", "num_asked", "reason"),
    [
        ("status-404", 1, "HTTP status 404: Not Found"),
        ("status-410", 1, "HTTP status 410: Gone"),
        ("status-500", 3, "HTTP status 500: Internal Server Error"),
        ("status-429", 3, "HTTP status 429: Too Many Requests"),
        ("endless", 1, "is larger than 1000000 bytes"),
        ("trickle", 1, "is not there after 2 seconds"),
        ("silent", 3, "timed out"),
        ("local", 1, "HTTP status 302: Found - Redirection to url 'file://"),
        ("ftp", 1, "unknown url type: ftp"),
    ],
)
def test_what_cannot_be_had_is_written_down_and_the_others_go_on(server, tmp_path, name, num_asked, reason):
    wanted = [download(server, tmp_path, name), download(server, tmp_path, "ok-1")]
    assert fetch(wanted, timeout=0.2, pause=0.01, max_bytes=1_000_000) == report(fetched=1, failed=1)
    (failure,) = failures(tmp_path)
    assert (failure["url"], failure["sha256"]) == (wanted[0].url, wanted[0].sha256)
    assert reason in failure["reason"]
    assert "\n" not in failure["reason"]
    assert names(tmp_path) == {wanted[1].sha256, "failures.jsonl"}
    if name != "ftp":
        assert server.asked[f"/{name}"] == num_asked


def test_a_file_that_its_server_calls_too_large_is_not_even_begun(server, tmp_path):
    assert fetch([download(server, tmp_path, "ok-1")], max_bytes=SIZE - 1) == report(failed=1)
    assert fetch([download(server, tmp_path, "ok-1")], max_bytes=SIZE) == report(fetched=1)


def test_another_content_is_refused_and_told(server, tmp_path):
    wanted = download(server, tmp_path, "ok-1", content="ok-2")
    assert fetch([wanted]) == report(failed=1)
    assert failures(tmp_path)[0]["reason"] == (
        f"the content is another: its SHA-256 is {hashlib.sha256(body('/ok-1')).hexdigest()}"
    )
    assert not wanted.path.exists()
    assert server.asked["/ok-1"] == 1


@pytest.mark.parametrize("name", ["drop-1", "busy-1"])
def test_a_passing_failure_is_tried_again(server, tmp_path, name):
    assert fetch([download(server, tmp_path, name)], pause=0.01) == report(fetched=1)
    assert server.asked[f"/{name}"] == 2
    assert not (tmp_path / "failures.jsonl").exists()


def test_pauses_grow(server, tmp_path):
    start = time.monotonic()
    fetch([download(server, tmp_path, "status-503")], pause=0.1, num_attempts=4)
    assert 0.7 <= time.monotonic() - start < 5  # 0.1 + 0.2 + 0.4


def test_a_redirect_within_http_is_followed(server, tmp_path):
    assert fetch([download(server, tmp_path, "redirect", content="ok-1")]) == report(fetched=1)


def test_spaces_and_accents_of_a_url_are_escaped(server, tmp_path):
    wanted = download(server, tmp_path, "caf\u00e9 1%20.jpg", content="caf%C3%A9%201%20.jpg")
    assert fetch([wanted]) == report(fetched=1)


@pytest.mark.parametrize("num_threads", [1, 8])
def test_as_many_as_asked_for_are_fetched_at_once(server, tmp_path, num_threads):
    fetch([download(server, tmp_path, f"slow-{number}") for number in range(24)], num_threads=num_threads)
    assert (num_threads + 1) // 2 <= server.most_open <= num_threads


@pytest.mark.parametrize(
    "url", ["", "file:///etc/passwd", "ftp://a/b", "data:,x", "/etc/passwd", "http://", "http://[x"]
)
def test_other_urls_are_refused(tmp_path, url):
    wanted = Download(url=url, sha256="0" * 64, path=tmp_path / "x")
    assert fetch([wanted]) == report(failed=1)
    assert failures(tmp_path)[0]["reason"].startswith("url: ")


@pytest.mark.parametrize("digest", ["", "0" * 63, "G" * 64, "../" + "0" * 61])
def test_a_malformed_digest_is_refused(tmp_path, digest):
    assert fetch([Download(url="http://127.0.0.1:9/", sha256=digest, path=tmp_path / "x")]) == report(failed=1)
    assert failures(tmp_path)[0]["reason"] == "sha256: must be 64 hex digits"


def test_failures_of_an_earlier_fetch_are_forgotten(server, tmp_path):
    wanted = download(server, tmp_path, "busy-1")
    assert fetch([wanted], num_attempts=1) == report(failed=1)
    assert fetch([wanted], num_attempts=1) == report(fetched=1)
    assert names(tmp_path) == {wanted.sha256}


@pytest.mark.parametrize(
    "settings", [{"num_threads": 0}, {"num_attempts": 0}, {"max_bytes": 0}, {"timeout": 0}, {"pause": -1}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        fetch([], **settings)


def test_nothing_to_fetch_is_fine():
    assert fetch([]) == report()


def test_a_folder_that_cannot_be_written_to_is_an_error_of_one_sentence(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be written \("):
        fetch([download(server, tmp_path / "file", "ok-1")])


def test_a_file_gets_its_name_only_when_it_is_whole(server, tmp_path, monkeypatch):
    def replace(self: Path, target: Path) -> Path:
        assert self.read_bytes() == body("/ok-1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", replace)
    wanted = download(server, tmp_path, "ok-1")
    with pytest.raises(UserError, match=rf"{wanted.sha256}: cannot be written \(No space left on device\)"):
        fetch([wanted])
    assert names(tmp_path) == set()


KILLED = """
import sys
from pathlib import Path
from tests.data.test_fetch import body, hashlib
from perception_r1.data.fetch import fetch
from perception_r1.data.sources import Download

url, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
digests = [hashlib.sha256(body(f"/slow-{k}")).hexdigest() for k in range(count)]
fetch([Download(url=f"{url}/slow-{k}", sha256=d, path=folder / d) for k, d in enumerate(digests)], num_threads=4)
"""


def test_a_fetch_that_was_killed_leaves_no_half_file_and_is_finished_by_the_next(server, tmp_path):
    wanted = [download(server, tmp_path, f"slow-{number}") for number in range(80)]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, server.url, str(tmp_path), str(len(wanted))],
        env={**os.environ, "PYTHONPATH": paths},
        stderr=subprocess.DEVNULL,
    )
    while sum(item.path.exists() for item in wanted) < 10:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = [item for item in wanted if item.path.exists()]
    assert 10 <= len(there) < len(wanted)
    assert all(hashlib.sha256(item.path.read_bytes()).hexdigest() == item.sha256 for item in there)
    (tmp_path / f".{wanted[0].sha256}.0.part").write_bytes(b"half")
    asked = Counter(server.asked)

    assert fetch(wanted) == report(fetched=len(wanted) - len(there), present=len(there))
    assert names(tmp_path) == {item.sha256 for item in wanted}
    assert all(item.path.read_bytes() == body(f"/slow-{number}") for number, item in enumerate(wanted))
    again = server.asked - asked
    assert {f"/slow-{number}" for number, item in enumerate(wanted) if item not in there} == set(again)


def test_two_fetches_in_a_folder_do_each_other_no_harm(server, tmp_path):
    wanted = [download(server, tmp_path, f"slow-{number}") for number in range(40)]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(fetch, wanted, num_threads=4)
        while not any(item.path.exists() for item in wanted):
            time.sleep(0.005)
        with pytest.raises(UserError, match=f"^{tmp_path} is in use by another fetch, process {os.getpid()} on "):
            fetch(wanted)
        assert first.result() == report(fetched=40)
    assert names(tmp_path) == {item.sha256 for item in wanted}
    assert fetch(wanted) == report(present=40)
