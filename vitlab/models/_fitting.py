"""Load tensors into a model where they fit, and say what does not.

Public: NEW_HEAD, Reading, fill, num_heads, said.
"""

import inspect
import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer

from vitlab.models import _weight_names, anatomy

NEW_HEAD = "the head is left out and starts new with {} classes"


def said(head_change, classes):
    """Return what is said of a head, of which a model without classes gets no new one."""
    return head_change.format(classes) if classes else "the head is left out"


@dataclass
class Reading:
    """Hold what one backbone of a file gives to a model."""

    prefix: str
    whose: str
    fitting: dict
    changes: list
    problem: str = ""
    has_head: bool = False  # whether all classifier layers are in the file


def fill(model, path, tensors, says):
    """Load the tensors of a file into model.

    says: what stands beside the file about its architecture, in Hugging Face's words
    Returns the Reading that was taken, whose changes say what was not taken as it is, and
    sentences about where tensors came from.
    """
    backbones = _weight_names.backbones(tensors)
    readings = []
    for prefix, whose in backbones.items():
        try:
            reading = _read(model, tensors, prefix, whose, says)
        except Exception as error:  # whatever tensors of odd shapes do to timm, torch and this file
            problem = f"No such model has its shapes: {type(error).__name__}: {error}."
            reading = Reading(prefix, whose, {}, [], problem)
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
    """Return the Reading of the backbone whose names begin with prefix."""
    outside = re.sub(r"[^.]+\.$", "", prefix)
    state, beside = {}, {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            state[_weight_names.renamed(name.removeprefix(prefix), whose)] = tensor
        else:
            beside[name.removeprefix(outside)] = tensor
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    _weight_names.join_qkv(state)
    if "reg_token" in expected and "dist_token" in state:  # a DeiT without its second head
        state["reg_token"] = state.pop("dist_token")
    if "register_tokens" in state:
        state.setdefault("mask_token", None)  # by which timm's filter knows DINOv2
    reading = Reading(prefix, whose, {}, [])
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
            head_change = NEW_HEAD
        elif name in expected or _weight_names.BACKBONE.match(name):
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
    if optional - reading.fitting.keys() or (not optional and head_change == NEW_HEAD):
        reading.changes.append(said(head_change, model.num_classes))
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
    for layer, pattern in zip(
        layers, (_weight_names.HEAD, _weight_names.DISTILLED_HEAD), strict=False
    ):
        parts = {}
        for name, tensor in [*state.items(), *beside.items()]:
            if match := re.fullmatch(pattern, name):
                sentence = NEW_HEAD
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
        own["num_heads"] = num_heads(model)
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


def num_heads(model):
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
