"""Set up an environment and say what goes on; needs Python and nothing else.

python tools/install.py .venv --constraint constraints.txt --editable '.[test,lint]'

What follows the folder goes to pip. Its own words, some thousand lines, go to install.log in the folder.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

GB = 1e9
UNPACKED = 7.5 * GB  # of which PyTorch's package for CUDA is two thirds
DOWNLOADED = 3.5 * GB  # pip keeps it all until it has unpacked the last one
LARGE = 50.0  # MB of a package worth a line
EVERY = 20.0  # seconds between two lines when nothing large happens
_DOWNLOAD = re.compile(
    r"\s*(Downloading|Using cached) (\S+?)-(\d[^-]*)-\S+\.(?:whl|tar\.gz) \(([\d.]+) ([kMG]B)\)"
)
_UNITS = {"kB": 1e-3, "MB": 1.0, "GB": 1e3}


def shortcoming(environment: Path) -> str | None:
    """What this machine lacks, in one line with what helps; None: nothing."""
    if find_spec("venv") is None or find_spec("ensurepip") is None:
        return "this Python cannot make environments: apt-get install python3-venv, or another Python"
    parent = environment.absolute().parent
    needed: Counter[int] = Counter()
    there = sum(path.lstat().st_size for path in environment.rglob("*")) if environment.exists() else 0
    needed[parent.stat().st_dev] += max(0, int(UNPACKED) - there)
    temporary = Path(tempfile.gettempdir())
    if there < UNPACKED / 2:  # else little is fetched
        needed[temporary.stat().st_dev] += int(DOWNLOADED)
    for folder in (parent, temporary):
        free, wanted = shutil.disk_usage(folder).free, needed[folder.stat().st_dev]
        if free < wanted:
            return f"{free / GB:.1f} GB are free on the disk of {folder}, {wanted / GB:.0f} GB are needed"
    return None


class Progress:
    """Tells what pip is doing, from its lines: what is large as it comes, and the sums now and then."""

    def __init__(self, environment: Path) -> None:
        self.environment, self.begin, self.started = environment, time.monotonic(), int(time.time())
        self.megabytes, self.fetched, self.to_unpack = 0.0, 0, 0
        self.last = deque[str](maxlen=20)

    def say(self, words: str) -> None:
        """A line, with the minutes and seconds since the beginning."""
        minutes, seconds = divmod(int(time.monotonic() - self.begin), 60)
        print(f"  {minutes}:{seconds:02}  {words}", flush=True)

    def hear(self, line: str) -> None:
        """A line of pip's."""
        self.last.append(line)
        if found := _DOWNLOAD.match(line):
            how, name, version, size, unit = found.groups()
            megabytes = float(size) * _UNITS[unit]
            self.fetched, self.megabytes = self.fetched + 1, self.megabytes + megabytes
            if megabytes >= LARGE:
                self.say(f"{how.lower()} {name} {version}, {megabytes:,.0f} MB")
        elif line.startswith("Installing collected packages:"):
            self.to_unpack = line.count(",") + 1
            self.say(f"unpacking {self.to_unpack} packages")

    def sum_up(self) -> None:
        """How far it is."""
        if self.to_unpack:
            folders = self.environment.glob("lib/python*/site-packages/*.dist-info")
            unpacked = sum(folder.stat().st_mtime >= self.started for folder in folders)
            self.say(f"{unpacked} of {self.to_unpack} unpacked")
        else:
            self.say(f"{self.fetched} packages found, {self.megabytes / 1e3:.1f} GB")


def pip(environment: Path, arguments: list[str]) -> int:
    """Run `pip install` in an environment and tell its progress; its exit status."""
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--no-compile", *arguments]
    log, progress = environment / "install.log", Progress(environment)
    with (
        log.open("w") as whole,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):

        def listen() -> None:
            for line in process.stdout or ():
                whole.write(line)
                progress.hear(line.rstrip())

        listener = Thread(target=listen)
        listener.start()
        while listener.is_alive():
            listener.join(EVERY)
            if listener.is_alive():
                progress.sum_up()
        status = process.wait()
    if status:
        print(*progress.last, f"pip failed with status {status}; all that it said is in {log}", sep="\n")
        return status
    progress.say("compiling")  # on all cores, where pip takes one
    python = [command[0], "-W", "ignore"]
    subprocess.run(
        [*python, "-m", "compileall", "-qq", "-j", "0", *environment.glob("lib/python*")], check=False
    )
    progress.say("done")
    return 0


def main(folder: str, *arguments: str) -> int:
    """Make the environment `folder` where there is none, and let its pip install the rest."""
    environment = Path(folder)
    if lacking := shortcoming(environment):
        print(lacking)
        return 1
    python = "Python {}.{}.{}".format(*sys.version_info)
    most = f"{DOWNLOADED / GB} GB"
    print(f"installing into {folder} with {python}: takes minutes, fetches up to {most}", flush=True)
    made = environment / "bin" / "python"
    if not made.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        upgrade = [str(made), "-m", "pip", "install", "--quiet", "--upgrade", "pip"]
        subprocess.run(upgrade, check=True, stderr=subprocess.DEVNULL)
    return pip(environment, list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
