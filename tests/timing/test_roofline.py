"""What a step has to do, what the device can, and how far one is from the other."""

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

from salnb import timing
from salnb._common.autograd import nodes_of
from salnb.timing import Case, peaks, steps, tables, work
from salnb.timing.cases import Settings, plan
from tests.helpers.timing_records import made_up_record
from tests.helpers.tolerances import assert_close

CASE = Case("small", "vanilla_gradient", batch=4, size=16)


def counted(run):
    with work._WorkCounter() as counter:
        run()
    return {kind: number for kind, number in counter.found.items() if number}


def test_an_operator_reads_and_writes_each_tensor_once():
    x, y = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    size = 4 * x.numel()
    assert counted(lambda: x + y) == {"elementwise": 3 * size}
    assert counted(lambda: x.add_(y)) == {"elementwise": 3 * size}
    assert counted(lambda: x.copy_(y)) == {"other": 2 * size}  # what is overwritten is not read
    assert counted(lambda: x.bfloat16()) == {"other": size + size // 2}
    assert counted(lambda: x.view(6, 64).transpose(0, 1)[1:].device) == {}
    assert counted(lambda: torch.empty_like(x)) == {}
    assert counted(lambda: x * y[:, :1, :1, :1].expand_as(x)) == {"elementwise": 2 * size + 4 * 2}
    assert counted(lambda: x.sum())["other"] == size + 4


def test_kinds_are_those_of_functions_and_their_derivatives():
    x, w = torch.rand(2, 3, 8, 8, requires_grad=True), torch.rand(5, 3, 1, 1)
    size = 4 * x.numel()
    found = counted(lambda: F.conv2d(x, w))
    assert found == {"flops": 2 * 5 * x.numel(), "convolution flops": 2 * 5 * x.numel(),
                     "convolution": size + 4 * 15 + size * 5 // 3}  # fmt: skip
    assert counted(lambda: x.flatten(1) @ torch.rand(192, 5))["matrix product"] == size + 4 * 5 * (192 + 2)
    y = F.batch_norm(x, None, None, training=True)
    (g,) = torch.autograd.grad(y, x, torch.rand_like(x), create_graph=True)
    found = counted(lambda: torch.autograd.grad(g, x, torch.rand_like(x)))
    assert found["batch norm"] > 10 * size, "passes of the second derivative are batch norm's"
    assert found.get("elementwise", 0) == 0


def test_bytes_are_those_of_the_batch_and_of_the_parameters():
    def total(case):
        return sum(work.count_bytes(case).values())

    assert total(CASE) < total(dataclasses.replace(CASE, batch=8)) < 2 * total(CASE)
    assert total(CASE.baseline) < total(CASE)
    half = total(dataclasses.replace(CASE.baseline, originals_only=True))
    assert half == pytest.approx(total(dataclasses.replace(CASE.baseline, batch=2)), rel=1e-2)
    for alike in ({"precision": "tf32"}, {"channels_last": True}, {"compiled": True}, {"captured": True}):
        assert total(dataclasses.replace(CASE, **alike)) == total(CASE)
    assert total(dataclasses.replace(CASE, precision="bf16")) < total(CASE)
    every = total(dataclasses.replace(CASE, every=4))
    assert every == pytest.approx((total(CASE) + 3 * total(CASE.baseline)) / 4, rel=1e-6)
    noisy = Case("small", "smoothgrad", batch=4, size=16)
    one, two, five = (total(dataclasses.replace(noisy, samples=n)) for n in (1, 2, 5))
    assert five == one + 4 * (two - one)


def test_a_plain_step_has_the_same_gradient_by_other_functions():
    found = []
    for plain in (False, True):
        step = steps.step_of(dataclasses.replace(CASE, plain=plain), torch.device("cpu"))
        loss = step.loss()
        names = {node.name() for node in nodes_of(loss)}
        loss.backward()
        assert ("_BatchNormBackwardBackward" in names) != plain
        found.append(torch.cat([p.grad.flatten() for p in step.model.parameters()]))
    assert_close(found[1], found[0])
    ours, plain = (work.count_bytes(dataclasses.replace(CASE, plain=p))["batch norm"] for p in (False, True))
    assert ours < plain


def test_a_baseline_of_the_originals_has_half_the_arithmetic():
    case = Case("small", None, batch=4, size=16, originals_only=True)
    assert len(steps.step_of(case, torch.device("cpu")).batch[0]) == 4
    assert 2 * work.count_flops(case)[0] == work.count_flops(case.baseline)[0]
    assert case.label.endswith("baseline, originals only")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_are_planned_where_their_pair_is(device):
    cases = plan(Settings(device=device).on(device))
    for which in ("plain", "originals_only"):
        found = [case for case in cases if getattr(case, which)]
        assert found
        assert not [case for case in found if case.compiled or case.baseline == case]
        for case in found:
            assert dataclasses.replace(case.baseline, method="vanilla_gradient") in cases
    assert {case.network for case in cases if case.plain} >= (
        set() if device == "cpu" else set(timing.TABLE_4)
    )


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2e12),
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA A100-SXM4-40GB", 1.555e12),
        ("NVIDIA A100-SXM4-80GB", 2.039e12),
        ("NVIDIA A100 80GB PCIe", 1.935e12),
        ("Tesla T4", 0.32e12),
    ],
)
def test_published_peaks_name_their_source(monkeypatch, name, bandwidth):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(peaks, "_measured", None)
    found, source = peaks.peaks_of(torch.device("cuda"), "32")
    assert found == {"flops": peaks.peak_flops(name, "32"), "bytes": pytest.approx(bandwidth)}
    assert "data sheet" in source


@pytest.mark.parametrize(
    ("name", "precision"), [("NVIDIA L40S", "32"), ("Tesla T4", "bf16"), ("NVIDIA A100-X", "32")]
)
def test_what_is_not_published_is_measured(monkeypatch, name, precision):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(peaks, "_measured", lambda device, precision: {"flops": 1.0, "bytes": 2.0})
    found, source = peaks.peaks_of(torch.device("cuda"), precision)
    assert (found, "measured" in source) == ({"flops": 1.0, "bytes": 2.0}, True)


def test_a_cpu_is_measured_once(monkeypatch):
    found, source = peaks.peaks_of(torch.device("cpu"), "32")
    assert 1e8 < found["bytes"] < 1e13
    assert 1e8 < found["flops"] < 1e14
    monkeypatch.setattr(peaks, "_fastest", None)
    assert peaks.peaks_of(torch.device("cpu"), "32") == (found, source)


def test_a_row_is_as_far_from_its_roofline_as_the_larger_time_says():
    record = copy.deepcopy(made_up_record())
    row = record["rows"][0]
    assert tables.roofline(row) == (8e-3, "memory")  # 2 originals: 2000 and 6000 bytes at 10^6 a second
    assert "2.50 times its roofline (memory)" in timing.describe(row)
    row["peaks"]["flops"] = 1e5
    assert tables.roofline(row) == (2e-2, "arithmetic")
    row["bytes"] = None
    assert tables.roofline(row) is None
    assert "roofline" not in timing.describe(row)


def test_the_roofline_has_a_table():
    record = made_up_record(networks=["resnet18", "resnet50"], size=64, modes=None)
    lines = tables.roofline_table(record).splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [row[0] for row in cells] == [
        "resnet18, baseline, originals only",
        "resnet18, baseline",
        "resnet18, with saliency",
        "resnet18, with saliency, plain PyTorch",
        "resnet50, baseline",
        "resnet50, with saliency",
    ]
    rows = {row[0]: row[1:] for row in cells}
    assert rows["resnet18, baseline"][:4] == ["20.00", "2.00", "8.00", "2.50"]
    assert rows["resnet18, with saliency"][5] == "3.30"
    assert rows["resnet50, with saliency"][4] == "–"
