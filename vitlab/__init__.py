"""vitlab: what pruning does to a Vision Transformer.

`from vitlab import budget, models` gives the modules that notebooks, the README and the pages of
docs/methods use, and `vitlab.budget` does after `import vitlab`. Each is imported at its first use.
"""

import importlib

_PLACES = """
    models models.checkpoint models.hub
    studies.results studies.runs
    evaluation.bench evaluation.cost evaluation.evaluate evaluation.export evaluation.roofline
    evaluation.runtimes
    pruning.budget pruning.compensate pruning.factor pruning.lowrank pruning.masks pruning.pool
    pruning.prune pruning.ranks pruning.recover pruning.scores pruning.sensitivity pruning.shrink
    training.data training.imitate training.train
    report.drawings report.inside report.plots report.tables
"""
_DOORS = {place.split(".")[-1]: f"vitlab.{place}" for place in _PLACES.split()}
__all__ = [*_DOORS]


def __getattr__(name):
    """Import a module of the list above at its first use."""
    if name == "__version__":
        return importlib.import_module("vitlab.files").version()
    if name in _DOORS:
        return importlib.import_module(_DOORS[name])
    # Python asks here, too, before it imports a file such as vitlab/names.py.
    names = importlib.import_module("vitlab.names")
    raise AttributeError(names.unknown("module of vitlab", name, __all__))


def __dir__():
    return [*__all__, "__version__"]
