"""Create models with the weights of local files, whoever named their tensors.

Public: create, expected.
"""

import json
import warnings
from pathlib import Path

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed

from vitlab import files
from vitlab.models import _fitting, _recipe, _structure, _weight_files, _weight_names, build


def create(
    name,
    *,
    num_classes,
    image_size=None,
    pretrained=False,
    weights=None,
    normalise=None,
    normalise_else=None,
    new_head=False,
    **options,
):
    """Create a ViT or Swin by name: any of timm's, or `conv_vit` and `conv_swin` of the studies.

    num_classes: size of the new head
    image_size: side in pixels; None: timm's own for the name. A Swin keeps its windows at another
        size and pads its grids to them. Give window_size=8, say, for 256 px where 7 is for 224; or
        call timm's model.set_input_size((256, 256)) afterwards, which scales windows with the grid.
    pretrained: take timm's weights, downloaded by timm
    weights: a local file (.safetensors, or another one opened with weights_only) or a folder of
        Hugging Face's or of `checkpoint.save`. Names may be timm's, torchvision's, Hugging Face's
        or an original release's, under any prefix. A checkpoint that was cut brings its options.
    normalise: any word of data.load, to train and measure on images normalised otherwise than the
        weights expect; None compares the images with what the weights expect
    normalise_else: the same, for weights whose file does not say what they expect
    new_head: start the head anew, even where that of the weights has as many classes
    options: timm's own arguments of the class (embed_dim, depth, patch_size, window_size,
        drop_path_rate, ...), and norm_eps for the epsilon of all LayerNorms
    Returns the model in train mode. `model.recipe` holds what is needed to build it again,
    `model.normalise` (mean, std) what its weights expect of the images, or None, and
    `model.class_names` what the weights say of a head that is kept. `model.is_head_new` says
    whether the head has learnt nothing yet.
    Raises ValueError for an unknown name, with the nearest known one, and for weights of another
    architecture, with what differs. So it does for files that hold no weights, and for options that
    the model cannot be built with.
    Raises FileNotFoundError for missing weights, and ConnectionError, with what to do, where timm's
    cannot be downloaded.
    """
    if not weights:
        model = build.create(
            name, num_classes=num_classes, image_size=image_size, pretrained=pretrained, **options
        )
        _warn_of_edge(model)
        model.normalise = build.moments(name) if pretrained and normalise is None else None
        model.is_head_new = not pretrained or num_classes != model.pretrained_cfg["num_classes"]
        if new_head and not model.is_head_new:
            _start_head_anew(model, num_classes)
        return model
    if pretrained:
        raise ValueError("give either pretrained=True (timm's weights) or weights=..., not both")
    path = Path(weights)
    model, reading, line = _of_file(name, num_classes, image_size, path, options, new_head)
    _warn_of_edge(model)
    _expect(model, expected(name, path, reading.whose), path, normalise, normalise_else)
    if reading.changes:
        warnings.warn(line, stacklevel=2)
    elif line:
        files.log(line)
    return model


def _of_file(name, num_classes, image_size, path, options, new_head):
    """Return the model of `create` with a file's weights, their Reading, and what is said of it."""
    record, config = _weight_files.described_beside(path)
    says = dict(config)
    if "layer_norm_eps" in config:  # no tensor tells it
        options = {"norm_eps": config["layer_norm_eps"]} | options
    if any(record.get("structure", {}).values()):
        model = _cut_again(path, record, name, image_size, options)
    else:
        model = build.create(name, num_classes=num_classes, image_size=image_size, **options)
        if record:
            says["num_attention_heads"] = _fitting.num_heads(
                _recipe.without_values(record["recipe"])
            )
    reading, facts = _fitting.fill(model, path, _weight_files.tensors(path, record), says)
    model.is_head_new = not reading.has_head
    if model.num_classes != num_classes or new_head and reading.has_head:
        _start_head_anew(model, num_classes)
        reading.changes.append(_fitting.said(_fitting.NEW_HEAD, num_classes))
    classes = _weight_files.class_names(record, config)
    if not model.is_head_new and len(classes) == num_classes:
        model.class_names = classes
    heads = _fitting.num_heads(model)
    if heads and not (record or "num_attention_heads" in config or "num_heads" in options):
        facts.append(f"num_heads={heads} is that of {name}: no tensor tells it")
    sentences = facts + reading.changes
    return model, reading, f"{path.name}: {'; '.join(sentences)}" if sentences else ""


def _start_head_anew(model, num_classes):
    model.reset_classifier(num_classes)
    model.recipe["num_classes"] = num_classes
    model.is_head_new = True


def _warn_of_edge(model):
    """Warn that a model does not see the last pixels of its images."""
    stem = model.patch_embed
    if isinstance(stem, PatchEmbed) and not stem.dynamic_img_pad and stem.img_size:
        size, patch = stem.img_size[0], stem.patch_size[0]
        if rest := size % patch:
            warnings.warn(
                f"image_size {size} is no multiple of the patch size {patch}: the last {rest} "
                "pixels of each row and column are not seen",
                stacklevel=3,
            )


def _expect(model, found, path, normalise, normalise_else):
    """Keep on a model what its weights expect of images, as `expected` has found it."""
    moments, is_guess = found
    if is_guess and normalise is None and normalise_else is not None:
        files.log(
            f"{path.name} does not say how its images were normalised: taken is {normalise_else}; "
            f"timm's weights of that name expect mean {moments[0]} and deviation {moments[1]}"
        )
        normalise = normalise_else
    model.normalise = moments if normalise is None else None
    model.normalise_is_guess = is_guess and normalise is None


def expected(name, weights, whose=None):
    """Return the (mean, std) of the images that local weights were trained on.

    name: str, of the model
    weights: a file or folder, as for `create`
    whose: whose names its tensors have; None reads that from the file
    Returns the moments, and whether they are a guess by the model's name. They are None where
    nobody knows.
    Raises what `create` raises for weights that cannot be read.
    """
    path = Path(weights)
    record, _ = _weight_files.described_beside(path)
    said = record.get("normalise")
    of_images = _weight_files.json_beside(path, "preprocessor_config.json")
    if not record and "image_mean" in of_images and "image_std" in of_images:
        said = of_images["image_mean"], of_images["image_std"]
    if not record and of_images.get("do_normalize") is False:
        said = (0.0,) * 3, (1.0,) * 3
    if said:
        return tuple(map(tuple, said)), False
    whose = whose or ", ".join(
        _weight_names.backbones(_weight_files.tensors(path, record)).values()
    )
    if "torchvision" in whose:  # all of its weights are ImageNet's
        return (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), False
    moments = build.moments(name)
    return moments, moments is not None


def _cut_again(path, record, name, image_size, options):
    """Return the model of a cut checkpoint without its values, at another image size if given.

    Raises ValueError for a name and options that contradict the record's recipe.
    """
    recipe = record["recipe"]
    stored = {"name": recipe["name"], **recipe["options"]}
    asked = json.loads(json.dumps({"name": name, **options}, default=str))
    # Rates of drop-out and of drop-path, and the size of patches, may be others.
    contradicting = [
        f"{key} {value!r} (the checkpoint {stored.get(key)!r})"
        for key, value in asked.items()
        if value != stored.get(key) and "drop" not in key and key != "patch_size"
    ]
    if contradicting:
        raise ValueError(
            f"{path} holds a cut model of {stored}, which no other recipe builds: asked for is "
            f"{', '.join(contradicting)}; leave that out"
        )
    model = build.create(
        recipe["name"],
        num_classes=recipe["num_classes"],
        image_size=image_size or recipe["image_size"],
        **(recipe["options"] | options),
    )
    old, new = _recipe.without_values(recipe).state_dict(), model.state_dict()
    structure = dict(record["structure"])
    structure["sizes"] = dict(structure.get("sizes", {}))
    for tensor, cut in structure["sizes"].items():
        if tensor in old:  # what the cut left as it was has the new size
            shapes = zip(cut, old[tensor].shape, new[tensor].shape, strict=True)
            structure["sizes"][tensor] = [now if kept == was else kept for kept, was, now in shapes]
    return _structure.rebuild(model, structure)
