#!/usr/bin/env bash
# timm 1.0.31 and transformers 5.24.0 with torch 2.15.0: the position table of a DINOv2 at other image sizes.
#
# A good guess: both libraries resample the table of 37 x 37 positions (518 px, patches of 14) by bicubic
# interpolation, so that the same weights give the same features in both at any size of images.
#
# What happens: they agree at 518 px alone. timm smooths before it picks values (antialias=True, its
# default), transformers does not, as DINOv2's own code does not. At smaller images, such as 112 or 224 px,
# the tables differ most. At larger ones they still differ a little, although nothing is smoothed there:
# torch's bicubic filter has another coefficient with antialias than without. So a model that is converted
# from one library to the other, equal at 518 px, is not equal at 224 px, although all tensors in both files
# are the same. Neither library says anything.
#
# Seen, in deviations of the table: one of drawn values differs by 0.79 at 8 x 8 positions, 0.68 at
# 16 x 16, 0 at 37 x 37 and 0.07 at 48 x 48. One that is a single wave over the image: 0.02, 0.01, 0, 0.01.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.15.0 timm==1.0.31 transformers==5.24.0

cat > compare.py <<'PYTHON'
import math

import torch
from timm.layers import resample_abs_pos_embed
from transformers import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings

SIDE, WIDTH = 37, 24
torch.manual_seed(0)
embeddings = Dinov2Embeddings(Dinov2Config(image_size=14 * SIDE, patch_size=14, hidden_size=WIDTH))
across = torch.linspace(0, 2 * math.pi, SIDE)
wave = (across.sin()[:, None] + across.cos()).flatten()[None, :, None].expand(1, -1, WIDTH)
tables = {"drawn": torch.randn(1, SIDE * SIDE, WIDTH), "wave": wave}


@torch.no_grad()
def difference(table, side):
    """Return the root of the mean squared difference, in deviations of the table."""
    whole = torch.cat([torch.zeros(1, 1, WIDTH), table], 1)
    embeddings.position_embeddings.copy_(whole)
    tokens = torch.zeros(1, 1 + side * side, WIDTH)
    theirs = embeddings.interpolate_pos_encoding(tokens, 14 * side, 14 * side)
    ours = resample_abs_pos_embed(whole, [side, side])
    return ((ours - theirs).square().mean().sqrt() / table.std()).item()


for name, table in tables.items():
    for side in (8, 16, 37, 48):
        print(name, side, round(difference(table, side), 2))
PYTHON

seen=$(CUDA_VISIBLE_DEVICES='' venv/bin/python compare.py 2>/dev/null)
echo "$seen"

[ "$seen" = "drawn 8 0.79
drawn 16 0.68
drawn 37 0.0
drawn 48 0.07
wave 8 0.02
wave 16 0.01
wave 37 0.0
wave 48 0.01" ] || { echo "changed: position tables in timm and transformers"; exit 1; }
