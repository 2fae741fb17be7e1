"""Explorer: pick a checkpoint, a layer, criteria and shares by widgets; see at once what would go, and what that costs.

Scores are taken once for a checkpoint and saved beside its run. A move of a slider ranks them, really cuts a copy of
the model and counts that one: all but the predicted loss is what the same calls give elsewhere. Two cuts add up:
weights masked over all layers together (masks.keep_largest), heads and neurons removed to a share of the MACs
(budget.plan).
"""

import bisect
import copy
import gc
import hashlib
import html
import io
import json
from contextlib import suppress
from functools import cache, cached_property, partial

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.core.pylabtools import print_figure
from IPython.display import HTML, Image, display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from . import budget, checkpoint, cost, data, evaluate, masks, models, plots, prune, record, scores

FORMAT = 2  # of saved scores: another one where their meaning changes
WEIGHTS = ("taylor", "fisher", "obd", "gradient", "snip", "magnitude", "random")
UNITS = ("fisher", "taylor", "michel")
SHOWN, TESTED = 12, 256  # validation images: pictures, and how many accuracy is of
BINS = 60  # of histograms
STATES = {"masked": "0.85", "goes with its unit": plots.COLORS[1], "kept": plots.COLORS[0]}


# -- checkpoints and their scores


def checkpoints(lab):
    """{"study/model/seed/name": folder} of all that can be explored: checkpoints of lab, a Run, then others of its
    study and model, then dense ones; what the repository ships is named so.

    Left out are models with layers that were factored or lost rows, of which no budget takes units, and other
    overridden runs than lab. Raises FileNotFoundError, with the commands that make a checkpoint, if there are none.
    """
    runs, shipped = record.root() / "runs", record.repository() / "checkpoints"
    found = {"/".join(folder.parts[-4:]): folder for folder in runs.glob("*/*/seed*/*")}
    for folder in shipped.glob("*/*"):
        study, model, seed = record.of_shipped(folder)
        found[f"{study}/{model}/seed{seed}/shipped"] = folder
    known = [label for label, folder in found.items() if "+" not in label or folder.parent == lab.folder]
    known = sorted(known, key=lambda label: (not label.endswith("/dense"), label))
    known.sort(key=lambda label: (found[label].parent != lab.folder, f"{lab.study}/{lab.model_name}/" not in label))
    if places := {label: found[label] for label in known if _is_plain(found[label])}:
        return places
    train = lab.command("1_train")
    raise FileNotFoundError(f"no checkpoint in {runs} or {shipped}: run make demo, or train one with\n  {train}")


def _is_plain(folder):
    """Whether folder has the record of a checkpoint, all of whose linear layers are plain ones."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or a broken one
        layers = json.loads((folder / checkpoint.RECORD).read_text())["structure"]["layers"]
        return all(layer["type"] == "Linear" for layer in layers.values())
    return False


# -- cuts


class Subject:
    """A checkpoint with its scores: what goes at which shares, the model that is then left, and what it costs."""

    def __init__(self, label, folder, lab, *, device="cpu"):
        """label, folder: one of `checkpoints`. lab: its own Run, or another one. Raises what checkpoint.load does."""
        study, model, seed, _ = label.split("/")
        own = folder.parent == lab.folder
        given = lab._given if study == lab.study else study  # perhaps a path
        self.lab = lab if own else record.open_run(given, model, int(seed.removeprefix("seed")))
        self.model = checkpoint.load(folder, device=device)
        self.weights, self.units = self._scores(folder)
        self.plan = cache(lambda criterion, macs: budget.plan(self.model, self.units[criterion], macs=macs))

    @cached_property
    def images(self):
        """The data.Dataset of the run."""
        return data.load(**self.lab.data)

    def calibration(self):
        """Batches of the calibration images."""
        return self.lab.calibration(self.images.train, device=evaluate.device_of(self.model))

    def _scores(self, folder):
        """Scores of weights and of units, {criterion: {key: tensor}} on the CPU: taken at first use, and saved in
        `explore` of the run's folder under a hash of all that they depend on."""
        kept, values = checkpoint.read(folder), self.lab.params.calibration
        about = [FORMAT, WEIGHTS, UNITS, self.lab.seed, self.lab.params.data, values]
        about += [kept["sha256"][checkpoint.WEIGHTS], kept["recipe"], kept["structure"]]
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        path = self.lab.path("explore") / f"{folder.name}-{key}.pt"
        if not path.is_file():
            record.say(f"taking the scores of {folder.name}, once: one pass over {values.images} images")
            options = {"weights": WEIGHTS, "units": UNITS, "labels": values.labels, "seed": self.lab.seed}
            found = scores.measure(self.model, self.calibration(), **options)
            record.write_atomic(path, partial(torch.save, [found["weights"], found["units"]]))
        return torch.load(path, map_location="cpu", weights_only=True)

    @cached_property
    def layers(self):
        """{block, or patch merging: {role: name of the weight}} of all weights that have scores, in forward order."""
        view, found = models.view(self.model), {}
        for name in self.weights["taylor"]:
            layer, block = name.removesuffix(".weight"), view.block_of(name)
            found.setdefault(block.name if block else layer.rpartition(".")[0], {})[view.role(layer)] = name
        return found

    @cached_property
    def floor(self):
        """The least share of the MACs, in hundredths, that a plan can keep; 1 if none can remove anything."""

        def is_reached(hundredth):
            with suppress(budget.Unreachable):
                return bool(self.plan("fisher", hundredth / 100))
            return False

        return (1 + bisect.bisect_left(range(1, 100), True, key=is_reached)) / 100

    @torch.no_grad()
    def cut(self, criterion, sparsity, unit_criterion, macs):
        """What goes and what is left when a share of the weights, in [0, 1), is masked by one criterion and heads and
        neurons are removed by another until a share of the MACs is left, in [floor, 1]: Values of

        keep        {parameter: bool}, False where a weight is masked
        drop        {(block, kind): indices} of the units that go
        stay        {parameter: bool}, False where a weight goes with its unit
        threshold   the largest masked score, -inf without
        model       the one that is left, masked and smaller
        masked      predicted rise of the loss (nats): the sum of `obd` over masked weights, those of units left out
        removed     the same by the units: the sum of their `fisher`
        """
        plan, model = self.plan(unit_criterion, macs) if macs < 1 else None, self.model
        keep = masks.keep_largest(self.weights[criterion], sparsity=sparsity)
        gone = {name: ~mask for name, mask in keep.items() if not mask.all()}
        if gone:
            model = copy.deepcopy(model)
            prune.apply(model, keep)
        if plan:
            model, _ = budget.cut(model, plan)
        drop = plan.drop if plan else {}
        stay = {name: mask.cpu() for name, mask in prune.units_to_masks(self.model, drop).items()}
        highest = [self.weights[criterion][name][mask].max().item() for name, mask in gone.items()]
        masked = [self.weights["obd"][name][mask & stay.get(name, mask)].sum().item() for name, mask in gone.items()]
        removed = [self.units["fisher"][key][indices].sum().item() for key, indices in drop.items()]
        found = {"keep": keep, "drop": drop, "stay": stay, "threshold": max(highest, default=-np.inf), "model": model}
        return record.Values(found, masked=sum(masked), removed=sum(removed))


def costs(model):
    """{words: count}; on disk as checkpoint.save writes float32, without zeros."""
    sums = cost.breakdown(model)[["macs", "macs_ideal", "params", "nonzero"]].sum()
    words = ("MACs", "MACs if zeros were free", "parameters", "non-zero parameters", "bytes in memory", "bytes on disk")
    return dict(zip(words, [*map(int, sums), cost.bytes_memory(model), cost.bytes_disk(model)], strict=True))


# -- pictures


def table(lines):
    """HTML of a table, lines of words."""
    cell = '<td style="padding:1px 8px;text-align:right">{}</td>'.format
    rows = ["".join(map(cell, line)) for line in lines]
    return f"<table><tr>{'</tr><tr>'.join(rows)}</tr></table>"


def costs_table(dense, cut):
    """HTML of `costs`, of the dense model and of what is left, over the predicted rise of the loss of a cut."""
    left = costs(cut.model)
    lines = [("", "dense", "cut", "left")]
    lines += [(n, f"{dense[n]:,}", f"{left[n]:,}", f"{left[n] / dense[n]:.1%}") for n in dense]
    lines += [("predicted rise of the loss (nats)", "", f"{cut.masked + cut.removed:.2g}", "")]
    lines += [("of which by weights (obd)", "", f"{cut.masked:.2g}", "")]
    return table([*lines, ("of which by units (fisher)", "", f"{cut.removed:.2g}", "")])


def units_table(units, drop):
    """HTML, a line for each block: scores of its heads, struck out where they go, and the neurons that stay.

    units: {(block, kind): scores}. drop: {(block, kind): indices} of those that go.
    """
    gone = f'<s style="background:{STATES["goes with its unit"]}">{{:.2g}}</s>'
    lines = [("block", "neurons that stay", "heads, by score")]
    for block in dict.fromkeys(block for block, _ in units):
        heads, neurons = (units.get((block, kind), torch.empty(0)).tolist() for kind in ("heads", "neurons"))
        out, left = drop.get((block, "heads"), ()), len(neurons) - len(drop.get((block, "neurons"), ()))
        bar = f'<progress value="{left}" max="{len(neurons)}" style="width:80px"></progress> {left} of {len(neurons)}'
        lines.append((block, bar, *((gone if i in out else "{:.2g}").format(score) for i, score in enumerate(heads))))
    return table(lines)


class LayerPicture:
    """One layer: its mask, and a histogram of its weights by score, with a line where the cut is.

    A figure beside pyplot, which would show and keep it. Artists are made once and then moved: those in `moving` are
    drawn anew over the others, which are drawn when `background` is None, as that takes longer.
    """

    @plots.styled
    def __init__(self):
        self.figure = Figure((9, 3.4), layout="none")
        self.canvas = FigureCanvasAgg(self.figure)
        margins = {"left": 0.08, "right": 0.985, "bottom": 0.18, "top": 0.81, "wspace": 0.18}
        self.mask, self.panel = self.figure.subplots(1, 2, gridspec_kw=margins)
        states = {"cmap": ListedColormap(list(STATES.values())), "vmin": 0, "vmax": len(STATES) - 1}
        self.image = self.mask.imshow(np.zeros((1, 1)), aspect="auto", **states)
        self.mask.grid(False)
        self.title = self.mask.set_title("", fontsize=11)
        self.bars = [self.panel.stairs([0], [1, 2], fill=True, color=color) for color in STATES.values()]
        self.line = self.panel.axvline(1, color="0.1", linewidth=1.5)
        self.panel.set_xscale("log")
        self.panel.set_title("weights by score", fontsize=11)
        self.figure.legend([*self.bars, self.line], [*STATES, "threshold"], loc="upper right", ncols=4)
        self.moving = [self.image, self.title, *self.bars, self.line]
        for artist in self.moving:
            artist.set_animated(True)  # left out where all is drawn

    def show(self, name, criterion, found):
        """Turn to the layer whose weight has this name, and to a criterion. found: its scores, {name: tensor}, of all
        layers, which share an axis; the few lowest ones are counted in its first bin."""
        rows, columns = found[name].shape
        self.image.set_extent((0, columns, rows, 0))
        self.mask.set(xlabel=f"input of {name.removesuffix('.weight')}", ylabel="row (output)")
        positive = np.concatenate([[1e-12], *(score[score > 0].numpy() for score in found.values())])
        low = np.partition(positive, len(positive) // 1000)[len(positive) // 1000]
        self.edges = np.geomspace(low, 1.001 * positive.max(), BINS + 1)
        self.places = np.digitize(found[name].numpy(), self.edges[1:-1])  # the bin of each weight
        self.panel.set(xlim=self.edges[[0, -1]], ylim=(0, 1.05 * np.bincount(self.places.ravel()).max()))
        self.panel.set_xlabel(f"{criterion} score")
        self.background = None

    def move(self, keep, stay, threshold):
        """Show another cut. keep, stay: bool tensors like the weight, as in Subject.cut."""
        state = torch.where(stay, 2 * keep, 1).numpy()
        self.image.set_data(state)
        self.title.set_text(f"kept {(state == 2).sum():,} of {state.size:,}")
        for least, bar in enumerate(self.bars):  # each over the ones before
            bar.set_data(np.bincount(self.places[state >= least], minlength=BINS), self.edges)
        self.line.set_xdata([np.clip(threshold, *self.edges[[0, -1]])] * 2)
        self.line.set_visible(np.isfinite(threshold))

    @plots.styled
    def png(self):
        """Bytes of a PNG, lightly compressed, as it is looked at for a moment."""
        if self.background is None:
            self.canvas.draw()
            self.background = self.canvas.copy_from_bbox(self.figure.bbox)
        self.canvas.restore_region(self.background)
        for artist in self.moving:
            artist.axes.draw_artist(artist)
        file = io.BytesIO()
        plt.imsave(file, np.asarray(self.canvas.buffer_rgba()), format="png", pil_kwargs={"compress_level": 1})
        return file.getvalue()


# -- widgets


class Explorer:
    """The widgets: `show` them, and move them. cut: Subject.cut of how they stand, with the model to go on with.

    lab: a Run, whose checkpoint is opened first if it has one, else the next of `checkpoints`. device: where models
    are scored and tested. Raises what `checkpoints`, data.load (where images are missing) and checkpoint.load raise.
    """

    def __init__(self, lab, *, device="cpu"):
        self.lab, self.device, self.places = lab, device, checkpoints(lab)
        wide, dropdown = {"width": "400px", "max_width": "100%"}, ipywidgets.Dropdown
        self.checkpoint = dropdown(description="checkpoint", options=[*self.places], layout=wide)
        self.block, self.layer = dropdown(description="block"), dropdown(description="layer")
        self.criterion = dropdown(description="weights by", options=WEIGHTS)
        self.unit_criterion = dropdown(description="units by", options=UNITS)
        share = {"step": 0.01, "readout_format": ".0%", "layout": wide, "style": {"description_width": "110px"}}
        self.sparsity = ipywidgets.FloatSlider(0.5, description="weights masked", max=0.99, **share)
        self.macs = ipywidgets.FloatSlider(0.8, description="MACs kept", max=1, **share)
        self.button = ipywidgets.Button(description="test on images")
        narrow = {"max_width": "100%", "overflow": "auto"}
        self.layer_image, self.test_image = (ipywidgets.Image(layout=narrow) for _ in range(2))
        self.heads, self.table, self.status, self.answer = (ipywidgets.HTML(layout=narrow) for _ in range(4))
        rows = [[self.checkpoint, self.block, self.layer], [self.sparsity, self.criterion]]
        rows += [[self.macs, self.unit_criterion], [self.status], [self.layer_image], [self.heads, self.table]]
        rows += [[self.button, self.answer], [self.test_image]]
        wrapped = {"flex_flow": "row wrap", "align_items": "center"}
        self.box = ipywidgets.VBox([ipywidgets.HBox(row, layout=wrapped) for row in rows])
        self._open(self.checkpoint.value)
        self.checkpoint.observe(self._reopen, "value")
        for each in (self.block, self.layer, self.criterion, self.unit_criterion, self.sparsity, self.macs):
            each.observe(self.move, "value")
        self.button.on_click(self.test)

    def show(self):
        """Display the widgets; headless, where nobody can move them, the pictures and the table as they are."""
        if record.headless():
            display(Image(data=self.layer_image.value), HTML(self.heads.value), HTML(self.table.value))
        else:
            gc.collect()
            gc.freeze()  # to look through all that is imported for garbage takes longer than the rest of a move
            display(self.box)

    def _reopen(self, change):
        if change["new"] == self.label:  # back after a failure
            return
        self.status.value = f"opening {change['new']} …"
        try:
            self._open(change["new"])
        except Exception as error:  # shown, as nobody sees what a callback raises
            self.checkpoint.value = self.label
            self.status.value = _in_red(f"{change['new']}: {error}")

    def _open(self, label):
        subject = Subject(label, self.places[label], self.lab, device=self.device)
        blocks, floor, dense = subject.layers, subject.floor, costs(subject.model)  # what can fail has been done
        self.subject, self.label, self.dense = subject, label, dense
        self.answer.value, self.test_image.layout.display = "", "none"  # of another model
        self.layer_picture, self.shown = LayerPicture(), None
        for widget, options in ((self.block, blocks), (self.layer, dict.fromkeys(sum(map(list, blocks.values()), [])))):
            widget.options, widget.index = [*options], 0
        self.macs.min = floor
        self.move()

    def move(self, change=None):
        """Cut as the widgets stand, and show it."""
        criterion, unit_criterion = self.criterion.value, self.unit_criterion.value
        sparsity, macs = round(self.sparsity.value, 2), round(self.macs.value, 2)
        own = self.subject.layers[self.block.value]
        name = own.get(self.layer.value, next(iter(own.values())))
        self.cut = self.subject.cut(criterion, sparsity, unit_criterion, macs)
        if self.shown != (name, criterion):
            self.layer_picture.show(name, criterion, self.subject.weights[criterion])
            self.shown = name, criterion
        keep = self.cut.keep[name]
        self.layer_picture.move(keep, self.cut.stay.get(name, torch.ones_like(keep)), self.cut.threshold)
        self.layer_image.value = self.layer_picture.png()
        self.heads.value = units_table(self.subject.units[unit_criterion], self.cut.drop)
        self.table.value = costs_table(self.dense, self.cut)
        words = f"{sparsity:.0%} of the weights masked by {criterion}, units removed by {unit_criterion}"
        self.status.value = f"{words} to {macs:.0%} of the MACs"

    def test(self, button=None):
        """Compare the dense model and the cut one on validation images, show those that they see most differently, and
        measure the loss on the calibration images, which the prediction is of."""
        self.answer.value = "testing …"
        try:
            self.answer.value = self._tested()
        except Exception as error:
            self.answer.value = _in_red(error)

    def _tested(self):
        images, before, after = self.subject.images, self.subject.model, self.cut.model
        split = images.val.subset(min(TESTED, len(images.val)))
        found = evaluate.compare(before, after, split, most=len(split), classes=images.classes).images
        right = [(found[column] == found.label).sum() for column in ("before", "after")]
        dense, cut = (f"<b>{count} ({count / len(split):.1%})</b>" for count in right)
        figure = plots.changed_images(split, found.head(SHOWN))
        self.test_image.value, self.test_image.layout.display = print_figure(figure), None
        plt.close(figure)
        seen = self.subject.calibration()
        rise, predicted = scores.loss(after, seen) - scores.loss(before, seen), self.cut.masked + self.cut.removed
        is_near = predicted / 3 <= rise <= 3 * predicted
        return (
            f"Of {len(split)} validation images dense gets {dense} right, cut {cut}; {self.status.value}. On the "
            f"calibration images the loss changes by <b>{rise:+.2g}</b> nats, predicted: {predicted:+.2g}. "
            f"{'' if is_near else _in_red('The prediction is off by more than 3 times: choose by what is measured. ')}"
            "Below, those whose prediction moved most, as label: dense → cut."
        )


def _in_red(words):
    return f'<span style="color:firebrick">{html.escape(str(words))}</span>'
