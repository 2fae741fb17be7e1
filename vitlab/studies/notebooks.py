"""Run a notebook without a screen.

`vitlab run 1_train --study demo --model vit --seed 0` checks names and types of all parameters
first. Then it executes a copy through papermill, with the interpreter that runs this.
It keeps that copy in the folder of the run, also when the notebook fails.
People, the Makefile and the Snakefile all come through this door.

Several notebooks (`vitlab run 3 4 5`) run one after the other in one kernel, which imports torch
once, and is emptied between them.

With --processes 2, or started by torchrun, several processes execute the notebook together and
train data-parallel.

Public: run.
"""

import ast
import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from vitlab import files, names, parallel
from vitlab.studies import runs, settings

_ONE_PROCESS = ("6_efficiency", "7_report")  # several processes would only disturb these


def _find_notebook(name):
    """Return the path of a notebook.

    name: its number ("3"), its name, or its path.
    Raises ValueError, with all known names, for an unknown one.
    """
    if str(name).endswith(".ipynb") and Path(name).is_file():
        return Path(name).resolve()
    folder = files.notebooks()
    known = sorted(path.stem for path in folder.glob("*.ipynb"))
    wanted = Path(name).name.removesuffix(".ipynb")
    matching = [stem for stem in known if wanted in (stem, stem.split("_")[0])]
    if len(matching) != 1:
        raise ValueError(names.unknown("notebook", name, known))
    return folder / f"{matching[0]}.ipynb"


def _parameters_of(path):
    """Return {name: default} of a notebook's cell of parameters.

    path: of the notebook.
    Raises ValueError if there is not exactly one such cell.
    Raises ValueError if it holds more than literals, which papermill would not compute again.
    """
    name = Path(path).name
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(
            f"{name} has {len(tagged)} cells tagged `parameters`; it needs exactly one"
        )
    defaults = {}
    for line in ast.parse("".join(tagged[0]["source"])).body:
        try:
            (target,) = line.targets
            defaults[target.id] = ast.literal_eval(line.value)
        except (AttributeError, ValueError) as error:
            words = f"{name}: a parameters cell holds literals only, not `{ast.unparse(line)}`"
            raise ValueError(words) from error
    return defaults


def _check(path, parameters):
    """Return all parameters of a notebook: the given ones, as literals, and the other defaults.

    In place of a default model that the study does not have stands the study's first one.
    Raises ValueError for an unknown parameter, study, model or overridden value.
    Raises TypeError for a value of another type than the notebook's.
    """
    defaults = _parameters_of(path)
    parameters = settings.as_lists(parameters)
    for name, value in parameters.items():
        if name in ("model", "seed") and name not in defaults:
            raise ValueError(f"{Path(path).name} is about the whole study and takes no {name}")
        names.check(f"parameter of {Path(path).name}:", name, defaults)
        if name != "override":  # settings.study checks what a study overrides
            settings.checked(name, defaults[name], value)
    values = {**defaults, **parameters}
    study = settings.study(values["study"], override=values["override"])
    if "model" in values:
        if "model" not in parameters and values["model"] not in study.models:
            values["model"] = next(iter(study.models))  # the notebook's own is the demo's
        names.check(f"model of study {study.name}:", values["model"], study.models)
    return values


def _execute(path, parameters, *, out=None, kernel=None):
    """Execute a copy of a notebook, and return the path of that copy.

    path: of the notebook.
    parameters: {name: value}; the others keep the notebook's values.
    kernel: what `_kernel` yields, to be used for more than this notebook; None starts one.
    out: where to keep the copy; by default in `notebooks/` in the folder of the run. It is there
        only when the notebook has run to its end. Before, it is called <name>.running.ipynb, and
        after an error <name>.failed.ipynb.
    Of several processes (see `parallel`) each executes its own copy. At the end those of all but
    the first are deleted.
    Raises ValueError and TypeError for wrong parameters, before anything starts.
    Raises RuntimeError if the same notebook of the same run is being executed already.
    Raises the notebook's error: papermill's PapermillExecutionError or nbclient's DeadKernelError.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    if kernel is None:
        with _kernel() as kernel:
            return _execute(path, parameters, out=out, kernel=kernel)
    values = _check(path, parameters)
    parameters = {name: values[name] for name in [*parameters, *({"model"} & values.keys())]}
    if str(values["study"]).endswith((".yaml", ".yml")):  # the kernel works in another folder
        parameters = {**parameters, "study": str(Path(values["study"]).absolute())}
    if out is None:
        seed = values.get("seed", 0)
        run = runs.open_run(values["study"], values.get("model"), seed, values["override"])
        out = run.path("notebooks") / Path(path).name
    out = Path(out).resolve()
    if not parallel.is_first():
        out = out.with_suffix(f".rank{parallel.rank()}.ipynb")
    running = out.with_suffix(".running.ipynb")
    failed = out.with_suffix(".failed.ipynb")
    files.make_folder(out.parent)
    lock = out.with_name(f".{out.stem}.lock")
    with files.lock(lock, f"{out.stem} of this run"):
        if kernel.has_kernel:
            _empty(kernel)
        try:
            papermill.execute_notebook(
                path,
                running,
                parameters,
                kernel_name="python3",
                language="python",
                km=kernel,
                progress_bar=False,
                stdout_file=sys.stdout if parallel.is_first() else None,
                stderr_file=sys.stderr,
                cwd=Path(path).parent,
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


@contextlib.contextmanager
def _kernel():
    """Yield the manager of a quiet kernel of this interpreter; others may start beside it.

    The first notebook starts the kernel, and at the end it is shut down.
    """
    from ipykernel.kernelspec import write_kernel_spec
    from jupyter_client import AsyncKernelManager
    from jupyter_core.utils import run_sync
    from traitlets.config import Config

    class Kernel(AsyncKernelManager):
        made = None  # the newest connection, which nbclient closes only with the kernel

        def client(self, **options):
            self.made = super().client(**options)
            return self.made

    with tempfile.TemporaryDirectory(prefix="nb", ignore_cleanup_errors=True) as folder:
        # A kernel spec in this folder comes before any that the user installed for another Python.
        # Level 50: jupyter_client ends a kernel with an interrupt, which the kernel may log as an
        # error.
        spec = Path(folder, "kernels", "python3")
        write_kernel_spec(spec, extra_arguments=["--log-level=50"])
        # Kernels find free TCP ports by trying, and race for them. Sockets in a folder of its own
        # spare each that, but not every system has them, nor for a long path.
        config = Config()
        if os.name == "posix" and len(folder) < 80:
            config.KernelManager = Config(transport="ipc", ip=f"{folder}/k")
        with mock.patch.dict(os.environ, _environment(folder)):
            kernel = Kernel(kernel_name="python3", config=config)
            try:
                yield kernel
            finally:
                if kernel.has_kernel:
                    kernel.made.stop_channels()
                    run_sync(kernel.shutdown_kernel)(now=True)


def _empty(kernel):
    """Forget the names of the notebook before in a kernel that goes on, and its connection."""
    from jupyter_core.utils import run_sync

    run_sync(kernel.made.execute_interactive)("%reset -f", silent=True)
    kernel.made.stop_channels()


def _environment(folder):
    """Return the environment variables of a kernel whose specification lies in a folder."""
    paths = [folder, os.environ.get("JUPYTER_PATH")]
    environment = {
        "JUPYTER_PATH": os.pathsep.join(filter(None, paths)),
        "JUPYTER_RUNTIME_DIR": folder,
        "VITLAB_HEADLESS": "1",
        # A relative data root is meant from here, not from the kernel's folder.
        "VITLAB_DATA": str(files.root()),
    }
    defaults = {
        "OMP_WAIT_POLICY": "PASSIVE",  # two notebooks on two cores
        # glibc gives the activations of each step back to the system and asks for them again.
        # On CPUs that is a part of each training step. These let it keep them.
        "MALLOC_TRIM_THRESHOLD_": str(10**9),
        "MALLOC_MMAP_THRESHOLD_": str(10**9),
        # Else these loggers of `--log` write where the notebooks lie.
        "WANDB_DIR": str(files.root() / "runs"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{files.root() / 'runs' / 'mlflow.db'}",
    }
    return defaults | os.environ | environment


def _parse_value(text):
    """Return (name, value) of "name=value", whose value is JSON, else text.

    Raises ValueError without `=`.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"expected name=value, got {text!r}")
    with contextlib.suppress(json.JSONDecodeError):
        value = json.loads(value)
    return name, value


def run(options, arguments):
    """Run a notebook as the command line says.

    options: what `vitlab run` knows, as the parser in vitlab/__main__.py gives it.
    arguments: list of str, the command line itself, for the processes that it may start.
    Returns the exit status: 0, 1 for a notebook that failed, 2 for wrong arguments.
    """
    try:
        if options.processes < 1:
            raise ValueError(f"--processes is at least 1, got {options.processes}")
        paths = [_find_notebook(notebook) for notebook in options.notebook]
        parameters = _parameters(options)
        if options.out and len(paths) > 1:
            raise ValueError(f"--out names the copy of one notebook, and here are {len(paths)}")
        for path in paths:
            _check(path, parameters)
            if max(options.processes, parallel.world_size()) > 1 and path.stem in _ONE_PROCESS:
                raise ValueError(
                    f"{path.stem} measures one process or writes figures: run it without "
                    "--processes"
                )
        _check_loggers(options.log or os.environ.get("VITLAB_LOG"))
    except (ValueError, TypeError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"vitlab run: {error}", file=sys.stderr)
        return 2
    if options.processes > 1 and "WORLD_SIZE" not in os.environ:
        return _together(options.processes, arguments)
    log = {"VITLAB_LOG": options.log} if options.log else {}
    with _kernel() as kernel:
        for path in paths:
            begun = time.perf_counter()
            name = " ".join(map(str, [path.stem, *parameters.values()]))
            files.log(f"{name}: running")
            try:
                with mock.patch.dict(os.environ, log):
                    out = _execute(path, parameters, out=options.out, kernel=kernel)
            except Exception as error:
                print(f"vitlab run: {name} failed. {_reason(error)}", file=sys.stderr)
                return 1
            files.log(f"{name}: done in {time.perf_counter() - begun:.0f} s, {out}")
    return 0


def _parameters(options):
    """Return the parameters of the notebook that stand on the command line."""
    parameters = {"study": options.study, "model": options.model, "seed": options.seed}
    parameters = {name: value for name, value in parameters.items() if value is not None}
    parameters |= dict(map(_parse_value, options.parameters))
    if options.override:
        parameters["override"] = dict(map(_parse_value, options.override))
    return parameters


def _check_loggers(asked):
    """Raise in words, before anything starts, where a logger that train.fit is to log to is not here.

    asked: their names with commas between, as --log has them, or None.
    """
    for name in asked.split(",") if asked else []:
        name = "tensorboard" if name in ("", "1") else name  # as train.fit reads them
        names.check("logger", name, settings.LOGGERS)
        # A folder that a logger has left here is no module: it has no origin.
        if getattr(importlib.util.find_spec(name), "origin", None) is None:
            raise ModuleNotFoundError(f"{name} is missing: pip install {name}", name=name)


def _together(processes, arguments):
    """Run this command line in several processes of this machine, which share its cores."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={processes}", "-m", "vitlab"]
    process = subprocess.Popen([*torchrun, *map(str, arguments)], env=environment)
    try:
        return process.wait()
    except BaseException:
        process.terminate()  # torchrun ends its processes, which end their kernels
        process.wait()
        raise


def _reason(error):
    """Return what went wrong in which line; the executed copy has the whole traceback."""
    reason = f"{type(error).__name__}: {error}"
    if hasattr(error, "ename"):
        lines = error.source.splitlines() or [""]
        # IPython writes "Cell In[5], line 3" above each of its frames, between escapes for colours.
        traceback = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback))
        found = re.search(rf"\bIn\s?\[{error.exec_count}\], line (\d+)", traceback)
        number = int(found[1]) if found else 1
        cell = f"Cell [{error.exec_count}], line {number}, `{lines[number - 1].strip()}`"
        reason = f"{cell} raised\n  {error.ename}: {error.evalue}"
    return "\n  ".join([reason, *getattr(error, "__notes__", [])])
