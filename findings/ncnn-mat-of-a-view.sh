#!/usr/bin/env bash
# ncnn 1.0.20261020 with numpy 2.4.6: ncnn.Mat of an array that is a view, such as a transposed image.
#
# A good guess: `ncnn.Mat(array)` holds the numbers that the array shows, so an image [H, W, C] goes in as
# `ncnn.Mat(image.transpose(2, 0, 1))`, as with every runtime that takes numpy's arrays. An array whose
# memory it cannot use is copied or refused.
#
# What happens: it takes the shape of the view, and the numbers in the order in which they lie in memory.
# A transposed image has the right shape and mixed channels, of which nothing is said; `.clone()` keeps the
# mixed order. np.ascontiguousarray(view) gives the right numbers. Mat does not keep that array alive,
# so it needs a name that lives on, or `.clone()` at once. torch's `permute(...).numpy()` is such a view, too.
#
# Seen: shape (3, 2, 2) both, 12 numbers of the view [0 3 6 9 1 …], of Mat [0 1 2 3 4 …].
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q ncnn==1.0.20261020 numpy==2.4.6

cat > views.py <<'PYTHON'
import ncnn
import numpy as np

image = np.arange(12, dtype=np.float32).reshape(2, 2, 3)  # height, width, channels
view = image.transpose(2, 0, 1)
in_order = np.ascontiguousarray(view)
for name, mat in {
    "view": ncnn.Mat(view),
    "clone of it": ncnn.Mat(view).clone(),
    "contiguous": ncnn.Mat(in_order),
}.items():
    seen = np.array(mat)
    order = "of the view" if (seen == view).all() else "other"
    order = "of memory" if (seen.ravel() == image.ravel()).all() else order
    print(f"{name}: {seen.shape == view.shape} {order}")
PYTHON

seen=$(venv/bin/python views.py 2>/dev/null)
echo "$seen"

[ "$seen" = "view: True of memory
clone of it: True of memory
contiguous: True of the view" ] || { echo "changed: ncnn.Mat of a view"; exit 1; }
