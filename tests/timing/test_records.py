"""Records of the timing study, read with suspicion, two of them side by side, and the command line."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from salnb import results, timing
from salnb.__main__ import main
from salnb.timing import peaks, runner
from salnb.timing import profiler as profile
from salnb.timing.records import Row
from tests.helpers.timing_records import made_up, settings, silent, without_waiting


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A record of rows that are made up."""
    with pytest.MonkeyPatch.context() as patch:
        without_waiting(patch)
        patch.setattr(runner, "measure_case", made_up)
        return timing.study(settings(), tmp_path_factory.mktemp("record") / "record.json", log=silent)


# --- damaged records ---------------------------------------------------------------------------------------

DAMAGES = {
    "schema": (lambda r: r.update(schema="salnb timing 0"), "schema must be 'salnb timing 2'"),
    "no rows": (lambda r: r.update(rows=[]), "rows must be a list that is not empty"),
    "no device": (lambda r: r["provenance"].pop("device_name"), "provenance.device_name must be there"),
    "no driver": (lambda r: r["facts"].pop("driver"), "facts.driver must be there"),
    "no batch": (lambda r: r["protocol"].update(batch=0), "protocol.batch must be a positive integer, got 0"),
    "no protocol": (lambda r: r.pop("protocol"), "protocol must be an object, got None"),
    "a row of text": (lambda r: r["rows"].append("x"), r"rows\[\d+\] must be an object"),
    "a field too few": (lambda r: r["rows"][1].pop("flops"), r"rows\[1\] must be an object of the fields .*'flops'"),
    "a field too many": (lambda r: r["rows"][1].update(speed=1), r"rows\[1\] must be an object of the fields .*'speed'"),
    "a row twice": (lambda r: r["rows"].append(r["rows"][0]), "must be a case of its own"),
    "a status": (lambda r: r["rows"][1].update(status="good"), r"rows\[1\].status must be one of ok, out of memory"),
    "a reason": (lambda r: r["rows"][1].update(reason="why"), r"rows\[1\].reason must be a text unless"),
    "times without a run": (lambda r: r["rows"][1].update(status="failed", reason="x"), r"rows\[1\].iterations must be null"),
    "a negative time": (lambda r: r["rows"][1]["seconds"].update(min=-1), r"rows\[1\].seconds must be positive"),
    "a time of text": (lambda r: r["rows"][1]["seconds"].update(mean="1"), r"rows\[1\].seconds must be positive"),
    "percentiles": (lambda r: r["rows"][1]["seconds"].update(p5=0.9), r"rows\[1\].seconds must be in order"),
    "a mean": (lambda r: r["rows"][0]["seconds"].update(mean=0.9), r"rows\[0\].seconds must be in order"),
    "parts": (lambda r: r["rows"][1]["parts"].update(forward=9.0), r"rows\[1\].parts must be as long as the mean"),
    "averaged": (lambda r: r["rows"][1].update(averaged=7), r"rows\[1\].averaged must be at most half"),
    "a ratio": (lambda r: r["rows"][1].update(ratio=2.0), "ratio of small, fp32, eager, .*, as its baseline says, got 2.0"),
    "no ratio": (lambda r: r["rows"][1].update(ratio=None), "ratio of small"),
    "arithmetic": (lambda r: r["rows"][1].update(flops=7), "flops_ratio of small"),
    "no arithmetic": (lambda r: r["rows"][1].update(flops=0), r"rows\[1\].flops must be a positive integer, got 0"),
    "peaks": (lambda r: r["rows"][1]["peaks"].update(bytes=0), r"rows\[1\].peaks must be positive flops and bytes"),
    "bytes": (lambda r: r["rows"][1]["bytes"].update(other=-1), r"rows\[1\].bytes must be null or numbers by name"),
    "memory": (lambda r: r["rows"][1].update(peak_bytes=1.5), r"rows\[1\].peak_bytes must be a positive integer"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_refused_with_the_place(tmp_path, record, damage):
    change, message = DAMAGES[damage]
    damaged = copy.deepcopy(record)
    timing.check_record(damaged)
    change(damaged)
    with pytest.raises(ValueError, match=message):
        timing.check_record(damaged)
    results.write_record(tmp_path / "record.json", damaged)
    with pytest.raises(ValueError, match=r"record\.json: not a timing record: "):
        timing.read_timing(tmp_path / "record.json")


def test_a_record_of_the_first_schema_is_read_and_says_what_it_lacks(tmp_path, record):
    old, new = copy.deepcopy(record), ("plain", "originals_only", "bytes", "peaks", "peaks_source", "lacks")
    old["schema"] = "salnb timing 1"
    old["rows"] = [
        {name: value for name, value in row.items() if name not in new}
        for row in old["rows"]
        if not row["plain"] and not row["originals_only"]
    ]
    results.write_record(tmp_path / "old.json", old)
    read = timing.read_timing(tmp_path / "old.json")
    for before, after in zip(old["rows"], read["rows"], strict=True):
        assert after["seconds"] == before["seconds"]
        assert after["bytes"] is None
        assert set(after["lacks"]) == {"bytes", "peaks"}


def test_a_file_that_was_cut_is_refused(tmp_path, record):
    path = tmp_path / "record.json"
    results.write_record(path, record)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"record\.json is not a record"):
        timing.read_timing(path)
    with pytest.raises(FileNotFoundError, match="there is no timing record"):
        timing.read_timing(tmp_path / "other.json")


# --- side by side ------------------------------------------------------------------------------------------


def cells(text):
    """The cells of a table's rows by their first."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows[1:]}


def test_two_records_side_by_side(record):
    other = copy.deepcopy(record)
    other["provenance"]["device_name"] = "a faster one"
    for row in other["rows"]:
        row["seconds"] = {name: value / 4 for name, value in row["seconds"].items()}
    at, row = next((i, row) for i, row in enumerate(other["rows"]) if row["every"] > 1)
    other["rows"][at] = Row(timing.case_of(row), "out of memory", "too large").to_dict()
    text = timing.compare(record, other)
    assert text.startswith(f"A: {record['provenance']['device_name']}, torch {torch.__version__}, ")
    assert "\nB: a faster one, torch" in text
    table = cells(text)
    assert table["small, fp32, eager, baseline"] == ["20.00", "5.00", "4.00", "–", "–", "–"]
    assert table["small, fp32, eager, vanilla gradient"] == ["60.00", "15.00", "4.00", "3.00", "3.00", "2.00"]
    case = timing.case_of(row)
    assert table[f"small, fp32, eager, vanilla gradient, every {case.every}"][:3] == [
        "60.00",
        "out of memory",
        "–",
    ]


def test_rows_meet_whatever_the_batch_of_each_device(record):
    other = copy.deepcopy(record)
    other["protocol"] |= {"batch": 16, "size": 224}
    for row in other["rows"]:
        row["batch"] *= 8
        row["size"] = 224
    table = cells(timing.compare(record, other))
    assert len(table) == len(record["rows"])
    assert all("–" not in row[:3] for row in table.values())
    assert "small, fp32, eager, vanilla gradient, 2 × the batch" in table


# --- the profile -------------------------------------------------------------------------------------------


def event(name, own=0.0, parent=None, kernels=(), device="CPU"):
    launched = [SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels]
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        self_cpu_time_total=own,
        kernels=launched,
        device_type=f"DeviceType.{device}",
    )


def test_operators_are_told_apart_by_what_called_them():
    norm = event("_BatchNormBackwardBackward", 1e6)
    found = profile.seconds_by_kind(
        [
            norm,
            event("aten::mul", 2e6, norm),
            event("aten::mul", 4e6),
            event("aten::convolution_backward", 8e6),
            event("aten::addmm", 16e6, event("Affine")),
        ],
        on_gpu=False,
    )
    assert found == {"batch norm": 3, "other": 4, "convolution": 8, "matrix product": 16}


def test_on_a_gpu_kernels_count_and_each_once():
    conv = event("aten::cudnn_convolution", 1e9, kernels=[("sm90_xmma_fprop", 1e6)])
    region = event(
        "## Call CompiledFxGraph",
        1e9,
        kernels=[
            ("triton_red_fused__native_batch_norm_legit_relu_3", 2e6),
            ("triton_poi_fused_convolution_relu_0", 4e6),
        ],
    )
    kernel = event("sm90_xmma_fprop", device="CUDA", kernels=[("sm90_xmma_fprop", 1e6)])
    found = profile.seconds_by_kind([conv, region, kernel], on_gpu=True)
    assert found == {"convolution": 1, "batch norm": 2, "other": 4, "matrix product": 0}


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "tf32", 494.7 * 1e12),
        ("NVIDIA H100 PCIe", "bf16", 756 * 1e12),
        ("NVIDIA H200", "32", 66.9 * 1e12),
        ("Tesla T4", "32", 8.1 * 1e12),
        ("Tesla T4", "tf32", None),
        ("NVIDIA L40S", "32", None),
        ("x86_64, 2 threads", "32", None),
    ],
)
def test_peaks_are_those_of_the_very_device(name, precision, peak):
    assert peaks.peak_flops(name, precision) == peak


@pytest.mark.parametrize(
    ("answer", "driver", "clock"),
    [("580.65.06, 700.00, 1980, 2619\n", "580.65.06", 1980.0), ("580.65.06, [N/A], [N/A], [N/A]", "580.65.06", None),
     ("No devices were found", None, None), (FileNotFoundError(), None, None), (subprocess.TimeoutExpired("", 10), None, None)],
    ids=["all", "no clocks", "no device", "no program", "no answer"],
)  # fmt: skip
def test_what_the_driver_does_not_tell_is_null(monkeypatch, answer, driver, clock):
    asked = []

    def smi(command, **options):
        asked.append(command)
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer)

    properties = SimpleNamespace(uuid="12-34", total_memory=80, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(profile.subprocess, "run", smi)
    facts = profile.device_facts(torch.device("cuda:1"))
    assert facts["driver"] == driver
    assert (facts["clocks_mhz"] or {}).get("most_sm") == clock
    assert facts["capability"] == "9.0"
    assert "--id=GPU-12-34" in asked[0]


# --- the command line --------------------------------------------------------------------------------------


def test_the_command_measures_and_compares(tmp_path, monkeypatch, capsys):
    without_waiting(monkeypatch)
    monkeypatch.setattr(runner, "measure_case", made_up)
    path = str(tmp_path / "record.json")
    command = ["time", "--device", "cpu", "--networks", "small", "--size", "32", "--iterations", "4"]
    assert main([*command, "--modes", "eager", "--batch", "4", "--out", path]) == 0
    assert "vanilla gradient: 60.00 ms" in capsys.readouterr().out
    record = timing.read_timing(path)
    assert (record["protocol"]["batch"], record["rows"][0]["iterations"]) == (4, 4)
    assert main(["time", "--compare", path, path]) == 0
    assert "| 60.00 | 60.00 | 1.00 |" in capsys.readouterr().out


def test_an_interrupted_study_says_so(tmp_path, monkeypatch, capsys):
    def measure(case, *args, **options):
        if case.method:
            raise KeyboardInterrupt
        return made_up(case)

    monkeypatch.setattr(runner, "measure_case", measure)
    path = tmp_path / "record.json"
    assert main(["time", "--device", "cpu", "--networks", "small", "--out", str(path)]) == 130
    assert "the rows that were measured are in the file that ends in .partial" in capsys.readouterr().err
    assert timing.read_timing(f"{path}.partial")["rows"][0]["status"] == "ok"
    assert not path.exists(), "an older record would have been replaced"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "gpu"], "device must be auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
        (["--budget", "0"], r"budget must lie in (0, 1e+09], got 0.0"),
        (["--budget", "nan"], r"budget must lie in (0, 1e+09], got nan"),
        (["--batch", "1"], "batch must lie in [2, 1e+09], got 1"),
        (["--iterations", "3"], "iterations must lie in [4, 1e+09], got 3"),
        (["--networks", "resnet81"], "networks 'resnet81' is unknown (did you mean 'resnet18'"),
        (["--precisions", "fp32"], "precisions 'fp32' is unknown"),
        (["--modes", "compile"], "modes 'compile' is unknown (did you mean 'compiled'"),
        (["--device", "cpu", "--precisions", "tf32"], "tf32 is for GPUs"),
        (["--device", "cpu", "--modes", "eager", "captured"], "modes: captured is for NVIDIA's GPUs"),
        (["--device", "cpu", "--networks", "vit_b_16"], "size must be 224 for vit_b_16, got 64"),
        (["--networks", "vgg16", "--size", "16"], "size must be at least 32 for vgg16, got 16"),
        (["--out", "record"], "out must be a file whose name ends in .json, got record"),
        (["--compare", "none.json", "none.json"], "there is no timing record none.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_answered_without_torch(arguments, message):
    program = (
        "import sys; from salnb.__main__ import main; status = main(sys.argv[1:]); "
        "print('torch' in sys.modules); sys.exit(status)"
    )
    command = [sys.executable, "-c", program, "time", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (2, "False\n")
    assert answer.stderr.startswith("salnb: error: ")
    assert answer.stderr.count("\n") == 1
    assert message in answer.stderr


def test_nothing_but_torch_and_torchvision_is_loaded():
    """A machine that measures need not have what the chapters and the training need."""
    probe = (
        "import sys, torch, torchvision; before = set(sys.modules); from salnb import timing; "
        "timing.measure(timing.Case('small', batch=2, size=16), iterations=4); "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    # of torch.distributed, which at its import makes a folder: torch 2.6 leaves that to the interpreter's end
    warnings = ["-W", "error", "-W", "ignore:Implicitly cleaning up:ResourceWarning"]
    answer = subprocess.run(
        [sys.executable, *warnings, "-c", probe], capture_output=True, text=True, check=True
    )
    extra = {name for name in answer.stdout.split() if name not in sys.stdlib_module_names}
    assert extra - {"torch", "torchvision"} <= {"salnb", "numpy", "sympy", "mpmath"}, extra
    assert answer.stderr == ""
