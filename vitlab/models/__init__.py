"""What is in a Vision Transformer, before and after a cut, and how it is stored."""

import torch

try:
    import timm  # noqa: F401
except RuntimeError as error:  # "operator torchvision::nms does not exist"
    raise ImportError(
        f"torchvision does not fit this torch {torch.__version__} ({error}). Install both from the "
        "same place, with the pair of versions that constraints.txt names."
    ) from error

from vitlab.models._weights import create
from vitlab.models.anatomy import check_classes, view

__all__ = ["check_classes", "create", "view"]
