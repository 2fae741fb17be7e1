"""Explorer: pick a checkpoint, a layer, criteria and shares by widgets; see at once what would go, and what that costs.

Scores are taken once for a checkpoint and saved beside its run. A move of a slider ranks them, really cuts a copy of
the model and counts that one: all but the predicted loss is what the same calls give elsewhere. Two cuts add up:
weights masked over all layers together (masks.keep_largest), heads and neurons removed to a share of the MACs
(budget.plan).
"""

import atexit
import bisect
import contextlib
import copy
import gc
import hashlib
import html
import io
import json
from functools import cached_property

import ipywidgets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import safetensors.torch
import torch
from IPython.display import HTML, Image, display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image as Pixels

from . import budget, checkpoint, cost, data, evaluate, masks, models, plots, prune, record, scores

FORMAT = 1  # of saved scores: another one where their meaning changes
WEIGHTS = ("taylor", "fisher", "obd", "gradient", "snip", "magnitude", "random")
UNITS = ("fisher", "taylor", "michel")
KINDS = ("heads", "neurons")
SHOWN, TESTED = 12, 256  # test images: pictures, and how many accuracy is of
BINS = 60  # of histograms
STATES = {"masked": "0.85", "goes with its unit": plots.COLORS[1], "kept": plots.COLORS[0]}
COSTS = {
    "macs": "MACs",
    "macs_ideal": "MACs if zeros were free",
    "params": "parameters",
    "nonzero": "non-zero parameters",
    "bytes_memory": "bytes in memory",
    "bytes_disk": "bytes on disk",
}
FAILURES = (OSError, ValueError, TypeError, RuntimeError)  # shown, as nobody sees what a widget's callback raises


# -- checkpoints and their scores


def checkpoints(lab):
    """{label: folder} of all that can be explored: checkpoints of lab, a Run, then others of its study and model, those
    of other runs, and shipped ones.

    Left out are models with layers that were factored or lost rows, of which no budget takes units, and other
    overridden runs than lab. Raises FileNotFoundError, with the commands that make a checkpoint, if there are none.
    """
    runs, shipped, found = record.root() / "runs", record.repository() / "checkpoints", {}

    def rank(folder):
        is_shipped = not folder.is_relative_to(runs)
        study, model = folder.parts[-2:] if is_shipped else folder.parts[-4:-2]
        is_other, looks_other = folder.parent != lab.folder, model != lab.model_name
        others = is_other, looks_other or study != lab.study, is_shipped, looks_other
        return *others, folder.parent, folder.name != "dense", folder.name

    for folder in sorted([*runs.glob("*/*/seed*/*"), *shipped.glob("*/*")], key=rank):
        is_run = folder.is_relative_to(runs)
        label = folder.relative_to(runs if is_run else shipped).as_posix()
        is_known = folder.parent == lab.folder or "+" not in label
        if is_known and (folder / checkpoint.RECORD).is_file() and _is_plain(folder):
            found[label if is_run else f"{label}, shipped"] = folder
    if not found:
        train = lab.command("1_train")
        raise FileNotFoundError(f"no checkpoint in {runs} or {shipped}: run make demo, or train one with\n  {train}")
    return found


def _is_plain(folder):
    """Whether all linear layers are plain ones, or the record is broken: opening it says how."""
    try:
        layers = json.loads((folder / checkpoint.RECORD).read_text())["structure"]["layers"]
        return all(layer["type"] == "Linear" for layer in layers.values())
    except (ValueError, KeyError, TypeError):
        return True


def run_of(folder, lab):
    """The Run whose images and values go with a checkpoint: lab for its own, else that which its folder names."""
    if folder.parent == lab.folder:
        return lab
    if folder.is_relative_to(record.repository() / "checkpoints"):
        return record.open_run(folder.parent.name, folder.name)
    study, model, seed, _ = folder.parts[-4:]
    return record.open_run(study, model, int(seed.removeprefix("seed")))


def saved_scores(folder, lab, model, images):
    """Scores of the checkpoint in folder, which model was loaded from, as scores.measure returns them, on the CPU.

    images: a function that gives the data.Dataset. Scores are taken at first use, from lab.calibration, and saved in
    `explore` of lab's folder, under a hash of all that they depend on: weights, architecture, images, calibration,
    seed. Raises what checkpoint.read and scores.measure raise.
    """
    kept = checkpoint.read(folder)
    about = {"format": FORMAT, "weights": kept["sha256"][checkpoint.WEIGHTS], "seed": lab.seed}
    about |= {name: kept[name] for name in ("recipe", "structure")}
    about |= {"data": lab.params.data, "calibration": lab.params.calibration, "criteria": [WEIGHTS, UNITS]}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = lab.path("explore") / f"{folder.name}-{key}.safetensors"
    names = [(group, criterion) for group, own in (("weights", WEIGHTS), ("units", UNITS)) for criterion in own]
    if not path.is_file():
        record.say(f"taking the scores of {folder.name}, once: one pass over {lab.params.calibration.images} images")
        batches = lab.calibration(images().train, device=evaluate.device_of(model))
        options = {"labels": lab.params.calibration.labels, "seed": lab.seed}
        found = scores.measure(model, batches, weights=WEIGHTS, units=UNITS, kinds=KINDS, **options)
        flat = {_flat(*name, key): s.cpu() for name in names for key, s in found[name[0]][name[1]].items()}
        record.write_atomic(path.with_suffix(".json"), json.dumps(about, indent=1))
        record.write_atomic(path, safetensors.torch.save(flat))
    flat, found = safetensors.torch.load_file(path), {"weights": {}, "units": {}}
    keys = {"weights": scores.own_parameters(model, None), "units": models.view(model).units(KINDS)}
    for group, criterion in names:  # in the model's order, which decides between equal scores
        found[group][criterion] = {key: flat[_flat(group, criterion, key)] for key in keys[group]}
    return found


def _flat(group, criterion, key):
    """Name of a tensor in the file: parts between slashes, which no name of a module has."""
    return "/".join([group, criterion, *([key] if isinstance(key, str) else key)])


# -- cuts


class Subject:
    """A checkpoint with its scores: what goes at which shares, the model that is then left, and what it costs."""

    def __init__(self, folder, lab, *, device="cpu"):
        self.lab, self.model, self.plans = lab, checkpoint.load(folder, device=device), {}
        found = saved_scores(folder, lab, self.model, lambda: self.images)
        self.weights, self.units = found["weights"], found["units"]
        self.costs = costs(self.model)

    @cached_property
    def images(self):
        """The data.Dataset of the run."""
        return data.load(**self.lab.data)

    @cached_property
    def layers(self):
        """{block, or patch merging: {role: name of the weight}} of all weights that have scores, in forward order."""
        view, found = models.view(self.model), {}
        for name in self.weights["taylor"]:
            layer, block = name.removesuffix(".weight"), view.block_of(name)
            found.setdefault(block.name if block else layer.rpartition(".")[0], {})[view.role(layer)] = name
        return found

    def plan(self, criterion, macs):
        """The budget.Plan of heads and neurons that keeps a share of the MACs, None for all of them (macs=1)."""
        if (criterion, macs) not in self.plans:
            options = {"kinds": KINDS, "macs": macs}
            plan = None if macs == 1 else budget.plan(self.model, self.units[criterion], **options)
            self.plans[criterion, macs] = plan
        return self.plans[criterion, macs]

    @cached_property
    def floor(self):
        """The least share of the MACs, in hundredths, that a plan can keep; 1 if none can remove anything."""

        def is_reached(hundredth):
            with contextlib.suppress(budget.Unreachable):
                return self.plan("fisher", hundredth / 100) is not None
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
        keep, plan, model = masks.keep_largest(self.weights[criterion], sparsity=sparsity), None, self.model
        gone = {name: ~mask for name, mask in keep.items() if not mask.all()}
        if gone:
            model = copy.deepcopy(model)
            prune.apply(model, keep)
        if plan := self.plan(unit_criterion, macs):
            model, _ = budget.cut(model, plan)
        drop = plan.drop if plan else {}
        stay = {name: mask.cpu() for name, mask in prune.units_to_masks(self.model, drop).items()}
        highest = [self.weights[criterion][name][mask].max().item() for name, mask in gone.items()]
        masked = [self.weights["obd"][name][mask & stay.get(name, mask)].sum().item() for name, mask in gone.items()]
        removed = [self.units["fisher"][key][indices].sum().item() for key, indices in drop.items()]
        found = {"keep": keep, "drop": drop, "stay": stay, "threshold": max(highest, default=-np.inf), "model": model}
        return record.Values(found, masked=sum(masked), removed=sum(removed))


def costs(model):
    """{name: count} for the names in COSTS; on disk as checkpoint.save writes float32, without zeros."""
    counts = cost.breakdown(model)[["macs", "macs_ideal", "params", "nonzero"]].sum().astype(int).to_dict()
    return counts | {"bytes_memory": cost.bytes_memory(model), "bytes_disk": cost.bytes_disk(model)}


def costs_table(dense, cut, left):
    """HTML of two `costs`, of the dense model and of what is left, over the predicted rise of the loss of a cut."""
    lines = [("", "dense", "cut", "left")]
    lines += [(COSTS[n], f"{dense[n]:,}", f"{left[n]:,}", f"{left[n] / dense[n]:.1%}") for n in COSTS]
    lines += [("predicted rise of the loss (nats)", "", f"{cut.masked + cut.removed:.2g}", "")]
    lines += [
        ("of which by weights (obd)", "", f"{cut.masked:.2g}", ""),
        ("of which by units (fisher)", "", f"{cut.removed:.2g}", ""),
    ]
    cell = '<td style="padding:0 8px;text-align:{}">{}</td>'
    rows = ["".join(cell.format("right" if i else "left", word) for i, word in enumerate(line)) for line in lines]
    return f'<table style="line-height:1.5">{"".join(f"<tr>{row}</tr>" for row in rows)}</table>'


# -- pictures


class Picture:
    """A figure beside pyplot, which would show and keep it, with axes in a row. Artists are made once and then moved:
    those in `moving` are drawn anew over the others, which are drawn when `is_new` is set. All sizes in inches:
    margins are given, as to find them takes longer than to draw."""

    def __init__(self, ratios, *, width, height, left, right, top, between):
        bottom = 0.6
        self.figure, self.moving, self.is_new = Figure((width, height), layout="none"), [], True
        FigureCanvasAgg(self.figure)
        margins = {"left": left / width, "right": 1 - right / width, "bottom": bottom / height, "top": 1 - top / height}
        margins["wspace"] = between * len(ratios) / (width - left - right - between * (len(ratios) - 1))
        self.axes = self.figure.subplots(1, len(ratios), width_ratios=ratios, gridspec_kw=margins)

    @plots.styled
    def png(self):
        """Bytes of a PNG, lightly compressed, as it is looked at for a moment."""
        canvas = self.figure.canvas
        if self.is_new:
            for artist in self.moving:
                artist.set_animated(True)
            canvas.draw()
            self.background, self.is_new = canvas.copy_from_bbox(self.figure.bbox), False
        canvas.restore_region(self.background)
        for artist in self.moving:
            artist.axes.draw_artist(artist)
        return encoded(canvas)


def encoded(canvas):
    """What was drawn on a canvas, as PNG."""
    file, pixels = io.BytesIO(), Pixels.fromarray(np.asarray(canvas.buffer_rgba()))
    pixels.convert("RGB").save(file, "png", compress_level=1)
    return file.getvalue()


class LayerPicture(Picture):
    """One layer: its mask, and histograms of its weights and of their scores, with lines where the cut is."""

    @plots.styled
    def __init__(self):
        super().__init__([1, 1.1, 1.1], width=9, height=3.2, left=0.7, right=0.15, top=0.65, between=0.6)
        self.mask, *self.panels = self.axes
        self.image = self.mask.imshow(np.zeros((1, 1, 3)), aspect="auto")
        self.mask.grid(False)
        self.bars = [
            [ax.stairs([0], [0, 1], fill=True, color=color) for color in STATES.values()] for ax in self.panels
        ]
        self.lines = [ax.axvline(0, color="0.1", linewidth=1.5) for ax in (*self.panels, self.panels[0])]
        self.panels[0].set_xlabel("value")
        for ax, words in zip(self.panels, ("weights by value", "weights by score"), strict=True):
            ax.set_title(words, fontsize=11)
        self.panels[1].set(xscale="log")
        words = {"loc": "upper right", "ncols": 4}
        self.figure.legend([*self.bars[0], self.lines[0]], [*STATES, "threshold"], **words)
        self.title = self.mask.set_title("", fontsize=11)
        self.moving = [self.image, *self.bars[0], *self.bars[1], *self.lines, self.title]
        self.palette = np.array([matplotlib.colors.to_rgb(color) for color in STATES.values()])

    def show(self, name, weight, criterion, found):
        """Turn to the layer whose weight has this name, and to a criterion. found: its scores, {name: tensor}, of all
        layers, which share an axis; the few lowest ones are counted in its first bin."""
        rows, columns = weight.shape
        self.image.set_extent((0, columns, rows, 0))
        layer = name.removesuffix(".weight")
        self.mask.set(xlim=(0, columns), ylim=(rows, 0), xlabel=f"input of {layer}", ylabel="row (output)")
        self.panels[1].set_xlabel(f"{criterion} score")
        weight, self.criterion = weight.float().cpu().numpy(), criterion
        reach = max(float(np.abs(weight).max()), 1e-12)
        self.edges = [np.linspace(-reach, reach, BINS + 1), np.geomspace(*_limits(found), BINS + 1)]
        self.places = []  # bins of all weights, by value and by score
        for ax, edges, values in zip(self.panels, self.edges, (weight, found[name].numpy()), strict=True):
            self.places.append(np.clip(np.searchsorted(edges, values, side="right") - 1, 0, BINS - 1))
            ax.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.05 * np.bincount(self.places[-1].ravel()).max()))
        self.is_new = True

    def move(self, keep, stay, threshold):
        """Show another cut. keep, stay: bool tensors like the weight, as in Subject.cut; stay None: no unit goes."""
        keep, stay = (np.ones_like(keep) if mask is None else mask.numpy() for mask in (keep, stay))
        state = np.where(stay, np.where(keep, 2, 0), 1)
        self.image.set_data(self.palette[state])
        self.title.set_text(f"kept {(state == 2).sum():,} of {state.size:,}")
        for edges, places, bars in zip(self.edges, self.places, self.bars, strict=True):
            for least, bar in enumerate(bars):  # each over the ones before
                bar.set_data(np.bincount(places[state >= least], minlength=BINS), edges)
        low, high = self.edges[1][[0, -1]]
        for line, place in zip(self.lines, (threshold, np.clip(threshold, low, high), -threshold), strict=True):
            line.set_xdata([place, place])
            line.set_visible(np.isfinite(threshold) and (line is self.lines[1] or self.criterion == "magnitude"))


def _limits(found):
    """(low, high) for a logarithmic axis of scores, {name: tensor}: of those above 0, a thousandth is below."""
    positive = np.concatenate([score[score > 0].numpy() for score in found.values()])
    if not len(positive):
        return 1e-12, 1.0
    low = np.partition(positive, len(positive) // 1000)[len(positive) // 1000]
    return float(low), float(max(positive.max(), 1.001 * low))


class UnitPicture(Picture):
    """All blocks: scores of heads, crossed where they go, and the share of neurons that stays."""

    @plots.styled
    def __init__(self, units, criterion):
        """units: {(block, kind): scores} by that criterion."""
        self.counts = {key: len(score) for key, score in units.items()}
        self.blocks = list(dict.fromkeys(block for block, _ in units))
        most = max([1, *(count for (_, kind), count in self.counts.items() if kind == "heads")])
        sizes = {"left": 0.3 + 0.09 * max(map(len, self.blocks)), "height": 0.95 + 0.44 * len(self.blocks)}
        width = sizes["left"] + 0.7 * most + 2.6
        super().__init__([0.7 * most, 1.5], width=width, **sizes, right=0.85, top=0.35, between=0.25)
        heads, neurons = self.axes
        table = np.full((len(self.blocks), most), np.nan)
        for y, block in enumerate(self.blocks):
            score = units.get((block, "heads"), torch.empty(0)).numpy()
            table[y, : len(score)] = score
        middle = {"ha": "center", "va": "center", "fontsize": 9}
        shade = np.log10(np.maximum(table, 1e-4 * max(np.nan_to_num(table).max(), 1e-30)))
        heads.imshow(shade, aspect="auto", cmap="rocket_r")
        for (y, x), score in np.ndenumerate(table):
            dark = shade[y, x] > np.nanmin(shade) / 2 + np.nanmax(shade) / 2
            words = "" if np.isnan(score) else f"{score:.2g}"
            heads.text(x, y, words, color="white" if dark else "black", **middle)
        heads.set(xticks=range(most), xlabel=f"head, {criterion} score")
        heads.set_title("heads, crossed: gone", fontsize=11)
        heads.set_yticks(range(len(self.blocks)), self.blocks)
        heads.grid(False)
        cross = {"marker": "X", "color": "black", "markeredgecolor": "white", "markersize": 10}
        (self.crosses,) = heads.plot([], [], linestyle="", **cross)
        self.bars = neurons.barh(range(len(self.blocks)), 1.0, 0.7, color=STATES["kept"], linewidth=0)
        self.words = [neurons.text(1.04, y, "", va="center", fontsize=9) for y in range(len(self.blocks))]
        neurons.set(xlim=(0, 1), ylim=heads.get_ylim(), xlabel="share that stays", yticks=[])
        neurons.set_title("neurons", fontsize=11)
        neurons.xaxis.set_major_formatter("{x:.0%}")
        self.moving = [self.crosses, *self.bars, *self.words]

    def move(self, drop):
        """Show other units that go. drop: {(block, kind): indices}."""
        gone = [
            (head + 0.39, y - 0.26) for y, block in enumerate(self.blocks) for head in drop.get((block, "heads"), ())
        ]
        self.crosses.set_data(*np.reshape(gone, (-1, 2)).T)
        for block, bar, words in zip(self.blocks, self.bars, self.words, strict=True):
            count = self.counts.get((block, "neurons"), 0)
            left = count - len(drop.get((block, "neurons"), ()))
            bar.set_width(left / max(count, 1))
            words.set_text(f"{left} of {count}")


# -- widgets


class Explorer:
    """The widgets: `show` them, and move them. cut: Subject.cut of how they stand, with the model to go on with.

    lab: a Run, whose checkpoint is opened first if it has one, else the next of `checkpoints`. device: where models
    are scored and tested. Raises what `checkpoints`, data.load (where images are missing) and checkpoint.load raise.
    """

    def __init__(self, lab, *, device="cpu"):
        self.lab, self.device, self.is_held = lab, device, False
        self.places = checkpoints(lab)
        self.checkpoint = _widget("Dropdown", "checkpoint", options=[*self.places], width=400)
        self.block, self.layer = _widget("Dropdown", "block", width=250), _widget("Dropdown", "layer", width=170)
        self.criterion = _widget("Dropdown", "weights by", options=WEIGHTS)
        self.unit_criterion = _widget("Dropdown", "units by", options=UNITS)
        share = {"step": 0.01, "readout_format": ".0%", "width": 400, "style": {"description_width": "110px"}}
        self.sparsity = _widget("FloatSlider", "weights masked", value=0.5, min=0, max=0.99, **share)
        self.macs = _widget("FloatSlider", "MACs kept", value=0.8, min=0, max=1, **share)
        self.button = _widget("Button", "test on images", width=150)
        self.layer_image, self.unit_image, self.test_image = (_widget("Image", format="png") for _ in range(3))
        self.table, self.status, self.answer = (_widget("HTML") for _ in range(3))
        rows = [[self.checkpoint, self.block, self.layer], [self.sparsity, self.criterion]]
        rows += [[self.macs, self.unit_criterion], [self.status], [self.layer_image], [self.unit_image, self.table]]
        rows += [[self.button, self.answer], [self.test_image]]
        wrapped = ipywidgets.Layout(flex_flow="row wrap", align_items="center")
        self.box = ipywidgets.VBox([ipywidgets.HBox(row, layout=wrapped) for row in rows])
        self._open(self.checkpoint.value)
        self.checkpoint.observe(self._reopen, "value")
        for each in (self.block, self.layer, self.criterion, self.unit_criterion, self.sparsity, self.macs):
            each.observe(self.move, "value")
        self.button.on_click(self.test)

    def show(self):
        """Display the widgets; headless, where nobody can move them, the pictures and the table as they are."""
        if record.headless():
            display(*(Image(data=image.value) for image in (self.layer_image, self.unit_image)), HTML(self.table.value))
        else:
            gc.collect()
            gc.freeze()  # to look through all that is imported for garbage takes longer than the rest of a move
            atexit.register(gc.unfreeze)
            display(self.box)

    def _reopen(self, change):
        if self.is_held:
            return
        self.status.value = f"opening {change['new']} …"
        try:
            self._open(change["new"])
        except FAILURES as error:
            self._set(self.checkpoint, "value", change["old"])
            self.status.value = _in_red(f"{change['new']}: {error}")

    def _open(self, label):
        folder = self.places[label]
        subject = Subject(folder, run_of(folder, self.lab), device=self.device)
        blocks, floor = subject.layers, subject.floor  # what can fail has been done
        self.subject = subject
        roles = dict.fromkeys(role for own in blocks.values() for role in own)
        for widget, options in ((self.block, blocks), (self.layer, roles)):
            self._set(widget, "options", [*options])
            self._set(widget, "index", 0)
        self._set(self.macs, "min", floor)
        self.answer.value, self.test_image.layout.display = "", "none"  # of another model
        self.layer_picture, self.shown, self.shown_units = LayerPicture(), None, (None, None)
        self.move()

    def _set(self, widget, name, value):
        """Set a trait of a widget without drawing."""
        self.is_held = True
        setattr(widget, name, value)
        self.is_held = False

    def move(self, change=None):
        """Cut as the widgets stand, and show it."""
        if self.is_held:
            return
        criterion, unit_criterion = self.criterion.value, self.unit_criterion.value
        sparsity, macs = round(self.sparsity.value, 2), round(self.macs.value, 2)
        self.cut = self.subject.cut(criterion, sparsity, unit_criterion, macs)
        own = self.subject.layers[self.block.value]
        name = own.get(self.layer.value, next(iter(own.values())))
        if self.shown != (name, criterion):
            weight = self.subject.model.get_parameter(name).detach()
            self.layer_picture.show(name, weight, criterion, self.subject.weights[criterion])
        self.layer_picture.move(self.cut.keep[name], self.cut.stay.get(name), self.cut.threshold)
        self.layer_image.value = self.layer_picture.png()
        if self.shown_units != (unit_criterion, macs):
            if self.shown_units[0] != unit_criterion:
                self.unit_picture = UnitPicture(self.subject.units[unit_criterion], unit_criterion)
            self.unit_picture.move(self.cut.drop)
            self.unit_image.value = self.unit_picture.png()
        self.shown, self.shown_units = (name, criterion), (unit_criterion, macs)
        self.table.value = costs_table(self.subject.costs, self.cut, costs(self.cut.model))
        words = f"{sparsity:.0%} of the weights masked by {criterion}, units removed by {unit_criterion}"
        self.status.value = f"{words} to {macs:.0%} of the MACs"

    def test(self, button=None):
        """Compare the dense model and the cut one on test images, and show those that they see most differently."""
        self.answer.value = "testing …"
        try:
            self.answer.value = self._tested()
        except FAILURES as error:
            self.answer.value = _in_red(error)

    def _tested(self):
        images = self.subject.images
        split = images.test.subset(min(TESTED, len(images.test)))
        options = {"most": len(split), "classes": images.classes}
        found = evaluate.compare(self.subject.model, self.cut.model, split, **options).images
        rise = np.log(found.p_before / found.p_after).mean()
        right = [(found[column] == found.label).sum() for column in ("before", "after")]
        dense, cut = (f"<b>{count} ({count / len(split):.1%})</b>" for count in right)
        figure = plots.changed_images(split, found.head(SHOWN))
        figure.canvas.draw()
        self.test_image.value, self.test_image.layout.display = encoded(figure.canvas), None
        plt.close(figure)
        return (
            f"Of {len(split)} test images dense gets {dense} right, cut {cut}, and the loss rises by <b>{rise:.2g}</b> "
            f"nats (predicted: {self.cut.masked + self.cut.removed:.2g}); {self.status.value}. Below, those whose "
            "prediction moved most, as label: dense → cut."
        )


def _in_red(words):
    return f'<span style="color:firebrick">{html.escape(str(words))}</span>'


def _widget(kind, description="", *, width=None, **options):
    layout = ipywidgets.Layout(max_width="100%", **({"width": f"{width}px"} if width else {}))
    described = {"description": description} if description else {}
    return getattr(ipywidgets, kind)(layout=layout, **described, **options)
