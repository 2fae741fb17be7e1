"""Run a notebook without a screen: `python -m vitlab.run 1_train --study demo --model vit --seed 0`.

Checks names and types of all parameters first, then executes a copy through papermill, with the interpreter
that runs this, and keeps that copy in the folder of the run, also when it fails. People, the Makefile and the
Snakefile all come through this door. With --processes 2, or started by torchrun, several processes execute it
together and train data-parallel; from a notebook, `run.main(["1_train", "--processes", "2", …])` does the same.
"""

import argparse
import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vitlab import parallel, record

ALONE = ("6_efficiency", "7_report")  # which several processes would only disturb


def find_notebook(name):
    """Path of a notebook given by number ("3"), name or path. Raises ValueError for an unknown one."""
    if str(name).endswith(".ipynb") and Path(name).is_file():
        return Path(name).resolve()
    folder = record.repository() / "notebooks"
    known = sorted(path.stem for path in folder.glob("*.ipynb"))
    wanted = Path(name).name.removesuffix(".ipynb")
    found = [stem for stem in known if stem == wanted or stem.split("_")[0] == wanted]
    if len(found) != 1:
        raise ValueError(record.unknown("notebook", name, known))
    return folder / f"{found[0]}.ipynb"


def parameters_of(path):
    """{name: default} of a notebook's parameters cell.

    Raises ValueError if there is not exactly one such cell or if it holds more than literals, which papermill
    would not compute again.
    """
    cells = json.loads(Path(path).read_text())["cells"]
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{Path(path).name} has {len(tagged)} cells tagged `parameters`; it needs exactly one")
    defaults = {}
    for line in ast.parse("".join(tagged[0]["source"])).body:
        try:
            (target,) = line.targets
            defaults[target.id] = ast.literal_eval(line.value)
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"{Path(path).name}: a parameters cell holds literals only, not `{ast.unparse(line)}`"
            ) from error
    return defaults


def check(path, given):
    """given with every parameter known to the notebook, of its type, and fit to open a run.

    Raises ValueError for an unknown parameter, study, model or overridden value, TypeError for a type.
    """
    defaults = parameters_of(path)
    for name, value in given.items():
        if name not in defaults:
            raise ValueError(record.unknown(f"parameter of {Path(path).name}:", name, defaults))
        if name == "override":
            continue  # a dict of any names, which record.study looks at
        record.checked(name, defaults[name], value)
    values = {**defaults, **given}
    if "study" in values:
        study = record.study(values["study"], override=values.get("override"))
        if "model" in values and values["model"] not in study.models:
            raise ValueError(record.unknown(f"model of study {study.name}:", values["model"], study.models))
    return values


def execute(path, given, *, out=None, log=False):
    """Execute a copy of the notebook at path with the parameters given, and return the path of that copy.

    out: where to keep it; by default `notebooks/` in the folder of the run. It is there only when the
    notebook has run to its end: before, it is called <name>.running.ipynb, and after an error, which is then
    raised (papermill's PapermillExecutionError or nbclient's DeadKernelError), <name>.failed.ipynb.
    log: whether trainings write TensorBoard files.
    Of several processes (see `parallel`) each executes its own copy, and those of all but the first are deleted at
    the end. Raises what `check` raises, RuntimeError if the same notebook of the same run is being executed already.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    values = check(path, given)
    if str(values.get("study", "")).endswith((".yaml", ".yml")):  # the kernel has another working folder
        given = {**given, "study": str(Path(values["study"]).resolve())}
    out = Path(out).resolve() if out else _folder(values) / "notebooks" / Path(path).name
    if not parallel.is_first():
        out = out.with_suffix(f".rank{parallel.rank()}.ipynb")
    running, failed = (out.with_suffix(f".{state}.ipynb") for state in ("running", "failed"))
    record.make_folder(out.parent)
    lock, what = out.with_name(f".{out.stem}.lock"), f"{out.stem} of this run"
    with record.alone(lock, what), _kernel(log) as options:
        try:
            papermill.execute_notebook(
                *(path, running, given),
                kernel_name="python3",
                language="python",
                progress_bar=False,
                stdout_file=sys.stdout if parallel.is_first() else None,
                stderr_file=sys.stderr,
                cwd=Path(path).parent,
                **options,
            )
        except BaseException as error:
            if running.exists():
                running.replace(failed)
                error.add_note(f"The executed copy, up to there: {failed}")
            if isinstance(error, DeadKernelError):
                error.add_note("A kernel that dies has most often found no memory left.")
            raise
    failed.unlink(missing_ok=True)
    if parallel.is_first():
        running.replace(out)
    else:
        running.unlink()
    return out


def _folder(values):
    if "study" not in values:
        raise ValueError("the notebook has no parameter `study`, so say where its copy goes: --out PATH")
    model, seed, override = values.get("model"), values.get("seed", 0), values.get("override")
    return record.open_run(values["study"], model, seed, override).folder


@contextlib.contextmanager
def _kernel(log):
    """Options of papermill for a quiet kernel of this very interpreter, beside which others may start.

    Kernels find free TCP ports by trying and race for them, so each gets sockets in a folder of its own;
    where the system has none, or the path is too long for one, it stays at TCP. A kernel spec in the same
    folder comes before any that the user has installed for another Python.
    """
    from traitlets.config import Config

    with tempfile.TemporaryDirectory(prefix="nb", ignore_cleanup_errors=True) as folder:
        spec = Path(folder, "kernels", "python3", "kernel.json")
        spec.parent.mkdir(parents=True)
        # Level 50: jupyter_client ends a kernel with an interrupt, which the kernel now and then logs as an error.
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=50"]
        spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
        paths = [folder, *filter(None, [os.environ.get("JUPYTER_PATH")])]
        environment = {
            "JUPYTER_PATH": os.pathsep.join(paths),
            "JUPYTER_RUNTIME_DIR": folder,
            "VITLAB_HEADLESS": "1",
            "VITLAB_DATA": str(record.root()),  # a relative one is meant from here, not from the kernel's folder
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),  # two notebooks on two cores
            # glibc gives the activations of each step back to the system and asks for them again, a part of each
            # training step on CPUs; these let it keep them.
            "MALLOC_TRIM_THRESHOLD_": os.environ.get("MALLOC_TRIM_THRESHOLD_", str(10**9)),
            "MALLOC_MMAP_THRESHOLD_": os.environ.get("MALLOC_MMAP_THRESHOLD_", str(10**9)),
        }
        environment |= {"VITLAB_LOG": "1"} if log else {}
        sockets = os.name == "posix" and len(folder) < 80
        manager = {"transport": "ipc", "ip": f"{folder}/k"} if sockets else {}
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            yield {"config": Config({"KernelManager": manager})}
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def parse_value(text):
    """(name, value) of "name=value"; the value is JSON, else text. Raises ValueError without `=`."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"expected name=value, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main(arguments=None):
    """The command line. Returns its exit status: 0, 1 for a notebook that failed, 2 for wrong arguments."""
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("python -m vitlab.run", description=about, allow_abbrev=False)
    parser.add_argument("notebook", help="number, name or path, such as 3 or 3_global_pruning")
    parser.add_argument("--study", help="name in notebooks/params, or path of your own .yaml file")
    parser.add_argument("--model", help="a name in the study's `models`")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.VALUE=…", dest="override")
    parser.add_argument("-p", action="append", default=[], metavar="NAME=…", dest="parameters")
    parser.add_argument("--out", help="where the executed copy goes (default: the folder of the run)")
    parser.add_argument("--processes", type=int, default=1, help="how many train together, by torchrun (%(default)s)")
    parser.add_argument("--log", action="store_true", help="write TensorBoard files of trainings into the run's folder")
    asked = parser.parse_args(arguments)
    if asked.processes != 1 and "WORLD_SIZE" not in os.environ:
        return _together(asked.processes, sys.argv[1:] if arguments is None else arguments)
    begun = time.perf_counter()
    try:
        path = find_notebook(asked.notebook)
        given = {name: getattr(asked, name) for name in ("study", "model", "seed")}
        given = {name: value for name, value in given.items() if value is not None}
        given |= dict(map(parse_value, asked.parameters))
        if asked.override:
            given["override"] = dict(map(parse_value, asked.override))
        check(path, given)
        if parallel.count() > 1 and path.stem in ALONE:
            raise ValueError(f"{path.stem} measures one process or writes figures: run it without --processes")
    except (ValueError, TypeError) as error:
        print(f"vitlab.run: {error}", file=sys.stderr)
        return 2
    words = " ".join(str(given[name]) for name in ("study", "model", "seed") if name in given)
    record.say(f"{path.stem} {words}: running")
    try:
        out = execute(path, given, out=asked.out, log=asked.log)
    except Exception as error:
        print(f"vitlab.run: {path.stem} {words} failed. {_reason(error)}", file=sys.stderr)
        return 1
    record.say(f"{path.stem} {words}: done in {time.perf_counter() - begun:.0f} s, {out}")
    return 0


def _together(processes, arguments):
    """Run this command line in so many processes on this machine, each with its share of the cores."""
    if processes < 1:
        print(f"vitlab.run: --processes is at least 1, got {processes}", file=sys.stderr)
        return 2
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    own = subprocess.Popen(
        [*torchrun, "-m", "vitlab.run", *map(str, arguments)], env=os.environ | {"OMP_NUM_THREADS": threads}
    )
    try:
        return own.wait()
    except BaseException:
        own.terminate()  # torchrun ends its processes, which end their kernels
        own.wait()
        raise


def _reason(error):
    """What went wrong in which cell, for people; the executed copy has the whole traceback."""
    if hasattr(error, "ename"):
        first = next((line for line in error.source.splitlines() if line.strip()), "")
        reason = f"Cell [{error.exec_count}] `{first}` raised\n  {error.ename}: {error.evalue}"
    else:
        reason = f"{type(error).__name__}: {error}"
    return "\n  ".join([reason, *getattr(error, "__notes__", [])])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that no kernel stays behind
    sys.exit(main())
