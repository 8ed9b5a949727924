"""The steps that the timing study measures, really run: they do what they are called, and nothing besides."""

import dataclasses
import math
from contextlib import nullcontext

import pytest
import torch

from salnb import timing
from salnb.timing import Case, Settings, steps, work
from tests.helpers.timing_records import settings


def test_a_study_of_a_small_network(tmp_path):
    lines = []
    path = tmp_path / "deep" / "record.json"
    timing.study(settings(iterations=4, budget=600), path, log=lines.append)
    record = timing.read_timing(path)
    assert {row["status"] for row in record["rows"]} == {"ok"}, [row["reason"] for row in record["rows"]]
    assert len(lines) == len(record["rows"]) + 1
    for row in record["rows"]:
        assert row["flops"] > row["convolution_flops"] > 0.9 * row["flops"]
        assert row["peak_bytes"] > row["held_bytes"]
        if row["every"] == 1:
            assert row["kinds"]["convolution"] > 0
            assert set(row["parts"]) >= {"forward", "loss", "backward"}
            assert ("input gradient" in row["parts"]) == bool(row["method"])
    limits = {row["method"]: row["flops_ratio"] for row in record["rows"] if row["every"] == 1}
    assert 1.95 < limits["vanilla_gradient"] < 2.1
    assert limits["grad_cam"] < limits["vanilla_gradient"] < limits["smoothgrad"] / 4
    (every,) = [row["flops_ratio"] for row in record["rows"] if row["every"] == 4]
    assert every == pytest.approx(1 + (limits["vanilla_gradient"] - 1) / 4)
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("method", [None, "vanilla_gradient"])
@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_step_gives_the_gradients_of_its_definition(method, precision, channels_last):
    case = Case("small", method, precision=precision, channels_last=channels_last, batch=4, size=16)
    step = steps.step_of(case, torch.device("cpu"))
    weight = step.model.network.stem[0].weight
    step()
    first = weight.grad.clone()
    step()
    torch.testing.assert_close(weight.grad, first)  # of one step, not of two
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert step.images.is_contiguous(memory_format=layout)
    assert first.abs().max() > 0
    plain = dataclasses.replace(case, precision="32", channels_last=False)
    reference = steps.step_of(plain, torch.device("cpu"))
    reference()
    exact = reference.model.network.stem[0].weight.grad
    error = (first - exact).norm() / exact.norm()
    assert error < (0.2 if precision == "bf16" else 1e-3)
    assert (error > 1e-4) == (precision == "bf16")  # so that bf16 is what it is called


def test_the_parts_of_a_step_are_told_in_their_order():
    for method, expected in (
        (None, ["forward", "loss", "backward"]),
        ("vanilla_gradient", ["forward", "input gradient", "loss", "backward"]),
    ):
        told = []
        steps.step_of(Case("small", method, batch=2, size=16), torch.device("cpu"), told.append)()
        assert told == expected


def test_a_compiled_step_is_the_objectives_own(monkeypatch):
    called = []
    monkeypatch.setattr(steps.Objective, "compile", lambda self: called.append("objective"))
    monkeypatch.setattr(torch, "compile", lambda model, **options: called.append("model") or model)
    for method in (None, "vanilla_gradient"):
        steps.step_of(Case("small", method, compiled=True, batch=2, size=16), torch.device("cpu"))()
    assert called == ["model", "objective"]


def test_a_captured_step_is_the_objectives_own(monkeypatch):
    called = []

    def graphed(model, arguments):
        called.append(("model", len(arguments), torch.is_autocast_cache_enabled()))
        return model

    monkeypatch.setattr(steps.Objective, "compile", lambda self, mode=None: called.append(mode))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    for method in (None, "vanilla_gradient"):
        told = []
        case = Case("small", method, precision="bf16", captured=True, batch=2, size=16)
        steps.step_of(case, torch.device("cpu"), told.append)()
        assert told == ["backward"]
    assert called == [("model", 1, False), "cuda-graphs"]
    assert case.label.startswith("small, bf16, captured")
    assert case.baseline.captured


def test_a_fused_step_prefers_the_kernels_and_its_baseline_has_none(monkeypatch):
    asked = []
    monkeypatch.setattr(steps.fused, "preferred", lambda device: asked.append(device) or nullcontext(True))
    case = Case("small", fused=True, batch=2, size=16)
    for each in (case, case.baseline, dataclasses.replace(case, fused=False)):
        steps.step_of(each, torch.device("cpu"))()
    assert asked == [torch.device("cpu")]
    monkeypatch.undo()  # this CPU cannot: the times of another step would bear that name
    with pytest.raises(RuntimeError, match="the fused kernels cannot be used here"):
        steps.step_of(case, torch.device("cpu"))()
    assert case.label.endswith("fused")
    assert case.baseline == Case("small", None, batch=2, size=16)


def test_the_images_were_augmented_beforehand(monkeypatch):
    step = steps.step_of(Case("small", batch=2, size=16), torch.device("cpu"))
    inner = step.objective.augmentation.augmentation

    def refuse(*args, **kwargs):
        raise AssertionError("the step augments")

    monkeypatch.setattr(inner, "images", refuse)
    monkeypatch.setattr(inner, "make_params", refuse)
    carried = []
    monkeypatch.setattr(inner, "align", lambda a, b, params: carried.append(b) or (a, b, None))
    step()
    assert len(carried) == 1  # the way back belongs to the step


def test_tf32_is_allowed_where_it_is_asked_for_and_only_there():
    def allowed():
        return torch.get_float32_matmul_precision() != "highest", torch.backends.cudnn.allow_tf32

    before = allowed()
    for precision in ("32", "tf32", "bf16"):
        with steps.arithmetic(Case("small", precision=precision), torch.device("cpu")):
            assert allowed() == (precision == "tf32",) * 2
            assert torch.backends.cudnn.benchmark
    assert allowed() == before


def test_arithmetic_is_counted_without_computing():
    """By hand: a network's multiplications, forward, and twice as many for its gradients."""
    total, convolutions = work.count_flops(Case("resnet18", None, batch=4, size=64))
    model = steps.models.build("resnet18", steps.NUM_CLASSES)
    products = []

    def note(module, args, output):
        products.append(2 * output.numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(note)
    model.eval()(torch.rand(8, 3, 64, 64))
    assert total == 3 * sum(products) - products[0]  # the images themselves have no gradient
    assert total - convolutions == 3 * products[-1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("budget", value) for value in (math.nan, math.inf, -1, True, "60")),
        *(
            (name, value)
            for name in ("batch", "size", "iterations")
            for value in (0, True, 8.5, math.nan, "8")
        ),
        *(
            (name, value)
            for name in ("networks", "precisions", "modes")
            for value in ("resnet18", 32, [3], [[]])
        ),
    ],
)
def test_settings_that_are_no_numbers_or_names_are_refused_by_name(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name} "):
        Settings(**{name: value})
