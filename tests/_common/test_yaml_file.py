"""Files of settings in YAML: nothing in them is taken for what it was not meant to be."""

import os

import pytest

from salnb._common.yaml_file import read_yaml
from salnb.study.scale import load_scale
from salnb.train.settings_file import read_settings

SCALE = "scale: {data: [digit-scenes], networks: [small], seeds: [0]"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("seed: 1\nepochs: 2\nseed: 3\n", "seed is named twice, again in line 3"),
        ("a:\n  - {b: 1, b: 1}\n", "b is named twice, again in line 2"),
        ("seed: 010\n", "010 in line 1 is another number to YAML"),
        ("seed: 1:30\n", "1:30 in line 1 is another number to YAML"),
        ("gamma: 1:30.5\n", "1:30.5 in line 1 is another number to YAML"),
        ("[" * 5000, "nested too deeply"),
        ("seed: 1\n---\nseed: 2\n", "expected a single document"),
        ("!!python/object:os.system x\n", "could not determine a constructor"),
    ],
)
def test_what_could_be_taken_for_something_else_is_refused(text, why, tmp_path):
    path = tmp_path / "settings.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=why):
        read_yaml(path)
    with pytest.raises(ValueError, match=f"config .*settings.yml cannot be read: .*{why}"):
        read_settings(str(path))


@pytest.mark.parametrize("text", ["\ufeffseed: 1\r\ngamma: .5\r\n", '{"seed": 1, "gamma": 0.5}'])
def test_files_of_every_editor(text, tmp_path):
    path = tmp_path / "settings.yml"
    path.write_bytes(text.encode())
    assert read_yaml(path) == {"seed": 1, "gamma": 0.5}


def test_anchors_and_merges_are_read(tmp_path):
    path = tmp_path / "settings.yml"
    path.write_text("a: &a {seed: 0, gamma: 0.5}\nb: {<<: *a, seed: 0x10}\n")
    assert read_yaml(path)["b"] == {"seed": 16, "gamma": 0.5}


def test_a_setting_is_named_once_however_it_is_spelt(tmp_path):
    path = tmp_path / "settings.yml"
    path.write_text("batch_size: 8\nbatch-size: 16\n")
    with pytest.raises(ValueError, match="names batch_size twice"):
        read_settings(str(path))


def test_a_home_folder_is_found_in_files_too(tmp_path):
    path = tmp_path / "settings.yml"
    path.write_text("out: ~/run\nweights: ~\nlearning_rate: 1e-3\n")
    found = read_settings(str(path))
    assert found == {"out": os.path.expanduser("~/run"), "weights": None, "learning_rate": 0.001}


def test_a_scale_says_everything_once(tmp_path):
    path = tmp_path / "own.yml"
    path.write_text(SCALE + ", seeds: [1]}")
    with pytest.raises(ValueError, match="seeds is named twice"):
        load_scale(path)


def test_weights_of_a_scale_are_numbers_as_they_are_written(tmp_path):
    path = tmp_path / "own.yml"
    path.write_text(SCALE + ", gammas: [1e-3, 1E2, 2], studies: {table1: {gammas: [1e-2]}}}")
    assert load_scale(path).gammas == (0.001, 100.0, 2)
    assert load_scale(path).for_study("table1").gammas == (0.01,)
