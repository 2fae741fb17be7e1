"""Solve the weights that stay anew, so that they make up for those that are masked.

Public: Fill, refit.
"""

from dataclasses import dataclass

import torch
from torch import nn

from vitlab import files, names
from vitlab.models import _layers, _structure, anatomy
from vitlab.pruning import _sweep, lowrank, prune

# How the weights that stay are solved for. Least squares are the best end that an update can have
# for a given mask. Optimal Brain Surgeon is one sweep over the columns, as SparseGPT updates the
# weights that stay (Frantar and Alistarh 2023). It is never better for the layer's output on the
# calibration activations.
_REFITS = {"least squares": lowrank.refit, "obs": lowrank.obs_update}


@torch.no_grad()
def refit(model, keep, grams, *, method="least squares", damping=1e-3):
    """Return a copy of model whose masked weights are zero and made up for by the others.

    No labels and no training are needed. What has no gram (biases, norms) is only masked.

    model: a ViT or Swin; it stays as it is.
    keep: {parameter: bool tensor}, True stays, as from masks.keep_largest.
    grams: {layer: [n, n]}, as from scores.grams.
    method: "least squares" (lowrank.refit) or, for comparison, "obs" (lowrank.obs_update).
    damping: share of the mean of the gram's diagonal that is added to it, see lowrank.damped.

    Raises ValueError for an unknown method or parameter, and for a mask or a gram that does not
    fit. At least one weight in keep must have a gram.
    """
    names.check("method", method, _REFITS)
    model = anatomy.copied(model)
    parameters = prune.parameters_of(model, keep)
    if not {name.removesuffix(".weight") for name in keep} & grams.keys():
        raise ValueError("grams has none of the layers in keep: give scores.grams of them")
    for name, weight in files.progress(parameters.items(), "compensating"):
        mask = keep[name].to(weight.device)
        layer = name.removesuffix(".weight")
        gram = _sweep.fitting_gram(grams, layer, weight[0].numel(), damping, partial=True)
        # What has no gram cannot adapt, and an empty support leaves nothing that could.
        if gram is None or not mask.any():
            weight.mul_(mask)
            continue
        # The outputs on calibration activations come near to those before. A convolution is the
        # matrix of its flattened filters.
        solution = _REFITS[method](weight.flatten(1), gram, mask.flatten(1))
        weight.copy_(solution.view_as(weight))
    return model


@dataclass(frozen=True)
class Fill:
    """Make up in closed form for the inputs that layers lose.

    means: {layer: mean of its inputs [n]}.
    grams: {layer: gram of its inputs [n, n]}.
    damping: see lowrank.damped.
    """

    means: dict
    grams: dict
    damping: float

    def narrow(self, model, name, keep):
        """Let a linear layer or convolution read only these inputs, made up for the others.

        model: holds the layer; it is changed in place.
        name: of the layer.
        keep: int64 [kept], the inputs (channels of a convolution) that stay.

        Raises ValueError for a gram or a mean of another shape.
        """
        layer = model.get_submodule(name)
        weight = layer.weight
        # A filter sees a kernel of values in each channel, a linear layer one value.
        size = weight[0, 0].numel()
        columns = (keep[:, None] * size + torch.arange(size)).flatten()
        transfer, lost = self._solve(layer, name, columns)
        if isinstance(layer, nn.Conv2d):
            flat = weight.flatten(1)
            new = flat[:, columns]
            if transfer is not None:
                new = flat.double() @ transfer
            # resize gives it the old precision back.
            _structure.resize(layer, "weight", new.unflatten(1, (-1, *weight.shape[2:])))
        else:
            new = _layers.select(layer, columns=columns)
            if transfer is not None:
                _layers.recombine(new, layer, transfer.to(weight.dtype))
            _structure.put(model, name, new)
        if lost is None:
            return
        # What the outputs lost on average goes into the bias, or into the batch norm behind.
        norm = anatomy.norm_after(model, name)
        if layer.bias is not None:
            _layers.shift(model.get_submodule(name), lost)
        elif norm is not None:
            model.get_submodule(norm).running_mean.sub_(lost)

    def put_constant(self, model, name, reader):
        """Replace attention or an MLP by what its last layer, the reader, gives without inputs.

        model: holds the module; it is changed in place.
        name: of the attention or MLP.
        reader: name of its last layer, which reads what is gone.

        Raises ValueError for a gram or a mean of another shape.
        """
        layer = model.get_submodule(reader)
        _, lost = self._solve(layer, reader, torch.arange(0))
        new = _layers.Constant(layer.out_features, bias=False)
        if layer.bias is not None:
            # The mean that all inputs gave joins the bias; without means the bias alone stays.
            new.bias = nn.Parameter(layer.bias + (0 if lost is None else lost))
        _structure.put(model, name, new)

    def _solve(self, layer, name, columns):
        """Return what makes up for the inputs of a layer that are not in columns.

        Returns (transfer, lost). Transfer [n, kept] is float64, or None without a gram. Lost [m] is
        what each output loses on average, or None without a mean or a place for it.
        """
        weight = layer.weight.flatten(1)
        n = weight.shape[1]
        gram = _sweep.fitting_gram(self.grams, name, n, self.damping, partial=True)
        mean = self.means.get(name)
        if mean is not None and mean.shape != (n,):
            raise ValueError(
                f"mean of {name} is {list(mean.shape)}, not {[n]}: wrong layer or model"
            )
        if layer.bias is None and not isinstance(layer, nn.Conv2d):
            mean = None  # a linear layer without bias cannot take it up
        # Inputs x are about transfer (x[columns] - centre[columns]) + centre, where centre is
        # their mean, or zero without means.
        centre = weight.new_zeros(n) if mean is None else mean
        centre = centre.to(weight.device, torch.float64)
        columns = columns.to(weight.device)
        transfer = None
        # Without a gram, what the outputs lose on average is what the removed inputs gave them.
        unexplained = centre.index_fill(0, columns, 0)
        if gram is not None:
            # With a gram, the inputs that stay predict the removed ones, about the mean.
            covariance = gram.to(weight.device) - centre[:, None] * centre
            transfer = lowrank.regression(covariance, columns)
            unexplained = centre - transfer @ centre[columns]
        if mean is None:
            return transfer, None
        return transfer, (weight.double() @ unexplained).to(weight.dtype)
