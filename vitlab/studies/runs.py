"""Open the folder of a run, and collect its results with their provenance.

A run is one model and one seed of a study. It writes to `<data
root>/runs/<study>/<model>/seed<seed>/`. Notebooks open a run with `open_run` and never name a path.

Public: IDENTITY, LOG, Run, checkpoint_id, open_run, provenance, study_label, watch,
with_first_columns.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from filelock import FileLock

from vitlab import files, names, parallel
from vitlab.studies import settings

_METER = "closed form (vitlab.cost)"  # of params, MACs and FLOPs; other meters have own columns
LOG = "results.jsonl"  # of a run: every result that was ever saved
IDENTITY = ["study", "model", "seed"]
_CUT = ["method", "criterion", "form", "target_kind", "target", "stage"]
_HISTORY = [*IDENTITY, *_CUT, "epoch"]
_MEASURED = """
    correct total top1 mean_per_class loss ece
    params nonzero macs macs_ideal flops meter macs_torchprofile macs_thop
    bytes_memory bytes_disk
    latency_ms latency_q1 latency_q3 images_per_s memory_mb
    batch threads precision image_size
    epochs seconds
    checkpoint data split_seed commit torch timm device date
"""
_COLUMNS = [*IDENTITY, *_CUT, *_MEASURED.split()]


def open_run(study_name, model=None, seed=0, override=None):
    """Return the Run of one model and seed of a study.

    study_name, override: as in `settings.study`. An overridden run has its own folder. Where the
        override does not concern a notebook, the run reads what that notebook wrote for the study
        itself.
    model: one of the study's models; None for the study as a whole (data, report).
    seed: int >= 0.
    Raises what `settings.study` raises, and ValueError for an unknown model.
    Raises TypeError for another seed, PermissionError where the folder cannot be written.
    """
    try:
        values = settings.study(study_name, seed=seed if model else None, override=override)
        if model is not None:
            names.check(f"model of study {values.name}:", model, values.models)
        if settings.checked("seed", 0, seed) < 0:
            raise TypeError(f"seed should be an integer of at least 0, got {seed}")
    except (TypeError, ValueError) as error:
        # What is wrong stands in the parameters cell: IPython shows this in place of a traceback.
        lines = [f"{type(error).__name__}: {error}"]
        error._render_traceback_ = lambda: lines
        raise
    return Run(study_name, values, model, seed, settings.as_lists(override or {}))


def watch(items, title):
    """Return items with a bar for the outer loop of a notebook: title, and how many are done.

    items: what is gone through, with or without a length.
    title: str, what is done, in a word or two.
    """
    items = items if hasattr(items, "__len__") else list(items)
    form = "{desc}: {n_fmt} of {total_fmt} {bar} {elapsed}{postfix}"
    return files.progress(items, title, delay=0, bar_format=form)


@dataclass
class Run:
    """Hold one model and seed of a study: its values, its folder, its results.

    `open_run` makes it.

    given: name of the study, or path of its file.
    params: the study's Values.
    model_name, seed, override: as for `open_run`.
    study: name of the study.
    folder: path of the folder where this run writes.
    """

    given: str
    params: settings.Values
    model_name: str | None
    seed: int
    override: dict

    def __post_init__(self):
        self.study = self.params.name
        inner = Path(self.model_name, f"seed{self.seed}") if self.model_name else Path()
        runs = files.root() / "runs"
        self.folder = runs / study_label(self.study, self.override) / inner
        self._base = runs / self.study / inner
        files.make_folder(self.folder)
        files.warn_of_other_lab()
        self._commit = _commit(files.repository())  # of the code as imported, not as it is later

    @property
    def model(self):
        """Return the arguments of models.create.

        `models.create(**lab.model, num_classes=..., image_size=...)`
        Of `weights` and `pretrained` one is left, see `settings.weights_of`.
        Raises FileNotFoundError, with all places that were searched, for missing weights.
        """
        options = dict(self.params.models[self.model_name])
        if options.get("weights"):
            path = settings.weights_of(self.given, options)
            options.pop("weights" if path is None else "pretrained", None)
            if path:
                options["weights"] = str(path)
                # The study's word serves where a file has none.
                if self.params.data.normalise != "weights":
                    options["normalise_else"] = self.params.data.normalise
        return options

    @property
    def data(self):
        """Return the arguments of data.load: `data.load(**lab.data)`.

        Raises FileNotFoundError, with all places that were searched, for missing images.
        """
        options = {name: value for name, value in self.params.data.items() if name != "augment"}
        options["normalise"] = self._normalise(options["normalise"])
        name = options["name"]
        if name not in settings.DATASETS:
            try:
                options["name"] = str(settings.find(self.given, name))
            except FileNotFoundError as error:
                words = names.unknown("dataset", name, settings.DATASETS)
                raise FileNotFoundError(f"{words} As a path, {error}") from None
        return options

    def _normalise(self, of_study):
        """Return the word of data.load for what this run's images are normalised by."""
        values = self.params.models.get(self.model_name, {})
        word = values.get("normalise") or of_study
        if word != "weights":
            return word
        if weights := values.get("weights") and self.model.get("weights"):
            # The file says it, or timm guesses it by the name.
            return {"name": values["name"], "weights": weights}
        return values["name"] if values.get("pretrained") else "train"

    def training(self, section="train", *, stage=None):
        """Return the recipe of a training, or all arguments of train.fit that a study knows.

        section: str; its epochs, lr, images and warmup_epochs replace those of `train`.
        stage: str, the name of the training. With it the result is {"recipe", "stage", "folder"}:
            `train.fit(model, images.train, images.val, **lab.training("budget", stage=label))`.
            Without it the result is the recipe alone, a flat dict, as checkpoints keep it.
        """
        replacing = self.params[section]
        recipe = {
            **self.params.train,
            **{name: replacing[name] for name in settings.SETTINGS if name in replacing},
            # After a cut the head is trained with the rest.
            "head": self.params.train.head and section == "train",
            "augment": dict(self.params.data.augment),
            "seed": self.seed,
        }
        if stage is None:
            return recipe
        return {"recipe": recipe, "stage": stage, "folder": self.path("training")}

    def calibration(self, split, *, images=None, augment=None, device="cpu"):
        """Return a list of (x, y) batches for scores, in evaluation transforms.

        split: data.Split, of which a stratified part is taken.
        images: int, how many; None for as many as the study's `calibration` says. A smaller split
            gives all it has.
        augment: whether each image is augmented as in training, by a draw from the run's seed. None
            leaves that to the study's `calibration`. False is for the images that are compared with
            the calibration images, such as those of val.
        device: where the batches lie.
        """
        values = self.params.calibration
        part = split.subset(min(images or values.images, len(split)), seed=self.seed)
        augment = values.augment if augment is None else augment
        options = {}
        if augment:
            options = {"augment": dict(self.params.data.augment), "seed": self.seed}
        return list(part.batches(values.batch_size, device=device, **options))

    def save_calibration(self, batches, losses):
        """Write the table `calibration`, which says from what scores were taken.

        Columns: images, batch_size, labels, augment, calibration_loss, val_loss.
        batches: those of `calibration`.
        losses: (calibration loss, val loss) in nats, of scores.check_calibration.
        """
        calibration_loss, val_loss = losses
        row = {
            **self.params.calibration,
            "images": sum(len(y) for _, y in batches),
            "calibration_loss": calibration_loss,
            "val_loss": val_loss,
        }
        return self.save_table("calibration", pd.DataFrame([row]))

    def path(self, name):
        """Return where this run writes the file or folder of a name."""
        return self.folder / name

    def need(self, name, notebook, images=None):
        """Return the path of what an earlier notebook wrote.

        An overridden run takes the study's own where that notebook does not use what changed.
        images: data.Dataset of this notebook, to be compared with what a dense model was trained on.
        Raises FileNotFoundError that says which notebook to run first.
        Raises ValueError for a dense model of another study, images or weights than those of now.
        """
        sections = _sections_of(notebook)
        folders = [self.folder, self._base]
        if any(dotted.split(".")[0] in sections for dotted in self.override):
            folders = [self.folder]
        for folder in folders:
            if (folder / name).exists():
                kept = _kept_by(folder / name)
                if "values" in kept:
                    now = self.record(self.training(), images)
                    self._refuse_changes(kept, now, folder / name, notebook)
                return folder / name
        raise FileNotFoundError(
            f"{self.path(name)} is missing: run notebooks/{notebook}.ipynb first, "
            f"{self._how_to_run(notebook)}"
        )

    def _refuse_changes(self, then, now, path, notebook):
        if changes := _changes(then, now):
            raise ValueError(
                f"{path} is of another study, or of other images, than those of now:\n"
                f"{changes}\nRun notebooks/{notebook}.ipynb again, {self._how_to_run(notebook)}"
            )

    def _how_to_run(self, notebook):
        return f"in JupyterLab or with\n  {self.command(notebook)}"

    def record(self, recipe, images=None, model=None):
        """Return what a dense checkpoint depends on, which it keeps as `extra`.

        recipe: that of `training`, a flat dict.
        images: data.Dataset; None leaves the images out.
        model: as models.create gives it, to warn of weights that may have learnt from test images.
        Returns a dict of settings, values, data, images and weights, None for what is not known.
        Raises ValueError for weights of a model that was trained on another split of the images.
        """
        record = {"settings": recipe, "values": self.origin}
        weights = self._weights()
        if images:
            record |= {"data": images.description, "images": images.identity}
            before = _kept_by(weights.parent) if weights else {}
            changes = _changes(_split_of(before), _split_of(record))
            # A folder may be called otherwise by now: its images tell, too.
            content = [_split_of(kept)["content"] for kept in (before, record)]
            is_same = before.get("data") == images.description or content[0] == content[1]
            if is_same and changes:
                raise ValueError(
                    f"the model of {weights} has seen another split of these images, and perhaps "
                    f"val and test images of this one:\n{changes}\nTake that split or other weights"
                )
            is_known = before.get("data") == images.description
            if weights and not is_known and not getattr(model, "is_head_new", True):
                _warn_of_drawn(images, weights)
        return record | {"weights": weights and files.fingerprint(weights)}

    def _weights(self):
        """Return the file of the weights that training starts from, None where there is none."""
        values = self.params.models[self.model_name]
        with contextlib.suppress(FileNotFoundError):  # perhaps moved since: the model is trained
            path = settings.weights_of(self.given, values)
            return path / "model.safetensors" if path and path.is_dir() else path

    def shipped(self, recipe, images):
        """Return the folder of the dense checkpoint that the repository ships for this run.

        That is checkpoints/STUDY/MODEL, or MODEL-seed1 for another seed than 0.
        recipe: that of `training`, a flat dict.
        images: data.Dataset.
        Returns None if there is none, or one of another recipe, another model or other data.
        """
        name = f"{self.model_name}-seed{self.seed}" if self.seed else str(self.model_name)
        folder = files.repository() / "checkpoints" / self.study / name
        kept = _kept_by(folder)
        if not {"settings", "values", "data"} <= kept.keys():
            return None
        return None if _changes(kept, self.record(recipe, images)) else folder

    @property
    def origin(self):
        """Return the values of data and model, on which a dense checkpoint depends, too."""
        # As the study writes them: paths would be others on another machine.
        data = {name: value for name, value in self.params.data.items() if value is not None}
        data.pop("augment")  # `training` has it
        return json.loads(json.dumps({"data": data, "model": self.params.models[self.model_name]}))

    def command(self, notebook):
        """Return the command that runs a notebook for this run."""
        script = "vitlab" if shutil.which("vitlab") else f"{sys.executable} -m vitlab"
        words = [script, "run", notebook, "--study", str(self.given)]
        if self.model_name and notebook not in ("0_data", "7_report"):
            words += ["--model", self.model_name, "--seed", str(self.seed)]
        for name, value in self.override.items():
            words += ["--set", f"'{name}={json.dumps(value)}'"]
        return " ".join(words)

    def results(self, notebook, images, measure, save_model=None):
        """Return a collector of the results and histories of a notebook. See `_Results`."""
        return _Results(self, notebook, images, measure, save_model)

    def save_results(self, notebook, results, *, data=None, identity=None):
        """Write all results of a notebook, and return them as a frame with provenance.

        results: frame or list of dicts, one for each model that was measured. Each has at least
            `method` and `stage`, and a number as `target` where something was cut.
        data: str, what the images are called, such as "CIFAR-10 (JPEG)".
        identity: dict, that of data.Dataset, which tells the images from others
        The frame has the columns of `_COLUMNS` in that order, then all others.
        Raises ValueError for results without method or stage, and a target that is no number.
        """
        values = self._values_of(notebook)
        frame = pd.DataFrame(results)
        missing = [column for column in ("method", "stage") if column not in frame]
        if missing:
            raise ValueError(f"results of {notebook} lack {' and '.join(missing)}")
        if data:
            frame["data"] = data
        if "target" in frame:
            frame["target"] = pd.to_numeric(frame["target"])
        # What a result says itself stays.
        frame = frame.assign(**(self._provenance() | dict(frame)))
        frame = with_first_columns(frame, _COLUMNS, fill=True)
        self._save(f"results-{notebook}.csv", frame)
        values["images"] = identity
        about = {"notebook": notebook, "save": uuid.uuid4().hex, "parameters": values}
        lines = json.loads(frame.to_json(orient="records"))
        _append(self.path(LOG), [about | line for line in lines])
        return frame

    def _values_of(self, notebook):
        """Return the values of the study that a notebook uses, of the models only the run's own."""
        values = {}
        for section in _sections_of(notebook):
            values[section] = settings.without_defaults(section, self.params[section])
        if self.model_name and "models" in values:
            values["models"] = self.params.models[self.model_name]
        return values

    def changes(self, notebook):
        """Return what a notebook's values were when it last saved results, and are now, in lines.

        notebook: str, its name.
        Returns a list of str, empty where nothing that it uses has changed.
        Raises ValueError for an unknown notebook.
        """
        then = _last_parameters(self.path(LOG), notebook)
        return _changes(then, self._values_of(notebook)).splitlines()

    def load_results(self, notebook):
        """Return the results that a notebook saved for this run.

        Raises FileNotFoundError as `need` does.
        Raises ValueError for results of other values than the study has, or of other images than
        those of the dense model.
        """
        path = self.need(f"results-{notebook}.csv", notebook)
        now = self._values_of(notebook)
        with contextlib.suppress(FileNotFoundError):
            now["images"] = _kept_by(self.need("dense", "1_train")).get("images")
        self._refuse_changes(_last_parameters(path.with_name(LOG), notebook), now, path, notebook)
        return pd.read_csv(path)

    def save_history(self, notebook, history):
        """Write the histories of a notebook, and return them as one frame.

        history: the frame of train.fit, or a list of such frames, marked by method, target, ...
        Raises ValueError for no histories, PermissionError where the folder cannot be written.
        """
        frame = pd.concat(history, ignore_index=True) if isinstance(history, list) else history
        frame = frame.assign(**self._identity())
        return self._save(f"history-{notebook}.csv", with_first_columns(frame, _HISTORY))

    def save_table(self, name, frame):
        """Write any other frame as table-<name>.csv, marked with study, model and seed.

        Raises ValueError for a frame without results, PermissionError as `save_history` does.
        """
        rest = frame.drop(columns=IDENTITY, errors="ignore")
        identity = pd.DataFrame(self._identity(), rest.index)
        return self._save(f"table-{name}.csv", pd.concat([identity, rest], axis=1))

    @property
    def figures(self):
        """Return the folder of the study's figures and tables, which is made if need be."""
        folder = files.repository() / "figures" / self.study
        if self.override:  # an overridden study is never published
            folder = files.root() / "runs" / study_label(self.study, self.override) / "figures"
        files.make_folder(folder)
        return folder

    def _save(self, name, frame):
        if frame.empty:
            raise ValueError(f"nothing to write to {name}: no results")
        files.write_atomic(self.path(name), frame.to_csv(index=False))
        return frame

    def _identity(self):
        return {"study": self.study, "model": self.model_name, "seed": self.seed}

    def _provenance(self):
        return {
            **self._identity(),
            "split_seed": self.params.data.split_seed,
            **provenance(),
            "commit": self._commit,
            "meter": _METER,
            "override": json.dumps(self.override) if self.override else None,
        }


@dataclass
class _Results:
    """Collect the results of a notebook: one for each model that is measured on test.

    `Run.results` makes it. Each cut of the study is opened with the columns that describe it, and
    each stage of it adds a result:

        log = lab.results("3_global_pruning", images, evaluate.measure, checkpoint.save)
        cut = log.cut(method="unstructured", criterion="taylor", form="masked",
                      target_kind="sparsity", target=0.9)
        cut.add("cut", model, val_top1=val_top1)
        history = train.fit(model, images.train, images.val,
                            **lab.training("global_pruning", stage=label))
        cut.add("finetuned", model, history=history, checkpoint=label)
        table, history = log.save()

    run: Run.
    notebook: str, its name, such as "3_global_pruning".
    images: data.Dataset, whose test split is measured.
    measure: function of (model, split) that returns {column: value}, such as evaluate.measure.
    save_model: function of (model, folder), of extra and masks, such as checkpoint.save. It saves each
        model that is added with the name of a checkpoint. None saves no models.
    results, histories: lists of dicts and of frames, what was collected so far.
    bar: that of `watch`, or None.
    """

    run: Run
    notebook: str
    images: object
    measure: Callable
    save_model: Callable | None = None
    results: list = field(default_factory=list)
    histories: list = field(default_factory=list)
    bar: object = None

    def watch(self, items):
        """Return items with the bar of `watch`, which also names the newest result."""
        self.bar = watch(items, self.notebook)
        return self.bar

    def cut(self, **columns):
        """Return a Cut, whose results and histories all have these columns."""
        return _Cut(self, columns)

    def save(self):
        """Write results and histories, and return both frames; without histories None for one."""
        of_images = {"data": self.images.description, "identity": self.images.identity}
        table = self.run.save_results(self.notebook, self.results, **of_images)
        if not self.histories:
            return table, None
        return table, self.run.save_history(self.notebook, self.histories)


@dataclass
class _Cut:
    """Add the results of one cut, stage by stage, to the results of a notebook.

    `log.cut` makes it. The columns may grow: `cut.columns["form"] = "removed"`.
    Other tables of the same cut take them, too: `table.assign(**cut.columns)`.
    """

    log: _Results
    columns: dict

    def add(self, stage, model=None, *, history=None, checkpoint=None, masks=None, **columns):
        """Add a result, and return it as a dict.

        stage: str, such as "cut", "finetuned", or "unreachable".
        model: the model to be measured on test; None for a result without a measurement, such as
            `cut.add("unreachable", note=str(error))`.
        history: frame of train.fit. The result gets its epochs (without epoch 0, that of the head
            alone) and seconds, and the frame is saved
            with the columns of the cut. `history.assign(target=0.0)` gives it a column of its own.
        checkpoint: str, name of the folder of the run in which the model is saved, by the
            collector's `save_model` if it has one, with cut and top-1 as `extra`.
        masks: {parameter name: bool tensor} that is saved with the model.
        columns: columns of this result alone, such as val_top1=91.5.
        """
        result = {**self.columns, "stage": stage, **columns}
        if checkpoint is not None:
            result["checkpoint"] = checkpoint
        if history is not None:
            self.log.histories.append(history.assign(**self.columns))
            result |= {"epochs": int(history.epoch.max()), "seconds": history.seconds.sum()}
        if model is not None:
            result |= self.log.measure(model, self.log.images.test)
            self._save(model, result, masks)
            if self.log.bar is not None:
                words = f"{result['method']}, {stage}: {result['top1']:.1f} %"
                self.log.bar.set_postfix_str(words)
        self.log.results.append(result)
        return result

    def _save(self, model, result, masks):
        """Save a model, with its result, as the checkpoint that this names; else it is not kept."""
        save_model, name = self.log.save_model, result.get("checkpoint")
        if save_model is None or name is None:
            return
        options = {} if masks is None else {"masks": masks}
        kept = {
            column: result[column] for column in [*_CUT, "val_top1", "top1"] if column in result
        }
        save_model(model, self.log.run.path(name), extra=kept, **options)


def _sections_of(notebook):
    """Return the sections of a study that a notebook reads. Raises ValueError if unknown."""
    names.check("notebook", notebook, settings.USES)
    return settings.USES[notebook]


def _kept_by(checkpoint):
    """Return what the record of a checkpoint keeps as `extra`, {} where there is no record."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads((checkpoint / "model.json").read_text(encoding="utf-8"))["extra"]
    return {}


def _warn_of_drawn(images, weights):
    """Warn that weights of unknown training may know the test images, if these were drawn here."""
    if "test" in images.drawn:
        warnings.warn(
            f"{weights.name} may have learnt from this study's test images ({images.drawn['test']} "
            "here): its test results count only if test/ holds images that it has never seen",
            stacklevel=3,
        )


def _split_of(record):
    """Return what says which images of a set are train, val and test, from a dense record."""
    data = record.get("values", {}).get("data", {})
    content = (record.get("images") or {}).get("content")  # the folder's name and a hash
    return {
        "split_seed": data.get("split_seed"),
        "content": content and content.rpartition("-")[2],
    }


def _last_parameters(log, notebook):
    """Return the parameters with which a notebook last saved results in a run's log, {} for none."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that was cut short
            result = json.loads(line)
            if result["notebook"] == notebook:
                return result["parameters"]
    return {}


def _changes(then, now):
    """Return a line for each value that differs between two records, in one text.

    What one of them does not say at all, such as an older one, is no difference.
    """
    said = [name for name in now if then.get(name) is not None and now[name] is not None]
    flat = []
    for record in (then, now):
        record = {name: record[name] for name in said}
        if "settings" in said:
            record["settings"] = settings.without_defaults("train", record["settings"])
        [row] = pd.json_normalize(json.loads(json.dumps(record))).to_dict("records")
        flat.append(row)
    then, now = flat
    lines = []
    for name in dict.fromkeys([*then, *now]):
        old, new = then.get(name), now.get(name)
        if old != new:
            lines.append(f"  {name}: {old!r} then, {new!r} now")
    return "\n".join(lines)


def with_first_columns(frame, columns, *, fill=False):
    """Return a frame with some columns before all others.

    frame: any frame.
    columns: names, in the order that is wanted.
    fill: bool, whether names that the frame does not have become empty columns.
    """
    first = [column for column in columns if fill or column in frame]
    rest = [column for column in frame if column not in columns]
    return frame.reindex(columns=[*first, *rest])


def _append(path, results):
    """Add results to a file of JSON lines, in one piece even if others add at the same time."""
    if not parallel.is_first():
        return
    text = "".join(json.dumps(result) + "\n" for result in results)
    with FileLock(f"{path}.lock"), open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the last line was cut short
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def study_label(name, override):
    """Return the name of a study's folder, another one for each override.

    name: str, of the study.
    override: {"section.value": new value}, or None. So an overridden study never replaces the study
        itself.
    """
    if not override:
        return name
    changes = [f"{dotted}={json.dumps(value)}" for dotted, value in sorted(override.items())]
    text = ",".join(changes)
    if len(text) > 60 or not re.fullmatch(r"[\w.,=-]+", text):
        text = hashlib.sha256(text.encode()).hexdigest()[:10]
    return f"{name}+{text}"


def checkpoint_id(folder):
    """Return (study, model, seed) of a folder of checkpoints/."""
    model, seed = re.fullmatch(r"(.+?)(?:-seed(\d+))?", folder.name).groups()
    return folder.parent.name, model, int(seed or 0)


def provenance():
    """Return where numbers of this process come from.

    Columns: threads, commit of the code, torch, timm, device, date.
    """
    import torch  # here, as the command line reads studies without waiting for it

    return {
        "threads": torch.get_num_threads(),
        "commit": _commit(files.repository()),
        "torch": version("torch"),
        "timm": version("timm"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


@functools.cache  # git strips every notebook that was run to tell
def _commit(repository):
    """Return the short hash of the commit of the code in a folder, "unknown" without git.

    The hash ends with "+dirty" if the code was changed since. Of an installed package it is the
    version.
    """
    if not (repository / "vitlab").is_dir():
        return files.version()
    if not shutil.which("git"):
        return "unknown"
    head = _git(repository, "rev-parse", "--short=10", "HEAD")
    # git diff does not remember which files it found unchanged: after a fresh checkout each process
    # would strip all notebooks.
    _git(repository, "update-index", "-q", "--refresh")
    # Notebooks count without their outputs, which git strips where install.sh could tell it to.
    changed = _git(repository, "diff", "--quiet", "HEAD", "--", "vitlab", "notebooks", "benchmarks")
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+dirty" if changed.returncode else "")


def _git(repository, *words):
    """Run git in a repository, and return its end with what it printed."""
    command = ["git", "-C", str(repository), *words]
    return subprocess.run(command, capture_output=True, text=True)


def _processor():
    """Return the name of the processor, as Linux gives it, else its architecture."""
    name = None
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()
