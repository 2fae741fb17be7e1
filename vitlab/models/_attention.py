"""Let attention lose heads and head dimensions: timm's own classes with a forward pass for it.

Parameters and their names are timm's.

Public: CUT_CLASSES, CutAttention, CutWindowAttention, CutWindowAttentionV2, allow_cuts.
"""

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models import swin_transformer, swin_transformer_v2


# timm's attention takes queries, keys and values of one size. Here queries and keys have one size
# and values another, and `scale` stays what it was. The layers qkv and proj are always called as
# modules. So hooks see them, and any layer of `_layers` can stand in their place.
class CutAttention(Attention):
    """Compute a ViT's attention.

    x: [B, tokens, C]
    Raises ValueError for a mask between tokens.
    """

    def forward(self, x, attn_mask=None, is_causal=False):
        if attn_mask is not None or is_causal:
            raise ValueError(
                "attention with dimensions cut takes no mask: mask the dimensions instead"
            )
        q, k, v = _split(self, self.qkv(x))
        y = _attend(self, self.q_norm(q), self.k_norm(k), v, scale=self.scale)
        return self.proj_drop(self.proj(self.norm(y)))


class CutWindowAttention(swin_transformer.WindowAttention):
    """Compute Swin's attention in windows.

    x: [B * windows, tokens of a window, C]
    mask: [windows, tokens, tokens] of shifted windows, or None
    """

    def forward(self, x, mask=None):
        q, k, v = _split(self, self.qkv(x))
        y = _attend(
            self,
            q,
            k,
            v,
            scale=self.scale,
            bias=self._get_rel_pos_bias(),  # [1, heads, tokens, tokens]
            mask=mask,
        )
        return self.proj_drop(self.proj(y))


class CutWindowAttentionV2(swin_transformer_v2.WindowAttention):
    """Compute SwinV2's cosine attention in windows.

    x: [B * windows, tokens of a window, C]
    mask: [windows, tokens, tokens] of shifted windows, or None
    """

    fused_attn = False

    def forward(self, x, mask=None):
        y = self.qkv(x)
        if self.q_bias is not None:  # q and v have biases beside qkv, keys have none
            y = y + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = _split(self, y)
        # Liu et al. 2022, section 3.2: tau not below 0.01, so a scale of at most 100.
        q = F.normalize(q, dim=-1) * self.logit_scale.exp().clamp(max=100.0)
        k = F.normalize(k, dim=-1)
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = 16 * torch.sigmoid(table[self.relative_position_index])
        bias = bias.permute(2, 0, 1)  # [heads, tokens, tokens]
        y = _attend(self, q, k, v, bias=bias, mask=mask)
        return self.proj_drop(self.proj(y))


# {timm's class: the class here in which anything may be cut}
CUT_CLASSES = {
    cut_class.__base__: cut_class
    for cut_class in (CutAttention, CutWindowAttention, CutWindowAttentionV2)
}


def allow_cuts(attn):
    """Let this attention lose head dimensions, in place."""
    # The two classes compute the same: outputs change by rounding at most.
    attn.__class__ = CUT_CLASSES.get(type(attn), type(attn))


def _split(attn, qkv):
    """Return q, k and v, each [B, heads, tokens, dimensions], of qkv [B, tokens, all]."""
    values = attn.proj.in_features
    queries = (qkv.shape[-1] - values) // 2
    return [
        part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        for part in qkv.split([queries, queries, values], dim=-1)
    ]


def _of_one_size(*tensors):
    """Return tensors [..., dimensions] with zeros behind, so that all have the most dimensions."""
    most = max(tensor.shape[-1] for tensor in tensors)
    return [F.pad(tensor, (0, most - tensor.shape[-1])) for tensor in tensors]


def _attend(attn, q, k, v, *, scale=1.0, bias=None, mask=None):
    """Return softmax(scale q k^T + bias) v, heads side by side: [B, tokens, heads * dimensions]."""
    if mask is not None:  # the same windows in each image
        bias = (bias + mask[:, None]).repeat(q.shape[0] // mask.shape[0], 1, 1, 1)
    if attn.fused_attn:
        size = v.shape[-1]
        # The fused kernel of CPUs takes vectors of one size alone. Zeros at their ends change no
        # product, and are 1.2 to 2.7 times as fast as torch's way without the kernel.
        if v.device.type == "cpu" and not torch.compiler.is_exporting():
            q, k, v = _of_one_size(q, k, v)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=bias,
            dropout_p=attn.attn_drop.p if attn.training else 0.0,
            scale=scale,
        )[..., :size]
    else:
        weights = scale * q @ k.transpose(-2, -1)
        if bias is not None:
            weights = weights + bias
        y = attn.attn_drop(weights.softmax(-1)) @ v
    return y.transpose(1, 2).flatten(2)
