"""Explore by widgets which weights and units a cut takes from a checkpoint, and what is left.

The user picks a checkpoint, a layer, criteria and shares.

Public: Explorer.
"""

# Two cuts add up: weights are masked over all layers together (masks.keep_largest), and heads and
# neurons are removed to a share of the MACs (budget.plan). Scores are measured once for a
# checkpoint and saved beside its run. Each move of a slider ranks the scores, cuts a copy of the
# model and counts what that copy costs. So every number but the predicted loss is what the same
# calls give elsewhere.

import copy
import gc
import hashlib
import html
import io
import json
from contextlib import suppress
from functools import cache, cached_property, partial
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.core.pylabtools import print_figure
from IPython.display import HTML, Image, display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from vitlab import files, models
from vitlab.evaluation import cost, evaluate
from vitlab.models import checkpoint
from vitlab.pruning import budget, masks, pool, prune, scores
from vitlab.report import _style, drawings
from vitlab.studies import runs, settings
from vitlab.studies.runs import checkpoint_id
from vitlab.training import data

_FORMAT = 2  # version of the saved scores; it changes when their meaning does
_WEIGHTS = ("taylor", "fisher", "obd", "gradient", "snip", "magnitude", "random")
_UNITS = ("fisher", "taylor", "michel")
_SHOWN = 12  # how many validation images are shown
_TESTED = 256  # how many validation images accuracy is measured on
_BINS = 60  # bins of a histogram
_STATES = {"masked": "0.85", "goes with its unit": _style.BAD, "kept": _style.COLORS["pool"]}


# -- checkpoints


def _checkpoints(lab):
    """Return {"study/model/seed/name": folder} of all checkpoints, those without images last.

    lab: a Run
    Raises FileNotFoundError, with the commands that make a checkpoint, if there are none.
    """
    runs = files.root() / "runs"
    shipped = files.repository() / "checkpoints"
    # A checkpoint that comes with the repository has the name "shipped".
    folders = {"/".join(folder.parts[-4:]): folder for folder in runs.glob("*/*/seed*/*")}
    for folder in shipped.glob("*/*"):
        study, model, seed = checkpoint_id(folder)
        folders[f"{study}/{model}/seed{seed}/shipped"] = folder

    # The checkpoints of lab come first, then others of its study and model, then dense ones. Those
    # of other models whose images are not here come last.
    lacks = {
        study: _lacks_images(study, lab) for study in {label.split("/")[0] for label in folders}
    }

    def order(label):
        study, model, _, _ = label.split("/")
        is_of_lab = folders[label].parent == lab.folder
        is_of_model = (study, model) == (lab.study, lab.model_name)
        is_dense = label.endswith("/dense")
        return not is_of_lab, not is_of_model, bool(lacks[study]), not is_dense, label

    # Overridden runs other than lab are left out.
    chosen = {}
    for label in sorted(folders, key=order):
        folder = folders[label]
        is_overridden = "+" in label and folder.parent != lab.folder
        if not is_overridden and _layers_of(folder) is not None:
            chosen[label] = folder
    if chosen:
        return chosen
    raise FileNotFoundError(
        f"no checkpoint in {runs} or {shipped}: train one with\n  {lab.command('1_train')}"
    )


def _layers_of(folder):
    """Return the types of a checkpoint's linear layers, None for a folder that is no checkpoint."""
    # A folder without a record, or with a broken one, is no checkpoint.
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        layers = json.loads((folder / checkpoint.RECORD).read_text())["structure"]["layers"]
        return {layer["type"] for layer in layers.values()}
    return None


def _lacks_images(study, lab):
    """Return which images of a study are not here, "" if they are. Nothing is downloaded."""
    try:
        name, is_overridden, _ = study.partition("+")
        given = lab.given if name == lab.study else name
        # Of overridden runs the list has none but lab.
        name = (lab.params if is_overridden else settings.study(given)).data.name
        path = name if name in settings.DATASETS else settings.find(given, name)
    except (ValueError, TypeError, OSError) as error:
        return str(error).splitlines()[0]
    # Shapes are drawn where they are missing.
    return "" if name == "shapes" or data.is_here(path) else f"no images of {name}"


# -- cuts


class _Subject:
    """Hold a checkpoint with its scores, and cut it by them."""

    def __init__(self, label, folder, lab, *, device="cpu"):
        """Open a checkpoint, and measure its scores unless they are saved already.

        label, folder: an item of `_checkpoints`
        lab: the Run of the checkpoint, or another one
        device: where the model is scored
        Raises what checkpoint.load raises.
        """
        study, model, seed, _ = label.split("/")
        if folder.parent != lab.folder:
            # A study may be given as the path of its file, which its name alone does not tell.
            study = lab.given if study == lab.study else study
            lab = runs.open_run(study, model, int(seed.removeprefix("seed")))
        self.lab = lab
        self.folder = folder
        self.model = checkpoint.load(folder, device=device)
        self.weights, self.units = self._scores(folder)
        self.plan = cache(
            lambda criterion, macs: budget.plan(self.model, self.units[criterion], macs=macs)
        )

    @cached_property
    def images(self):
        """Return the data.Dataset of the run."""
        images = data.load(**self.lab.data)
        models.check_classes(self.model, images)
        return images

    def calibration(self):
        """Return batches of the calibration images."""
        device = evaluate.device_of(self.model)
        return self.lab.calibration(self.images.train, device=device)

    def _scores(self, folder):
        """Return the scores of weights and of units, both {criterion: {key: tensor}} on the CPU."""
        saved = checkpoint.read(folder)
        calibration = self.lab.params.calibration
        causes = [_FORMAT, _WEIGHTS, _UNITS, self.lab.seed, self.lab.params.data, calibration]
        causes += [saved["sha256"][checkpoint.WEIGHTS], saved["recipe"], saved["structure"]]
        # They are saved in `explore` of the run's folder, under a hash of all that they depend on.
        key = hashlib.sha256(json.dumps(causes, sort_keys=True).encode()).hexdigest()[:16]
        path = self.lab.path("explore") / f"{folder.name}-{key}.pt"
        if not path.is_file():
            passes = f"one pass over {calibration.images} images"
            files.log(f"measuring the scores of {folder.name}, once: {passes}")
            measured = scores.measure(
                self.model,
                self.calibration(),
                weights=_WEIGHTS,
                units=_UNITS,
                labels=calibration.labels,
                seed=self.lab.seed,
            )
            files.write_atomic(path, partial(torch.save, [measured["weights"], measured["units"]]))
        return torch.load(path, map_location="cpu", weights_only=True)

    @cached_property
    def layers(self):
        """Return {block: {role: name of the weight}} of weights with scores, in forward order."""
        view = models.view(self.model)
        weights = {}
        linears = view.linears()
        for name in self.weights["taylor"]:
            layer = next(layer for layer in linears if name.startswith(f"{layer}."))
            block = view.block_of(name)
            # A patch merging lies in no block, and counts as one of its own.
            block_name = block.name if block else layer.rpartition(".")[0]
            # A factored layer has several weights: its first one is "qkv first.weight".
            part = name.removeprefix(layer).strip(".")
            role = f"{view.role(layer)} {part}".removesuffix(" weight").removesuffix(".weight")
            weights.setdefault(block_name, {})[role] = name
        return weights

    def parts(self, name):
        """Return {"q": rows, "k": rows, "v": rows} of a weight whose rows are these, else {}."""
        block = models.view(self.model).block_of(name)
        if block is None or not block.num_heads or not name.startswith(f"{block.name}.attn.qkv."):
            return {}
        queries, values = block.num_heads * block.qk_dim, block.num_heads * block.head_dim
        rows = {"q": queries, "k": queries, "v": values}
        return rows if sum(rows.values()) == len(self.weights["taylor"][name]) else {}

    def code(self, criterion, sparsity, unit_criterion, macs):
        """Return the lines of Python that make the model of `cut`, given the same."""
        calibration = self.lab.params.calibration
        study = self.lab.given
        if str(study).endswith((".yaml", ".yml")):  # the code may be run in another folder
            study = Path(study).absolute()
        given = f'"{study}", "{self.lab.model_name}", {self.lab.seed}'
        if self.lab.override:
            given += f", {self.lab.override}"
        lines = [
            "from vitlab import budget, checkpoint, data, masks, prune, runs, scores",
            "",
            f"lab = runs.open_run({given})",
            "images = data.load(**lab.data)",
            f'model = checkpoint.load("{self.folder}")',
            "measured = scores.measure(",
            "    model,",
            "    lab.calibration(images.train),",
            f'    weights=["{criterion}"],',
            f'    units=["{unit_criterion}"],',
            f'    labels="{calibration.labels}",',
            f"    seed={self.lab.seed},",
            ")",
            f'keep = masks.keep_largest(measured["weights"]["{criterion}"], sparsity={sparsity})',
            "small = prune.masked(model, keep)",
        ]
        if macs < 1:
            lines += [
                f'plan = budget.plan(model, measured["units"]["{unit_criterion}"], macs={macs})',
                "small, _ = budget.cut(small, plan)",
            ]
        return "\n".join(lines)

    @cached_property
    def floor(self):
        """Return the least share of the MACs, in hundredths, that a plan can keep.

        It is 1 where layers are factored or lost rows: plans remove units of whole layers.
        """
        if _layers_of(self.folder) - {"Linear"}:
            return 1
        try:
            self.plan("fisher", 0.01)
        except pool.Unreachable as error:
            # It is 1 if no plan can remove anything.
            return next(share / 100 for share in range(1, 101) if share >= 100 * error.floor)
        return 0.01

    @torch.no_grad()
    def cut(self, criterion, sparsity, unit_criterion, macs):
        """Mask weights, remove units, and return what goes and what is left.

        criterion: by which weights are masked
        sparsity: share of the weights to mask, in [0, 1)
        unit_criterion: by which heads and neurons are removed
        macs: share of the MACs to keep, in [floor, 1]

        Returns Values:
            keep: {parameter: bool}, False where a weight is masked
            drop: {(block, kind): indices} of the units that go
            stay: {parameter: bool}, False where a weight goes with its unit
            threshold: the largest masked score, -inf if nothing is masked
            model: the model that is left, masked and smaller
            masked: predicted rise of the loss by the weights, in nats
            removed: predicted rise of the loss by the units, in nats
        """
        weights = self.weights[criterion]
        keep = masks.keep_largest(weights, sparsity=sparsity)
        model, drop = self.model, {}
        if not all(mask.all() for mask in keep.values()):
            model = copy.deepcopy(model)
            prune.apply(model, keep)
        if macs < 1:
            plan = self.plan(unit_criterion, macs)
            model, _ = budget.cut(model, plan)
            drop = plan.drop
        unit_masks = prune.units_to_masks(self.model, drop)
        stay = {name: mask.cpu() for name, mask in unit_masks.items()}
        threshold, masked = -np.inf, 0
        for name, mask in keep.items():
            if not mask.all():
                is_masked = ~mask
                threshold = max(threshold, weights[name][is_masked].max().item())
                # The weights' part is the sum of `obd` over the masked weights of units that stay.
                # The score of a unit includes its own weights.
                counted = is_masked & stay.get(name, is_masked)
                masked += self.weights["obd"][name][counted].sum().item()
        fisher = self.units["fisher"]
        # The units' part is the sum of their `fisher`.
        removed = sum(fisher[key][indices].sum().item() for key, indices in drop.items())
        return settings.Values(
            keep=keep,
            drop=drop,
            stay=stay,
            threshold=threshold,
            model=model,
            masked=masked,
            removed=removed,
        )


def _costs(model):
    """Return {description: count} of what a model costs."""
    sums = cost.breakdown(model).sum(numeric_only=True)
    return {
        "MACs": int(sums.macs),
        "MACs if zeros were free": int(sums.macs_ideal),
        "parameters": int(sums.params),
        "non-zero parameters": int(sums.nonzero),
        "bytes in memory": cost.bytes_memory(model),
        # On disk it is stored without zeros, as checkpoint.save writes it.
        "bytes on disk": cost.bytes_disk(model),
    }


# -- tables and pictures


def _table(lines):
    """Return the HTML of a table, given as lines of words."""
    cell = '<td style="padding:1px 8px;text-align:right">{}</td>'
    rows = ["".join(cell.format(word) for word in line) for line in lines]
    return f"<table><tr>{'</tr><tr>'.join(rows)}</tr></table>"


def _costs_table(before, cut):
    """Return the HTML of a table of costs and of the predicted rise of the loss.

    before: `_costs` of the checkpoint
    cut: what `_Subject.cut` returned
    """
    lines = [("", "checkpoint", "cut", "left")]
    for name, count in _costs(cut.model).items():
        lines.append((name, f"{before[name]:,}", f"{count:,}", f"{count / before[name]:.1%}"))
    rises = {
        "predicted rise of the loss (nats)": cut.masked + cut.removed,
        "of which by weights (obd)": cut.masked,
        "of which by units (fisher)": cut.removed,
    }
    lines += [(name, "", f"{rise:.2g}", "") for name, rise in rises.items()]
    return _table(lines)


def _units_table(units, drop):
    """Return the HTML of a table with a line for each block: its heads and its neurons.

    units: {(block, kind): scores}
    drop: {(block, kind): indices} of the units that go
    """
    color = _STATES["goes with its unit"]
    lines = [("block", "neurons that stay", "scores of heads")]
    for block in dict.fromkeys(block for block, _ in units):
        count = len(units.get((block, "neurons"), ()))
        left = count - len(drop.get((block, "neurons"), ()))
        # The line shows how many neurons stay, and the scores of heads: a line strikes out those of
        # heads that go.
        bar = f'<progress value="{left}" max="{count}" style="width:80px"></progress>'
        line = [block, f"{bar} {left} of {count}"]
        for i, score in enumerate(units.get((block, "heads"), ())):
            is_removed = i in drop.get((block, "heads"), ())
            line.append(
                f'<s style="background:{color};color:white">{score:.2g}</s>'
                if is_removed
                else f"{score:.2g}"
            )
        lines.append(line)
    return _table(lines)


class _LayerPicture:
    """Draw one layer: its mask, and a histogram of its weights by score, with a line at the cut.

    moving: the artists that a move changes
    background: a picture of all other artists, or None if it must be drawn again
    """

    # Artists are made once, and then moved. Those in `moving` are drawn each time, over a picture
    # of the others. The others take most of the time and are drawn only when `background` is None.

    @_style.styled
    def __init__(self):
        # The figure is none of pyplot's, which would show and keep it.
        self.figure = Figure((9, 3.4), layout="none")
        self.canvas = FigureCanvasAgg(self.figure)
        self.figure.subplots_adjust(left=0.08, right=0.985, bottom=0.18, top=0.81, wspace=0.18)
        self.mask, self.panel = self.figure.subplots(1, 2)
        colors = list(_STATES.values())
        self.image = self.mask.imshow(
            np.zeros((1, 1)),
            cmap=ListedColormap(colors),
            vmin=0,
            vmax=len(colors) - 1,
            interpolation="nearest",
            aspect="auto",
        )
        self.mask.grid(False)
        self.mask.set_ylabel("row (output)")
        self.title = self.mask.set_title("", fontsize=11)
        self.parts = []  # lines and letters of queries, keys and values
        self.stairs = [self.panel.stairs([0], [1, 2], fill=True, color=color) for color in colors]
        self.line = self.panel.axvline(1, color="0.1", linewidth=1.5)
        self.panel.set_xscale("log")
        self.panel.set_title("weights by score", fontsize=11)
        self.figure.legend(
            [*self.stairs, self.line],
            [*_STATES, "threshold"],
            loc="upper right",
            ncols=len(_STATES) + 1,
        )
        self.moving = [self.image, self.title, *self.stairs, self.line]
        plt.setp(self.moving, animated=True)  # canvas.draw leaves these artists out

    def show(self, name, criterion, scores, parts=None):
        """Change to another layer or criterion.

        name: name of the layer's weight
        criterion: name of the criterion, for the axis
        scores: {name: tensor} of all layers
        parts: {letter: number of rows} of what the rows are, from the first one on
        """
        rows, columns = scores[name].shape
        for artist in self.parts:
            artist.remove()
        self.parts, end = [], 0
        for letter, count in (parts or {}).items():
            middle = 1 - (end + count / 2) / rows
            self.parts.append(
                self.mask.text(1.01, middle, letter, transform=self.mask.transAxes, va="center")
            )
            end += count
            if end < rows:
                self.parts.append(self.mask.axhline(end, color="black", linewidth=1))
        plt.setp(self.parts, animated=True)
        self.image.set_extent((0, columns, rows, 0))
        self.mask.set_xlabel(f"input of {name.removesuffix('.weight')}")
        # All layers share an axis. The lowest thousandth of the scores is counted in its first bin.
        positive = [score[score > 0].numpy() for score in scores.values()]
        positive = np.concatenate([[1e-12], *positive])
        first = len(positive) // 1000
        lowest = np.partition(positive, first)[first]
        highest = 1.001 * positive.max()
        self.edges = np.geomspace(lowest, highest, _BINS + 1)
        self.bin_of_weight = np.digitize(scores[name].numpy(), self.edges[1:-1])  # of each weight
        most = np.bincount(self.bin_of_weight.ravel()).max()
        self.panel.set_xlim(lowest, highest)
        self.panel.set_ylim(0, 1.05 * most)
        self.panel.set_xlabel(f"{criterion} score")
        self.background = None

    def move(self, keep, stay, threshold):
        """Show another cut of the layer.

        keep, stay: bool tensors like the weight, as `_Subject.cut` returns them
        threshold: the largest masked score
        """
        state = torch.where(stay, 2 * keep, 1).numpy()
        self.image.set_data(state)
        self.title.set_text(f"kept {(state == 2).sum():,} of {state.size:,}")
        # Each histogram is drawn over the ones before it, and covers a part of them.
        for least, bar in enumerate(self.stairs):
            counts = np.bincount(self.bin_of_weight[state >= least], minlength=_BINS)
            bar.set_data(counts, self.edges)
        x = np.clip(threshold, self.edges[0], self.edges[-1])
        self.line.set_xdata([x, x])
        self.line.set_visible(np.isfinite(threshold))

    @_style.styled
    def png(self):
        """Return the bytes of a PNG."""
        if self.background is None:
            self.canvas.draw()
            self.background = self.canvas.copy_from_bbox(self.figure.bbox)
        self.canvas.restore_region(self.background)
        for artist in self.moving + self.parts:
            artist.axes.draw_artist(artist)
        file = io.BytesIO()
        pixels = np.asarray(self.canvas.buffer_rgba())
        # Light compression is enough for a picture that is shown for a moment.
        plt.imsave(file, pixels, format="png", pil_kwargs={"compress_level": 1})
        return file.getvalue()


# -- widgets


class Explorer:
    """Show widgets that choose a cut, and what it does.

    `show` displays the widgets. `cut` is the present cut: masks, indices of units, and the model
    that is left (see `_Subject.cut`).
    """

    def __init__(self, lab, *, device="cpu"):
        """Open the first checkpoint of a list, and make the widgets.

        lab: a Run, whose own checkpoint is opened first if it has one
        device: where models are scored and tested
        Raises FileNotFoundError if there is no checkpoint, what data.load raises where images are
        missing, and what checkpoint.load raises.
        """
        self.lab = lab
        self.device = device
        self.folders = _checkpoints(lab)
        self._make_widgets()
        self._open(self.checkpoint.value)
        self.checkpoint.observe(self._reopen, "value")
        for widget in self.choices:
            widget.observe(self._move, "value")
        self.button.on_click(self._test)
        self.code_button.observe(self._show_code, "value")

    def _make_widgets(self):
        # Two controls of a row fit into 500 px, so that all stay above the pictures on a small
        # screen, and what people ask for first, accuracy, stands beside them.
        wrapped = {"flex_flow": "row wrap", "align_items": "center"}
        beside = {"flex_flow": "row wrap", "align_items": "flex-start"}
        style = {"description_width": "110px"}

        def dropdown(width, description="", **options):
            layout = {"width": width, "max_width": "100%"}
            return ipywidgets.Dropdown(
                description=description, layout=layout, style=style, **options
            )

        narrow = {"max_width": "100%", "overflow": "auto"}
        output = partial(ipywidgets.HTML, layout=narrow)
        picture = partial(ipywidgets.Image, layout=narrow)
        slider = partial(
            ipywidgets.FloatSlider,
            step=0.01,
            readout_format=".0%",
            layout={"width": "350px", "max_width": "100%"},
            style=style,
        )
        self.checkpoint = dropdown("500px", "checkpoint", options=self._options())
        self.block, self.layer = dropdown("300px", "block"), dropdown("200px")
        self.sparsity = slider(0.5, description="weights masked", max=0.99)
        self.criterion = dropdown("160px", options=[(f"by {name}", name) for name in _WEIGHTS])
        self.macs = slider(0.8, description="MACs kept", max=1)
        self.unit_criterion = dropdown(
            "160px", options=[(f"units by {name}", name) for name in _UNITS]
        )
        self.button = ipywidgets.Button(description="test on images", button_style="primary")
        self.code_button = ipywidgets.ToggleButton(description="as code")
        self.status, self.heads, self.table, self.answer = output(), output(), output(), output()
        self.code = ipywidgets.Textarea(layout={"display": "none", "width": "100%"}, rows=18)
        self.layer_image, self.test_image = picture(), picture()
        weights = [self.sparsity, self.criterion]
        units = [self.macs, self.unit_criterion]
        layer = [self.block, self.layer]
        self.choices = [*layer, *weights, *units]
        rows = [
            [self.checkpoint, self.button, self.code_button],
            [ipywidgets.HBox(weights), ipywidgets.HBox(units)],
            [self.status],
            [self.answer],
            [self.code],
            [ipywidgets.HBox(layer)],
            [self.layer_image],
        ]
        rows = [ipywidgets.HBox(row, layout=wrapped) for row in rows]
        tables = ipywidgets.HBox([self.heads, self.table], layout=beside)
        self.box = ipywidgets.VBox([*rows, tables, self.test_image])

    def _options(self):
        """Return (words, label) of each checkpoint; words say why one cannot be opened."""
        lacks_images = cache(partial(_lacks_images, lab=self.lab))  # it reads the study's file
        options = []
        for label in self.folders:
            lacks = lacks_images(label.split("/")[0])
            options.append((f"{label} \N{EM DASH} {lacks}" if lacks else label, label))
        return options

    def show(self):
        """Display the widgets; headless, where nobody can move them, their pictures and tables."""
        if files.headless():
            picture = Image(data=self.layer_image.value)
            display(picture, HTML(self.heads.value), HTML(self.table.value))
        else:
            # To search all imported objects for garbage takes longer than the rest of a move.
            gc.collect()
            gc.freeze()
            display(self.box)

    def _reopen(self, change):
        label = change["new"]
        if label == self.label:  # a checkpoint could not be opened, and this is the one before
            return
        self.status.value = f"opening {label} …"
        try:
            # To open it would download its images, which is more than a choice in a list should do.
            if lacks := _lacks_images(label.split("/")[0], self.lab):
                raise FileNotFoundError(f"not opened: {lacks}")
            self._open(label)
        except Exception as error:  # it is shown here: nobody sees what a callback raises
            self.checkpoint.value = self.label
            self.status.value = _in_red(f"{label}: {error}")

    def _open(self, label):
        subject = _Subject(label, self.folders[label], self.lab, device=self.device)
        blocks, floor = subject.layers, subject.floor
        self.costs = _costs(subject.model)
        # From here on nothing can fail: the explorer changes wholly or not at all. Widgets that are
        # given their new bounds one by one move nothing until all have them.
        self.subject, self.label = subject, label
        self.answer.value = ""  # the old answer is about another model
        self.test_image.layout.display = "none"
        self.layer_picture = _LayerPicture()
        self.shown = None
        roles = dict.fromkeys(role for layers in blocks.values() for role in layers)
        for widget, options in ((self.block, blocks), (self.layer, roles)):
            widget.options = [*options]
            widget.index = 0
        self.macs.min = floor
        self.macs.disabled = self.unit_criterion.disabled = floor == 1
        self.status.value = ""
        if floor == 1:
            self.status.value = "Its layers were cut before: their weights can go, units cannot."
        self._move()

    def _move(self, change=None):
        """Make the cut that the widgets describe, and show it."""
        if change and self.shown is None:  # a checkpoint is being opened
            return
        criterion, unit_criterion = self.criterion.value, self.unit_criterion.value
        sparsity, macs = round(self.sparsity.value, 2), round(self.macs.value, 2)
        self.cut = self.subject.cut(criterion, sparsity, unit_criterion, macs)
        layers = self.subject.layers[self.block.value]
        name = layers.get(self.layer.value, next(iter(layers.values())))
        if self.shown != (name, criterion):
            scores_by_name, parts = self.subject.weights[criterion], self.subject.parts(name)
            self.layer_picture.show(name, criterion, scores_by_name, parts)
            self.shown = name, criterion
        keep = self.cut.keep[name]
        stay = self.cut.stay.get(name, torch.ones_like(keep))
        self.layer_picture.move(keep, stay, self.cut.threshold)
        self.layer_image.value = self.layer_picture.png()
        self.heads.value = _units_table(self.subject.units[unit_criterion], self.cut.drop)
        self.table.value = _costs_table(self.costs, self.cut)
        if change and self.answer.value and change["owner"] not in (self.block, self.layer):
            self.answer.value = (
                f'<span style="opacity:.5">Before the last move: {self.tested}</span>'
            )
        self._show_code()

    def _show_code(self, change=None):
        """Show the lines of Python that make the present cut, or hide them."""
        self.code.layout.display = None if self.code_button.value else "none"
        choice = self.criterion.value, round(self.sparsity.value, 2)
        choice += self.unit_criterion.value, round(self.macs.value, 2)
        self.code.value = self.subject.code(*choice)

    def _test(self, button):
        self.answer.value = "testing …"
        try:
            self.tested = self.answer.value = self._compared()
        except Exception as error:
            self.answer.value = _in_red(error)

    def _compared(self):
        """Compare the checkpoint and the cut model, show images, and return the answer as HTML."""
        images, before, after = self.subject.images, self.subject.model, self.cut.model
        count = min(_TESTED, len(images.val))
        split = images.val.subset(count)
        moved = evaluate.compare(before, after, split, most=count, classes=images.classes).images
        right = (moved.before == moved.label).sum()
        cut = (moved.after == moved.label).sum()
        # The pictures are the validation images whose predictions differ most between the models.
        figure = drawings.changed_images(split, moved.head(_SHOWN))
        self.test_image.value = print_figure(figure)
        self.test_image.layout.display = None
        plt.close(figure)
        # The loss is measured on the calibration images, for which it was predicted.
        batches = self.subject.calibration()
        rise = scores.loss(after, batches) - scores.loss(before, batches)
        predicted = self.cut.masked + self.cut.removed
        is_near = predicted / 3 <= rise <= 3 * predicted
        warning = "The prediction is off by more than 3 times: choose by what is measured. "
        return (
            f"Of {count} validation images the checkpoint gets <b>{right} ({right / count:.1%})</b> right, "
            f"cut <b>{cut} ({cut / count:.1%})</b>. On the calibration images the loss changes by "
            f"<b>{rise:+.2g}</b> nats, predicted: {predicted:+.2g}. "
            f"{'' if is_near else _in_red(warning)}"
            "At the bottom, those whose prediction moved most, as label: checkpoint → cut."
        )


def _in_red(words):
    return f'<span style="color:firebrick">{html.escape(str(words))}</span>'
