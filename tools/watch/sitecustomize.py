"""Notes what each Python process that has this folder on its PYTHONPATH opens for reading, and lists.

Python imports this module by its name when it starts, in child processes too; `tools.reads` says
where to note.
"""

import os
import sys

_TREE = os.environ["SALNB_READS_TREE"] + os.sep
_NOTES = os.environ["SALNB_READS_NOTES"]
_noted: set[str] = set()


def _note(event: str, arguments: tuple) -> None:
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, str) or path == _NOTES or flags & os.O_ACCMODE == os.O_WRONLY:
            return
    elif event in ("os.listdir", "os.scandir"):
        path = arguments[0] or "."
        if not isinstance(path, str):
            return
    else:
        return
    line = f"{'file' if event == 'open' else 'folder'}\t{os.path.realpath(path)}\n"
    if line in _noted or _TREE not in line:
        return
    _noted.add(line)
    notes = os.open(_NOTES, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(notes, line.encode())
    os.close(notes)


sys.addaudithook(_note)
