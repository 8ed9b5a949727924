"""What is missing is named, with the command that installs it."""

import re
import sys
from pathlib import Path

import pytest

from salnb._common.packages import package_folder, require


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "this needs the package absent: pip install absent"),
        ({"extra": "train"}, "this needs the package absent: pip install 'salnb[train]'"),
        ({"extra": "ray", "what": "on ray"}, "on ray needs the package absent: pip install 'salnb[ray]'"),
    ],
)
def test_a_missing_package_is_named(options, message):
    for look_up in (require, package_folder):
        with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(message)}$"):
            look_up("absent", **options)


def test_what_a_package_lacks_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("import absent")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="this needs the package absent: pip install broken"):
        require("broken")


def test_what_is_there_is_given():
    assert require("json.decoder") is sys.modules["json.decoder"]
    assert package_folder("json") == Path(require("json").__file__).parent
