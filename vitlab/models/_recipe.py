"""Read from a model what it is built from, and find what a checkpoint of it would lose.

Public: check_kept, of, without_values.
"""

import json

import timm
import torch

from vitlab.models import build

# Attributes of modules that change no answer: rates that only training draws by, how things are
# computed, and what timm notes of sizes before. A model that is loaded has those of its recipe.
_NO_ANSWER = {"training", "p", "drop_prob", "fused_attn", "grad_checkpointing", "inplace"}
_NO_ANSWER |= {"feature_info", "target_shift_size"}
_PLAIN = (bool, int, float, str, tuple, list, type(None))


def of(model, name=None, options=None):
    """Return the recipe of a model as it is now, and a model built by it, without values.

    The recipe is the one that models.create left, or timm's own record of the name and arguments
    of a model that timm.create_model made. What timm recorded since (another size of images,
    classifier or pooling) is in it.

    name, options: timm's name and arguments, if the model itself does not know them
    Raises ValueError for a model without either, and for arguments that JSON cannot hold.
    """
    recipe = getattr(model, "recipe", None)
    if name or not recipe:
        name = name or getattr(model, "pretrained_cfg", {}).get("architecture")
        if name is None:
            raise ValueError(
                "the model has no recipe to build it from: make it by models.create or "
                "timm.create_model, or give checkpoint.save the name and options that do"
            )
        options = {key: value for key, value in (options or {}).items() if key != "num_classes"}
        recipe = {"name": name, "num_classes": model.num_classes, "image_size": None}
        recipe["options"] = options
    dense = without_values(recipe)
    now, then = _arguments(model), _arguments(dense)
    changed = {key: value for key, value in now.items() if key not in then or value != then[key]}
    if not changed:
        return recipe, dense
    recipe = recipe | {"num_classes": changed.pop("num_classes", recipe["num_classes"])}
    if sides := changed.pop("img_size", None):
        recipe["image_size"] = sides[0] if len(set(sides)) == 1 else sides
    recipe["options"] = recipe["options"] | changed
    return recipe, without_values(recipe)


def without_values(recipe):
    """Return the model of a recipe on the meta device: no memory and no random numbers."""
    arguments = dict(recipe)
    options = arguments.pop("options", {})
    with torch.device("meta"):
        return build.create(**arguments, **options)


def _arguments(model):
    """Return timm's record of the arguments that make a model as it is now, as JSON gives them."""
    # timm's own reading leaves the rates of drop-out and drop-path away.
    arguments = getattr(model, "_model_args", {}) | timm.models.get_model_args(model)
    try:
        return json.loads(json.dumps(arguments))
    except TypeError as error:
        raise ValueError(
            f"the model was made with an argument that a checkpoint cannot hold ({error}): give "
            "numbers, words or lists; timm knows its norms and activations by name"
        ) from error


def check_kept(model, twin):
    """Raise ValueError if twin, built from recipe and structure, is not the model but for values.

    twin: on any device
    """
    lost = _module_differences(model, twin) + _tensor_differences(model, twin)
    if lost:
        raise ValueError(
            f"a checkpoint cannot hold this model: {'; '.join(lost[:3])} ({len(lost)} in all). It "
            "holds what models.create or timm.create_model built, changed by vitlab's cuts and by "
            "timm's reset_classifier and set_input_size alone. Take hooks and patches off, remove "
            "blocks by shrink.remove, and give what else differs to models.create"
        )


def _module_differences(model, twin):
    """Return in words which modules are other ones, or work otherwise, in model and twin."""
    lost = []
    modules, twins = dict(model.named_modules()), dict(twin.named_modules())
    for name in twins | modules:
        if name not in modules:
            lost.append(f"{name} is missing")
        elif name not in twins:
            lost.append(f"{name} was added")
        else:
            reasons = _reasons(modules[name], twins[name])
            lost += [f"{name or 'the model'} {reason}" for reason in reasons]
    return lost


def _reasons(module, twin):
    """Yield in words why a module does not compute what its twin would with the same tensors."""
    if type(module) is not type(twin):
        yield f"is a {type(module).__name__} instead of a {type(twin).__name__}"
        return
    if module._forward_hooks or module._forward_pre_hooks:
        yield "has forward hooks"
    if "forward" in vars(module):
        yield "has a forward pass of its own"
    for key, value in vars(twin).items():
        if key.startswith("_") or key in _NO_ANSWER or not isinstance(value, _PLAIN):
            continue
        own = getattr(module, key, None)
        # A list is a tuple once it was stored as JSON.
        if json.dumps(own, default=repr) != json.dumps(value, default=repr):
            yield f"has {key} {own} instead of {value}"


def _tensor_differences(model, twin):
    """Return in words which tensors of a model are not in its twin, and which ones no file holds."""
    state, twins = model.state_dict(), twin.state_dict()
    lost = []
    for name in twins | state:
        shape, wanted = (list(s[name].shape) if name in s else None for s in (state, twins))
        if shape != wanted:
            lost.append(f"{name} is {shape or 'missing'} instead of {wanted or 'missing'}")
    for name, _ in model.named_buffers():
        owner = model.get_submodule(name.rpartition(".")[0])
        # timm computes what no state dict holds, such as the masks of Swin's windows, anew.
        if name not in state and not hasattr(owner, "init_non_persistent_buffers"):
            lost.append(f"{name} is in no state dict")
    return lost
