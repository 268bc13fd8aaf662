import torch
from torch import nn

from perception_r1.planning.meter import MemoryMeter

KIB = 256  # numbers of four bytes


def test_a_phase_holds_what_is_there_at_once():
    meter = MemoryMeter("cpu")
    with meter:
        with meter.phase("first"):
            kept = torch.zeros(KIB)
            torch.zeros(2 * KIB)  # gone at once
        with meter.phase("second"):
            view = kept.view(2, -1)[0]  # no memory of its own
            del kept
    assert {phase: peak.bytes for phase, peak in meter.peaks.items()} == {"first": 3072, "second": 1024}
    assert view.numel() == KIB // 2


def test_sizes_are_rounded_as_the_allocator_of_cuda_does():
    meter = MemoryMeter("meta")
    with meter, meter.phase("all"):
        _kept = [torch.empty(1, device="meta"), torch.empty(129, device="meta"), torch.zeros(1000)]
    assert meter.peaks["all"].bytes == 512 + 1024  # that on the CPU is not counted


def test_memory_has_a_kind():
    meter, layer = MemoryMeter("cpu", vocabulary=64), nn.Linear(32, 64)
    meter.claim(layer.parameters(), "weights")
    inner = nn.Linear(32, 32)
    meter.claim(inner.parameters(), "more weights")
    meter.watch(inner, "inner")
    with meter, meter.phase("all"):
        hidden = inner(torch.zeros(16, 32))
        logits = layer(hidden)
        with meter.kind("other"):
            _more = torch.zeros(128)
        meter.claim([hidden], "claimed")
        logits.sum().backward()
        meter.forget([layer.weight.grad])
    held = {"weights": 8192 + 512, "claimed": 2048, "other": 512}
    held["logits"] = 4096 + 512  # and the one number that all of their gradient is
    assert {kind: meter.peaks["all"].kinds[kind] for kind in held} == held
    assert meter._totals["inner"] == 0


def test_the_memory_of_a_step_is_what_it_adds():
    meter = MemoryMeter("cpu")
    with meter, meter.phase("all"):
        _kept = torch.zeros(KIB)
        assert meter.measure(lambda: (torch.zeros(KIB) + torch.zeros(KIB)).zero_()) == 3072
    assert meter.peaks["all"].bytes == 1024
