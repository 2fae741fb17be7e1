"""Say which names are known, and which one was perhaps meant.

Public: check, known, nearest, unknown.
"""

import difflib
import textwrap


def nearest(name, names):
    """Return ", did you mean 'x'?" for the nearest of some names, or "." where none is near."""
    close = difflib.get_close_matches(str(name), map(str, names), n=1)
    return f", did you mean {close[0]!r}?" if close else "."


def unknown(kind, name, names):
    """Return the words of an error about a name that is not known.

    kind: what the name is of, such as "study".
    name: the name that is not known.
    names: the names that are.
    Returns a sentence with the nearest known name, if one is near, and the known names.
    """
    names = [str(option) for option in names]
    listed = textwrap.shorten(", ".join(names), 400, placeholder=" …")
    return f"unknown {kind} {name!r}{nearest(name, names)} Known are {listed}."


def check(kind, name, names):
    """Raise ValueError, with the nearest known name, for a name that is not known."""
    if name not in names:
        raise ValueError(unknown(kind, name, names))


def known(chosen, names, kind):
    """Return names as a list, checked.

    chosen: an iterable of names, or a single one.
    names: the names that are known.
    kind: what a name is of, for the error.
    Raises ValueError, with the nearest known name, for one that is not known.
    """
    chosen = [chosen] if isinstance(chosen, str) else list(chosen)
    for name in chosen:
        check(kind, name, names)
    return chosen
