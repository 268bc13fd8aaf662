"""The engine of servers, with servers that compute as our own engine does: tokens must be exactly ours."""

import threading
import time
from functools import partial

import pytest
import torch
from aiohttp import web
from torch import Tensor

from perception_r1.engines import NativeEngine, ServerEngine
from perception_r1.engines import server as module
from perception_r1.engines.base import EngineContext
from perception_r1.engines.client import Server, chat_request, read_completions
from perception_r1.errors import UserError
from perception_r1.policy.load import LoraConfig, PolicyConfig
from perception_r1.policy.policy import Policy
from tests.policy import oracle
from tests.serving.serving import LikeVLLM, running

SEEDS = [5, 2**30, 7, 2**31 - 1]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.05)


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
            assert [server.is_lost for server in engine._servers] == [False, False]
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


def test_a_server_that_knows_only_text_serves_an_evaluation(policy, folder):
    text = "Two cups."
    choice = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
    with pytest.raises(UserError, match="does not tell tokens"):
        read_completions({"choices": [choice]}, torch.tensor([1]), 1, policy)
    other = Policy.without_weights(PolicyConfig(name=str(folder)))
    (found,) = read_completions({"choices": [choice]}, torch.tensor([1]), 1, other)
    assert other.processor.decode([found.tokens[:-1]]) == [text]
    assert int(found.tokens[-1]) == int(other.eos_token_ids[0])
    assert found.logprobs.isnan().all()


@pytest.mark.parametrize(
    "answer",
    [[], None, {}, {"choices": 3}, {"choices": [{"index": 0}]}, {"choices": [{"index": 0, "finish_reason": "stop"}]}],
)
def test_what_is_no_answer_is_refused_in_a_sentence(policy, answer):
    with pytest.raises(UserError, match=r"^The server"):
        read_completions(answer, torch.tensor([1]), 1, policy)


def test_a_refusal_is_told_in_the_server_s_words(folder, policy):
    async def refuse(request):
        return web.json_response({"error": {"message": "no such model"}}, status=404)

    app = web.Application()
    app.router.add_get("/v1/models", refuse)
    with running(app) as url, pytest.raises(UserError, match=r"refuses /v1/models \(404\): .*no such model"):
        Server(url, timeout=5, max_requests=1).models()


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
