"""The command line: `python -m vitlab run 1_train --study demo` and `python -m vitlab results`.

Each command imports its own module only, so that `run` starts without torch and matplotlib.
"""

import importlib
import signal
import sys

COMMANDS = {
    "run": ("vitlab.studies.notebooks", "execute a notebook without a screen"),
    "results": ("vitlab.studies.results", "print the results of all runs, or compare them"),
}


def main(arguments):
    """Call the command that the first argument names with the others; return its exit status."""
    name = arguments[0] if arguments else "--help"
    if name not in COMMANDS:
        print("usage: python -m vitlab COMMAND …, with --help for more\n")
        for command, (_, purpose) in COMMANDS.items():
            print(f"  {command:8} {purpose}")
        return 0 if name in ("-h", "--help") else 2
    module, _ = COMMANDS[name]
    return importlib.import_module(module).main(arguments[1:])


if __name__ == "__main__":
    # Unwind on SIGTERM, so that no kernel stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))
