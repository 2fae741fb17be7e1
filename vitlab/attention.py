"""Attention that may lose heads and head dimensions: timm's own classes with a forward pass that allows it.

timm's attention takes queries, keys and values of one size. Here q and k have one size and v another, `scale` stays
what it was, and the layers qkv and proj are always called as modules, so that hooks see them and any layer of
`vitlab.layers` can stand in their place. Parameters and their names are timm's.
"""

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models import swin_transformer, swin_transformer_v2

LARGEST_LOGIT_SCALE = 100.0  # SwinV2's bound (Liu et al. 2022, section 3.2: tau not below 0.01)


class CutAttention(Attention):
    """ViT's attention. x: [B, tokens, C]."""

    def forward(self, x, attn_mask=None, is_causal=False):
        if attn_mask is not None or is_causal:
            raise ValueError("attention with dimensions cut takes no mask: mask the dimensions instead")
        q, k, v = _split(self, self.qkv(x))
        y = _attend(self, self.q_norm(q), self.k_norm(k), v, scale=self.scale)
        return self.proj_drop(self.proj(self.norm(y)))


class CutWindowAttention(swin_transformer.WindowAttention):
    """Swin's attention in windows. x: [B * windows, tokens of a window, C]; mask: [windows, tokens, tokens]."""

    def forward(self, x, mask=None):
        q, k, v = _split(self, self.qkv(x))
        y = _attend(self, q, k, v, scale=self.scale, bias=_window_bias(self._get_rel_pos_bias(), mask, len(x)))
        return self.proj_drop(self.proj(y))


class CutWindowAttentionV2(swin_transformer_v2.WindowAttention):
    """SwinV2's cosine attention in windows, shapes as above. Biases of q and v are parameters beside qkv."""

    fused_attn = False

    def forward(self, x, mask=None):
        y = self.qkv(x)
        if self.q_bias is not None:
            y = y + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = _split(self, y)
        q = F.normalize(q, dim=-1) * self.logit_scale.exp().clamp(max=LARGEST_LOGIT_SCALE)
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = 16 * torch.sigmoid(table[self.relative_position_index])  # [tokens, tokens, heads]
        bias = _window_bias(bias.permute(2, 0, 1)[None], mask, len(x))
        return self.proj_drop(self.proj(_attend(self, q, F.normalize(k, dim=-1), v, scale=1.0, bias=bias)))


OPEN = {  # timm's classes, and those in which anything may be cut
    Attention: CutAttention,
    swin_transformer.WindowAttention: CutWindowAttention,
    swin_transformer_v2.WindowAttention: CutWindowAttentionV2,
}


def open_up(attn):
    """Let this attention lose head dimensions, in place. Nothing that it computes changes but by rounding."""
    attn.__class__ = OPEN.get(type(attn), type(attn))


def _split(attn, qkv):
    """q, k [B, heads, tokens, qk dimensions] and v [B, heads, tokens, v dimensions] of qkv [B, tokens, all]."""
    values = attn.proj.in_features
    queries = (qkv.shape[-1] - values) // 2
    parts = qkv.split([queries, queries, values], dim=-1)
    return [part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in parts]


def _window_bias(bias, mask, windows):
    """bias [1, heads, tokens, tokens] plus the mask [windows of an image, tokens, tokens] of shifted windows."""
    return bias if mask is None else (bias + mask[:, None]).repeat(windows // len(mask), 1, 1, 1)


def _attend(attn, q, k, v, *, scale, bias=None):
    """softmax(scale q k^T + bias) v with the heads side by side: [B, tokens, heads * v dimensions]."""
    if attn.fused_attn:
        p = attn.attn_drop.p if attn.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, scale=scale)
    else:
        weights = scale * q @ k.transpose(-2, -1)
        weights = weights if bias is None else weights + bias
        y = attn.attn_drop(weights.softmax(-1)) @ v
    return y.transpose(1, 2).flatten(2)
