"""The command line: `python -m vitlab run 1_train --study demo` and `python -m vitlab results`.

Each command imports its own module only, so that `run` starts without torch and matplotlib.

Public: main.
"""

import importlib
import signal
import sys

_COMMANDS = {"run": "vitlab.studies.notebooks", "results": "vitlab.studies.results"}
_USAGE = """usage: python -m vitlab COMMAND …, with --help for more

  run      execute a notebook without a screen
  results  print the results of all runs, or compare those of a study with the published ones"""


def main(arguments):
    """Call the command that the first argument names with the others, and return its exit status."""
    name, *rest = arguments or ["--help"]
    if name not in _COMMANDS:
        print(_USAGE)
        return 0 if name == "--help" else 2
    return importlib.import_module(_COMMANDS[name]).main(rest)


if __name__ == "__main__":
    # Unwind on SIGTERM, so that no kernel stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))
