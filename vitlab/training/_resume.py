"""Save the state of a training, so that a killed one goes on to the same result.

Public: fingerprint, load_state, save_state.
"""

import functools
import hashlib
import json

import torch

from vitlab import files, parallel

_BEFORE = ".before.pt"  # ending of the state of the epoch before


def fingerprint(settings, model, masks, teacher):
    """Return a hash of all that the result depends on; a state file of another one is not used."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for tensors in (model.state_dict(), masks or {}, teacher.state_dict() if teacher else {}):
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().ravel().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_state(file, state):
    """Write the state of this epoch to file, and keep the one of the epoch before beside it."""
    if file is not None and parallel.is_first():
        files.write_atomic(
            file, functools.partial(torch.save, state), keep=file.with_suffix(_BEFORE)
        )


def load_state(file, key):
    """Return the newest whole state with this key, on the CPU, from file or the one beside it.

    Without one, the state has no history, and its best weights have an accuracy below all others.
    """
    for path in [file, file.with_suffix(_BEFORE)] if file else []:
        try:
            # not onto accelerate's device: among several CPU processes that is "cpu:0", which
            # torch.load refuses
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["key"] == key:
                return state
        except FileNotFoundError:
            continue
        except Exception as error:  # a damaged state costs the epoch in it, not the run
            files.log(
                f"{path.name} cannot be read ({type(error).__name__}); "
                "training goes on from before it"
            )
    return {"key": key, "history": [], "best": {"top1": -1.0}}
