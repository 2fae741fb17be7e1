"""Create models with the weights of local files, whoever named their tensors.

Public: create, expected.
"""

import argparse
import inspect
import json
import math
import re
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer

from vitlab import files
from vitlab.models import _packed, _structure, anatomy, build, checkpoint


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
    Raises FileNotFoundError for missing weights.
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


_NEW_HEAD = "the head is left out and starts new with {} classes"


def _of_file(name, num_classes, image_size, path, options, new_head):
    """Return the model of `create` with a file's weights, their _Reading, and what is said of it."""
    record, config = _described_beside(path)
    says = dict(config)
    if "layer_norm_eps" in config:  # no tensor tells it
        options = {"norm_eps": config["layer_norm_eps"]} | options
    if any(record.get("structure", {}).values()):
        model = _cut_again(path, record, name, image_size, options)
    else:
        model = build.create(name, num_classes=num_classes, image_size=image_size, **options)
        if record:
            says["num_attention_heads"] = _num_heads(_without_values(record["recipe"]))
    reading, facts = _fill(model, path, _tensors(path, record), says)
    model.is_head_new = not reading.has_head
    if model.num_classes != num_classes or new_head and reading.has_head:
        _start_head_anew(model, num_classes)
        reading.changes.append(_said(_NEW_HEAD, num_classes))
    classes = _class_names(record, config)
    if not model.is_head_new and len(classes) == num_classes:
        model.class_names = classes
    heads = _num_heads(model)
    if heads and not (record or "num_attention_heads" in config or "num_heads" in options):
        facts.append(f"num_heads={heads} is that of {name}: no tensor tells it")
    sentences = facts + reading.changes
    return model, reading, f"{path.name}: {'; '.join(sentences)}" if sentences else ""


def _said(head_change, classes):
    """Return what is said of a head, of which a model without classes gets no new one."""
    return head_change.format(classes) if classes else "the head is left out"


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
    record, _ = _described_beside(path)
    said = record.get("normalise")
    of_images = _json_beside(path, "preprocessor_config.json")
    if not record and "image_mean" in of_images and "image_std" in of_images:
        said = of_images["image_mean"], of_images["image_std"]
    if not record and of_images.get("do_normalize") is False:
        said = (0.0,) * 3, (1.0,) * 3
    if said:
        return tuple(map(tuple, said)), False
    whose = whose or ", ".join(_backbones(_tensors(path, record)).values())
    if "torchvision" in whose:  # all of its weights are ImageNet's
        return (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), False
    moments = build.moments(name)
    return moments, moments is not None


# ---- Files ----


def _described_beside(path):
    """Return the record of `checkpoint.save` and Hugging Face's config beside weights, or {}."""
    folder = path if path.is_dir() else path.parent
    record = {}
    is_whole = path.is_dir() or path.name == checkpoint.WEIGHTS
    if is_whole and (folder / checkpoint.RECORD).is_file():
        record = checkpoint.read(folder)
    config = _json_beside(path, "config.json")
    return record, config if "model_type" in config else {}


def _json_beside(path, name):
    """Return the dict in the file of this name beside or in weights, {} where there is none."""
    file = (path if path.is_dir() else path.parent) / name
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is no JSON of named values: {error}") from error


def _class_names(record, config):
    """Return the names of the classes in the order of the head's outputs, [] where none are said."""
    label_of = config.get("id2label") or {}
    numbers = sorted(filter(str.isdigit, label_of), key=int)
    names = record.get("classes") or [str(label_of[number]) for number in numbers]
    filled_in = all(re.fullmatch(r"LABEL_\d+", name) for name in names)  # by transformers
    return [] if filled_in else names


_ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_LOOKED_FOR = (checkpoint.WEIGHTS, "model-*-of-*.safetensors", "pytorch_model.bin")


def _tensors(path, record):
    """Return {name: tensor} of weights, names of nested dicts joined by dots, zeros unpacked."""
    parts = [path] if path.is_file() else []
    for pattern in _LOOKED_FOR:
        parts = parts or sorted(path.glob(pattern))
    if not parts:
        others = [file.name for file in sorted(path.glob("*")) if file.suffix in _ENDINGS]
        raise FileNotFoundError(
            f"no weights at {path}; give a .safetensors or .pth file or a folder with one of "
            f"{', '.join(_LOOKED_FOR)}"
            + (f"; this one holds {', '.join(others)}: give the path of one" if others else "")
        )
    tensors = {}
    for part in parts:
        tensors |= dict(_flat(_content(part)))
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name: it needs those of a state_dict()")
    if not any(name.endswith(_packed.BITS) for name in tensors):
        return tensors
    if not record:
        raise FileNotFoundError(
            f"{path} is stored without its zeros and can be read only beside its "
            f"{checkpoint.RECORD}"
        )
    return _packed.unpack(tensors, record["packed"])


def _content(file):
    """Return what a file of weights holds. Raises ValueError, with what the file is instead."""
    with open(file, "rb") as opened:
        start = opened.read(200).lstrip()
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # of timm's and Meta's scripts
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        why = f"it is broken or cut short ({type(error).__name__}): copy or download it again"
        if start.startswith(b"<"):
            why = "it is a web page: download the file itself"
        elif start.startswith(b"version https://git-lfs"):
            why = "it only points to the file: fetch that by `git lfs pull`"
        elif start and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
            why = "it is text and no checkpoint: give the file that holds the tensors"
        elif file.suffix in (".npz", ".npy", ".h5", ".msgpack", ".onnx"):
            why = f"{file.suffix} is not read: give the same weights as .safetensors or .pth"
        elif zipfile.is_zipfile(file) or start.startswith(b"\x80"):  # whole, and no plain dict
            why = (
                f"beside tensors it holds objects ({_objects(file)}), which may run code when "
                "opened: where it was made, save the tensors alone by "
                "torch.save(model.state_dict(), ...)"
            )
    # Without the first error: torch's own words advise to open the file unsafely.
    raise ValueError(f"no weights can be read from {file}: {why}")


def _objects(file):
    """Return the names of the classes that a pickled file needs, as far as torch can tell."""
    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # of programs and of files older than zip it cannot
        return "a whole model or program, for example"


# Wrappers that put their name before a part of the model: torch.compile, FSDP, checkpointing.
_WRAPPERS = r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."


def _flat(content, prefix=""):
    """Yield (name, tensor) of nested dicts."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, torch.Tensor):
            yield re.sub(_WRAPPERS, "", f"{prefix}{key}"), value
        else:
            yield from _flat(value, f"{prefix}{key}.")


# ---- Names ----

# {whose names: (how the name of a tensor of the patch embedding begins, [(pattern, replacement)])}
# The patterns, one after the other, give the names of timm or of the original release, which timm's
# own filter takes. q, k and v stand apart until they are joined.
_LAYOUTS = {
    "timm": (
        r"patch_embed\.",
        [(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.")],  # DINOv2's chunks of blocks
    ),
    "Hugging Face": (
        r"embeddings\.patch_embeddings\.",
        [
            (r"^embeddings\.(\w+_tokens?)$", r"\1"),
            (r"^distillation_token", "dist_token"),
            (r"^embeddings\.position_embeddings", "pos_embed"),
            (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
            (r"^embeddings\.norm", "patch_embed.norm"),
            (r"^(?:encoder\.)?layers?\.(\d+)\.(?!blocks|downsample)", r"blocks.\1."),
            (r"^encoder\.", ""),
            (r"attention\.(?:\w+\.)?(q|k|v)(?:uery|ey|alue|_proj)\.", r"attn.\1."),
            (r"attention\.(?:output\.dense|o_proj)", "attn.proj"),
            (r"attention\.(?:self\.|relative_position_bias\.)?", "attn."),
            (r"continuous_position_bias_mlp", "cpb_mlp"),
            (r"intermediate\.dense|mlp\.weights_in", "mlp.fc1"),
            (r"output\.dense|mlp\.weights_out", "mlp.fc2"),
            (r"layernorm_before", "norm1"),
            (r"layernorm_after", "norm2"),
            (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
            (r"^layernorm", "norm"),
        ],
    ),
    "OpenCLIP": (r"(?=visual\.conv1\.)", []),
    "torchvision": (
        r"(?:conv_proj|features\.1\.0\.attn\.proj)\.",
        [
            (r"^class_token", "cls_token"),
            (r"^encoder\.pos_embedding", "pos_embed"),
            (r"^conv_proj|^features\.0\.0", "patch_embed.proj"),
            (r"^features\.0\.2", "patch_embed.norm"),
            # Stages and merging in turns.
            (r"^features\.(\d*[13579])\.", lambda match: f"layers.{int(match[1]) // 2}.blocks."),
            (r"^features\.(\d+)", lambda match: f"layers.{int(match[1]) // 2 - 1}.downsample"),
            (r"^encoder\.layers\.encoder_layer_", "blocks."),
            (r"^encoder\.ln", "norm"),
            (r"\.ln_(\d)", r".norm\1"),
            (r"self_attention\.in_proj_", "attn.qkv."),
            (r"self_attention\.out_proj", "attn.proj"),
            (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
            (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
        ],
    ),
}
# A number is a place in an nn.Sequential: of the head's layers, or of backbone and head.
_HEAD = (
    r"(?:(?:heads?|fc|linear|head\.fc|heads\.head|classifier|cls_classifier)(?:\.\d+)?|\d+)"
    r"\.(weight|bias)"
)
_DISTILLED_HEAD = r"(?:head_dist|distillation_classifier)\.(weight|bias)"
# What else belongs to a backbone. Whatever a file has beside these may be left out.
_BACKBONE = re.compile(
    r"(blocks|layers|patch_embed|norm|norm_pre|fc_norm|attn_pool)\.|(absolute_)?pos_embed$|"
    r"(cls|reg|dist)_token$"
)


_UNKNOWN = "no library known here"


def _backbones(tensors):
    """Return {what all names of a backbone begin with: whose names they are}."""
    found = {}
    for whose, (anchor, _) in _LAYOUTS.items():
        for name in tensors:
            if match := re.match(rf"((?:.*?\.)?){anchor}", name):
                found[match[1]] = whose
    for prefix, whose in found.items():
        blocks = rf"{re.escape(prefix)}(layers\.\d+\.)?blocks\.\d"
        if whose == "timm" and not any(re.match(blocks, name) for name in tensors):
            found[prefix] = _UNKNOWN
    return found or {"": _UNKNOWN}  # timm's filter knows some others


def _renamed(name, whose):
    _, rules = _LAYOUTS.get(whose, ("", []))
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _join_qkv(state):
    """Join q, k and v that stand apart, in place, as timm has them."""
    for name in [name for name in state if name.endswith((".attn.q.weight", ".attn.q.bias"))]:
        ahead, _, part = name.rpartition("q.")
        parts = [state.pop(f"{ahead}{letter}.{part}", None) for letter in "qkv"]
        if parts[1] is None and part == "bias":  # SwinV2's keys have none
            parts[1] = torch.zeros_like(parts[0])
        if all(torch.is_tensor(tensor) for tensor in parts):
            state[f"{ahead}qkv.{part}"] = torch.cat(parts)
    for name in [name for name in state if name.endswith("logit_scale")]:
        attn = name.removesuffix("logit_scale")
        if (bias := state.pop(f"{attn}qkv.bias", None)) is not None:
            state[f"{attn}q_bias"], _, state[f"{attn}v_bias"] = bias.chunk(3)


# ---- What fits ----


@dataclass
class _Reading:
    """Hold what one backbone of a file gives to a model."""

    prefix: str
    whose: str
    fitting: dict
    changes: list
    problem: str = ""
    has_head: bool = False  # whether all classifier layers are in the file


def _fill(model, path, tensors, says):
    """Load the tensors of a file into model.

    says: what stands beside the file about its architecture, in Hugging Face's words
    Returns the _Reading that was taken, whose changes say what was not taken as it is, and
    sentences about where tensors came from.
    """
    backbones = _backbones(tensors)
    readings = []
    for prefix, whose in backbones.items():
        try:
            reading = _read(model, tensors, prefix, whose, says)
        except Exception as error:  # whatever tensors of odd shapes do to timm, torch and this file
            problem = f"No such model has its shapes: {type(error).__name__}: {error}."
            reading = _Reading(prefix, whose, {}, [], problem)
        readings.append(reading)
    chosen = _choose(path, readings)
    if chosen.problem:
        example = next(name for name in tensors if name.startswith(chosen.prefix))
        raise ValueError(
            f"{path} holds another architecture than {type(model).__name__} {model.recipe}. "
            f"Names are of {chosen.whose}{_behind(chosen.prefix)}, such as {example}. "
            f"{chosen.problem}"
        )
    for name, tensor in chosen.fitting.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{path} holds values that are not finite, such as in {name}: the training that "
                "wrote it went astray, or the file is damaged; give an earlier one"
            )
    model.load_state_dict(chosen.fitting, strict=False)
    facts = [f"names of {chosen.whose}{_behind(chosen.prefix)}"]
    if len(readings) > 1:  # the choice may be another than the one that was meant
        others = sorted(backbones.keys() - {chosen.prefix})
        chosen.changes.insert(0, f"taken rather than {', '.join(map(repr, others))}")
    is_plain = chosen.whose == "timm" and not chosen.prefix
    return chosen, [] if is_plain else facts


def _behind(prefix):
    return f", behind {prefix!r}" if prefix else ""


def _choose(path, readings):
    """Return the reading that is meant. Raises ValueError where several may be."""
    fitting = [reading for reading in readings if not reading.problem]
    if not fitting:
        return readings[0]
    # Averaged weights are what timm takes first and what DINO evaluates: its teacher is an average
    # of the student.
    averaged = [
        reading for reading in fitting if re.search(r"(^|[._])(ema|teacher)[._]", reading.prefix)
    ]
    first, *others = averaged or fitting
    for other in others:
        if any(
            not torch.equal(first.fitting[name], other.fitting.get(name)) for name in first.fitting
        ):
            raise ValueError(
                f"{path} holds more than one such model, behind "
                f"{' and '.join(repr(reading.prefix) for reading in fitting)}: save the one that "
                "you mean by itself"
            )
    return first


def _read(model, tensors, prefix, whose, says):
    """Return the _Reading of the backbone whose names begin with prefix."""
    outside = re.sub(r"[^.]+\.$", "", prefix)
    state, beside = {}, {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            state[_renamed(name.removeprefix(prefix), whose)] = tensor
        else:
            beside[name.removeprefix(outside)] = tensor
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    _join_qkv(state)
    if "reg_token" in expected and "dist_token" in state:  # a DeiT without its second head
        state["reg_token"] = state.pop("dist_token")
    if "register_tokens" in state:
        state.setdefault("mask_token", None)  # by which timm's filter knows DINOv2
    reading = _Reading(prefix, whose, {}, [])
    optional = _parameters_of_classifiers(model)
    heads, head_change = _heads(model, expected, state, beside)
    if differences := _differences(model, state, says):
        reading.problem = differences
        return reading
    family = anatomy.family_of(model) or VisionTransformer
    # DeiT-III has its own names for its layer scale.
    own = {"adapt_layer_scale": True} if family is VisionTransformer else {}
    with warnings.catch_warnings(action="ignore"):  # torch's, about its own speed
        fitted = inspect.getmodule(family).checkpoint_filter_fn(dict(state), model, **own)
    fitted = fitted | heads
    missing = sorted(expected.keys() - fitted.keys() - optional)
    wrong, left_out = [], set()
    for name, tensor in fitted.items():
        if name in expected and tensor.shape == expected[name]:
            reading.fitting[name] = tensor
        elif name in optional:  # timm's filter makes a head of OpenCLIP's projection
            head_change = _NEW_HEAD
        elif name in expected or _BACKBONE.match(name):
            wrong.append(name)
        else:
            left_out.add(name.split(".")[0])
    for names, what in ((missing, "missing"), (wrong, "others than the model's")):
        if names:
            reading.problem += f"{len(names)} tensors are {what}, such as {names[0]}. "
    if reading.problem:
        if not _architecture(fitted):
            reading.problem = f"It holds no blocks of a transformer. {reading.problem}"
        return reading
    reading.changes = [*_resampled(state, fitted), *_windows(model, state, says, whose)]
    if left_out:
        reading.changes.append(f"left out: {', '.join(sorted(left_out))}")
    reading.has_head = bool(optional) and optional <= reading.fitting.keys()
    if optional - reading.fitting.keys() or (not optional and head_change == _NEW_HEAD):
        reading.changes.append(_said(head_change, model.num_classes))
    return reading


def _parameters_of_classifiers(model):
    """Return the names of the parameters of the classifier layers."""
    layers = tuple(f"{layer}." for layer in anatomy.classifier_names(model))
    return {name for name, _ in model.named_parameters() if name.startswith(layers)}


def _heads(model, expected, state, beside):
    """Take the heads out of state, in place, and return those that fit, under the model's names.

    state, beside: {name: tensor} of the backbone, and of what stands beside it in the file
    Returns {name: tensor}, and what is said of a head that does not fit.
    """
    # Behind such a layer, which timm's class does not have, a head of equal size is another one.
    is_behind = any("pre_logits" in name for name in state)
    sentence = "it has no head, which starts new with {} classes"
    heads = {}
    layers = [*anatomy.classifier_names(model), "", ""]
    for layer, pattern in zip(layers, (_HEAD, _DISTILLED_HEAD), strict=False):
        parts = {}
        for name, tensor in [*state.items(), *beside.items()]:
            if match := re.fullmatch(pattern, name):
                sentence = _NEW_HEAD
                state.pop(name, None)
                fits = expected.get(f"{layer}.{match[1]}") == tensor.shape
                if fits and _stands_alone(name, [*state, *beside]):
                    parts.setdefault(f"{layer}.{match[1]}", tensor)
        if len(parts) == 2 and not is_behind:  # weight and bias
            heads |= parts
    return heads, sentence


def _stands_alone(name, names):
    """Return whether no other layer of the same nn.Sequential has tensors among names."""
    numbered = re.match(r"((?:.*\.)?)\d+\.", name)
    if not numbered:
        return True
    others = [other for other in names if not other.startswith(numbered[0])]
    return not any(re.match(rf"{re.escape(numbered[1])}\d+\.", other) for other in others)


_OPTIONS = set(
    "depth depths embed_dim num_heads mlp_ratio in_chans patch_size class_token reg_tokens "
    "no_embed_class global_pool qkv_bias qk_norm init_values pre_norm act_layer".split()
)


_NAME_OF_FAMILY = {
    "ViT": "vit_small_patch16_224",
    "Swin": "swin_tiny_patch4_window7_224",
    "SwinV2": "swinv2_tiny_window8_256",
}


def _differences(model, state, says):
    """Return how the architecture of state differs from the model's, in words; "" for none."""
    file, own = _architecture(state), _architecture(model.state_dict())
    if "depth" in file:
        file["num_heads"] = says.get("num_attention_heads")
        own["num_heads"] = _num_heads(model)
        own["no_embed_class"] = getattr(model, "no_embed_class", False)
    if act := says.get("hidden_act"):
        act = "gelu_tanh" if act in ("gelu_new", "gelu_pytorch_tanh") else act
        file["act_layer"] = act
        own["act_layer"] = model.recipe["options"].get("act_layer", "gelu")
    file = {name: value for name, value in file.items() if value is not None}
    differing = [name for name in file if own.get(name) not in (None, file[name])]
    if not set(differing) - {"patch_size"}:  # timm resamples the kernel
        return ""
    if "family" in differing:  # of which the model's class cannot take options
        return (
            f"The file is of the family {file['family']}, the model of {own['family']}; what fits "
            f"it is a name of that family, such as {_NAME_OF_FAMILY[file['family']]}."
        )
    said = [f"{name} {file[name]} (the model {own[name]})" for name in differing]
    fit = [f"{name}={file[name]!r}" for name in file if name in _OPTIONS & set(differing)]
    if "embed_dim" in differing and "num_heads" not in file:
        fit.append("num_heads=... (no tensor tells it)")
    return f"The file has {', '.join(said)}; what fits it is {', '.join(fit)}."


def _num_heads(model):
    """Return the number of heads of a ViT's first attention; None for another model."""
    for block in getattr(model, "blocks", ()):
        if heads := getattr(getattr(block, "attn", None), "num_heads", None):
            return heads
    return None


def _architecture(state):
    """Return what the tensors of a model say about it, under the names of timm's options."""
    matches = [re.match(r"((?:layers\.\d+\.)?)blocks\.\d+\.", name) for name in state]
    blocks = {match[0]: match[1] for match in matches if match}
    if not blocks:
        return {}
    first = min(blocks)
    sizes = {name.removeprefix(first): list(t.shape) for name, t in state.items() if t is not None}
    [width] = sizes.get("norm1.weight", [None])
    says = {"family": "ViT", "embed_dim": width}
    if width and "mlp.fc1.weight" in sizes:
        says["mlp_ratio"] = sizes["mlp.fc1.weight"][0] / width
    if len(kernel := sizes.get("patch_embed.proj.weight", [])) == 4:
        says |= {"in_chans": kernel[1], "patch_size": kernel[-1]}
    stem = {name.split(".")[1] for name in sizes if name.startswith("patch_embed.")}
    says["patch embedding"] = ", ".join(sorted(stem))
    says["qkv_bias"] = "attn.qkv.bias" in sizes or "attn.q_bias" in sizes
    depths = Counter(blocks.values())
    if "" not in depths:
        per_head = re.compile(r"\S+\.0\.attn\.(logit_scale|relative_position_bias_table)")
        tables = [state[name] for name in sorted(state) if per_head.fullmatch(name)]
        says["family"] = "SwinV2" if "attn.logit_scale" in sizes else "Swin"
        says["depths"] = tuple(depths[stage] for stage in sorted(depths))
        says["num_heads"] = tuple(len(t) if t.ndim == 3 else t.shape[1] for t in tables)
        return says
    pool = "avg" if "fc_norm.weight" in sizes else "token"
    known = ("cls_token", "dist_token", "reg_token", "register_tokens")
    tokens = {name: sizes[name][1] for name in known if name in sizes}
    says |= {
        "depth": len(blocks),
        "tokens before the patches": sum(tokens.values()),
        "class_token": "cls_token" in tokens,
        "reg_tokens": sum(tokens.values()) - tokens.get("cls_token", 0),
        "no_embed_class": _starts_at_patches(sizes.get("pos_embed", [0, 0])[1], tokens),
        "global_pool": "map" if "attn_pool.q.weight" in sizes else pool,
        "qk_norm": "attn.q_norm.weight" in sizes,
        "init_values": 1e-5 if {"ls1.gamma", "gamma_1"} & sizes.keys() else 0,
        "pre_norm": "norm_pre.weight" in sizes,
    }
    return says


def _starts_at_patches(positions, tokens):
    """Return whether a table has no positions for tokens before the patches; None if unclear."""
    if "register_tokens" in tokens:  # timm's filter moves the class token's out of the table
        return True
    patches = positions - sum(tokens.values())
    grids = [math.isqrt(max(count, 0)) ** 2 == count for count in (positions, patches)]
    return grids[0] if sum(grids) == 1 and positions else None


def _resampled(state, fitted):
    """Return sentences about the tensors whose values timm resampled to another size."""
    sentences = []
    for part in ("pos_embed", "patch_embed.proj.weight", "relative_position_bias_table"):
        resampled = []
        for name in fitted:
            if name.endswith(part) and name in state:
                # Of DINOv2 with registers timm adds the class token's position to the token itself.
                old, new = state[name], fitted[name]
                same = old[:, -new.shape[1] :] if part == "pos_embed" else old
                if not torch.equal(same, new):
                    resampled.append(f"{list(old.shape)} to {list(new.shape)}")
        if resampled:
            more = f" and {len(resampled) - 1} more" if resampled[1:] else ""
            sentences.append(f"{part} resampled from {resampled[0]}{more}")
    return sentences


def _windows(model, state, says, whose):
    """Return sentences about windows by which outputs are not those of the file's own library."""
    sentences = []
    blocks = [block for block in model.modules() if hasattr(block, "shift_size")]
    partly_filled = [block for block in blocks if block.input_resolution[0] % block.window_size[0]]
    if partly_filled and whose != "timm":
        sentences.append(f"at this image size outputs are not {whose}'s: timm shifts, then pads")
    tables = [(t.shape[1] + 1) // 2 for name, t in state.items() if name.endswith("coords_table")]
    file = max(tables, default=says.get("window_size"))
    own = max((block.window_size[0] for block in blocks), default=0)
    is_known = "pretrained_window_sizes" in model.recipe["options"]
    if isinstance(model, SwinTransformerV2) and file not in (None, own) and not is_known:
        sentences.append(
            f"windows are {own} wide, {file} in the file: distances count in shares of a window, "
            f"or as in the file by pretrained_window_sizes={(file,) * len(model.layers)}"
        )
    return sentences


# ---- Checkpoints of cut models ----


def _without_values(recipe):
    """Return the model of a recipe without memory and random numbers."""
    arguments = dict(recipe)
    options = arguments.pop("options")
    with torch.device("meta"):
        return build.create(**arguments, **options)


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
    old, new = _without_values(recipe).state_dict(), model.state_dict()
    structure = dict(record["structure"])
    structure["sizes"] = dict(structure.get("sizes", {}))
    for tensor, cut in structure["sizes"].items():
        if tensor in old:  # what the cut left as it was has the new size
            shapes = zip(cut, old[tensor].shape, new[tensor].shape, strict=True)
            structure["sizes"][tensor] = [now if kept == was else kept for kept, was, now in shapes]
    return _structure.rebuild(model, structure)
