"""Where and among how many processes a run may start: told by name, before torch is loaded."""

import json

import pytest

from salnb.train.config import PRACTICAL, Config


def test_a_folder_with_another_run_is_refused(held):
    config = Config(out=str(held), seed=2, learning_rate=0.1, model="small_groupnorm")
    for resume in (False, True):
        with pytest.raises(FileExistsError) as error:
            config.check_run(resume=resume)
        assert "model 'small' (now 'small_groupnorm'), seed 1 (now 2)" in str(error.value)
        assert "learning_rate" not in str(error.value)


def test_the_same_run_is_continued_only_when_asked(held):
    config = Config(out=str(held), seed=1, learning_rate=0.1)
    with pytest.raises(FileExistsError, match="holds this run already: resume it"):
        config.check_run(resume=False)
    config.check_run(resume=True)


def test_practical_settings_may_change(held):
    changes = {"device": "cpu", "workers": 0, "save_minutes": 1}
    assert set(changes) | {"out"} == PRACTICAL
    Config(out=str(held), seed=1, learning_rate=0.1, **changes).check_run(resume=True)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(NotADirectoryError, match="out must be a folder, got the file"):
        Config(out=str(tmp_path / "run")).check_run(resume=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"out .*file/run cannot be written to: Not a directory"):
        Config(out=str(tmp_path / "file" / "run")).check_run(resume=False)


LONG = {"a name": "x" * 300, "below what is not there": "new/" + "x" * 300, "a path": "deep/" * 1000}


@pytest.mark.parametrize("name", LONG)
def test_a_folder_whose_name_is_too_long_is_named(tmp_path, name):
    with pytest.raises(OSError, match=r"out .* cannot be written to: File name too long"):
        Config(out=str(tmp_path / LONG[name])).check_run(resume=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"{}", b'{"model": 3}', b"\xff", b"[" * 10**5, b'{"a": NaN}', None], ids=ascii
)
def test_a_file_of_something_else_is_left_alone(tmp_path, held, name, content, resume):
    path = held / name
    path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content[:99_999])
    with pytest.raises(FileExistsError, match=rf"holds a {name} that is not of a run: name another folder"):
        Config(out=str(held), seed=1, learning_rate=0.1).check_run(resume=resume)
    assert path.is_dir() if content is None else path.read_bytes() == content[:99_999]


def test_a_summary_alone_tells_of_its_settings(held):
    config = Config(out=str(held), seed=1, learning_rate=0.1)
    (held / "config.json").rename(held / "summary.json")
    (held / "summary.json").write_text(json.dumps({"config": config.to_dict(), "test_accuracy": 0.5}))
    config.check_run(resume=True)
    with pytest.raises(FileExistsError, match=r"holds a run of other settings: seed 1 \(now 2\)"):
        Config(out=str(held), seed=2, learning_rate=0.1).check_run(resume=True)
    with pytest.raises(FileExistsError, match="holds this run already: resume it"):
        config.check_run(resume=False)


def test_checkpoints_alone_are_left_alone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        FileExistsError, match=r"holds checkpoints without a config\.json: name another folder"
    ):
        Config(out=str(tmp_path)).check_run(resume=True)


@pytest.mark.parametrize(("name", "message"), [("checkpoints", "cannot be written to: Not a directory"),
                                               ("metrics.jsonl", r"holds a folder metrics\.jsonl")])  # fmt: skip
def test_what_cannot_be_written_later_is_told_at_once(held, name, message):
    (held / name).touch() if name == "checkpoints" else (held / name).mkdir()
    with pytest.raises(OSError, match=f"out .*{message}"):
        Config(out=str(held), seed=1, learning_rate=0.1).check_run(resume=True)


@pytest.mark.parametrize(
    ("changes", "least"), [({"batch_size": 9}, 2), ({"batch_size": 2, "augmentation": "mixup"}, 4)]
)
def test_processes_must_share_a_batch(tmp_path, monkeypatch, changes, least):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=f"batch_size must be a multiple of the 2 processes and at least {least}"
    ):
        Config(out=str(tmp_path), **changes).check_run(resume=False)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE, which torchrun sets, must be a number of processes, got 'two'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE, which torchrun sets, must be a number of processes, got ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE, .* got '0'"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE, .* got 'x'"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "3"}, "WORLD_SIZE must be a multiple of LOCAL_WORLD_SIZE, got 4"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "here"},
         "WORLD_SIZE is 2, but LOCAL_RANK, MASTER_PORT are not set: start the processes with torchrun, or unset"),
    ],
)  # fmt: skip
def test_variables_of_torchrun_are_checked(tmp_path, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        Config(out=str(tmp_path)).check_run(resume=False)
