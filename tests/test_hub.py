"""hub: what is pushed is a checkpoint with a card, and what is loaded is that model."""

import shutil

import pytest
import torch
from huggingface_hub import ModelCard

from vitlab.models import checkpoint, hub
from vitlab.pruning import shrink


def test_a_cut_model_comes_back_from_what_was_pushed(model, batch, tmp_path, monkeypatch):
    block = "blocks.0" if hasattr(model, "blocks") else "layers.0.blocks.0"
    small = shrink.remove(model, {(block, "heads"): [0]})
    small.class_names = ["cat", "dog", "cow"]
    checkpoint.save(small, tmp_path / "cut", extra={"method": "pool", "top1": 84.5, "log": [{}]})
    (tmp_path / "cut" / "notes.txt").write_text("not for others")
    made = []

    def upload_folder(api, repo_id, folder_path, allow_patterns):
        ignore = [path.name for path in folder_path.iterdir() if path.suffix == ".txt"]
        assert not any(path.endswith(".txt") for path in allow_patterns)
        shutil.copytree(folder_path, tmp_path / "hub", ignore=lambda *_: ignore)

    monkeypatch.setattr(hub.HfApi, "create_repo", lambda api, name, **how: made.append((name, how)))
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: tmp_path / "hub")
    address = hub.push(tmp_path / "cut", "me/cut", about="Cut to half.", license="mit")
    assert address.endswith("/me/cut") and made == [("me/cut", {"private": True, "exist_ok": True})]
    for name in ("me/cut", str(tmp_path / "hub")):
        assert torch.equal(hub.load(name)(batch[0]), small(batch[0]))
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "vitlab"
    for words in (
        "Cut to half.",
        "| top1 | 84.5 |",
        "| classes | cat, dog, cow |",
        "| cut | in 2 layers |",  # qkv and proj
    ):
        assert words in card.text
    assert "log" not in card.text
    assert "pip install vitlab" not in card.text, "no package index has it"


def test_what_is_no_checkpoint_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        hub.push(tmp_path, "me/cut")


def test_a_card_says_of_a_model_without_a_block_that_it_was_cut(vit, tmp_path):
    for name, model, cut in (
        ("dense", vit, "no"),
        ("small", shrink.remove(vit, {("blocks.0", "block"): [0]}), "yes"),
    ):
        checkpoint.save(model, tmp_path / name)
        assert f"| cut | {cut} |" in hub.card(tmp_path / name, name).text
