"""Write down what a cut changed in a model, and build the same shapes again.

`structure` and `rebuild` are what a checkpoint needs to make a cut model from its recipe.

Public: described, keep_entries, modules_of, put, rebuild, resize, set_heads, structure,
tell_width.
"""

import copy
from collections import defaultdict

import torch
from timm.layers import ClassifierHead
from torch import nn

from vitlab import names
from vitlab.models import _attention, _layers, _recipe, anatomy

_EVERY_ROLE = (*anatomy.ROLES.values(), "head")


def structure(model):
    """Return how a model's shapes differ from those of models.create with its recipe.

    The result can be stored as JSON and is what `rebuild` takes. For a model that was not cut,
    both of its first two entries are empty and the others are absent:
        "heads": {block: number of heads}
        "layers": {layer: config}
        "skipped": blocks that are gone, and norms before attention or an MLP without units
        "constant": {attention or MLP without units: config}
        "convolutions": {factored convolution: rank}
        "opened": attention with dimensions cut
        "sizes": {other parameter or buffer: shape}

    Raises ValueError for a model without a recipe, and for one that these would not rebuild.
    """
    return described(model)[1]


def described(model, name=None, options=None):
    """Return the recipe and the structure of a model.

    name, options: see `_recipe.of`
    Raises what `structure` raises.
    """
    recipe, dense = _recipe.of(model, name, options)
    view = anatomy.view(model)
    whole = dict(dense.named_modules())  # what else the model has no checkpoint holds
    heads = {}
    opened = []
    for block in view.blocks:
        dense_attn = whole.get(f"{block.name}.attn", block.attn)
        if block.num_heads not in (0, dense_attn.num_heads):
            heads[block.name] = block.num_heads
        if type(block.attn) is _attention.CUT_CLASSES.get(type(dense_attn)):
            opened.append(f"{block.name}.attn")
    configs = {}
    for name, layer in view.linears(_EVERY_ROLE).items():
        if not isinstance(layer, (nn.Linear, *_layers.COMPRESSED_LAYERS)):
            continue  # a classifier of the user's own
        config = _layers.config(layer)
        if config != _layers.config(whole.get(name, layer)):
            configs[name] = config
    constants = modules_of(model, _layers.Constant)
    convolutions = modules_of(model, _layers.FactoredConv2d)
    twin = copy.deepcopy(dense)
    for name, module in convolutions.items():
        # Sizes are compared for the two parts of a factored convolution, too.
        put(dense, name, _layers.FactoredConv2d(whole[name], rank=module.rank))
    others = {
        "skipped": list(modules_of(model, _layers.Skip)),
        "constant": {name: module.config() for name, module in constants.items()},
        "convolutions": {name: module.rank for name, module in convolutions.items()},
        "opened": opened,
        "sizes": _other_sizes(model, dense, without=configs),
    }
    others = {key: value for key, value in others.items() if value}
    found = {"heads": heads, "layers": configs, **others}
    _recipe.check_kept(model, rebuild(twin, found))
    return recipe, found


def modules_of(model, kind):
    """Return {name: module} of the modules of a class."""
    return {name: part for name, part in model.named_modules() if isinstance(part, kind)}


def _other_sizes(model, dense, without):
    """Return {parameter or buffer: shape} of what is not as in dense nor inside these layers."""
    dense_state = dense.state_dict()
    prefixes = tuple(f"{name}." for name in without)
    sizes = {}
    for name, tensor in model.state_dict().items():
        differs = tensor.shape != dense_state.get(name, tensor).shape
        if differs and not name.startswith(prefixes):
            sizes[name] = list(tensor.shape)
    return sizes


def rebuild(model, structure):
    """Give a model fresh from models.create the shapes of a structure, in place, and return it.

    The state dict of the model that the structure was taken from then fits
    load_state_dict(strict=True).

    Raises ValueError for blocks and layers that model does not have.
    """
    structure = defaultdict(dict, structure)  # entries without content may be absent
    for name in structure["skipped"]:
        put(model, name, _layers.Skip())
    for name, config in structure["constant"].items():
        put(model, name, _layers.Constant(**config))
    for name, rank in structure["convolutions"].items():
        conv = model.get_submodule(name)
        put(model, name, _layers.FactoredConv2d(conv, rank=rank))
    for name in structure["opened"]:
        _attention.allow_cuts(model.get_submodule(name))
    view = anatomy.view(model)
    layers_by_name = view.linears(_EVERY_ROLE)
    for name, config in structure["layers"].items():
        names.check("linear layer", name, layers_by_name)
        weight = layers_by_name[name].weight
        new = _layers.build(config, device=weight.device, dtype=weight.dtype)
        put(model, name, new)
    for name, shape in structure["sizes"].items():
        owner, _, tensor_name = name.rpartition(".")
        module = model.get_submodule(owner)
        resize(module, tensor_name, torch.empty(shape))
    for name, count in structure["heads"].items():
        block = view.block(name)
        set_heads(block.attn, torch.arange(count))
    for name in structure["opened"]:  # of as many heads, but of another size
        attn = model.get_submodule(name)
        set_heads(attn, torch.arange(attn.num_heads))
    if structure["sizes"]:
        tell_width(model)
    return model


def put(model, name, new):
    """Put a module in the place of the one called name, in the same mode."""
    old = model.get_submodule(name)
    model.set_submodule(name, new.train(old.training))


def set_heads(attn, heads):
    """Keep these heads wherever attention holds an entry for each head. `scale` stays."""
    attn.num_heads = len(heads)
    if hasattr(attn, "attn_dim"):  # timm's ViT
        attn.attn_dim = attn.proj.in_features
    if hasattr(attn, "head_dim"):
        attn.head_dim = attn.proj.in_features // len(heads)
    # Swin's table: if it were forgotten, attention with one head left would broadcast in silence.
    keep_entries(attn, "relative_position_bias_table", heads, axis=1)
    keep_entries(attn, "logit_scale", heads)
    if hasattr(attn, "cpb_mlp"):  # SwinV2's
        keep_entries(attn.cpb_mlp[2], "weight", heads)


def tell_width(model):
    """Set what timm's model says about its width, for a new classifier."""
    widths = anatomy.view(model).units(["width"])
    first, *_ = widths.values()
    *_, last = widths.values()
    model.embed_dim = first
    model.num_features = last
    model.head_hidden_size = last
    if isinstance(model.head, ClassifierHead):  # of Swins; timm's reset tells it the width, too
        model.head.in_features = last
        model.head.num_features = last * model.head.global_pool.feat_mult()


def keep_entries(module, name, keep, axis=0):
    """Keep these entries of a parameter or buffer along an axis, if the module has it."""
    tensor = getattr(module, name, None)
    if tensor is not None:
        indices = keep.to(tensor.device)
        resize(module, name, tensor.index_select(axis, indices))


def resize(module, name, tensor):
    """Set a parameter or buffer to tensor, and what the module says about its size."""
    old = getattr(module, name)
    tensor = tensor.detach().to(old).clone()
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, old.requires_grad)
    setattr(module, name, tensor)
    if name != "weight":
        return
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = tensor.shape[:2]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = tensor.shape
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = len(tensor)
    elif hasattr(module, "normalized_shape"):
        module.normalized_shape = tuple(tensor.shape)
