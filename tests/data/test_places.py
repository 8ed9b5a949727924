"""Where data sets are kept: any folder will do, a filled one need not be written, and the error says what to set."""

import errno
import os
import pwd
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

from salnb import data
from salnb.data import cache as kept
from salnb.data import paper
from tests.helpers import runs
from tests.helpers.paper_files import put_files
from tests.helpers.read_only import protect

pytest.importorskip("datasets")

ADVICE = r"^data sets cannot be kept in [^\n]*: set SALNB_CACHE to a folder that can be written and has room$"


def below_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SALNB_CACHE", str(tmp_path / "file" / "cache"))


def a_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SALNB_CACHE", str(tmp_path / "file"))


def a_dangling_link(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "cache")
    monkeypatch.setenv("SALNB_CACHE", str(tmp_path / "link"))


def a_device(tmp_path, monkeypatch):
    monkeypatch.setenv("SALNB_CACHE", "/dev/null")


def a_home_that_is_none(tmp_path, monkeypatch):
    monkeypatch.delenv("SALNB_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/dev/null/home")


def no_home(tmp_path, monkeypatch):
    """As in a container whose user has no entry in the list of users."""

    def unknown(user):
        raise KeyError(f"uid not found: {user}")

    monkeypatch.delenv("SALNB_CACHE", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def the_home_of_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("SALNB_CACHE", "~nobody-of-this-name/cache")


def a_name_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setenv("SALNB_CACHE", str(tmp_path / ("x" * 300)))


def relative_to_a_folder_that_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("SALNB_CACHE", "cache")


UNUSABLE = [
    *(below_a_file, a_file, a_dangling_link, a_device, a_home_that_is_none, no_home, the_home_of_nobody),
    *(a_name_that_is_too_long, relative_to_a_folder_that_is_gone),
]
unusable = pytest.mark.parametrize("place", UNUSABLE, ids=[place.__name__ for place in UNUSABLE])
NAMES = ["digit-scenes", "cifar10", "imagenet"]


@unusable
@pytest.mark.parametrize("name", NAMES)
def test_a_place_that_cannot_be_used_is_told_in_one_line(place, name, tmp_path, monkeypatch):
    place(tmp_path, monkeypatch)
    with pytest.raises(OSError, match=ADVICE):
        data.load(name, 32)


def in_a_process(call, folder, *args):
    """What `call(folder, …, log=…)` returns in a process of its own, as what protects a folder stays."""
    return runs.finish(*runs.start_call(partial(call, folder, *args), cache=folder))


def refusals(folder, code, log):
    protect(folder, code)
    found = []
    for name in NAMES:
        with pytest.raises(OSError) as error:  # noqa: PT011, what it says is looked at elsewhere
            data.load(name, 32)
        found.append(str(error.value))
    return found


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_written_is_told_in_one_line(code, tmp_path):
    """With data in it that would have to be decoded or prepared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SALNB_CACHE", str(tmp_path))
        for name in NAMES[1:]:
            put_files(name)
    lines = in_a_process(refusals, tmp_path, code)
    assert len(lines) == len(NAMES)
    for line in lines:
        assert re.match(ADVICE, line)
        assert os.strerror(code) in line


def test_a_disk_that_becomes_full_is_told_in_one_line(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("SALNB_CACHE", str(tmp_path))
    monkeypatch.setattr("salnb._common.files._place", full)
    with pytest.raises(
        OSError, match=rf"{tmp_path} \(\[Errno 28\] No space left on device\): set SALNB_CACHE"
    ):
        kept.cached("thing", lambda: {"images": torch.zeros(10)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("Not enough disk space")]
)
def test_a_disk_that_becomes_full_while_the_library_prepares_is_told(error, tmp_path, monkeypatch):
    def prepare(*args, **options):
        raise RuntimeError("An error occurred while generating the dataset") from error

    monkeypatch.setenv("SALNB_CACHE", str(tmp_path))
    put_files("imagenet")
    monkeypatch.setattr("datasets.load_dataset", prepare)
    with pytest.raises(OSError, match=ADVICE):
        data.load("imagenet", 32)


@pytest.mark.parametrize("name", ["imagenet", "imagenet-streamed"])
def test_a_place_of_the_library_itself_is_told_by_its_own_name(name, tmp_path, monkeypatch):
    def load(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied", "/home/somebody/.cache/huggingface/modules")

    monkeypatch.setenv("SALNB_CACHE", str(tmp_path))
    put_files("imagenet")
    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(
        data.NotFetchedError, match=r"denied: '/home/somebody/.*; set HF_HOME to a folder that can be"
    ):
        data.load(name, 32)


def test_what_goes_wrong_while_making_is_not_blamed_on_the_place(tmp_path, monkeypatch):
    def make():
        raise FileNotFoundError(2, "No such file or directory", "photograph.png")

    monkeypatch.setenv("SALNB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"photograph\.png"):
        kept.cached("thing", make)


def test_the_command_tells_it_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "salnb", "data", "digit-scenes"]
    environment = os.environ | {"SALNB_CACHE": str(tmp_path / "file" / "cache")}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 2
    assert answer.stderr.startswith("salnb: error: data sets cannot be kept in ")
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ("~/data", "HOME/data"),
        ("data/here", "CWD/data/here"),
        ("", "HOME/.cache/salnb"),
        (None, "HOME/.cache/salnb"),
    ],
)
def test_home_and_relative_paths_are_understood(given, folder, tmp_path, monkeypatch):
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    if given is None:
        monkeypatch.delenv("SALNB_CACHE", raising=False)
    else:
        monkeypatch.setenv("SALNB_CACHE", given)
    expected = folder.replace("HOME", str(home)).replace("CWD", str(here))
    assert str(data.cache_folder()) == expected
    kept.cached("thing", lambda: {"images": torch.zeros(10)})
    assert [path.name.split(".")[0] for path in data.cache_folder().iterdir()] == ["thing"]


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder with what each set needs, and the sum of the pixels of each set's test images."""
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SALNB_CACHE", str(folder))
        put_files("cifar10")
        put_files("imagenet")
        return folder, {name: pixels(name) for name in [*NAMES, "imagenet-streamed"]}


def pixels(name):
    dataset = data.load(name, 32, workers=0)
    return [int(batch.images.sum()) for split in (dataset.train, dataset.test) for batch in split.epoch(1000)]


def load_protected(folder, names, log):
    """The pixels of data sets, and the attempts to write."""
    attempts = protect(folder)
    return {name: pixels(name) for name in names}, attempts


def test_a_filled_folder_is_only_read(filled):
    """No write, no lock, and nothing touched."""
    folder, expected = filled
    assert in_a_process(load_protected, folder, expected) == (expected, [])


def test_a_filled_folder_may_be_mounted_elsewhere(filled, tmp_path):
    folder, expected = filled
    shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    folder.rename(folder.with_name("away"))
    try:
        assert in_a_process(load_protected, tmp_path / "elsewhere", expected) == (expected, [])
    finally:
        folder.with_name("away").rename(folder)


def test_files_that_cannot_be_given_checksums_are_used_without(filled, tmp_path):
    folder, expected = filled
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "files" / "cifar10" / "SHA256SUMS").unlink()
    found, attempts = in_a_process(load_protected, tmp_path / "copy", ["cifar10"])
    assert found == {"cifar10": expected["cifar10"]}
    assert attempts


def test_what_was_prepared_of_other_files_is_not_taken_for_these(filled, tmp_path, monkeypatch):
    shutil.copytree(filled[0], tmp_path / "copy")
    monkeypatch.setenv("SALNB_CACHE", str(tmp_path / "copy"))
    folder = paper.files_folder("imagenet")
    (test,) = folder.glob("validation-*")
    test.unlink()
    (folder / "SHA256SUMS").unlink()
    shutil.copyfile(folder / "train-00000-of-00001.parquet", test)
    assert len(data.load("imagenet", 32, workers=0).test) == 20


def test_a_preparation_of_which_a_part_is_gone_is_made_again(filled, tmp_path, monkeypatch):
    folder, expected = filled
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.setenv("SALNB_CACHE", str(tmp_path / "copy"))
    shutil.rmtree(tmp_path / "copy" / "hub" / "parquet")
    assert pixels("imagenet") == expected["imagenet"]


def test_a_damaged_preparation_is_named(filled, tmp_path, monkeypatch):
    shutil.copytree(filled[0], tmp_path / "copy")
    monkeypatch.setenv("SALNB_CACHE", str(tmp_path / "copy"))
    for file in (tmp_path / "copy" / "hub").rglob("*.arrow"):
        file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(
        data.DamagedFileError, match=rf"made of imagenet is damaged .*: remove {tmp_path}/copy/hub/imag"
    ):
        data.load("imagenet", 32)
