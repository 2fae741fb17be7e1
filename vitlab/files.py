"""Find the folders of the project, and write files whole or not at all.

Public: fingerprint, headless, how_to_run, lock, log, make_folder, notebooks, progress, repository,
root, version, warn_of_other_lab, write_atomic.
"""

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.auto import notebook_tqdm, std_tqdm, tqdm

from vitlab import parallel

_ELSEWHERE = "set VITLAB_DATA to a folder that can be written"
_ROOM = (
    "make room, or set VITLAB_DATA to a folder elsewhere, and run the same again; "
    "what was finished is kept"
)


def repository():
    """Return the folder of the lab, where notebooks, studies, figures and checkpoints lie.

    That is the clone that this package is imported from. A package that was installed without one
    works in the nearest lab of `vitlab init`, at or above the working folder, else in that folder.
    """
    return _clone() or _lab_here() or Path.cwd()


def _clone():
    """Return the folder of the clone that this package is imported from, or None."""
    folder = Path(__file__).parents[1]
    return folder if (folder / "pyproject.toml").exists() else None


def _lab_here():
    """Return the nearest folder with studies, at or above the working folder, or None."""
    here = Path.cwd()
    labs = (folder for folder in (here, *here.parents) if (folder / "notebooks/params").is_dir())
    return next(labs, None)


def notebooks():
    """Return the folder of the notebooks. Raises FileNotFoundError, with what to do, for none."""
    folder = repository() / "notebooks"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there are no notebooks in {folder.parent}: `vitlab init DIR` makes a folder that has "
            "them; run the same there"
        )
    return folder


def how_to_run(study):
    """Return the command for all notebooks of a study: make's, where the lab has a Makefile."""
    if (repository() / "Makefile").is_file():
        return f"make study STUDY={study}"
    return f"vitlab run 0 1 2 3 4 5 6 7 --study {study}"


def version():
    """Return the version of vitlab, "unknown" for a copied folder that nobody installed."""
    try:
        return importlib.metadata.version("vitlab")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def warn_of_other_lab():
    """Warn where the working folder lies in another clone or lab than the one that is written to."""
    clone, here = _clone(), _lab_here()
    if clone and here and here.resolve() != clone.resolve():
        warnings.warn(
            f"this vitlab belongs to {clone} and writes there, not to {here}, where you work: use "
            "that folder's own environment, or install it into this one (pip install -e .)",
            stacklevel=3,
        )


def root():
    """Return the data root: the environment's VITLAB_DATA, else the lab's folder `data`.

    Where there is no lab, that folder is made in the working folder, which is said once.
    """
    if chosen := os.environ.get("VITLAB_DATA"):
        return Path(chosen).expanduser().absolute()
    folder = repository() / "data"
    if not (repository() / "notebooks").is_dir():
        _say_where(folder)
    return folder


@functools.cache
def _say_where(folder):
    log(f"vitlab keeps images and results in {folder}; VITLAB_DATA names another folder")


def fingerprint(path):
    """Return a hash of a file's content, or of the names, sizes and times of a folder's files.

    What is hidden in the folder, at any depth, does not count.
    """
    if not os.path.isdir(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    found = []
    folders = [str(path)]
    while folders:
        for entry in os.scandir(folders.pop()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.path)
            else:
                stat = entry.stat()
                name = os.path.relpath(entry.path, path)
                found.append((name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def write_atomic(path, content, *, keep=None):
    """Write a file whole or not at all: under another name in its folder, which is then renamed.

    path: where to write; its folder is made if need be.
    content: text, bytes, or a function that is called with the path to write to.
    keep: a path to which the file that stood there before is moved; None replaces that file.
    Of several processes (see `parallel`) only the first writes.
    Raises PermissionError, with what to do, where the file cannot be written.
    Raises OSError, with what to do, where the disk is full.
    """
    path = Path(path)
    if not parallel.is_first():
        return
    make_folder(path.parent)
    part = path.with_name(f".{os.getpid()}-{path.name}")  # the same ending: savers look at it
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        if keep and path.exists():
            path.replace(keep)
        part.replace(path)
        _remove_abandoned(path)
    except PermissionError as error:
        raise PermissionError(f"cannot write {path} ({error.strerror}); {_ELSEWHERE}") from error
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        if _is_full(error, path.parent):
            words = f"the disk of {path.parent} is full: {_ROOM}"
            raise OSError(errno.ENOSPC, words) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _remove_abandoned(path):
    """Remove the unfinished parts of a file that killed processes left an hour ago or earlier."""
    for part in path.parent.glob(f".*-{path.name}"):
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed its part
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()


def _is_full(error, folder):
    """Return whether an error comes from a full disk, a quota or a limit of file sizes."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return shutil.disk_usage(folder).free < 1_000_000  # some libraries do not say so


@contextlib.contextmanager
def lock(lock, what):
    """Hold a lock file, which the system frees whatever happens to this process.

    lock: path of the lock file. The file itself stays and blocks nobody.
    what: str, the work that is done meanwhile, in words.
    Raises RuntimeError if another process holds the lock.
    """
    try:
        held = FileLock(lock).acquire(blocking=False)
    except Timeout:
        words = f"{what} is under way in another process: wait for it, or stop it"
        raise RuntimeError(words) from None
    with held:
        yield


def make_folder(folder):
    """Make a folder with its parents, and try whether files can be written there.

    Raises PermissionError, with what to do, where they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permissions do not tell on every file system
            pass
    except OSError as error:
        raise PermissionError(
            f"cannot write to {folder} ({error.strerror}); {_ELSEWHERE}"
        ) from error


def headless():
    """Return whether nobody watches a progress bar.

    `vitlab run` sets VITLAB_HEADLESS to say so.
    """
    return os.environ.get("VITLAB_HEADLESS", "0") not in ("", "0")


def progress(items, title, *, delay=2, **options):
    """Return items with a bar, which goes when they end.

    Bars are for terminals and notebooks: what is piped or kept in a file has none, and
    VITLAB_HEADLESS=1 switches all of them off.

    items: what is gone through.
    title: str, what is done meanwhile.
    delay: seconds before the bar is shown, so that short work has none.
    options: of tqdm.
    Of several processes only the first has bars.
    """
    in_notebook = notebook_tqdm is not std_tqdm
    is_seen = (in_notebook or sys.stderr.isatty()) and not headless()
    hidden = not (is_seen and parallel.is_first())
    return tqdm(items, desc=title, delay=delay, leave=False, disable=hidden, **options)


def log(text):
    """Print one line at once, without breaking a progress bar.

    Of several processes only the first prints.
    """
    if not parallel.is_first():
        return
    tqdm.write(str(text))
    sys.stdout.flush()
