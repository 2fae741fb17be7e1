"""Let Swin's windows be cut out and put back by tensors of at most four dimensions.

timm's own way has six, which mobile runtimes such as ncnn do not read. Parameters and their names
are timm's.

Public: allow_few_dimensions.
"""

import torch
import torch.nn.functional as F
from timm.models import swin_transformer, swin_transformer_v2


class _InWindows:
    """Compute a block's attention in windows; x: [B, H, W, C]."""

    def _attn(self, x):
        _, height, width, channels = x.shape
        high, wide = self.window_size
        down, right = self.shift_size
        if down or right:
            x = torch.roll(x, (-down, -right), (1, 2))
        x = F.pad(x, (0, 0, 0, -width % wide, 0, -height % high))
        _, padded_height, padded_width, _ = x.shape
        mask = self.get_attn_mask(x) if self.dynamic_mask else self.attn_mask
        windows = _turned(x, high, padded_width // wide, wide * channels)
        y = self.attn(windows.reshape(-1, high * wide, channels), mask=mask)
        y = _turned(y, padded_width // wide, high, wide * channels)
        y = y.reshape(-1, padded_height, padded_width, channels)[:, :height, :width]
        return torch.roll(y, (down, right), (1, 2)) if down or right else y


class _InSquares:
    """Merge patches in twos along both sides; x: [B, H, W, C]."""

    def forward(self, x):
        _, height, width, channels = x.shape
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        _, height, width, _ = x.shape
        x = _turned(x, 2, width // 2, 2 * channels)  # squares of 2 x 2, row by row
        x = _turned(x, 2, 2, channels)  # timm has them column by column
        return self._merged(x.reshape(-1, height // 2, width // 2, 4 * channels))


class _Block(_InWindows, swin_transformer.SwinTransformerBlock):
    """A block of Swin."""


class _BlockV2(_InWindows, swin_transformer_v2.SwinTransformerV2Block):
    """A block of SwinV2."""


class _Merging(_InSquares, swin_transformer.PatchMerging):
    """A merging of Swin, which normalises first."""

    def _merged(self, x):
        return self.reduction(self.norm(x))


class _MergingV2(_InSquares, swin_transformer_v2.PatchMerging):
    """A merging of SwinV2, which normalises last."""

    def _merged(self, x):
        return self.norm(self.reduction(x))


# {timm's class: the class here that computes the same}
_OPEN = {
    open_class.__bases__[1]: open_class for open_class in (_Block, _BlockV2, _Merging, _MergingV2)
}


def allow_few_dimensions(module):
    """Let a block or a merging of Swin compute in at most four dimensions, in place."""
    module.__class__ = _OPEN.get(type(module), type(module))


def _turned(x, rows, columns, size):
    """Return x, whose numbers lie as [any, rows, columns, size], as [any, columns, rows, size]."""
    return x.reshape(-1, rows, columns, size).transpose(1, 2)
