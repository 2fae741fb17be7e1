"""Share checkpoints, cut ones too, on the Hugging Face Hub, each with a model card.

What is shared is the folder that checkpoint.save writes, so that loading needs nothing but it.

Public: card, load, push.
"""

from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download

from vitlab.models import checkpoint

_FILES = ["*.json", "*.safetensors", "README.md"]  # of a checkpoint's folder
_CARD = """---
{metadata}
---

# {title}

{about}

```python
{use}
```

| | |
|---|---|
{rows}
"""
_USE = """from vitlab import hub

model = hub.load("{title}")  # in eval mode; vitlab is installed from a clone of it"""


def card(folder, title, *, about="", license=None, use=None):
    """Return the huggingface_hub.ModelCard of a checkpoint.

    folder: as checkpoint.save wrote it; the card lists what its record says.
    title: str, the name on the Hub.
    about: str, in words: what it was trained on, by what it was cut, what it is good for.
    license: str, a word of the Hub's, such as "mit"; None leaves it out.
    use: str, the lines of Python that use it; None for those that load it from the Hub.
    Raises what checkpoint.read raises.
    """
    record = checkpoint.read(folder)
    said = {"architecture": record["recipe"]["name"], "image size": record["recipe"]["image_size"]}
    parts = {name: part for name, part in record["structure"].items() if name != "opened"}
    layers = len(parts.get("layers", ()))
    said |= {"cut": f"in {layers} layers" if layers else "yes" if any(parts.values()) else "no"}
    for name, value in record["extra"].items():
        # What runs keep of a training is no line of a table.
        if isinstance(value, str | int | float):
            said[name] = f"{value:.4g}" if isinstance(value, float) else value
    mean, std = record.get("normalise") or (None, None)
    said |= {"mean of images": mean, "deviation of images": std}
    if record.get("classes"):
        said["classes"] = ", ".join(map(str, record["classes"]))
    rows = [f"| {name} | {value} |" for name, value in said.items() if value is not None]
    metadata = ModelCardData(
        library_name="vitlab",
        license=license,
        pipeline_tag="image-classification",
        tags=["vitlab", "pruning", record["recipe"]["name"]],
    )
    use = use or _USE.format(title=title)
    text = _CARD.format(metadata=metadata, title=title, about=about, use=use, rows="\n".join(rows))
    return ModelCard(text)


def push(folder, name, *, about="", license=None, private=True):
    """Write a checkpoint's card into its folder, upload both, and return the address.

    folder, about, license: as for `card`.
    name: str, "USER/MODEL" on the Hub, which is made if it is not there. Who you are is said by
        `hf auth login` or by HF_TOKEN.
    private: bool, whether a new one is seen by you alone.
    Raises what checkpoint.read raises, before anything is uploaded.
    """
    card(folder, name, about=about, license=license).save(Path(folder) / "README.md")
    api = HfApi()
    api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=_FILES)
    return f"{api.endpoint}/{name}"


def load(name, *, device="cpu"):
    """Return a model from the Hub, in eval mode.

    name: str, "USER/MODEL"; or a folder, from which nothing is downloaded.
    device: a torch.device or its name.
    Raises what checkpoint.load raises, and huggingface_hub's errors for a name that is not there.
    """
    folder = name if Path(name).is_dir() else snapshot_download(name, allow_patterns=_FILES)
    return checkpoint.load(folder, device=device)
