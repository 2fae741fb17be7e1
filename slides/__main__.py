"""Make the slides of a study: `python slides STUDY` writes slides.pptx and slides.html from figures/STUDY."""

import argparse
import re
import sys
from pathlib import Path
from zipfile import BadZipFile

import deck

from vitlab import files


def main(arguments=None):
    """Write the slides of the study that the command line names; return the exit status, 0 or 1."""
    parser = argparse.ArgumentParser("python slides", description=__doc__)
    parser.add_argument("study", help="name of a study, or path of its .yaml file")
    parser.add_argument("--out", help="the folder to write to (default: figures/STUDY/slides)")
    parser.add_argument(
        "--long", action="store_true", help="with an appendix: all tables and pictures"
    )
    parser.add_argument("--only", help="numbers of the slides to write, such as 3,9")
    parser.add_argument("--template", help="a .potx or .pptx whose master and layout are taken")
    options = parser.parse_args(arguments)
    if options.only and not re.fullmatch(r"\d+(,\d+)*", options.only):
        parser.error(f"--only takes numbers of slides, such as 3,9, got {options.only!r}")
    name = re.sub(r"\.ya?ml$", "", Path(options.study).name)
    try:
        only = [int(number) for number in options.only.split(",")] if options.only else None
        deck.write(
            files.repository() / "figures" / name,
            options.out,
            long=options.long,
            only=only,
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
