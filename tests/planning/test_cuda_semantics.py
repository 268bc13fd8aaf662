"""What is known of CUDA: the lists of torch's own tests for mixed precision, and what its kernels save."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from perception_r1.planning.cuda_semantics import FLOAT32, LOWER_PRECISION, cuda_semantics
from perception_r1.planning.meter import MemoryMeter

LISTS = Path(torch.__file__).parent / "testing" / "_internal" / "autocast_test_lists.py"


def listed(ending):
    """Names in the lists of torch's tests of CUDA."""
    source = LISTS.read_text(encoding="utf-8").partition("class AutocastCPUTestLists")[0]
    lists = re.findall(rf"self\.\w+_{ending} = \[(.*?)\n        \]", source, re.DOTALL)
    return {name for found in lists for name in re.findall(r'\("(\w+)"', found)}


def test_types_under_mixed_precision_are_those_of_torch():
    assert {"__matmul__", "linear", "conv3d", "bmm"} <= listed("fp16")
    unlisted = {"matmul", "einsum", "baddbmm", "scaled_dot_product_attention", "__rmatmul__"}  # made of listed ones
    assert listed("fp16") >= LOWER_PRECISION - unlisted
    assert listed("fp32") >= FLOAT32
    assert not listed("fp32") & LOWER_PRECISION


def meta(*shape, dtype=torch.float32, **options):
    return torch.empty(*shape, dtype=dtype, device="meta", **options)


def test_products_are_cast_and_norms_are_not():
    weight, rows = meta(8, 8, requires_grad=True), meta(4, 8)
    with cuda_semantics(torch.bfloat16):
        product = F.linear(rows, weight)
        assert (product.dtype, (rows @ weight).dtype) == (torch.bfloat16, torch.bfloat16)
        assert (F.layer_norm(product, (8,)).dtype, product.pow(2).dtype) == (torch.float32, torch.float32)
        assert (product + product).dtype == torch.bfloat16
        assert torch.zeros(2, 2).matmul(torch.zeros(2, 2)).dtype == torch.float32  # on the CPU
        with torch.autocast("cuda", enabled=False):
            assert F.linear(rows, weight).dtype == torch.float32
    with cuda_semantics(None):
        assert F.linear(rows, weight).dtype == torch.float32
    assert not torch.is_autocast_enabled("cuda")


def test_what_is_computed_again_in_backward_is_cast_as_before():
    weight = meta(8, 8, requires_grad=True)
    with cuda_semantics(torch.bfloat16):
        found = checkpoint(lambda rows: F.linear(rows, weight).relu(), meta(4, 8), use_reentrant=False)
        found.sum().backward()
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize(
    ("dtype", "mask", "saved"),
    [
        (torch.bfloat16, False, 2 * 128 * 16 * 4 + 128 * 4),  # flash: result and a number for each row
        (torch.float32, False, 4 * 128 * 16 * 4 + 128 * 4 * 4),  # memory-efficient: the same
        (torch.bfloat16, True, None),
    ],
)
def test_attention_keeps_no_scores(dtype, mask, saved):
    query, key, value = (meta(1, 4, 128, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    options = {"attn_mask": meta(128, 128, dtype=torch.bool)} if mask else {"is_causal": True}
    meter = MemoryMeter("meta")
    with cuda_semantics(None), meter, meter.phase("all"):
        attended = F.scaled_dot_product_attention(query, key, value, **options)
        held = meter._total
        attended.sum().backward()
    assert attended.shape == query.shape
    scores = 4 * 128 * 128 * attended.element_size()
    assert held < scores
    if saved is not None:
        assert saved <= held <= saved + 4 * 512 + 128 * 4 * 4


@pytest.mark.parametrize(("options", "copies"), [({}, True), ({"fused": True}, False), ({"foreach": False}, False)])
def test_an_optimiser_takes_the_temporary_memory_that_it_takes_on_cuda(options, copies):
    weights = [meta(256, 256, requires_grad=True) for _ in range(8)]
    meter = MemoryMeter("meta")
    with cuda_semantics(None):
        optimizer = torch.optim.AdamW(weights, **options)
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.empty_like(weight)
            meter.peaks.clear()
            with meter, meter.phase("update"):
                before = meter._total
                optimizer.step()
    temporary = meter.peaks["update"].bytes - before
    assert (temporary >= sum(weight.nbytes for weight in weights)) == copies
