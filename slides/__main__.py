"""Make the slides of a study: `python slides STUDY` writes slides.pptx and slides.html from figures/STUDY."""

import argparse
import re
import sys
from pathlib import Path

import deck

from vitlab import files


def main(arguments=None):
    """Write the slides of the study that the command line names; return the exit status, 0 or 1."""
    parser = argparse.ArgumentParser("python slides", description=__doc__)
    parser.add_argument("study", help="name of a study, or path of its .yaml file")
    parser.add_argument("--out", help="the folder to write to (default: figures/STUDY/slides)")
    options = parser.parse_args(arguments)
    name = re.sub(r"\.ya?ml$", "", Path(options.study).name)
    try:
        deck.write(files.repository() / "figures" / name, options.out)
    except FileNotFoundError as error:
        print(f"slides: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(
            f"slides: no slides.pptx, as {error.name} is missing: pip install python-pptx",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
