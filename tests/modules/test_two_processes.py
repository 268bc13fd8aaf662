import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from perception_r1.modules.encoding import encode_prompts, encode_targets
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from tests.modules.toy import Lottery, make_data

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

KINDS = ("grpo", "uneven", "parts", "whole", "reserve", "mixture", "sft", "sft_whole")


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """A folder for each kind of training, all done by the same two processes, one kind after another."""
    out = tmp_path_factory.mktemp("two")
    for kind in KINDS:
        (out / kind).mkdir()
    command = [sys.executable, "-W", "ignore", "-m", "tests.modules.run_on_two", str(folder), str(out), *KINDS]
    left = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by a trainer of an earlier test
    environment = {name: value for name, value in os.environ.items() if name not in left} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    assert process.returncode == 0, errors
    return out


def results(folder):
    """What each of the two processes reported."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def tensors(folder):
    """Gradients of the first update and weights after the last one, of each process."""
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_the_same_from_different_samples(runs, kind):
    """Some kinds have more micro-batches or nothing to learn on one process, which must not make the other one wait."""
    first, second = results(runs / kind)
    for one, other in zip(*tensors(runs / kind), strict=True):
        assert one.keys() == other.keys() != set()
        assert all(torch.equal(one[name], other[name]) for name in one)
    seen = [sample for micro_batch in (first, second) for step in micro_batch["ids"] for sample in step]
    assert len(seen) == len(set(seen)) == 8
    assert first["steps"] == second["steps"]
    assert first["validated"] == second["validated"]
    assert (first["validated"] > 0) == (not kind.startswith("sft"))
    assert sorted(path.name for path in runs.glob(f"{kind}/version_0/checkpoints/*")) == ["best.ckpt", "last.ckpt"]
    assert {path.parent.name for path in runs.glob(f"{kind}/version_0/samples/*/0.png")} == {"first", "last"}


def test_both_processes_know_what_the_prompts_of_both_taught(runs):
    data = make_data()
    data.setup("fit")
    names = [sample.id for sample in data.samples("train")]
    first, second = results(runs / "uneven")
    assert first["memory"] == second["memory"]
    dull = {names.index(name) for step in second["ids"] for name in step}  # all groups of this process were alike
    assert dull <= set(first["memory"]["taught_nothing"])
    assert len(dull) == 4


def test_the_number_of_parts_may_differ_between_processes_and_changes_nothing(runs):
    assert [result["num_parts"] for result in results(runs / "parts")] == [[8, 8], [1, 1]]
    assert [result["num_parts"] for result in results(runs / "whole")] == [[1, 1], [1, 1]]
    gradients, weights = tensors(runs / "parts")[0]
    expected_gradients, expected_weights = tensors(runs / "whole")[0]
    for name, gradient in expected_gradients.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-6 * scale, msg=name)
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5, msg=name)


def test_the_gradient_of_two_processes_is_that_of_one_over_all_their_samples(folder, runs):
    """A loop over completions with plain arithmetic, in one process; the mean is one over all tokens of both."""
    policy, task, data = Policy.load(PolicyConfig(name=str(folder))).double(), Lottery(), make_data()
    data.setup("fit")
    samples = {sample.id: sample for sample in data.samples("train")}
    loss, num_tokens = torch.zeros((), dtype=torch.float64), 0
    for result in results(runs / "parts"):
        prompts = encode_prompts(policy, task, [samples[name] for name in result["ids"][0]])
        completions = [torch.tensor(row) for row in result["completions"][0]]
        texts = policy.processor.decode(completions)
        rewards = torch.tensor([task.score(text.removesuffix("<|im_end|>"), None).reward for text in texts]).view(2, 4)
        for row, completion in enumerate(completions):
            group = rewards[row // 4]
            advantage = (group[row % 4] - group.mean()) / (group.std() + 1e-4)
            loss = loss - advantage * policy(prompts.select([row // 4]), [completion], 1.0)[0].sum()
            num_tokens += len(completion)
    (loss / num_tokens).backward()
    found = tensors(runs / "parts")[0][0]
    assert len(found) > 60
    for name, parameter in policy.named_parameters():
        scale = max(float(parameter.grad.abs().max()), 1e-3)
        torch.testing.assert_close(found[f"policy.{name}"], parameter.grad, rtol=0, atol=1e-5 * scale, msg=name)


def test_the_gradient_of_sft_is_that_of_the_mean_over_the_answer_tokens_of_all_processes(folder, runs):
    policy, task, data = Policy.load(PolicyConfig(name=str(folder))).double(), Lottery(), make_data()
    data.setup("fit")
    samples = {sample.id: sample for sample in data.samples("train")}
    loss, counts, means = torch.zeros((), dtype=torch.float64), [], []
    for result in results(runs / "sft_whole"):
        batch = [samples[name] for name in result["ids"][0]]
        prompts = encode_prompts(policy, task, batch)
        answers = encode_targets(policy, task, batch, prompts)
        own = -policy(prompts, answers).sum()
        counts.append(sum(map(len, answers)))
        means.append(float(own) / counts[-1])
        loss = loss + own
    loss = loss / sum(counts)
    assert counts[0] != counts[1]
    assert float(loss) != pytest.approx(sum(means) / 2, rel=1e-5)  # the mean of their means is another
    assert [result["loss"] for result in results(runs / "sft_whole")] == [pytest.approx(float(loss), rel=1e-6)] * 2
    loss.backward()
    found = tensors(runs / "sft_whole")[0][0]
    for name, parameter in policy.named_parameters():
        scale = max(float(parameter.grad.abs().max()), 1e-3)
        torch.testing.assert_close(found[f"policy.{name}"], parameter.grad, rtol=0, atol=1e-6 * scale, msg=name)
