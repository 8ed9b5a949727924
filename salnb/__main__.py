"""The command line: `python -m salnb COMMAND`, also installed as `salnb`; each command has `--help`."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

from salnb._common import catalog
from salnb._common.devices import check_device_name
from salnb._common.files import write_atomic
from salnb._common.image_folder import check_out, find_images, photographs
from salnb._common.packages import require
from salnb._common.progress import log_line
from salnb.results import read_record
from salnb.study import grids
from salnb.study.plans import load_plan
from salnb.study.scale import PLANNED, load_scale
from salnb.timing import cases as timing_plan
from salnb.train.config import Config
from salnb.train.settings_file import read_settings

_MODEL = "a finished run, torchvision:NAME, timm:NAME or efficientnet_lite0 (default)"
_PATH = os.path.expanduser  # a shell leaves ~ as it is behind an = sign


class Command(NamedTuple):
    """One subcommand."""

    help: str  # a line on what it does
    arguments: Callable[[argparse.ArgumentParser], None]  # adds its options to a parser
    run: Callable[[argparse.Namespace], int]  # does it; gives the exit status
    stopped: str = "{stopped}"  # what is said when Ctrl-C, or what it stands for, stopped it


# how a setting of each type is written
_OPTIONS: dict[Any, dict[str, Any]] = {
    bool: {"action": "store_true"},
    int: {"type": int, "metavar": "N"},
    int | None: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    str: {"metavar": "NAME", "type": _PATH},
    str | None: {"metavar": "NAME", "type": _PATH},
    tuple[str, ...]: {"nargs": "+", "metavar": "NAME"},
}


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    types = get_type_hints(Config)
    for field in dataclasses.fields(Config):
        options, text, default = _OPTIONS[types[field.name]], field.metadata["help"], field.default
        if default is dataclasses.MISSING:
            options = options | {"required": True}
        else:
            options = options | {"default": argparse.SUPPRESS}  # a file may have it
            text += "" if default is False or default in (None, ()) else f" (default: {default})"
        parser.add_argument("--" + field.name.replace("_", "-"), help=text, **options)
    text = "settings by the names of these options, in YAML or as a run's config.json; options win"
    parser.add_argument("--config", metavar="FILE", help=text)
    text = "continue the run in the folder, if there is one"
    parser.add_argument("--resume", action="store_true", help=text)


def _train(args: argparse.Namespace) -> int:
    options = vars(args).copy()
    resume, file = options.pop("resume"), options.pop("config")
    try:
        config = Config(**(read_settings(file) | options if file else options))
    except TypeError as error:  # a value of another kind, which only a file can have
        raise ValueError(f"config {file}: {error}") from error
    config.check_run(resume=resume)
    # from here on torch is loaded, which takes seconds: all that can be told without it has been
    from salnb.train import fit
    from salnb.train.evaluate import agreement_text

    summary = fit(config, resume=resume)
    if os.environ.get("RANK", "0") == "0":  # one of the processes that torchrun started speaks for all
        augmentation = summary.get("test_agreement_augmentation")
        log_line(f"maps under {augmentation}: {agreement_text(summary)}")
        log_line(f"test accuracy {summary['test_accuracy']:.4f}, summary in {config.out}/summary.json")
    return 0


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTO", help="image files, or folders of them")
    add("--model", default="efficientnet_lite0", metavar="NAME", help=_MODEL)
    add("--out", type=_PATH, required=True, metavar="FOLDER", help="where maps and pictures go")
    add("--method", default="grad_cam", metavar="NAME", help="saliency method: " + ", ".join(catalog.METHODS))
    add("--target", metavar="CLASS", help="name or number of the class (default: the most probable)")
    add("--layer", metavar="NAME", help="of the network, for Grad-CAM (default: the last convolution)")
    add(
        "--reshape", metavar="NAME", help="of its output, for Grad-CAM of transformers: tokens, channels_last"
    )
    add("--all", action="store_true", help="a sheet of all methods as well")
    add("--augment", metavar="NAME", help="draw the pair of maps under an augmentation as well")
    add("--batch-size", type=int, default=16, metavar="N", help="photographs at once (default: 16)")
    add("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda, cuda:N or mps")


def _explain(args: argparse.Namespace) -> int:
    _check_device_and_batch(args)
    files = photographs(args.photos)
    if args.method not in catalog.METHODS:
        raise catalog.unknown("method", args.method, catalog.METHODS)
    single = [name for name, least in catalog.AUGMENTATIONS.items() if least == 1]
    if args.augment not in (None, *single):
        raise catalog.unknown("augment", args.augment, single)
    options = {name: value for name in ("layer", "reshape") if (value := getattr(args, name)) is not None}
    if options and not catalog.METHODS[args.method].layer and not args.all:
        raise ValueError(f"{', '.join(options)}: for the methods with Grad-CAM, got {args.method}")
    catalog.check_trained(args.model)
    check_out(args.out, files, args.all, args.augment)
    from salnb import explain, trained

    wrong = explain.explain(
        trained.load(args.model, args.device),
        files,
        args.out,
        method=args.method,
        method_options=options if catalog.METHODS[args.method].layer else {},
        target=args.target,
        every_method=args.all,
        augment=args.augment,
        batch_size=args.batch_size,
    )
    for line in wrong:
        log_line(f"salnb: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _check_device_and_batch(args: argparse.Namespace) -> None:
    check_device_name(args.device)
    if args.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {args.batch_size}")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a finished run")
    add("--data", metavar="NAME", help="data set, whose test images are taken (default: that of the run)")
    text = "for data folder: its test, or all of it where it has no splits"
    add("--data-dir", type=_PATH, metavar="DIR", help=text)
    add("--augmentation", metavar="NAME", help="under which maps are compared (default: that of the run)")
    add("--batch-size", type=int, default=32, metavar="N", help="images at once (default: 32)")
    add("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda, cuda:N or mps")


def _evaluate(args: argparse.Namespace) -> int:
    _check_device_and_batch(args)
    if not os.path.exists(os.path.join(args.run, "model.json")):
        raise ValueError(f"{args.run} is no finished run: it has no model.json")
    theirs = _settings_of(args.run)
    name = args.data or ("folder" if args.data_dir else theirs["data"])
    augmentation = args.augmentation or theirs["augmentation"]
    if name not in catalog.DATA:
        raise catalog.unknown("data", name, catalog.DATA)
    if augmentation not in catalog.AUGMENTATIONS:
        raise catalog.unknown("augmentation", augmentation, catalog.AUGMENTATIONS)
    root = args.data_dir or (theirs["data_dir"] if name == "folder" else None)
    if (root is not None) != (name == "folder"):
        raise ValueError(f"data_dir and data folder go together, got {root!r} with {name!r}")
    if root is not None:
        find_images(root)
    from salnb import trained

    log_line(
        trained.report(args.run, name, root, augmentation, device=args.device, batch_size=args.batch_size)
    )
    return 0


def _settings_of(run: str) -> dict[str, Any]:
    """What `salnb evaluate` asks of the settings that a run has kept."""
    try:
        theirs = read_record(os.path.join(run, "config.json"))
        return {name: theirs[name] for name in ("data", "data_dir", "augmentation")}
    except (OSError, ValueError, KeyError) as error:
        why = getattr(error, "strerror", None) or f"{error}"
        raise ValueError(f"{run} is no finished run: its config.json cannot be read ({why})") from error


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", type=_PATH, required=True, metavar="FILE", help="the figure: a PNG")


def _plot(args: argparse.Namespace) -> int:
    if not args.out.endswith(".png"):
        raise ValueError(f"out must be a file whose name ends in .png, got {args.out}")
    runs: dict[str, list[Any]] = {}
    for run in dict.fromkeys(args.runs):
        path, rows = os.path.join(run, "metrics.jsonl"), runs.setdefault(run.rstrip("/"), [])
        try:
            with open(path, encoding="utf-8") as lines:
                for line in lines:
                    rows.append(json.loads(line))
        except OSError as error:
            raise ValueError(f"{run} is no run with an epoch behind it ({error})") from error
        except ValueError as error:
            raise ValueError(f"{path} is damaged: its line {len(rows) + 1} is not JSON ({error})") from error
    plot = require("salnb.plot", "chapters", what="salnb plot")
    write_atomic(args.out, plot.png(plot.show_curves(runs)))
    return 0


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="data set: " + ", ".join(catalog.DATA))
    parser.add_argument("--size", type=int, default=None, help="of digit-scenes: 32 (default), 64, 96 or 224")


def _data(args: argparse.Namespace) -> int:
    if args.name not in catalog.DATA:
        raise catalog.unknown("data", args.name, catalog.DATA)
    if args.name == "folder":
        raise ValueError("data folder is one's own: there is nothing to fetch")
    size = 32 if args.size is None else args.size
    if catalog.DATA[args.name].sizes is None and args.size is not None:
        raise ValueError(f"size is for digit-scenes, got {size} with {args.name}")
    catalog.check_made_in(args.name, size)
    from salnb import data

    log_line(json.dumps(data.fetch(args.name, size), indent=2))
    return 0


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", help="study: " + ", ".join(grids.STUDIES))
    scales = "smoke, laptop, laptop-strong, gpu, colab, paper, a YAML file, or plan, which some studies have"
    add("--scale", default="smoke", help=scales)
    add("--out", type=_PATH, required=True, metavar="DIR", help="folder of the records and the runs")
    add("--on", default="here", help="here: one training after the other; ray: on a cluster")
    add("--address", default="local", help="of the Ray cluster: local, auto or ray://HOST:PORT")
    add("--share", type=float, default=1.0, help="of a GPU or core that a training gets on Ray")
    add("--device", help="of the runs, instead of the scale's")


def _study(args: argparse.Namespace) -> int:
    if args.on not in ("here", "ray"):
        raise catalog.unknown("on", args.on, ("here", "ray"))
    if not args.share > 0:
        raise ValueError(f"share must be positive, got {args.share}")
    try:
        scale = load_plan(args.name).own_scale() if args.scale == "plan" else load_scale(args.scale)
        if args.device:
            scale = scale.with_training(device=args.device)
        # all settings, before torch is loaded
        grids.trainings(args.name, scale, *grids.UNCHOSEN)
    except TypeError as error:  # of a value in the file, where YAML takes words for numbers or the like
        raise ValueError(str(error)) from error
    from salnb import statistics, study
    from salnb.study import verdicts

    execute = None
    if args.on == "ray":
        from salnb.study.on_ray import OnRay

        execute = OnRay(address=args.address, share=args.share)
    records = study.run(args.name, scale, args.out, execute=execute)
    factor, reference, metric = grids.REFERENCES[args.name]
    if agreement := verdicts.agreement_table(records, factor):
        log_line(f"{agreement}\n")
    if args.name in PLANNED:
        log_line(verdicts.markdown(verdicts.judge(load_plan(args.name), records)))
    else:
        log_line(statistics.markdown(statistics.compare(records, factor, reference, metric=metric)))
    failed = [record for record in records if record["status"] == "failed"]
    for record in failed:
        log_line(f"failed: {record['name']}: {record['error']}", file=sys.stderr)
    return 1 if failed else 0


def _time_arguments(parser: argparse.ArgumentParser) -> None:
    small = "on a CPU, elsewhere"
    add = parser.add_argument
    add("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda, cuda:N or mps")
    add("--budget", type=float, metavar="SECONDS", help=f"time for all rows (default: 55 {small} 570)")
    add("--batch", type=int, metavar="N", help=f"originals in a step (default: 2 {small} 32)")
    add("--size", type=int, metavar="N", help=f"height and width of the images (default: 64 {small} 224)")
    add("--iterations", type=int, metavar="N", help=f"of each row (default: 8 {small} 200); half count")
    add("--networks", nargs="+", metavar="NAME", help="only these: " + ", ".join(catalog.NETWORKS))
    add("--precisions", nargs="+", metavar="NAME", help="only these: " + ", ".join(timing_plan.PRECISIONS))
    add("--modes", nargs="+", metavar="NAME", help="only these: " + ", ".join(timing_plan.MODES))
    add("--out", type=_PATH, metavar="FILE", help="the record (default: results/timing-<device>.json)")
    add("--compare", nargs=2, metavar=("A", "B"), help="measure nothing: print two records side by side")


def _time(args: argparse.Namespace) -> int:
    options = vars(args).copy()
    compared, out = options.pop("compare"), options.pop("out")
    if compared:
        from salnb.timing import compare, read_timing

        log_line(compare(*(read_timing(path) for path in compared)))
        return 0
    settings = timing_plan.Settings(**options)
    if out is not None and (os.path.isdir(out) or not out.endswith(".json")):
        raise ValueError(f"out must be a file whose name ends in .json, got {out}")
    from salnb.timing import study

    study(settings, out, log=log_line)
    return 0


COMMANDS = {
    "train": Command("train a network with the paper's losses", _train_arguments, _train),
    "evaluate": Command("say how a finished run does on labelled images", _evaluate_arguments, _evaluate),
    "explain": Command("draw where a network looks in photographs", _explain_arguments, _explain),
    "study": Command(
        "make a grid of training runs: Tables 1 to 3, and open questions",
        _study_arguments,
        _study,
        "{name}: stopped; to go on, start the study again",
    ),
    "data": Command("fetch a data set ahead of time and check it", _data_arguments, _data),
    "plot": Command("draw the curves of several runs into one figure", _plot_arguments, _plot),
    "time": Command(
        "measure what a training step with the saliency loss costs",
        _time_arguments,
        _time,
        "stopped: the rows that were measured are in the file that ends in .partial",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit status.

    An error that this package explains is a line on stderr and the status 2; any other shows its traceback.
    """
    parser = argparse.ArgumentParser(prog="salnb", description=__doc__.split(";")[0].replace("`", ""))
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.arguments(subparsers.add_parser(name, help=command.help, description=command.help))
    args = parser.parse_args(arguments)
    command = COMMANDS[vars(args).pop("command")]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        return command.run(args)
    except KeyboardInterrupt as error:  # `Interrupted` is one
        stopped = str(error) or "salnb: stopped by Ctrl-C"
        log_line(command.stopped.format(stopped=stopped, **vars(args)), file=sys.stderr)
        return 128 + getattr(error, "signal", signal.SIGINT)
    except (ValueError, ArithmeticError, OSError, RuntimeError, ModuleNotFoundError) as error:
        if not _is_answer(error):
            raise
        log_line(f"salnb: error: {error}", file=sys.stderr)
        return 2
    finally:
        _give_up_output()


def _give_up_output() -> None:
    """Have what nobody reads any more, the other end of a pipe being closed, not spoil the exit status."""
    with contextlib.suppress(AttributeError, ValueError):  # there is none
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_answer(error: BaseException) -> bool:
    """Whether an error was raised by this package, which explains itself, and not by what it uses."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # the package: this module's name is __main__ where it is the one that was started
    package = None if trace is None else trace.tb_frame.f_globals.get("__package__")
    return str(package).split(".")[0] == "salnb"


if __name__ == "__main__":
    sys.exit(main())
