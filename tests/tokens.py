"""Count the code of the package: `python tests/tokens.py` prints tokens, lines and public names of each file.

Comments, docstrings and layout are not counted. A code line is one on which a token begins.
A public name has no underscore, and neither has the file in which it stands (PEP 8).
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstring_places(tree):
    """Return (line, column) of every docstring in a syntax tree."""
    places = set()
    for node in ast.walk(tree):
        if isinstance(node, WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            places.add((node.body[0].lineno, node.body[0].col_offset))
    return places


def public_names(tree):
    """Return the names that a module defines at its top level without a leading underscore."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        if isinstance(node, ast.Assign):
            targets = [target for part in node.targets for target in ast.walk(part)]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def count(source):
    """Return (tokens, code lines, public names) of a module's source, each as a number."""
    tree = ast.parse(source)
    docstrings = docstring_places(tree)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = [token for token in tokens if token.type not in LAYOUT and token.start not in docstrings]
    return len(code), len({token.start[0] for token in code}), len(public_names(tree))


def main():
    """Print one line a file and one for the whole package."""
    package = Path(__file__).parents[1] / "vitlab"
    total = [0, 0, 0]
    print(f"{'tokens':>8} {'lines':>6} {'a line':>6} {'public':>6}")
    for path in sorted(package.rglob("*.py")):
        counts = count(path.read_text())
        if path.name.startswith("_"):
            counts = (*counts[:2], 0)
        total = [before + more for before, more in zip(total, counts, strict=True)]
        show(counts, path.relative_to(package.parent))
    show(total, "all")


def show(counts, name):
    """Print the counts of one file."""
    tokens, lines, public = counts
    print(f"{tokens:8,} {lines:6,} {tokens / max(1, lines):6.1f} {public:6} {name}")


if __name__ == "__main__":
    sys.exit(main())
