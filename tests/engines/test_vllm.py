"""vLLM itself beside our own engine and the training pass; it runs in the environment of `make install-vllm`."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from perception_r1.cli import main
from perception_r1.embedded.model import BASE, build_model_folder
from perception_r1.engines import NativeEngine, ServerEngine, VLLMEngine
from perception_r1.engines.base import EngineContext, EngineError
from perception_r1.errors import UserError
from perception_r1.policy.families import QWEN_FAMILIES
from perception_r1.policy.load import LoraConfig, PolicyConfig, model_path
from perception_r1.policy.policy import Policy
from tests.policy import oracle
from tests.tiny_models import build_internvl

pytestmark = pytest.mark.vllm

SMALL = {
    **{"kv_cache_gb": 0.5, "max_model_len": 1024, "enforce_eager": True, "max_images": 2},
    "engine_args": {"block_size": 32},  # what is cached of a prompt is a whole number of blocks
}
NUM_TOKENS = 40
SAME = [family for family in QWEN_FAMILIES if not family.startswith("qwen3_5")]
"""On a CPU vLLM (0.32) computes gated delta nets in bfloat16 alone, too roughly for these comparisons."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Models of each family with heads of 64, as vLLM on a CPU wants them."""
    found = {family: tmp_path_factory.mktemp(family) for family in SAME}
    for family, folder in found.items():
        build_model_folder(folder, family=family, seed=0, size=BASE)
    found["internvl"] = tmp_path_factory.mktemp("internvl")
    build_internvl(found["internvl"], hidden_size=256, num_key_value_heads=2)
    return found


@pytest.fixture
def start(monkeypatch):
    """Starts engines, and lets nothing of them stay."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engines = []

    def start(policy, config, **options):
        engine = VLLMEngine(**(SMALL | options))
        engine.connect(policy, EngineContext(config=config, dtype="float32", run_id="run"))
        engines.append(engine)
        return engine

    yield start
    engines.clear()
    cleanup_dist_env_and_memory()


def load(folder, **options):
    config = PolicyConfig(name=str(folder), **options)
    return Policy.load(config).eval(), config


@torch.no_grad()
def change(policy, amount=0.1, seed=0):
    """Let every trained weight be another by about so much."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            noise = amount * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise if "lora" in name else noise * parameter)


@torch.no_grad()
def gaps(policy, engine):
    """Whether greedy tokens are ours, and how far log-probabilities of samples are from those of the training pass."""
    prompts = oracle.encode(policy.processor, [0, 1, 2, 3])
    greedy = policy.sampling_params(max_new_tokens=NUM_TOKENS, is_greedy=True, repetition_penalty=1.1)
    one, other = (
        each.generate(policy, prompts, group_size=1, params=greedy, seeds=[0] * 4) for each in (NativeEngine(), engine)
    )
    is_same = [row.tolist() for row in one.completions] == [row.tolist() for row in other.completions]
    assert one.is_truncated == other.is_truncated or not is_same
    params = policy.sampling_params(max_new_tokens=NUM_TOKENS, temperature=0.7)
    rollout = engine.generate(policy, prompts, group_size=3, params=params, seeds=[1, 2, 3, 4])
    assert len({tuple(row.tolist()) for row in rollout.completions}) > 8
    assert not torch.isin(torch.cat(rollout.completions), policy.suppress_tokens).any()
    trained = policy(prompts, rollout.completions, 0.7)
    pairs = zip(trained, rollout.logprobs, strict=True)
    return is_same, max(float((row[: len(told)] - told).abs().max()) for row, told in pairs)


@pytest.mark.parametrize("family", [*SAME, "internvl"])
def test_tokens_and_log_probabilities_are_ours_before_and_after_an_update(folders, family, start):
    policy, config = load(folders[family])
    engine = start(policy, config)
    is_same, gap = gaps(policy, engine)
    assert is_same
    assert gap < 1e-4
    change(policy)
    is_same, stale_gap = gaps(policy, engine)  # nobody has told the engine
    assert not is_same
    assert stale_gap > 0.1
    engine.invalidate()
    is_same, gap = gaps(policy, engine)
    assert is_same
    assert gap < 1e-4


@pytest.mark.parametrize("forgotten", ["reset_prefix_cache", "load_policy"])
def test_the_test_above_finds_what_is_forgotten(folders, start, monkeypatch, forgotten):
    policy, config = load(folders["qwen2_vl"])
    engine = start(policy, config)
    assert gaps(policy, engine)[0]
    change(policy)
    if forgotten == "load_policy":  # vLLM's own way leaves the vocabulary head as it is
        plain = engine._llm.collective_rpc
        monkeypatch.setattr(engine._llm, "collective_rpc", lambda name, **kwargs: plain("reload_weights", **kwargs))
    else:
        monkeypatch.setattr(engine._llm, forgotten, lambda: True)
    engine.invalidate()
    assert gaps(policy, engine)[1] > 1e-2


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl"])
def test_an_adapter_is_handed_over_as_an_adapter(folders, start, monkeypatch, family):
    policy, config = load(folders[family], lora=LoraConfig(r=3))
    engine = start(policy, config)
    calls = []
    for seed in range(3):
        is_same, gap = gaps(policy, engine)
        assert is_same
        assert gap < 1e-4
        monkeypatch.setattr(engine._llm, "collective_rpc", lambda *args, **kwargs: calls.append(args))
        change(policy, 0.02, seed)
        assert gaps(policy, engine)[1] > 1e-2
        engine.invalidate()
    assert not calls  # the weights below it stay


def test_vllm_that_cannot_start_says_so_in_one_sentence(folders, start):
    policy, config = load(folders["qwen2_vl"])
    with pytest.raises(UserError, match=r"^vLLM cannot start with .*tokenizer_mode"):
        start(policy, config, engine_args={"tokenizer_mode": "other"})


@torch.no_grad()
def test_a_prompt_that_does_not_fit_is_one_sentence_and_the_next_one_is_answered(folders, start):
    policy, config = load(folders["qwen2_vl"])
    prompts = oracle.encode(policy.processor, [0, 1, 2, 3])
    params, lengths = policy.sampling_params(max_new_tokens=5, is_greedy=True), prompts.lengths
    engine = start(policy, config, max_model_len=max(lengths) - 1)
    with pytest.raises(EngineError, match=r"^vLLM cannot answer: [^\n]*\d"):
        engine.generate(policy, prompts, group_size=1, params=params, seeds=[0] * 4)
    shortest = prompts.select([lengths.index(min(lengths))])
    options = {"group_size": 1, "params": params, "seeds": [0]}
    found, own = (each.generate(policy, shortest, **options) for each in (engine, NativeEngine()))
    assert found.completions[0].tolist() == own.completions[0].tolist()


def run(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("family", [None, "internvl"])
def test_a_model_is_evaluated_without_a_second_copy_of_its_weights(folders, tmp_path, monkeypatch, capsys, family):
    words = ["test", "--task=counting", "--data.num_test=12", "--model.max_new_tokens=40"]
    if family:  # its workers send the pictures too
        words += [f"--model.policy.name={folders[family]}", "--data.num_workers=2"]
    run(words, tmp_path, monkeypatch, capsys)
    engine = [f"--model.engine.{name}={json.dumps(value)}" for name, value in SMALL.items()]
    monkeypatch.setattr("perception_r1.policy.policy.load_model", None)
    run([*words, "--engine=vllm", "--run_name=other", *engine], tmp_path, monkeypatch, capsys)
    found = [next(tmp_path.glob(f"logs/{name}/eval-*")) for name in ("counting", "other")]
    own, other = ((folder / "predictions.jsonl").read_text() for folder in found)
    assert own == other
    own, other = (json.loads((folder / "metrics.json").read_text()) for folder in found)
    assert own == other


def test_training_with_vllm_logs_what_training_without_it_logs(folders, tmp_path, monkeypatch, capsys):
    engine = [f"--model.engine.{name}={json.dumps(value)}" for name, value in SMALL.items()]
    run([*FIT, "--run_name=own"], tmp_path, monkeypatch, capsys)
    run([*FIT, "--run_name=vllm", "--engine=vllm", *engine], tmp_path, monkeypatch, capsys)
    own, vllm = (last_metrics(tmp_path / "logs" / name) for name in ("own", "vllm"))
    gone = {name for name in own if name not in vllm}
    assert gone == {"train/seconds/prefill"}
    assert float(vllm["train/logprob_mismatch"]) < 1e-5
    assert float(vllm["train/seconds/weights"]) > 0


FIT = ["fit", "--task=counting", "--trainer.max_steps=2", "--data.batch_size=4", "--model.max_new_tokens=60"]
FIT += ["--data.num_val=8", "--data.num_test=8", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]


def test_two_devices_have_a_vllm_each(tmp_path):
    engine = [f"--model.engine.{name}={json.dumps(value)}" for name, value in SMALL.items()]
    words = [*FIT, "--run_name=two", "--trainer.devices=2", "--trainer.strategy=ddp", "--engine=vllm", *engine]
    variables = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "perception_r1", *words],
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = last_metrics(tmp_path / "logs" / "two")
    assert float(found["train/logprob_mismatch"]) < 1e-5  # the mean of both
    assert float(found["train/seconds/weights"]) > 0


def last_metrics(folder):
    header, *rows = (line.split(",") for line in (folder / "version_0" / "metrics.csv").read_text().splitlines())
    found = {}
    for row in rows:
        found |= {name: value for name, value in zip(header, row, strict=True) if value}
    return found


class VLLMServer:
    """vLLM's own server in a process that can be killed and started again."""

    def __init__(self, folder, log, *words):
        self.folder, self.log, self.words = folder, log, words
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder)]
        words += ["--port", str(self.port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
        words += ["--kv-cache-memory-bytes", "500000000", "--logprobs-mode", "processed_logprobs"]
        words += ["--worker-extension-cls", "perception_r1.engines.vllm_worker.PolicyWorker", "--enable-lora"]
        words += ["--max-lora-rank", "8", "--limit-mm-per-prompt", '{"image": 2}', "--host", "127.0.0.1"]
        words += self.words
        variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "OMP_NUM_THREADS": "1"}
        environment = os.environ | variables
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)

    def stop(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(folders, tmp_path):
    server = VLLMServer(folders["qwen2_vl"], tmp_path / "server.log")
    server.start()
    yield server
    server.stop()


def test_a_server_cuts_the_tiles_of_pictures_that_are_kept(folders, tmp_path):
    server = VLLMServer(folders["internvl"], tmp_path / "log", "--mm-processor-kwargs", '{"use_fast": false}')
    server.start()
    try:
        policy, config = load(folders["internvl"])
        engine = ServerEngine([server.url], weights_folder=tmp_path / "weights")
        engine.connect(policy, EngineContext(config=config, dtype="float32", run_id="run"))
        is_same, gap = gaps(policy, engine)
    finally:
        server.stop()
    assert is_same
    assert gap < 1e-4


def test_a_server_takes_over_weights_and_adapters_and_survives_a_restart(folders, server, tmp_path):
    engine = ServerEngine([server.url], weights_folder=tmp_path / "weights", restart_timeout=300)
    policy, config = load(folders["qwen2_vl"])
    engine.connect(policy, EngineContext(config=config, dtype="float32", run_id="full"))  # waits until it has started
    change(policy)
    is_same, gap = gaps(policy, engine)
    assert is_same
    assert gap < 1e-4
    server.stop()
    server.start()
    is_same, gap = gaps(policy, engine)  # waits again; a new server has the weights of the folder
    assert is_same
    assert gap < 1e-4
    policy, config = load(folders["qwen2_vl"], lora=LoraConfig(r=3))
    other = ServerEngine([server.url], weights_folder=tmp_path / "adapters")
    other.connect(policy, EngineContext(config=config, dtype="float32", run_id="lora"))
    engine._servers.servers[0].load_weights(folders["qwen2_vl"], "base")
    for seed in range(2):
        change(policy, 0.02, seed)
        other.invalidate()
        is_same, gap = gaps(policy, other)
        assert is_same
        assert gap < 1e-4
    served = [name for name in other._servers.servers[0].models() if name.startswith("lora")]
    assert served == ["lora-2"]


def test_training_and_evaluation_with_a_server_from_the_command_line(tmp_path, monkeypatch, capsys):
    server = VLLMServer(model_path("tiny"), tmp_path / "server.log")
    server.start()
    try:
        options = ["--engine=server", f'--model.engine.urls=["{server.url}"]', "--model.engine.restart_timeout=300"]
        training = [*FIT, *options, "--model.engine.weights_folder=weights", "--run_name=server"]
        run(training, tmp_path, monkeypatch, capsys)
        found = last_metrics(tmp_path / "logs" / "server")
        assert float(found["train/logprob_mismatch"]) < 1e-5
        assert float(found["train/seconds/weights"]) > 0
        folder = tmp_path / "exported"
        words = ["export", "logs/server/version_0", "--ckpt=last", f"--to={folder}"]
        run(words, tmp_path, monkeypatch, capsys)
        words = ["test", "--task=counting", "--data.num_test=12", "--model.max_new_tokens=40"]
        words.append(f"--model.policy.name={folder}")
        run([*words, "--run_name=own"], tmp_path, monkeypatch, capsys)
        run([*words, *options, "--run_name=served"], tmp_path, monkeypatch, capsys)
    finally:
        server.stop()
    own, served = (next(tmp_path.glob(f"logs/{name}/eval-*")) for name in ("own", "served"))
    assert (own / "predictions.jsonl").read_text() == (served / "predictions.jsonl").read_text()
