"""The engine of servers, with servers that compute as our own engine does: tokens must be exactly ours."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from aiohttp import web
from torch import Tensor

from perception_r1.engines import NativeEngine, ServerEngine
from perception_r1.engines import servers as module
from perception_r1.engines.base import EngineContext, EngineError
from perception_r1.engines.client import API_KEY, Server, ServerLostError, chat_request, read_completions
from perception_r1.engines.servers import map_in_threads
from perception_r1.errors import UserError
from perception_r1.policy.load import LoraConfig, PolicyConfig
from perception_r1.policy.policy import Policy
from tests.policy import oracle
from tests.serving.serving import LikeVLLM, running

SEEDS = [5, 2**30, 7, 2**31 - 1]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.0)


@pytest.fixture
def policy(folder):
    return Policy.load(PolicyConfig(name=str(folder))).eval()


def connect(policy, urls, tmp_path=None, *, lora=None, rank=0, run_id="run", **options):
    folder = None if tmp_path is None else tmp_path / "weights"
    engine = ServerEngine(urls, weights_folder=folder, **({"restart_timeout": 20.0} | options))
    config = PolicyConfig(name="tiny", lora=lora)
    engine.connect(policy, EngineContext(config=config, dtype="float32", run_id=run_id, rank=rank, world_size=2))
    return engine


@torch.no_grad()
def rollouts(policy, engine, *, group_size=3, **options):
    """Those of a server and our own."""
    prompts = oracle.encode(policy.processor, [0, 1, 2, 3])
    params = policy.sampling_params(max_new_tokens=20, **options)
    generate = {"group_size": group_size, "params": params, "seeds": SEEDS}
    return engine.generate(policy, prompts, **generate), NativeEngine().generate(policy, prompts, **generate)


def assert_same(one, other):
    assert [row.tolist() for row in one.completions] == [row.tolist() for row in other.completions]
    assert one.is_truncated == other.is_truncated
    torch.testing.assert_close(torch.cat(one.logprobs), torch.cat(other.logprobs), rtol=0, atol=1e-4)
    assert torch.cat(one.entropies).isnan().all()


def test_a_server_is_told_how_the_chat_is_rendered_where_its_template_asks(policy):
    options = {"group_size": 1, "params": policy.sampling_params(max_new_tokens=1), "seed": 0}
    one, other = (
        chat_request([], [], template_options=template, **options) for template in ({"enable_thinking": False}, {})
    )
    assert one["chat_template_kwargs"] == {"enable_thinking": False}
    assert "chat_template_kwargs" not in other


@torch.no_grad()
def change(policy, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8}, {"is_greedy": True}])
def test_completions_are_those_of_our_own_engine(folder, policy, tmp_path, options):
    with running(LikeVLLM(folder).app()) as url:
        engine = connect(policy, [f"{url}/v1"], tmp_path)
        assert_same(*rollouts(policy, engine, **options))


def test_pictures_that_cannot_be_restored_are_kept_and_sent(model_folders, tmp_path):
    folder = model_folders["internvl"]
    policy = Policy.load(PolicyConfig(name=str(folder))).eval()
    with running(LikeVLLM(folder).app()) as url:
        engine = connect(policy, [url], tmp_path)
        assert_same(*rollouts(policy, engine))
    sizes = [
        picture.size for each in policy.processor.pictures(oracle.encode(policy.processor, [0, 1])) for picture in each
    ]
    assert sizes == [size for index in (0, 1) for size in oracle.CHATS[index][1]]


def test_prompts_are_spread_over_servers(folder, policy, tmp_path):
    servers = [LikeVLLM(folder) for _ in range(3)]
    counts = []
    for server in servers:
        plain = server.served.generator.submit
        counts.append([])
        spy = lambda *args, plain=plain, count=counts[-1]: count.append(1) or plain(*args)  # noqa: E731
        server.served.generator.submit = spy
    with running(servers[0].app()) as one, running(servers[1].app()) as two, running(servers[2].app()) as three:
        engine = connect(policy, [one, two, three], tmp_path)
        assert_same(*rollouts(policy, engine))
    assert [len(count) for count in counts] == [2, 1, 1]


def test_weights_are_handed_over_once_for_each_update(folder, policy, tmp_path):
    servers = [LikeVLLM(folder), LikeVLLM(folder)]
    with running(servers[0].app()) as one, running(servers[1].app()) as two:
        engine, other = (connect(policy, [one, two], tmp_path, rank=rank) for rank in (0, 1))
        for number in range(3):
            for each in (engine, other):  # the second device finds what the first has done
                assert_same(*rollouts(policy, each))
                assert_same(*rollouts(policy, each))
            assert [len(server.calls) for server in servers] == [number + 1] * 2
            assert len(list((tmp_path / "weights" / "run").glob("run-*"))) == 1
            change(policy, number)
            found, own = rollouts(policy, engine)  # nobody has told the engine
            assert list(map(Tensor.tolist, found.completions)) != list(map(Tensor.tolist, own.completions))
            for each in (engine, other):
                each.invalidate()
    del engine, each
    assert not (tmp_path / "weights" / "run").exists()


def test_the_second_device_waits_for_the_first(folder, policy, tmp_path):
    with running(LikeVLLM(folder).app()) as url:
        engine, other = (connect(policy, [url], tmp_path, rank=rank) for rank in (0, 1))
        change(policy)
        found = []
        thread = threading.Thread(target=lambda: found.append(rollouts(policy, other)))
        thread.start()
        time.sleep(0.3)
        assert not found
        assert_same(*rollouts(policy, engine))
        thread.join(20)
        assert_same(*found[0])


def test_a_server_that_was_started_again_gets_the_weights_again(folder, policy, tmp_path):
    server = LikeVLLM(folder)
    change(policy)
    with running(server.app()) as url:
        engine = connect(policy, [url], tmp_path)
        assert_same(*rollouts(policy, engine))
        server.reset()
    port = int(url.rpartition(":")[2])
    with running(server.app(), port):
        assert_same(*rollouts(policy, engine))
    assert len(server.calls) == 2


def test_a_server_that_fails_is_left_out_and_taken_back(folder, policy, tmp_path, caplog):
    servers = [LikeVLLM(folder), LikeVLLM(folder)]
    change(policy)
    with running(servers[0].app()) as one:
        with running(servers[1].app()) as two:
            engine = connect(policy, [one, two], tmp_path)
            assert_same(*rollouts(policy, engine))
            servers[1].served.generator.submit = lambda *args: 1 / 0  # answers 500
            assert_same(*rollouts(policy, engine))
        assert_same(*rollouts(policy, engine))
        servers[1].reset()
        with running(servers[1].app(), int(two.rpartition(":")[2])):
            assert_same(*rollouts(policy, engine))
            assert [server.is_lost for server in engine._servers.servers] == [False, False]
    assert caplog.text.count("does not answer") >= 1


def test_a_run_waits_for_the_only_server(folder, policy, tmp_path):
    server = LikeVLLM(folder)
    change(policy)
    with running(server.app()) as url:
        engine = connect(policy, [url], tmp_path)
    found = []
    thread = threading.Thread(target=lambda: found.append(rollouts(policy, engine)))
    thread.start()
    time.sleep(0.5)
    assert not found
    with running(server.app(), int(url.rpartition(":")[2])):
        thread.join(30)
    assert_same(*found[0])


def test_who_was_given_up_and_came_back_is_waited_for_again(folder, policy, tmp_path):
    server = LikeVLLM(folder)
    change(policy)
    with running(server.app()) as url:
        engine = connect(policy, [url], tmp_path, restart_timeout=1.0)
    with pytest.raises(EngineError, match="No server has answered for 1 s"):
        rollouts(policy, engine)
    port = int(url.rpartition(":")[2])
    with running(server.app(), port):
        assert_same(*rollouts(policy, engine))
    found = []
    thread = threading.Thread(target=lambda: found.append(rollouts(policy, engine)))
    thread.start()
    time.sleep(0.3)
    with running(server.app(), port):
        thread.join(30)
        assert_same(*found[0])


def test_without_a_server_it_ends_in_a_sentence(policy):
    started = time.monotonic()
    with pytest.raises(
        UserError, match=r"^No server has answered for 1 s: http://127\.0\.0\.1:1 \(ConnectError: .*refused\)\.$"
    ):
        connect(policy, ["http://127.0.0.1:1"], restart_timeout=1.0)
    assert time.monotonic() - started < 15


def test_without_a_folder_weights_cannot_be_handed_over(folder, policy):
    with running(LikeVLLM(folder).app()) as url:
        engine = connect(policy, [url])
        with pytest.raises(UserError, match="weights_folder of the engine is needed"):
            rollouts(policy, engine)
        other = Policy.without_weights(PolicyConfig(name=str(folder)))
        prompts = oracle.encode(other.processor, [0])
        params = other.sampling_params(max_new_tokens=9, is_greedy=True)
        engine.generate(other, prompts, group_size=1, params=params, seeds=[0])


def test_a_server_with_log_probabilities_of_another_distribution_is_refused(folder, policy, tmp_path):
    with running(LikeVLLM(folder, logprobs_mode="raw_logprobs").app()) as url:
        engine = connect(policy, [url], tmp_path)
        with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
            rollouts(policy, engine)


def test_a_server_that_reads_a_prompt_otherwise_is_refused(folder):
    policy = Policy.without_weights(PolicyConfig(name=str(folder)))
    server = LikeVLLM(folder)
    server.served.generator.policy.processor.image_processor.size["longest_edge"] = 28 * 28
    with running(server.app()) as url:
        engine, params = connect(policy, [url]), policy.sampling_params(max_new_tokens=5, is_greedy=True)
        prompts = oracle.encode(policy.processor, [0])
        with pytest.raises(UserError, match=r"reads a prompt as \d+ tokens that are not the \d+ of this program"):
            engine.generate(policy, prompts, group_size=1, params=params, seeds=[0])


def read(answer, policy, *, group_size=1, max_new_tokens=9):
    params = policy.sampling_params(max_new_tokens=max_new_tokens)
    return read_completions(answer, torch.tensor([1]), group_size=group_size, params=params, policy=policy)


def test_a_server_that_knows_only_text_serves_an_evaluation(policy, folder):
    text = "Two cups."
    choice = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
    with pytest.raises(EngineError, match="does not tell how it reads a prompt"):
        read({"choices": [choice]}, policy)
    with pytest.raises(EngineError, match="does not tell tokens"):
        read({"choices": [choice], "prompt_token_ids": [1]}, policy)
    other = Policy.without_weights(PolicyConfig(name=str(folder)))
    (found,) = read({"choices": [choice]}, other)
    assert other.processor.decode([found.tokens[:-1]]) == [text]
    assert int(found.tokens[-1]) == int(other.eos_token_ids[0])
    assert found.logprobs.isnan().all()


@pytest.mark.parametrize(
    "answer",
    [[], None, {}, {"choices": 3}, {"choices": [{"index": 0}]}, {"choices": [{"index": 0, "finish_reason": "stop"}]}],
)
def test_what_is_no_answer_is_refused_in_a_sentence(policy, answer):
    with pytest.raises(EngineError, match=r"^The server"):
        read(answer, policy)


def told(ids, logprobs):
    content = [{"logprob": each} for each in logprobs]
    choice = {"index": 0, "finish_reason": "stop", "token_ids": ids, "logprobs": {"content": content}}
    return {"choices": [choice], "prompt_token_ids": [1]}


@pytest.mark.parametrize(
    ("ids", "logprobs", "message"),
    [
        ([5, -1], [-1.0, -1.0], "a token is none of the"),
        ([5, 2**70], [-1.0, -1.0], "a token is none of the"),
        ([[5], [6]], [-1.0, -1.0], "no list of whole numbers"),
        ([5, 6.5], [-1.0, -1.0], "no list of whole numbers"),
        ([5, True], [-1.0, -1.0], "no list of whole numbers"),
        ("56", [-1.0, -1.0], "no list of whole numbers"),
        ([], [], "0 tokens, where 1 to 9 were asked for"),
        ([5] * 10, [-1.0] * 10, "10 tokens, where 1 to 9 were asked for"),
        ([5, 6], [-1.0, float("nan")], "no finite number of at most 0"),
        ([5, 6], [-1.0, float("-inf")], "no finite number of at most 0"),
        ([5, 6], [-1.0, 0.5], "no finite number of at most 0"),
        ([5, 6], [-1.0, None], "TypeError"),
        ([5, 6], [-1.0], "does not tell the log-probability of every token"),
    ],
)
def test_tokens_and_log_probabilities_that_cannot_be_are_refused(policy, ids, logprobs, message):
    assert read(told([5, 6], [-1.0, 0.0]), policy)[0].tokens.tolist() == [5, 6]
    with pytest.raises(EngineError, match=message):
        read(told(ids, logprobs), policy)


def test_a_token_that_was_not_to_be_sampled_is_refused(policy):
    never = int(policy.suppress_tokens[0])
    with pytest.raises(EngineError, match=rf"token {never} was not to be sampled"):
        read(told([5, never], [-1.0, -1.0]), policy)
    vocab_size = policy.model.lm_head.out_features
    assert read(told([vocab_size - 1], [-1.0]), policy)
    with pytest.raises(EngineError, match=f"none of the {vocab_size} of the model"):
        read(told([vocab_size], [-1.0]), policy)


def answering(body, status=200, headers=None, path="/v1/models"):
    async def answer(request):
        return web.Response(body=body, status=status, headers=headers or {"Content-Type": "application/json"})

    app = web.Application()
    app.router.add_get(path, answer)
    return app


def test_a_refusal_is_told_in_the_server_s_words_and_not_waited_for(policy):
    refusal = answering(b'{"error": {"message": "no such key"}}', status=401)
    with running(refusal) as url, pytest.raises(EngineError, match=r"refuses /v1/models \(401\): .*no such key"):
        connect(policy, [url], restart_timeout=1e6)


@pytest.mark.parametrize(
    "body",
    [
        *(b"[]", b"{}", b'{"data": null}', b'{"data": ["a"]}', b'{"data": [{}]}', b"<html>", b"", b"null", b"7"),
        *(b'"data"', b"[" * 100_000, b'{"data": {"id": 3}}', b'{"data": []}', b"\xff\xfe\xfa"),
    ],
)
def test_what_names_no_models_is_refused_in_a_sentence(policy, body):
    with running(answering(body)) as url, pytest.raises(EngineError, match=rf"^The server {url} (answers|serves)"):
        connect(policy, [url], restart_timeout=1e6)


def test_a_body_that_cannot_be_decoded_is_a_failure(policy):
    app = answering(b"no gzip", headers={"Content-Encoding": "gzip"})
    with running(app) as url, pytest.raises(EngineError, match=r"^No server has answered for 0 s: .*DecodingError"):
        connect(policy, [url], restart_timeout=0.2)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "host", "http://[::1", ""])
def test_what_is_no_address_is_refused_at_once(url):
    with pytest.raises(UserError, match=r"is no address of a server"):
        ServerEngine([url])


def test_the_key_is_sent_without_the_line_break_of_its_file(monkeypatch):
    keys = []

    async def models(request):
        keys.append(request.headers["Authorization"])
        return web.json_response({"data": [{"id": "tiny"}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    monkeypatch.setenv(API_KEY, "secret\n")
    with running(app) as url:
        assert Server(url, timeout=5, max_requests=1).models() == ["tiny"]
    assert keys == ["Bearer secret"]


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines", "bell\a"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_told(monkeypatch, key):
    monkeypatch.setenv(API_KEY, key)
    with pytest.raises(UserError, match=f"^{API_KEY} holds characters that no key has") as caught:
        Server("http://localhost", timeout=5, max_requests=1)
    assert key not in str(caught.value)


def test_a_server_that_fails_at_chats_alone_is_given_up(folder, policy, tmp_path, caplog):
    server = LikeVLLM(folder)
    server.served.generator.submit = lambda *args: 1 / 0  # answers 500, and is healthy otherwise
    with running(server.app()) as url:
        engine = connect(policy, [url], tmp_path, restart_timeout=1.0)
        with pytest.raises(EngineError, match=rf"^A prompt has failed \d+ times in \d s: {url} \(500 for /v1/chat"):
            rollouts(policy, engine)
    assert caplog.text.count("does not answer") < 40  # the pauses grow


def test_a_prompt_that_no_server_can_answer_is_given_up(folder, policy, tmp_path, monkeypatch):
    plain, tried = Server.complete, []

    def complete(self, request):
        if request["seed"] == 4:
            tried.append(self.url)
            raise ServerLostError("it breaks")
        return plain(self, request)

    monkeypatch.setattr(Server, "complete", complete)
    prompts, params = oracle.encode(policy.processor, [0, 1]), policy.sampling_params(max_new_tokens=5)
    with running(LikeVLLM(folder).app()) as one, running(LikeVLLM(folder).app()) as two:
        engine = connect(policy, [one, two], tmp_path, restart_timeout=0.5)
        assert len(engine.generate(policy, prompts, group_size=1, params=params, seeds=[3, 5]).completions) == 2
        with pytest.raises(EngineError, match=r"^A prompt has failed \d+ times .* \(it breaks\), .* \(it breaks\)"):
            engine.generate(policy, prompts, group_size=1, params=params, seeds=[3, 4])
        assert len(engine.generate(policy, prompts, group_size=1, params=params, seeds=[3, 5]).completions) == 2
    assert set(tried) == {one, two}


def test_giving_up_does_not_take_longer_for_many_prompts(folder, policy, tmp_path, monkeypatch):
    with running(LikeVLLM(folder).app()) as url:
        engine = connect(policy, [url], tmp_path, restart_timeout=0.5)
    plain = Server.is_healthy
    monkeypatch.setattr(Server, "is_healthy", lambda self: time.sleep(0.5) or plain(self))
    prompts = oracle.encode(policy.processor, [0, 1] * 20)
    params, started = policy.sampling_params(max_new_tokens=5), time.monotonic()
    with pytest.raises(EngineError, match="No server has answered"):
        engine.generate(policy, prompts, group_size=1, params=params, seeds=[0] * 40)
    assert time.monotonic() - started < 10  # 40 prompts after one another take 20 s


def test_the_first_error_ends_it_whatever_others_wait_for():
    is_released, ended = threading.Event(), []

    def work(number, is_over):
        if number == 3:
            raise EngineError("lost")
        assert threading.current_thread().daemon  # a process ends without it
        is_over.wait(30)
        ended.append(number)
        is_released.wait(30)

    with pytest.raises(EngineError, match="lost"):
        map_in_threads(work, 8, num_threads=4)
    is_released.set()
    assert set(ended) <= {0, 1, 2}


def test_results_come_in_order():
    def work(number, is_over):
        time.sleep(0.01 * (5 - number))
        return number

    assert map_in_threads(work, 5, num_threads=3) == list(range(5))
    assert map_in_threads(work, 0, num_threads=3) == []


def test_ctrl_c_ends_a_process_that_waits_for_an_answer():
    code = (
        "import signal, threading\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from perception_r1.engines.servers import map_in_threads\n"
        "print('waits', flush=True)\n"
        "map_in_threads(lambda number, is_over: threading.Event().wait(), 3, num_threads=2)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"waits\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in errors


def test_weights_of_runs_that_were_killed_are_removed(folder, policy, tmp_path):
    with running(LikeVLLM(folder).app()) as url:
        living = connect(policy, [url], tmp_path, run_id="living")
        rollouts(policy, living)
        killed = tmp_path / "weights" / "killed"
        (killed / "killed-7").mkdir(parents=True)
        (killed / "owner.lock").touch()
        other = tmp_path / "weights" / "other"  # whatever this may be
        other.mkdir()
        connect(policy, [url], tmp_path, run_id="next")
    assert not killed.exists()
    assert other.exists()
    assert (tmp_path / "weights" / "living" / "living-0" / "model.safetensors").exists()


def test_weights_that_are_gone_are_an_error_of_the_engine(folder, policy, tmp_path):
    with running(LikeVLLM(folder).app()) as url:
        engine, other = (connect(policy, [url], tmp_path, rank=rank) for rank in (0, 1))
        rollouts(policy, engine)
        rollouts(policy, other)
        shutil.rmtree(tmp_path / "weights" / "run")
        with pytest.raises(EngineError, match=r"The weights of this run in .* are gone"):
            rollouts(policy, other)
        other.invalidate()
        with pytest.raises(EngineError, match=r"The weights of this run in .* are gone"):
            rollouts(policy, other)


def test_an_adapter_is_served_under_a_name_of_its_own(folder, tmp_path):
    policy = Policy.load(PolicyConfig(name=str(folder), lora=LoraConfig(r=2))).eval()
    adapters, asked = {}, []
    server = LikeVLLM(folder)

    async def models(request):
        return web.json_response({"data": [{"id": name} for name in ["tiny", *adapters]]})

    async def load(request):
        body = await request.json()
        adapters[body["lora_name"]] = body["lora_path"]
        return web.Response(text="Success")

    async def unload(request):
        del adapters[(await request.json())["lora_name"]]
        return web.Response(text="Success")

    async def chat(request):
        asked.append((await request.json())["model"])
        server.served.name = asked[-1]  # the adapter is all that this one serves
        return await server.served._chat(request)

    app = web.Application(client_max_size=2**25)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/load_lora_adapter", load)
    app.router.add_post("/v1/unload_lora_adapter", unload)
    app.router.add_post("/v1/chat/completions", chat)
    with running(app) as url:
        engine = connect(policy, [url], tmp_path, lora=LoraConfig(r=2))
        for number in range(3):
            rollouts(policy, engine)
            assert list(adapters) == [f"run-{number}"]
            engine.invalidate()
    assert asked == [f"run-{number}" for number in range(3) for _ in range(4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"urls": []}, "urls of the engine is empty"), ({"urls": ["http://a"], "timeout": 0}, "must be above 0")],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        partial(ServerEngine, **options)()
