"""Records and files: whole or not at all, and checked when read."""

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path

import pytest
import torch

import salnb
from salnb import results
from salnb._common import files as _files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_records_come_back(tmp_path):
    record = {"accuracy": 0.5, "terms": [1, 2.5, None], "text": "γ = 1"}
    path = tmp_path / "deep" / "er" / "record.json"
    results.write_record(path, record)
    assert results.read_record(path) == record
    assert path.read_text().endswith("}\n")
    assert path.stat().st_mode & 0o777 == 0o644
    assert names(path.parent) == ["record.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, torch.zeros(())], ids=repr)
def test_what_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path, value):
    path = tmp_path / "record.json"
    results.write_record(path, {"kept": 1})
    with pytest.raises((ValueError, TypeError)):
        results.write_record(path, {"value": value})
    assert results.read_record(path) == {"kept": 1}
    assert names(tmp_path) == ["record.json"]


NO_RECORDS = [
    b"",
    b'{"a": 1',
    b"[1, 2]",
    b"\x00",
    b'{"a": "\xff"}',
    b'{"a": NaN}',
    b'{"a": -Infinity}',
    b"[" * 10**5,
]


@pytest.mark.parametrize("content", NO_RECORDS, ids=lambda content: repr(content[:20]))
def test_what_is_no_record_is_named(tmp_path, content):
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"record\.json is not a record"):
        results.read_record(tmp_path / "record.json")


def test_a_name_that_is_no_utf8_is_kept(tmp_path):
    record = {"out": os.fsdecode(b"caf\xe9"), "text": "γ"}
    results.write_record(tmp_path / "record.json", record)
    assert results.read_record(tmp_path / "record.json") == record


@pytest.mark.parametrize(
    ("before", "status"),
    [
        ("resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))", 1),  # as a full disk
        ("os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.fsync = lambda *a: os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
    ids=["full disk", "killed", "killed while writing"],
)
def test_what_ends_the_writing_leaves_the_old_record(tmp_path, before, status):
    path = tmp_path / "record.json"
    results.write_record(path, {"kept": 1})
    program = (
        f"import os, resource, signal, sys; from salnb import results; {before}\n"
        "results.write_record(sys.argv[1], {'text': 'x' * 100_000})"
    )
    answer = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert answer.returncode == status
    assert ("File too large" in answer.stderr) == (status == 1)
    assert results.read_record(path) == {"kept": 1}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_content(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    _files.write_atomic(path, b"old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        _files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_the_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A crash of the machine must not leave a name without content."""
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    _files.write_atomic(tmp_path / "file", b"content")
    assert order == ["fsync", "replace", "fsync"]


def test_a_saved_state_comes_back_and_torch_alone_can_read_it(tmp_path):
    state = {"tensor": torch.randn(3, 4), "step": 7, "rows": [{"loss": 0.5}], "nothing": None}
    path = _files.save_hashed(tmp_path, "step-7", state)
    for loaded in (_files.load_hashed(path), torch.load(path, weights_only=True)):
        assert torch.equal(loaded.pop("tensor"), state["tensor"])
        assert loaded == {"step": 7, "rows": [{"loss": 0.5}], "nothing": None}


@pytest.mark.parametrize("where", [0, 0.3, 0.9, 1])
@pytest.mark.parametrize("how", ["flip", "cut"])
def test_any_change_of_a_saved_state_is_noticed(tmp_path, how, where):
    path = _files.save_hashed(tmp_path, "state", {"a": torch.randn(100)})
    content = bytearray(path.read_bytes())
    place = min(int(where * len(content)), len(content) - 1)
    if how == "flip":
        content[place] ^= 4
    path.write_bytes(content if how == "flip" else content[:place])
    with pytest.raises(_files.DamagedFileError, match=r"state.* is truncated or altered"):
        _files.load_hashed(path)


def test_a_disk_that_is_full_is_called_so(tmp_path):
    """The file size limit of a process stands for the full disk: the write itself fails, midway."""
    program = (
        "import resource, sys, torch; from pathlib import Path; from salnb._common.files import save_hashed\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "try: save_hashed(Path(sys.argv[1]), 'state', {'a': torch.zeros(100_000)})\n"
        "except OSError as error: print(error.strerror)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "File too large\n"
    assert names(tmp_path) == []


def test_provenance_says_where_when_and_with_what():
    found = results.provenance("cpu")
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["salnb"] == salnb.__version__
    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["device"] == "cpu"
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(found["time"])).total_seconds()) < 60
    assert json.loads(json.dumps(found)) == found
    assert "missing" not in found


def test_accessories_that_fail_are_named():
    record = {"accuracy": 0.5, "here": lambda: 1, "gone": lambda: {}["key"], "steps": 7}
    missing = {"gone": "KeyError: 'key'"}
    assert results.with_accessories(record) == {
        "accuracy": 0.5, "here": 1, "gone": None, "steps": 7, "missing": missing,
    }  # fmt: skip
    assert results.with_accessories({"here": lambda: 1}) == {"here": 1}


def fail(*args, **options):
    raise RuntimeError("is broken")


@pytest.mark.parametrize(
    ("target", "device", "field"),
    [
        ("salnb.results.commit", "cpu", "commit"),
        ("platform.platform", "cpu", "system"),
        ("platform.processor", "cpu", "device_name"),
        ("torch.get_num_threads", "cpu", "device_name"),
        ("torch.cuda.get_device_name", "cuda:1", "device_name"),
        ("platform.python_version", "cpu", "python"),
    ],
)
def test_provenance_does_without_what_fails(monkeypatch, target, device, field):
    whole = results.provenance("cpu")
    monkeypatch.setattr(target, fail)
    found = results.provenance(device)
    assert found.pop("missing") == {field: "RuntimeError: is broken"}
    assert found.keys() == whole.keys()
    assert (found if field in whole else found["versions"])[field] is None
    left_out = {"time", "device", "versions", field}
    assert {k: v for k, v in found.items() if k not in left_out} == {
        k: v for k, v in whole.items() if k not in left_out
    }


@pytest.mark.parametrize("error", [OSError, metadata.PackageNotFoundError])
def test_versions_do_without_a_package_whose_metadata_are_broken(monkeypatch, error):
    def version(package, version=metadata.version):
        if package == "torchvision":
            raise error("torchvision")
        return version(package)

    whole = results.provenance("cpu")
    monkeypatch.setattr(metadata, "version", version)
    found = results.provenance("cpu")
    assert found["versions"] == whole["versions"] | {"torchvision": None}
    assert list(found["missing"]) == ["torchvision"]
    # one that is not installed is not missed
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "missing" not in results.provenance("cpu")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A source tree with git's folder in it, and a folder before all others on the path."""
    (tmp_path / "tree" / ".git").mkdir(parents=True)
    (tmp_path / "tree" / "salnb").mkdir()
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(results, "__file__", str(tmp_path / "tree" / "salnb" / "results.py"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (None, "FileNotFoundError: [Errno 2] No such file or directory: 'git'"),
        ("sleep 60", "RuntimeError: git ls-files takes more than 0.5 s"),
        ("echo fatal: $0 >&2; exit 128", "RuntimeError: git ls-files ended with status 128"),
    ],
    ids=["missing", "hanging", "failing"],
)
def test_a_git_that_does_not_answer_is_said(tree, monkeypatch, script, why):
    monkeypatch.setattr(results, "_PATIENCE", 0.5)
    if script:
        (tree / "bin" / "git").write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{script}\n")
        (tree / "bin" / "git").chmod(0o755)
    found = results.provenance("cpu")
    assert found["commit"] is None
    assert found["missing"] == {"commit": why}
    assert str(tree) not in json.dumps(found)


def test_outside_of_a_source_tree_git_is_not_asked(tree):
    (tree / "tree" / ".git").rmdir()
    found = results.provenance("cpu")
    assert found["commit"] is None
    assert "missing" not in found


def test_commit_is_that_of_the_source_tree():
    root = Path(salnb.__file__).parent.parent
    answer = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    if answer.returncode:
        assert results.commit() is None
    else:
        assert results.commit().removesuffix("+changes") == answer.stdout.strip()


def test_an_installed_copy_inside_another_repository_has_no_commit(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    copy = tmp_path / "results.py"
    copy.write_text("")
    monkeypatch.setattr(results, "__file__", str(copy))
    assert results.commit() is None


def test_parameters_have_one_hash_as_long_as_nothing_changes():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    first = results.parameters_sha256(model)
    assert first == results.parameters_sha256(model)
    assert len(first) == 64
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.nextafter(model[0].weight[0, 0, 0, 0], torch.tensor(9.0))
    second = results.parameters_sha256(model)
    model[1].running_mean[0] += 1
    assert len({first, second, results.parameters_sha256(model)}) == 3


def test_peak_memory_grows_with_what_is_used():
    before = results.peak_memory(torch.device("cpu"))
    assert before == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    block = torch.ones(before // 4 + 40_000_000)  # more than was ever in use
    assert results.peak_memory(torch.device("cpu")) > before
    del block


def test_a_number_that_is_too_large_is_no_number_of_a_record(tmp_path):
    (tmp_path / "record.json").write_text('{"accuracy": 1e999}')
    with pytest.raises(ValueError, match=r"record\.json is not a record: 1e999 is no number"):
        results.read_record(tmp_path / "record.json")


def test_only_what_can_be_read_again_is_written(tmp_path):
    with pytest.raises(TypeError, match="record must be a mapping, got list"):
        results.write_record(tmp_path / "record.json", [1])
    assert not names(tmp_path)
