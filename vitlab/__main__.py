"""The command line: `vitlab run 1_train --study demo`, or `python -m vitlab run 1_train --study demo`.

What a command needs is imported when it runs, so that help and errors do not wait for torch.

Public: command_line, main.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from vitlab import files

_LAB = Path(__file__).with_name("lab")  # where a wheel has the notebooks, see setup.py


def main(arguments=None):
    """Call a command, and return its exit status.

    arguments: list of str, such as ["run", "1_train"]. None: those of this process, which then
        unwinds on SIGTERM, so that no kernel stays behind.
    """
    if arguments is None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        arguments = sys.argv[1:]
    parser = command_line()
    with contextlib.suppress(ImportError):  # completion in the shell, see docs/package.md
        import argcomplete

        argcomplete.autocomplete(parser)
    arguments = [str(word) for word in arguments]
    options = parser.parse_args(arguments)
    return options.call(options, arguments)


def command_line():
    """Return the parser of the command line, whose arguments know what the shell may complete."""
    parser = argparse.ArgumentParser(
        "vitlab", description="What pruning does to a Vision Transformer.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"vitlab {files.version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(call, about, **options):
        name = call.__name__.strip("_")
        # Without abbreviations, as --mod could come to mean another option.
        made = commands.add_parser(
            name, help=about, description=f"{about}.", allow_abbrev=False, **options
        )
        made.set_defaults(call=call)
        return made.add_argument

    add = command(
        _init, "make a folder with the notebooks, studies and slides of an installed vitlab"
    )
    add("folder", help="where to make it; its notebooks/ and slides/ may not be there yet")

    add = command(
        _run,
        "execute notebooks without a screen",
        epilog=_known(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    each = add("notebook", nargs="+", help="number, name or path, such as 3 or 3_global_pruning")
    each.completer = _completer(lambda: _names("*.ipynb"), ".ipynb")
    study = add("--study", help="name in notebooks/params, or path of your own .yaml file (demo)")
    study.completer = _completer(lambda: _names("params/*.yaml"), ".yaml", ".yml")
    add("--model", help="a name in the study's `models` (the first)").completer = _models
    add("--seed", type=int, help="of initial weights, order and draws, from 0 (0)")
    add(
        "--set",
        action="append",
        metavar="SECTION.VALUE=…",
        dest="override",
        help="another value of the study, such as train.epochs=2; may be given again",
    )
    add(
        "-p",
        action="append",
        default=[],
        metavar="NAME=…",
        dest="parameters",
        help="another parameter of the notebook's first cell, such as retrain=true",
    )
    add("--out", help="where the executed copy goes (the folder of the run)")
    add("--processes", type=int, default=1, help="how many train together, by torchrun (1)")
    add(
        "--log",
        nargs="?",
        const="tensorboard",
        metavar="NAME",
        help="log trainings to tensorboard (without a name), wandb, mlflow, or another of accelerate",
    )

    add = command(_results, "print the results of all runs as one CSV table")
    add("study", nargs="?", help="of this study alone").completer = study.completer
    add(
        "--compare",
        action="store_true",
        help="set them beside the published figures/STUDY/results.csv instead",
    )
    add(
        "--short",
        action="store_true",
        help="of figures/STUDY/summary.csv instead, as a table for each model and a sentence",
    )

    add = command(_export, "write a checkpoint for ONNX or OpenVINO, checked against torch")
    folder = add("checkpoint", help="its folder, such as data/runs/demo/vit/seed0/budget-pool-0.5")
    folder.completer = _completer(_checkpoints)
    add(
        "file",
        nargs="?",
        default="model.onnx",
        help="NAME.onnx, or NAME.xml for OpenVINO (%(default)s)",
    )
    add("--int8", action="store_true", help="quantise it, calibrated by training images")
    add("--images", metavar="NAME", help="dataset or folder to check it on (those of its study)")

    add = command(_slides, "make slides.pptx and slides.html of a study, from figures/STUDY")
    add("study", help="its name, or path of its .yaml file").completer = study.completer
    add("--out", help="the folder to write to (figures/STUDY/slides)")
    add("--long", action="store_true", help="with an appendix: all tables and pictures")
    add("--only", type=_numbers, help="numbers of the slides to write, such as 3,9")
    add("--template", help="a .potx or .pptx whose master and layout are taken")
    return parser


def _numbers(text):
    """Return the ints of "3,9", for --only."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"takes numbers of slides, such as 3,9, got {text!r}")
    return [int(number) for number in text.split(",")]


def _names(pattern):
    """Return the names of what a pattern finds in the folder of the notebooks."""
    return sorted(path.stem for path in (files.repository() / "notebooks").glob(pattern))


def _completer(names, *endings):
    """Return what argcomplete calls for a word: the names that begin like it, else folders and files.

    names: function that returns them. endings: of the files.
    """

    def complete(prefix, **_):
        from argcomplete.completers import FilesCompleter

        known = [name for name in names() if name.startswith(prefix)]
        return known or FilesCompleter(endings)(prefix)

    return complete


def _checkpoints():
    records = (files.root() / "runs").glob("*/*/seed*/*/model.json")
    return sorted(os.path.relpath(record.parent) for record in records)


def _models(parsed_args, **_):
    from vitlab.studies import settings

    return settings.study(parsed_args.study or "demo").models


def _known():
    """Return which notebooks and studies there are, for the help of `run`."""
    folder = files.repository() / "notebooks"
    lines = ["notebooks:"]
    for path in sorted(folder.glob("*.ipynb")):
        title = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        lines.append(f"  {path.stem:17} {title.splitlines()[0].lstrip('# ')}")
    if not (studies := _names("params/*.yaml")):
        return "Here are no notebooks: `vitlab init DIR` makes a folder that has them."
    return "\n".join([*lines, "", f"studies: {', '.join(studies)}"])


def _refuse(command, words, status=2):
    """Print what is wrong, and return the exit status."""
    print(f"vitlab {command}: {words}", file=sys.stderr)
    return status


def _init(options, arguments):
    folder = Path(options.folder).expanduser()
    if not _LAB.is_dir():
        words = f"this vitlab runs from {files.repository()}, which has its notebooks: work there"
        return _refuse("init", words)
    parts = [path.name for path in _LAB.iterdir()]
    if there := [name for name in parts if (folder / name).exists()]:
        return _refuse("init", f"{folder} has {' and '.join(there)} already: name another folder")
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(_LAB, folder, ignore=compiled, dirs_exist_ok=True)
    print(
        f"{folder} has the notebooks, slides, and studies in notebooks/params. Images and results will go "
        f"to {folder}/data (or to VITLAB_DATA). Next:\n"
        f"  cd {folder}\n  vitlab run 0 --study demo    # or: jupyter lab notebooks"
    )
    return 0


def _run(options, arguments):
    from vitlab.studies import notebooks

    return notebooks.run(options, arguments)


def _results(options, arguments):
    for option in ("compare", "short"):
        if getattr(options, option) and not options.study:
            return _refuse("results", f"--{option} needs a study")
    if options.short:
        return _short(options.study)
    from vitlab.studies import results

    return results.show(options.study, compare=options.compare)


def _short(study):
    import pandas as pd

    from vitlab.report import tables
    from vitlab.studies import settings

    try:
        path = files.repository() / "figures" / settings.study(study).name / "summary.csv"
    except (TypeError, ValueError) as error:
        return _refuse("results", error, 1)
    if not path.is_file():
        return _refuse(
            "results", f"there is no {path}: notebook 7 writes it, once there are cuts", 1
        )
    print(tables.in_short(pd.read_csv(path)))
    return 0


def _export(options, arguments):
    folder = Path(options.checkpoint)
    if not (folder / "model.json").is_file():
        return _refuse("export", f"{folder.absolute()} is no checkpoint: it has no model.json")
    from vitlab.evaluation import deploy

    try:
        images = _images_of(folder, options.images)
        lines = deploy.write(folder, options.file, images=images, int8=options.int8)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as reason:
        return _refuse("export", reason, 1)
    path = Path(options.file)
    size = sum(path.with_suffix(each).stat().st_size for each in deploy.FILES[path.suffix])
    print(f"{path}: {size / 1e6:.1f} MB")
    print(*lines, sep="\n")
    return 0


def _images_of(folder, name):
    """Return the data.Dataset that a checkpoint's model is for, None where it is not here.

    name: of the dataset; None: what the record of the checkpoint, or of its dense model, says
    """
    from vitlab.evaluation import cost
    from vitlab.models import checkpoint
    from vitlab.training import data

    model = checkpoint.load(folder)
    said = {"split_seed": 0, "normalise": "train"}
    for each in (folder.parent / "dense", folder):
        with contextlib.suppress(OSError, ValueError):
            said |= checkpoint.read(each)["extra"].get("values", {}).get("data", {})
    if not name and not data.is_here(said.get("name", "")):
        return None
    return data.load(
        name or said["name"],
        image_size=cost.input_shape(model)[-1],
        split_seed=said["split_seed"],
        normalise=model.normalise or said["normalise"],
    )


def _slides(options, arguments):
    try:
        folder = files.notebooks().with_name("slides")
    except FileNotFoundError as error:
        return _refuse("slides", error)
    return subprocess.call([sys.executable, str(folder), *arguments[1:]])


if __name__ == "__main__":
    sys.exit(main())
