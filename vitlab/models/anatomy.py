"""See a ViT or Swin as blocks, heads, neurons and linear layers by role.

In this package only the folder `models` knows timm's classes.

Public: FAMILIES, ROLES, UNITS, View, check_classes, check_weights, classifier_names, copied,
family_of, features, norm_after, pooling, view.
"""

import copy
import re
from dataclasses import dataclass

import timm
from timm.layers import Attention, Mlp
from timm.models import swin_transformer, swin_transformer_v2, vision_transformer
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from vitlab import names
from vitlab.models import _attention, _layers

UNITS = ("heads", "neurons", "qk", "v", "width", "filters", "block")
ROLES = {
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "downsample.reduction": "merge",
}
# {timm's class: (kind of model, pattern of the names of its blocks with their stage as a group)}
FAMILIES = {
    SwinTransformer: ("swin", r"layers\.(\d+)\.blocks\.\d+"),
    SwinTransformerV2: ("swin", r"layers\.(\d+)\.blocks\.\d+"),
    VisionTransformer: ("vit", r"()blocks\.\d+"),
}


def _look_up(things, name, noun):
    """Return things[name]. Raises ValueError with the nearest name if there is none."""
    if name not in things:
        raise ValueError(f"no {noun} {name!r} in this model{names.nearest(name, things)}")
    return things[name]


def family_of(model):
    """Return the class of FAMILIES that model is of, or None."""
    return next((family for family in FAMILIES if isinstance(model, family)), None)


def classifier_names(model):
    """Return the names of the classifier layers, by timm's get_classifier."""
    heads = model.get_classifier()  # a distilled DeiT has two: of the class token and of its own
    if isinstance(heads, nn.Module):
        heads = [heads]
    heads = [head for head in heads if not isinstance(head, nn.Identity)]
    return [name for name, module in model.named_modules() if module in heads]


def pooling(model):
    """Return timm's word for how a model pools its tokens before the classifier, "" for not."""
    return timm.models.get_model_args(model)["global_pool"]


def features(model, x):
    """Return what a model's classifier reads of images, or would read if it had one.

    x: [B, 3, H, W]
    Returns [B, n]: n is the width of the last stage, times the tokens of a model without pooling.
    """
    # timm's models all have these two halves of their forward pass.
    tokens = model.forward_features(x)
    return model.forward_head(tokens, pre_logits=True).flatten(1)


@dataclass(frozen=True)
class _Block:
    """Describe one transformer block: its attention and MLP, whatever has been cut from them."""

    name: str
    stage: int
    attn: nn.Module
    mlp: nn.Module

    @property
    def num_heads(self):
        return getattr(self.attn, "num_heads", 0)

    @property
    def head_dim(self):
        """Return the size of a head's values, and of its queries and keys unless these were cut."""
        return self.attn.proj.in_features // self.num_heads if self.num_heads else 0

    @property
    def qk_dim(self):
        """Return the size of a head's queries and keys."""
        if not self.num_heads:
            return 0
        return (self.attn.qkv.out_features // self.num_heads - self.head_dim) // 2

    @property
    def normalises_queries(self):
        """Return whether a query's dimensions change each other before they meet the keys."""
        if isinstance(self.attn, _attention.CutWindowAttentionV2):
            return True
        norm = getattr(self.attn, "q_norm", None)
        return not isinstance(norm, nn.Identity | None)

    @property
    def neurons(self):
        return self.mlp.fc2.in_features if hasattr(self.mlp, "fc2") else 0

    @property
    def writers(self):
        """Return the layers that give the outputs of attention and MLP."""
        attn = self.attn  # a Constant gives its own
        mlp = self.mlp
        return [getattr(attn, "proj", attn), getattr(mlp, "fc2", mlp)]


@dataclass(eq=False)
class View:
    """Show a ViT or Swin, cut or not, as blocks, units and linear layers by role. See `view`."""

    # The residual stream is the tensor of tokens that the blocks pass on: each block reads it and
    # adds something to it. Swin has one in each stage, with patch merging in between.

    model: nn.Module
    kind: str  # "vit" or "swin"
    blocks: list

    def __post_init__(self):
        self.classifiers = classifier_names(self.model)

    def layer(self, name):
        """Return the module called name. Raises ValueError with the nearest name for none."""
        return _look_up(dict(self.model.named_modules()), name, "layer")

    def parameter(self, name):
        """Return the parameter called name. Raises ValueError with the nearest name for none."""
        return _look_up(dict(self.model.named_parameters()), name, "parameter")

    def block(self, name):
        """Return the _Block called name. Raises ValueError with the nearest name for none."""
        return _look_up({block.name: block for block in self.blocks}, name, "block")

    def block_of(self, name):
        """Return the _Block of a module or parameter; None in stem, merging and classifier."""
        return next((block for block in self.blocks if name.startswith(f"{block.name}.")), None)

    def role(self, name):
        """Return the role of a linear layer by its name, or None for another module.

        Roles are qkv, proj, fc1, fc2, merge and head.
        """
        if name in self.classifiers:
            return "head"
        role = next((role for end, role in ROLES.items() if name.endswith(end)), None)
        # Attention pooling has an MLP, too, and lies in no block.
        return role if role == "merge" or self.block_of(name) else None

    def linears(self, roles=None):
        """Return {name: module} of the linear layers, in forward order.

        roles: some of qkv, proj, fc1, fc2, merge and head; None: all but the classifier, which is
            protected unless its role is given
        Raises ValueError for an unknown role, with the nearest one.
        """
        roles = ROLES.values() if roles is None else roles
        roles = names.known(roles, [*ROLES.values(), "head"], "role")
        return {name: m for name, m in self.model.named_modules() if self.role(name) in roles}

    def units(self, kinds=("heads", "neurons")):
        """Return {(where, kind): how many there are now}, without those of which none are left.

        kinds: some of
            "heads", "neurons"  of a block
            "qk", "v"           dimensions of a block's heads, numbered head * size + dimension
            "width"             channels of a stage's residual stream: ("stages.0", "width"); a ViT
                                has one stage
            "filters"           of a convolution of the stem, factored or not, that feeds another
                                one of the same nn.Sequential
            "block"             the block itself: 1
        Raises ValueError for an unknown kind, with the nearest one.
        """
        kinds = names.known(kinds, UNITS, "kind of unit")
        counts = {}
        for block in self.blocks:
            sizes = {
                "heads": block.num_heads,
                "neurons": block.neurons,
                "qk": block.num_heads * block.qk_dim,
                "v": block.num_heads * block.head_dim,
                "block": 1,
            }
            counts |= {(block.name, kind): sizes[kind] for kind in kinds if kind in sizes}
        if "width" in kinds:
            for stage in self.stages:
                first, _ = self.residual_stream(stage)[0]
                counts[stage, "width"] = len(first.weight)
        if "filters" in kinds:
            for name, conv in self.stem:
                if _is_factor(self.model, name):  # its last part says how many filters there are
                    name = name.rpartition(".")[0]
                if _feeds_convolution(self.model, name):
                    counts[name, "filters"] = conv.out_channels
        return {key: count for key, count in counts.items() if count}

    @property
    def stages(self):
        """Return the names of the stages: "stages.0" and so on.

        In each of them the residual stream has one width.
        """
        count = len(self.model.layers) if self.kind == "swin" else 1
        return [f"stages.{number}" for number in range(count)]

    @property
    def stem(self):
        """Return [(name, convolution)] of the patch embedding, in forward order."""
        modules = self.model.patch_embed.named_modules(prefix="patch_embed")
        # Subclasses of timm's compute otherwise, such as by standardised weights.
        return [(name, module) for name, module in modules if type(module) is nn.Conv2d]

    @property
    def _whole_stem(self):
        """Return {name: convolution} of the patch embedding, without the parts of factored ones."""
        return {name: conv for name, conv in self.stem if not _is_factor(self.model, name)}

    @property
    def matrices(self):
        """Return {name: module} of all that may become low rank."""
        # The stem's convolutions that are not factored, and the linear layers but the classifier.
        return self._whole_stem | self.linears()

    @property
    def layers_along_stream(self):
        """Return {module name: names of its layers, in forward order} along the residual stream.

        "" stands for the whole model and its classifier.
        """
        # The modules make the stream one after the other: the patch embedding, the blocks, and in
        # Swin patch merging between them. Between the patch embedding and the first block a model
        # may add to the stream.
        merging = (swin_transformer.PatchMerging, swin_transformer_v2.PatchMerging)
        blocks = {block.name for block in self.blocks}
        segments = {"patch_embed": list(self._whole_stem)}
        for name, module in self.model.named_modules():
            if name in blocks or isinstance(module, merging):
                segments[name] = [layer for layer in self.linears() if layer.startswith(f"{name}.")]
        return segments | {"": self.classifiers}

    def block_end(self, layer):
        """Return how the last layer of a block writes to the residual stream, by the layer's name.

        Returns (the norm that reads the stream before the layer, the factors [width] by which its
        outputs are scaled or None). Returns None for any other layer.
        """
        block = self.block_of(layer)
        # The last writer is another module where a norm comes between the layer and the stream.
        module = self.model.get_submodule(layer)
        if block is None or self.residual_writers(block)[1] is not module:
            return None
        inside = self.model.get_submodule(block.name)
        scale = getattr(inside, "ls2", None)
        return inside.norm2, getattr(scale, "gamma", None)

    def residual_writers(self, block):
        """Return the two modules whose outputs a block adds to the residual stream."""
        # On the way to the stream a factor for each channel may scale the outputs, no more. Where
        # the norms come last, they are what writes.
        inside = self.model.get_submodule(block.name)
        norms_last = isinstance(inside, vision_transformer.ResPostBlock)
        if norms_last or isinstance(self.model, SwinTransformerV2):
            return [inside.norm1, inside.norm2]
        return block.writers

    def residual_stream(self, stage):
        """Return all that is as wide as the residual stream of a stage: [(part, how)].

        The first part has a weight row for each channel. How a part is as wide:
            "rows", "columns"  of a linear layer or convolution
            "channels"         of a norm or a scale
            "merged"           columns or channels of patch merging, which sees four tokens side by
                               side
            "last"             dimension of a parameter
        Raises ValueError for an unknown stage.
        Raises TypeError for what cannot be made narrower.
        """
        names.check("stage", stage, self.stages)
        number = self.stages.index(stage)
        model = self.model
        if number == 0:
            last = self.stem[-1][1]
            parts = _stem_end(model, last)
        else:
            parts = _merging(model.layers[number].downsample, "rows")
        for block in self.blocks:
            if block.stage == number:
                parts += _block_stream(block, model.get_submodule(block.name))
        if number + 1 < len(self.stages):
            return parts + _merging(model.layers[number + 1].downsample, "merged")
        if getattr(model, "attn_pool", None) is not None:
            raise TypeError("a model that pools by attention cannot be made narrower")
        parts += _parts(model, ["norm", "fc_norm"], "channels")
        return parts + [(model.get_submodule(name), "columns") for name in self.classifiers]


def check_classes(model, images, outputs=None):
    """Raise ValueError, with both sides, unless a model answers with the classes of the images.

    model: a model with `num_classes`, and with `class_names` where it was trained or its weights
        say them
    images: data.Split or data.Dataset; the labels of a batch, which only say how many at least
    outputs: how many answers the model gave; None for its num_classes
    """
    if outputs is None:
        outputs = getattr(model, "num_classes", None)
    class_names = list(getattr(images, "classes", ()))
    count = len(class_names)
    words = str(count)
    if not class_names:
        labels = getattr(images, "labels", images)
        count = 1 + max(labels.tolist(), default=-1)
        words = f"at least {count}"
    if outputs is not None and (outputs < count or class_names and outputs != count):
        raise ValueError(
            f"the model has {outputs} classes, the images {words}: take images of the model's "
            "classes, or a model that models.create(..., num_classes=...) made for these images"
        )
    # As many as the outputs, unless the head is another by now.
    learnt = getattr(model, "class_names", [])
    if len(learnt) == len(class_names) and learnt != class_names:
        same = (
            "the same names in another order" if set(learnt) == set(class_names) else "other names"
        )
        label = [own == name for own, name in zip(learnt, class_names, strict=True)].index(False)
        raise ValueError(
            f"the model was trained on classes of {same}: label {label} is {learnt[label]!r} for "
            f"the model and {class_names[label]!r} for the images. Give the images the names and "
            "the order of the model's classes, or start a new head: new_head=True of "
            "models.create, new_head: true of the model in a study (del model.class_names where "
            "it is new already)"
        )


def _chain_behind(model, layer):
    """Return [(name, module)] behind a layer in its nn.Sequential; [] for a layer in no such."""
    parent, _, own_name = layer.rpartition(".")
    chain = model.get_submodule(parent)
    if not isinstance(chain, nn.Sequential):
        return []
    children = list(chain.named_children())
    place = [name for name, _ in children].index(own_name)
    return [(f"{parent}.{name}", module) for name, module in children[place + 1 :]]


def _feeds_convolution(model, layer):
    """Return whether another convolution of one nn.Sequential reads the filters of this one."""
    # What lies between must leave channels alone. Only a batch norm that `norm_after` finds can
    # lose some of its own.
    norm = norm_after(model, layer)
    for name, module in _chain_behind(model, layer):
        if isinstance(module, _layers.FactoredConv2d) or type(module) is nn.Conv2d:
            return getattr(module, "groups", 1) == 1
        if name != norm and list(module.parameters()):
            return False
    return False


def norm_after(model, layer):
    """Return the name of the batch norm that a convolution feeds (after pooling or not), or None.

    layer: name of a convolution; one outside an nn.Sequential has no such norm
    """
    for name, module in _chain_behind(model, layer):
        if isinstance(module, nn.BatchNorm2d):
            return name
        if not isinstance(module, (nn.MaxPool2d, nn.AvgPool2d, nn.Identity)):
            return None
    return None


def _is_factor(model, layer):
    """Return whether a convolution, by its name, is one of the two parts of a factored one."""
    parent = model.get_submodule(layer.rpartition(".")[0])
    return isinstance(parent, _layers.FactoredConv2d)


def _parts(owner, attributes, how):
    """Return [(part, how)] of the attributes of owner that are there and do something."""
    parts = [getattr(owner, attribute, None) for attribute in attributes]
    return [(part, how) for part in parts if not isinstance(part, nn.Identity | None)]


def _stem_end(model, last):
    """Return what is as wide as the first stage before the blocks, the last convolution first."""
    inside = list(model.patch_embed.modules())
    behind = inside[inside.index(last) + 1 :]
    norms = [(module, "channels") for module in behind if list(module.parameters())]
    tokens = _parts(model, ["cls_token", "reg_token", "dist_token", "pos_embed"], "last")
    return [(last, "rows"), *norms, *tokens, *_parts(model, ["norm_pre"], "channels")]


def _merging(merging, side):
    """Return patch merging where it writes ("rows") or reads ("merged") a stage's stream."""
    # Swin's norm is on what merging reads, SwinV2's on what it writes.
    writes_norm = isinstance(merging, swin_transformer_v2.PatchMerging)
    parts = [(merging.reduction, side)]
    if side == "merged" and not writes_norm:
        parts.append((merging.norm, "merged"))
    if side == "rows" and writes_norm:
        parts.append((merging.norm, "channels"))
    return parts


def _block_stream(block, inside):
    """Return what of a block, with its module inside, is as wide as the residual stream."""
    if getattr(block.attn, "gate", None) is not None:
        raise TypeError("attention with a gate cannot be made narrower")
    readers = _parts(block.attn, ["qkv"], "columns") + _parts(block.mlp, ["fc1"], "columns")
    writers = [(writer, "rows") for writer in block.writers]
    return readers + writers + _parts(inside, ["norm1", "norm2", "ls1", "ls2"], "channels")


# {what torch hangs on a layer to compute a weight before each pass: what takes it off again}
_CURES = {
    BasePruningMethod: "torch.nn.utils.prune.remove(layer, name)",
    WeightNorm: "torch.nn.utils.remove_weight_norm(layer, name)",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(layer, name)",
    ParametrizationList: "torch.nn.utils.parametrize.remove_parametrizations(layer, name)",
}


def check_weights(model):
    """Raise ValueError for weights that are no parameters of one layer, with what to call first.

    They are those that torch computes before each pass, and those of a layer in two places.
    """
    for name, module in model.named_modules():
        parts = (
            *module._forward_pre_hooks.values(),
            *getattr(module, "parametrizations", {}).values(),
        )
        for part in parts:
            for kind, cure in _CURES.items():
                if isinstance(part, kind):
                    raise ValueError(
                        f"a weight of {name} is computed anew before each pass, by torch's "
                        f"{type(part).__name__}, and cannot be counted, cut or stored as it is: "
                        f"call {cure} first"
                    )
    first = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module._parameters and first.setdefault(id(module), name) != name:
            raise ValueError(
                f"{first[id(module)]} and {name} are one module, and cannot be counted, cut or "
                "stored as two: put a copy.deepcopy of it in the second place"
            )


def copied(model):
    """Return a deep copy of a model. Raises what `check_weights` raises."""
    check_weights(model)
    return copy.deepcopy(model)


def view(model):
    """Return the View of a timm ViT/DeiT, Swin or SwinV2.

    Raises TypeError for a model that vitlab cannot see into, and ValueError for weights that are
    no parameters of one layer.
    """
    check_weights(model)
    blocks = []
    if family := family_of(model):
        kind, pattern = FAMILIES[family]
        for name, module in model.named_modules():
            match = re.fullmatch(pattern, name)
            if match and not isinstance(module, _layers.Skip):
                parts = [getattr(module, part, None) for part in ("attn", "mlp")]
                blocks.append(_Block(name, int(match[1] or 0), *parts))
    attentions = (Attention, swin_transformer.WindowAttention, _attention.CutWindowAttentionV2)
    is_plain = all(
        isinstance(block.attn, (*attentions, _layers.Constant))
        and isinstance(block.mlp, (Mlp, _layers.Constant))
        for block in blocks
    )
    if not blocks or not is_plain:
        raise TypeError(
            f"cannot see into {type(model).__module__}.{type(model).__name__}: supported are timm's "
            "VisionTransformer family (ViT, DeiT), SwinTransformer and (made by models.create) "
            "SwinTransformerV2, with fused qkv and a two-layer MLP; not EVA, SwiGLU, MaxViT or "
            "ConvNets. Of a model of another library, save the state dict and give the file to "
            "models.create as weights"
        )
    return View(model, kind, blocks)
