"""An environment with packages that do not fit each other, made of small modules that fail as the real ones do."""

import os
import subprocess
import sys

import pytest
import torch

from perception_r1.engines import repair_vllm

SCRIPT = repair_vllm.__file__
BROKEN_TORCHVISION = """\
import torch


@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold):
    return dets
"""


def run(folder, *words):
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)


def write(folder, name, text):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)


@pytest.mark.slow
def test_torchvision_without_its_operators_can_be_imported_afterwards(tmp_path):
    write(tmp_path, "torchvision", BROKEN_TORCHVISION)
    write(tmp_path, "vllm", "import torchvision")
    assert "torchvision::nms does not exist" in run(tmp_path, "-c", "import torchvision").stderr
    for _ in range(2):  # a second time it finds nothing to do
        assert run(tmp_path, SCRIPT).returncode == 0
        assert run(tmp_path, "-c", "import torchvision").returncode == 0
    text = (tmp_path / "torchvision" / "__init__.py").read_text()
    assert text.count("torchvision_operators") == 1


def test_an_environment_without_faults_stays_as_it_is(tmp_path):
    write(tmp_path, "torchvision", "")
    write(tmp_path, "vllm", "")
    assert run(tmp_path, SCRIPT).returncode == 0
    assert (tmp_path / "torchvision" / "__init__.py").read_text() == ""
    assert not (tmp_path / "torchvision_operators.py").exists()


def test_vllm_that_still_cannot_be_imported_is_told(tmp_path):
    write(tmp_path, "torchvision", "")
    write(tmp_path, "vllm", "raise ImportError('no')")
    done = run(tmp_path, SCRIPT)
    assert done.returncode == 1
    assert "vLLM is installed but cannot be imported" in done.stderr


@pytest.mark.parametrize("schema", repair_vllm.OPERATORS)
def test_every_operator_has_a_schema_that_torch_reads(schema):
    assert torch._C.parse_schema(f"torchvision::{schema}").name.startswith("torchvision::")
