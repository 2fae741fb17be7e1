"""Checkpoints that older code wrote answer as they did: those of checkpoints/, and a small one of every kind of cut."""

import json
from pathlib import Path

import pytest
import torch

from vitlab.models import checkpoint

ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).parent / "kept"
LOGITS = json.loads((KEPT / "logits.json").read_text())  # {folder: logits of two images}


def images(size):
    """Return two images [2, 3, size, size] that follow from a formula, not from a seed."""
    x = torch.arange(2 * 3 * size * size, dtype=torch.float64)
    return (1.5 * torch.sin(x * x * 1e-3 + 0.1 * x)).reshape(2, 3, size, size).float()


@pytest.mark.parametrize("folder", LOGITS)
@torch.no_grad()
def test_a_checkpoint_of_older_code_answers_as_it_did(folder):
    model = checkpoint.load(ROOT / folder).eval()
    size = checkpoint.read(ROOT / folder)["recipe"]["image_size"]
    # Other processors round otherwise; another architecture or another weight moves logits by far more.
    torch.testing.assert_close(
        model(images(size)), torch.tensor(LOGITS[folder]), rtol=1e-3, atol=1e-3
    )


def test_every_committed_checkpoint_is_looked_at():
    committed = {
        path.parent
        for top in ("checkpoints", "tests/kept")
        for path in (ROOT / top).rglob("model.json")
    }
    assert {str(folder.relative_to(ROOT)) for folder in committed} == set(LOGITS)
    formats = {checkpoint.read(folder)["format"] for folder in committed}
    assert formats == {1, 3}


def test_masks_come_back():
    for name in ("vit", "swin"):
        masks = checkpoint.load_masks(KEPT / f"{name}-masked-fisher")
        weights = checkpoint.load(KEPT / f"{name}-masked-fisher").state_dict()
        assert masks and all((weights[key][~mask] == 0).all() for key, mask in masks.items())
