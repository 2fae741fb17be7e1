"""vitlab: what pruning does to a Vision Transformer.

`from vitlab import budget, models` gives the modules that notebooks use; each is imported when it is asked for.
"""

import importlib

# The modules that the notebooks and the README use, by the folder that each lies in.
_DOORS = {
    "models": ("checkpoint",),
    "studies": ("results", "runs"),
    "evaluation": ("bench", "cost", "evaluate", "roofline"),
    "pruning": (
        "budget",
        "compensate",
        "factor",
        "masks",
        "pool",
        "prune",
        "ranks",
        "recover",
        "scores",
        "sensitivity",
        "shrink",
    ),
    "training": ("data", "train"),
    "report": ("drawings", "inside", "plots", "style", "tables"),
}
_FOLDERS = {module: folder for folder, modules in _DOORS.items() for module in modules}
__all__ = ["models", *_FOLDERS]


def __getattr__(name):
    """Import a module of the list above at its first use."""
    if name == "models":
        return importlib.import_module("vitlab.models")
    if name in _FOLDERS:
        return importlib.import_module(f"vitlab.{_FOLDERS[name]}.{name}")
    # Python asks here, too, before it imports a file such as vitlab/names.py.
    names = importlib.import_module("vitlab.names")
    raise AttributeError(names.unknown("module of vitlab", name, __all__))


def __dir__():
    return __all__
