"""Give the tensors of other libraries the names that timm's models have.

Public: BACKBONE, DISTILLED_HEAD, HEAD, UNKNOWN, backbones, join_qkv, renamed.
"""

import re

import torch

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
HEAD = (
    r"(?:(?:heads?|fc|linear|head\.fc|heads\.head|classifier|cls_classifier)(?:\.\d+)?|\d+)"
    r"\.(weight|bias)"
)
DISTILLED_HEAD = r"(?:head_dist|distillation_classifier)\.(weight|bias)"
# What else belongs to a backbone. Whatever a file has beside these may be left out.
BACKBONE = re.compile(
    r"(blocks|layers|patch_embed|norm|norm_pre|fc_norm|attn_pool)\.|(absolute_)?pos_embed$|"
    r"(cls|reg|dist)_token$"
)


UNKNOWN = "no library known here"


def backbones(tensors):
    """Return {what all names of a backbone begin with: whose names they are}."""
    found = {}
    for whose, (anchor, _) in _LAYOUTS.items():
        for name in tensors:
            if match := re.match(rf"((?:.*?\.)?){anchor}", name):
                found[match[1]] = whose
    for prefix, whose in found.items():
        blocks = rf"{re.escape(prefix)}(layers\.\d+\.)?blocks\.\d"
        if whose == "timm" and not any(re.match(blocks, name) for name in tensors):
            found[prefix] = UNKNOWN
    return found or {"": UNKNOWN}  # timm's filter knows some others


def renamed(name, whose):
    _, rules = _LAYOUTS.get(whose, ("", []))
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def join_qkv(state):
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
