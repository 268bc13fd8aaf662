import resource
from pathlib import Path

import pytest
import torch

from perception_r1.modules.memory import peak_memory_gb


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells what is held now")
def test_of_a_process_it_is_what_it_has_held():
    def held():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9

    block = torch.ones(50_000_000)
    with_block = held()
    del block
    assert with_block - 0.01 <= peak_memory_gb(torch.device("cpu"))
    assert held() < with_block - 0.1


def test_of_a_gpu_it_is_that_of_its_allocator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {torch.device("cuda", 1): 3_500_000_000}.__getitem__)
    assert peak_memory_gb(torch.device("cuda", 1)) == 3.5
