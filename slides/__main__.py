"""Make the slides of a study: `python slides STUDY` writes slides.pptx and slides.html from figures/STUDY."""

import re
import sys
from pathlib import Path
from zipfile import BadZipFile

import deck

from vitlab import files
from vitlab.__main__ import command_line


def main(arguments=None):
    """Write the slides of the study that the command line names; return the exit status, 0 or 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = command_line().parse_args(["slides", *arguments])
    name = re.sub(r"\.ya?ml$", "", Path(options.study).name)
    try:
        deck.write(
            files.repository() / "figures" / name,
            options.out,
            long=options.long,
            only=options.only,
            template=options.template,
        )
    except BadZipFile:
        print(f"slides: {options.template} is no .potx or .pptx", file=sys.stderr)
        return 1
    except (FileNotFoundError, ValueError) as error:
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
