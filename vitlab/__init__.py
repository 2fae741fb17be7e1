"""vitlab: what pruning does to a Vision Transformer.

`from vitlab import budget, models` gives the modules that notebooks, the README and the pages of
docs/methods use, and `vitlab.budget` does after `import vitlab`. Each is executed at its first use.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

_PLACES = """
    models models.checkpoint models.hub
    studies.results studies.runs
    evaluation.bench evaluation.cost evaluation.evaluate evaluation.export evaluation.roofline
    pruning.budget pruning.compensate pruning.factor pruning.lowrank pruning.masks pruning.pool
    pruning.prune pruning.ranks pruning.recover pruning.scores pruning.sensitivity pruning.shrink
    training.data training.imitate training.train
    report.drawings report.inside report.plots report.tables
"""
_DOORS = {place.split(".")[-1]: f"vitlab.{place}" for place in _PLACES.split()}
__all__ = [*_DOORS]


def __getattr__(name):
    """Give a module of the list above."""
    if name == "__version__":
        return importlib.metadata.version("vitlab")
    if name in _DOORS:
        return _lazily(_DOORS[name])
    # Python asks here, too, before it imports a file such as vitlab/names.py.
    names = importlib.import_module("vitlab.names")
    raise AttributeError(names.unknown("module of vitlab", name, __all__))


def _lazily(name):
    """Return a module that is executed at its first use, by the standard library's LazyLoader.

    So torch, which takes seconds, is imported when it is needed: a mistyped study is told before.
    """
    if name not in sys.modules:
        parent, _, own = name.rpartition(".")
        above = _lazily(parent)
        folder = Path(__file__).parent.joinpath(*parent.split(".")[1:])
        spec = importlib.machinery.PathFinder.find_spec(name, [str(folder)])
        spec.loader = importlib.util.LazyLoader(spec.loader)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        setattr(above, own, module)  # as Python does where it imports a file
        spec.loader.exec_module(module)
    return sys.modules[name]


def __dir__():
    return [*__all__, "__version__"]
