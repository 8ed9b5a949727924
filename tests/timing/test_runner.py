"""The timing study: which steps count, in which order they are measured, and what a record keeps of them."""

import dataclasses
import json
import statistics

import pytest
import torch

from salnb import results, timing
from salnb.timing import clock, foresight, runner
from salnb.timing.cases import TABLE_4, Case, Settings, counted, plan
from salnb.timing.records import Row
from tests.helpers.timing_records import made_up, out_of_memory, settings, silent, without_waiting

# --- the protocol ------------------------------------------------------------------------------------------


class FakeClock(clock.HostClock):
    """Tells the time that steps claim to have taken, and remembers when it was waited for."""

    def __init__(self):
        self.now, self.steps, self.waits = 0.0, 0, []

    def mark(self):
        return self.now

    def wait(self):
        self.waits.append(self.steps)


def run(durations, averaged, **options):
    """Run the protocol over steps of the given durations."""
    ours = FakeClock()
    watch = clock.Stopwatch(ours)

    def step():
        ours.now += durations[ours.steps]
        ours.steps += 1

    clock.run_protocol(step, watch, len(durations), averaged, **options)
    return ours, watch


def test_only_the_second_half_counts():
    durations = [50.0] + [7.0] * 99 + [float(i) for i in range(100)]
    ours, watch = run(durations, 100)
    assert ours.steps == 200
    assert watch.times(100) == [float(i) for i in range(100)]
    assert clock.distribution(watch.times(100))["mean"] == 49.5


def test_the_device_is_waited_for_before_what_counts_and_at_the_end():
    ours, _ = run([1.0] * 200, 100)
    assert ours.waits == [0, 1, 3, 100, 200]


def test_steps_that_count_are_not_interrupted():
    """Waiting between them would hide that the host runs ahead of the device."""
    ours, _ = run([1.0] * 32, 16)
    assert [w for w in ours.waits if 16 < w < 32] == []


def test_a_row_that_would_not_fit_stops_after_three_steps():
    with pytest.raises(clock.OutOfBudgetError, match="394 s more were needed, 393 s were left"):
        run([90.0, 2.0, 2.0] + [2.0] * 197, 100, left=lambda: 393.0)
    ours, _ = run([90.0, 2.0, 2.0] + [2.0] * 197, 100, left=lambda: 394.0)
    assert ours.steps == 200


def test_parts_add_up_to_the_step():
    ours = FakeClock()
    watch = clock.Stopwatch(ours)

    def step():
        for part, seconds in (("forward", 1.0), ("input gradient", 2.0), ("forward", 3.0), ("backward", 4.0)):
            watch.mark(part)
            ours.now += seconds
            ours.steps += 1

    for _ in range(4):
        watch.run(step)
    assert watch.parts(2) == {"other": 0.0, "forward": 4.0, "input gradient": 2.0, "backward": 4.0}
    assert watch.times(2) == [10.0, 10.0]


def test_the_distribution_is_that_of_its_definition():
    times = torch.rand(101, dtype=torch.float64).tolist()
    found, ordered = clock.distribution(times), sorted(times)
    assert found["p5"] == pytest.approx(ordered[5])  # of 101 values the hundredths are values themselves
    assert found["p95"] == pytest.approx(ordered[95])
    assert (found["min"], found["median"], found["max"]) == (ordered[0], ordered[50], ordered[100])
    assert found["mean"] == pytest.approx(statistics.mean(times))


@pytest.mark.parametrize("every", [1, 4, 16])
@pytest.mark.parametrize("iterations", [4, 8, 200])
def test_steps_with_and_without_saliency_are_averaged_in_their_proportion(iterations, every):
    total, averaged = counted(iterations, every)
    assert total >= iterations
    assert averaged <= total // 2
    assert sum(i % every == 0 for i in range(total - averaged, total)) * every == averaged > 0
    assert counted(200, 1) == (200, 100)


class FakeEvent:
    """Stands for torch.cuda.Event."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.stream = stream

    def elapsed_time(self, other):
        return 1500.0  # milliseconds


def test_a_gpu_is_timed_by_events_in_its_stream_and_waited_for_as_a_whole(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device = torch.device("cuda:1")
    ours = clock.clock_of(device)
    event = ours.mark()
    assert event.stream == "stream of cuda:1"
    assert waited == []  # marking a moment must not make the host wait
    assert ours.seconds(event, ours.mark()) == 1.5
    ours.wait()
    assert waited == [device]


# --- the plan ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_baseline_comes_before_what_is_compared_with_it(device):
    cases = plan(Settings(device=device).on(device))
    assert len(set(cases)) == len(cases)
    for i, case in enumerate(cases):
        assert case.method is None or case.baseline in cases[:i]


def test_the_table_of_the_paper_comes_first_and_as_it_is_in_the_paper():
    cases = plan(Settings().on("cuda"))
    assert [(case.network, case.method) for case in cases[:10]] == [
        (network, method) for network in TABLE_4 for method in (None, "vanilla_gradient")
    ]
    for case in cases[:10]:
        assert (case.precision, case.compiled, case.channels_last) == ("32", False, False)
        assert (case.batch, case.size, case.every) == (32, 224, 1)
    assert Settings().on("cuda").iterations == 200
    # then the fastest steps, each behind the eager one
    assert [(case.precision, case.captured, case.method) for case in cases[10:14]] == [
        ("bf16", captured, method) for captured in (False, True) for method in (None, "vanilla_gradient")
    ]


def test_the_plan_of_a_gpu_holds_every_question():
    cases = plan(Settings().on("cuda"))
    networks = {*TABLE_4, "resnet18", "convnext_tiny", "vit_b_16"}
    for precision in ("32", "tf32", "bf16"):
        for compiled in (False, True):
            found = {c.network for c in cases if (c.precision, c.compiled) == (precision, compiled)}
            assert found == networks, (precision, compiled)
        captured = {c.network for c in cases if c.captured and c.precision == precision}
        assert captured >= set(TABLE_4), precision
    assert not [case for case in cases if case.captured and case.compiled]
    assert {case.precision for case in cases if case.fused} == {"32", "bf16"}
    assert {case.network for case in cases if case.channels_last and case.compiled} == networks
    assert {case.every for case in cases} == {1, 4, 16}
    assert {case.batch for case in cases} == {8, 16, 32, 64, 128, 256}
    assert len({case.method for case in cases}) == 7
    assert {case.samples for case in cases if case.method == "smoothgrad"} == {25}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_asked_for_is_all_that_is_planned(device):
    chosen = Settings(device=device, networks=["resnet18"], precisions=["bf16"], modes=["eager"], size=224)
    cases = plan(chosen.on(device))
    assert cases
    assert {(c.network, c.precision, c.mode) for c in cases} == {("resnet18", "bf16", "eager")}


def test_no_row_has_a_size_that_its_network_cannot_take():
    networks = {case.network for case in plan(Settings(size=128).on("cuda"))}
    assert "vit_b_16" not in networks
    methods = {case.method for case in plan(Settings(device="cpu", size=32).on("cpu"))}
    assert "vanilla_gradient" in methods
    assert "grad_cam" not in methods


@pytest.fixture
def quick(monkeypatch):
    """See `without_waiting`."""
    return without_waiting(monkeypatch)


# --- the study ---------------------------------------------------------------------------------------------


def test_the_record_is_on_the_disk_after_every_row(tmp_path, monkeypatch, quick):
    path, seen = tmp_path / "record.json", []
    partial = tmp_path / "record.json.partial"

    def measure(case, device, **options):
        if partial.exists():
            record = timing.read_timing(partial)
            seen.append(sum(row["status"] == "ok" for row in record["rows"]))
            waiting = [row["reason"] for row in record["rows"] if row["status"] == "not run"]
            assert set(waiting) == {"the study ended before its turn"}
        if len(seen) == 3:
            raise KeyboardInterrupt
        return made_up(case)

    monkeypatch.setattr(runner, "measure_case", measure)
    with pytest.raises(KeyboardInterrupt):
        timing.study(settings(), path, log=silent)
    assert seen == [1, 2, 3]
    assert not path.exists()
    rows = timing.read_timing(partial)["rows"]
    assert [row["status"] for row in rows[:3]] == ["ok"] * 3
    assert len(rows) == len(plan(settings().on("cpu")))


def test_ratios_are_to_the_own_baseline(tmp_path, monkeypatch, quick):
    slow = {2: 1.0, 4: 5.0, 8: 1.0, 16: 1.0}

    monkeypatch.setattr(runner, "measure_case", lambda case, *a, **k: made_up(case, factor=slow[case.batch]))
    record = timing.study(settings(), tmp_path / "record.json", log=silent)
    with_saliency = [row for row in record["rows"] if row["method"]]
    assert len({row["batch"] for row in with_saliency}) == 4
    for row in with_saliency:
        assert row["ratio"] == pytest.approx(3)
        assert row["flops_ratio"] == 2
    assert [row["ratio"] for row in record["rows"] if not row["method"]] == [None] * 6


def test_out_of_memory_is_a_row_and_the_study_goes_on(tmp_path, monkeypatch, quick):
    tried = []

    def measure(case, device, **options):
        tried.append(case)
        return out_of_memory() if case.batch >= 4 and case.method else made_up(case)

    monkeypatch.setattr(runner, "measure_case", measure)
    record = timing.study(settings(), tmp_path / "record.json", log=silent)
    by_case = {timing.case_of(row): row for row in record["rows"]}
    case = Case("small", batch=4, size=32)
    assert by_case[case]["status"] == "out of memory"
    assert by_case[case]["reason"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 7.00 GiB."
    larger = dataclasses.replace(case, batch=8)
    assert larger not in tried
    assert by_case[larger]["reason"] == "a batch of 4+4 was too large already"
    assert by_case[dataclasses.replace(case, batch=2, method="deconvnet")]["status"] == "ok"
    assert len(quick) == len(tried)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "out of memory"),
        (RuntimeError("MPS backend out of memory"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("no kernel image is available"), "failed"),
        (KeyError("weight"), "failed"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_an_error_is_a_row_that_says_which(tmp_path, monkeypatch, quick, error, status):
    def measure(case, device, **options):
        if case.method == "deconvnet":
            raise error
        return made_up(case)

    monkeypatch.setattr(runner, "measure_case", measure)
    rows = timing.study(settings(), tmp_path / "record.json", log=silent)["rows"]
    (row,) = [row for row in rows if row["method"] == "deconvnet"]
    assert row["status"] == status
    assert row["reason"].startswith(type(error).__name__)
    assert {row["status"] for row in rows if row["method"] != "deconvnet"} == {"ok"}


def test_what_does_not_fit_the_budget_is_listed_as_not_run(tmp_path, monkeypatch, quick):
    now, asked = [0.0], []

    def measure(case, device, *, left, **options):
        asked.append(left())
        now[0] += 10
        if case.method == "grad_cam":
            raise clock.OutOfBudgetError("9 s more were needed, 3 s were left")
        return made_up(case)

    monkeypatch.setattr(runner, "measure_case", measure)
    record = timing.study(settings(budget=45), tmp_path / "r.json", log=silent, now=lambda: now[0])
    statuses = [row["status"] for row in record["rows"]]
    assert statuses[:5] == ["ok"] * 5
    assert set(statuses[5:]) == {"not run"}
    assert asked == [45 / 4, 35, 25, 15, 5]  # of the first pair the baseline has a quarter
    assert record["protocol"]["spent_seconds"] == 50
    assert record["rows"][5]["reason"].endswith("0 s were left")


def test_a_row_is_not_begun_if_twice_its_baseline_is_too_much(tmp_path, monkeypatch, quick):
    """Of a step with saliency it is known beforehand that its arithmetic is twice that of the baseline."""
    tried = []
    monkeypatch.setattr(
        runner, "measure_case", lambda case, *a, **k: tried.append(case) or made_up(case, factor=100)
    )
    timing.study(settings(budget=31), tmp_path / "a.json", log=silent, now=lambda: 0.0)
    case = Case("small", "deconvnet", batch=2, size=32)
    assert case not in tried  # 8 steps of 2 seconds, twice, are 32 seconds
    assert dataclasses.replace(case, method="vanilla_gradient") in tried  # the first pair
    assert dataclasses.replace(case, method="vanilla_gradient", every=4) in tried  # 20 seconds
    tried.clear()
    timing.study(settings(budget=33), tmp_path / "b.json", log=silent, now=lambda: 0.0)
    assert case in tried
    assert dataclasses.replace(case, method="smoothgrad", samples=5) not in tried


def test_time_to_compile_is_foreseen(tmp_path, monkeypatch, quick):
    tried = []
    monkeypatch.setattr(
        runner, "measure_case", lambda case, *a, **k: tried.append(case.compiled) or made_up(case)
    )
    chosen = settings(modes=None)
    timing.study(chosen, tmp_path / "a.json", log=silent, now=lambda: 0.0)
    assert sum(tried) == 1  # 30 s for the baseline, 90 s for the step with saliency, 60 s in all
    tried.clear()
    timing.study(dataclasses.replace(chosen, budget=100), tmp_path / "b.json", log=silent, now=lambda: 0.0)
    assert sum(tried) == 2


@pytest.mark.parametrize(
    ("precision", "capability", "lacking"),
    [
        ("tf32", (7, 5), "TF32 needs"),
        ("bf16", (7, 5), "bfloat16 needs"),
        ("32", (7, 5), ""),
        ("bf16", (9, 0), ""),
    ],
)
def test_what_a_gpu_lacks_is_not_available(monkeypatch, precision, capability, lacking):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    case = Case("resnet18", precision=precision)
    status, reason = foresight.foreseen(case, torch.device("cuda"), 200, 100.0, [])
    assert status == ("not available" if lacking else None)
    assert reason.startswith(lacking)


def test_fused_kernels_take_a_gpu_and_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    case, found = Case("resnet18", fused=True), []
    monkeypatch.setattr(foresight.importlib.util, "find_spec", lambda name: object() if found else None)
    assert foresight.lacking(case, torch.device("cpu")) == "fused kernels are for NVIDIA's GPUs"
    assert foresight.lacking(case, torch.device("cuda")) == "fused kernels need Triton"
    found.append("triton")
    assert foresight.lacking(case, torch.device("cuda")) == ""


def test_a_device_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="device cuda is not on this machine: take cpu, or auto"):
        timing.study(Settings(device="cuda"))


def test_the_default_file_is_named_by_the_device(monkeypatch):
    assert str(timing.default_path("cpu")) == "results/timing-cpu.json"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert str(timing.default_path("cuda")) == "results/timing-nvidia-h100-80gb-hbm3.json"


def test_committed_records_are_whole():
    root = results.Path(results.__file__).parent.parent
    paths = [path for kind in ("timing", "beside") for path in (root / "results").glob(f"{kind}-*.json")]
    assert paths
    for path in paths:
        assert json.loads(path.read_text()) == timing.read_timing(path)


def test_rows_are_written_as_they_were_read():
    record = timing.read_timing(results.published() / "timing-cpu.json")
    assert {row["status"] for row in record["rows"]} > {"ok"}
    written = [Row.from_dict(row).to_dict() for row in record["rows"]]
    assert json.dumps(written) == json.dumps(record["rows"])  # the order of the names, too
