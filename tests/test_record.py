import json
import os
import shutil
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from vitlab import files
from vitlab.__main__ import main
from vitlab.evaluation import bench
from vitlab.models import _layers, anatomy
from vitlab.pruning import _sweep, factor, pool, prune, scores
from vitlab.studies import results, runs, settings
from vitlab.training import data, train


@pytest.fixture(autouse=True)
def data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("VITLAB_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def lab():
    return runs.open_run("demo", "vit", 0, {})


CRITERIA = ["random", "magnitude", "gradient", "taylor", "fisher"]
ROW = {"method": "dense", "stage": "dense", "top1": 90.0, "extra": "x"}


# -- studies


def test_values_read_as_attributes_and_name_what_is_near():
    values = settings.study("demo")
    assert values.name == "demo" and values.train.epochs == values["train"]["epochs"]
    with pytest.raises(AttributeError, match="unknown value 'epoch', did you mean 'epochs'"):
        _ = values.train.epoch


@pytest.mark.parametrize(
    "dotted, value",
    [
        ("train.epochs", 2),
        ("train.lr", 1),  # an int for a float
        ("train.precision", "bf16"),
        ("data.augment.flip", False),
        ("global_pruning.sparsities", [0.5, 0]),
        ("global_pruning.images", None),  # all of them
        ("budget.faster_at", None),
        ("data.skip_broken", True),  # null in the study
        ("seeds", (1, 2)),
        ("models.vit.depth", 2),
    ],
)
def test_an_override_changes_its_value_and_no_other(dotted, value):
    plain, changed = settings.study("demo"), settings.study("demo", override={dotted: value})
    assert changed != plain
    *parents, last = dotted.split(".")
    before, after = plain, changed
    for parent in parents:
        before, after = before[parent], after[parent]
    assert after[last] == (list(value) if isinstance(value, tuple) else value)
    after[last] = before[last]
    assert changed == plain


def test_an_override_may_give_a_value_that_the_study_leaves_out():
    override = {"models.vit.normalise": "imagenet", "data.augment.erase": 0.25}
    lab = runs.open_run("demo", "vit", 0, override)
    assert lab.data["normalise"] == "imagenet" and lab.params.data.augment.erase == 0.25
    assert "erase" not in settings.study("demo").data.augment
    for wrong, words in [
        ("models.vit.weihgts", "did you mean 'models.vit.weights'"),
        ("models.vit.patch_size", "unknown value 'models.vit.patch_size'"),  # it may be misspelt
    ]:
        with pytest.raises(ValueError, match=words):
            settings.study("demo", override={wrong: 1})
    with pytest.raises(TypeError, match="models.vit.weights should be a valid string"):
        settings.study("demo", override={"models.vit.weights": 3})


WORDS = {  # value of a study: the words that the code which takes them knows
    "data.normalise": ["train", "imagenet", "weights"],
    "train.precision": ["auto", *bench.PRECISIONS],
    "calibration.labels": [*_sweep.LABELS],
    "global_pruning.criterion": [*CRITERIA],
    "global_pruning.row_criterion": [*CRITERIA],
    "global_pruning.schedules": ["one-shot", "cubic", "iterative"],
    "heads_svd_iht.head_criterion": [*scores.UNITS],
    "budget.target": [*pool._TARGETS],
    "budget.distilled": ["pool", "units", "heads+neurons", "random", "svd", "ranks"],
    "efficiency.precision": [*bench.PRECISIONS],
}


@pytest.fixture(scope="module")
def accepts():
    """A function that says whether a study may have this value, in a list where it has a list."""
    values = settings.study("demo")
    del values["name"]

    def accepts(dotted, value):
        section, name = dotted.split(".")
        value = [value] if isinstance(values[section][name], list) else value
        try:
            settings._replaced(values, {dotted: value}, "override")
        except ValueError as error:
            assert dotted in str(error)
            return False
        return True

    return accepts


@pytest.mark.parametrize("dotted", WORDS)
def test_a_study_knows_the_words_that_the_code_knows_and_no_others(accepts, dotted):
    everywhere = {*sum(WORDS.values(), []), *scores.WEIGHTS, *scores.ROWS, *factor.METHODS}
    assert {word for word in everywhere if accepts(dotted, word)} == set(WORDS[dotted])


def test_words_of_notebooks_3_and_5_are_those_that_a_study_may_choose():
    """Where a notebook itself spells out what there is."""
    third, fifth = (
        (files.repository() / "notebooks" / name).read_text()
        for name in ("3_global_pruning.ipynb", "5_budget.ipynb")
    )
    assert f"criteria = {json.dumps(CRITERIA)}"[1:-1].replace('"', '\\"') in third
    for method in WORDS["budget.distilled"]:
        assert f'\\"{method}\\"' in fifth
    for schedule in WORDS["global_pruning.schedules"]:
        assert prune.shares(schedule, 2, final=0.5)[-1] == 0.5


def test_kinds_of_a_budget_are_all_units_and_ranks_with_heads_and_neurons_among_them():
    kinds = [*anatomy.UNITS, "ranks"]
    assert settings.study("demo", override={"budget.kinds": kinds}).budget.kinds == kinds
    for wrong, words in [
        (["heads", "neuron"], "budget.kinds.1 .*got str 'neuron', did you mean 'neurons'"),
        (["ranks"], "budget.kinds needs heads and neurons, which notebook 5 compares"),
    ]:
        with pytest.raises(ValueError, match=words):
            settings.study("demo", override={"budget.kinds": wrong})


def test_a_budget_names_a_runtime_for_latency_alone():
    asked = {"budget.target": "latency", "budget.runtime": "onnxruntime int8"}
    assert settings.study("demo", override=asked).budget.runtime == "onnxruntime int8"
    with pytest.raises(ValueError, match="budget.runtime says where latency is measured"):
        settings.study("demo", override={"budget.runtime": "onnxruntime int8"})


def test_forms_are_methods_with_a_support_that_compress_takes(accepts):
    supports = ["", *_layers.SUPPORTS, "2:4"]
    for method, support in product([*factor.METHODS, "svd-iht"], supports):
        try:
            factor._check_request(0.5, method, support or "entries", 0.3, {})
            taken = True
        except ValueError:
            taken = False
        if support == "entries" and "iht" not in method:
            taken = False  # said twice
        assert accepts("heads_svd_iht.forms", f"{method} {support}".strip()) == taken


def test_runtimes_are_those_in_which_a_model_can_be_timed(accepts):
    for runtime, precision in product(
        [*bench._RUNTIMES, "egaer"], [*bench.PRECISIONS, "int8", "fp16"]
    ):
        try:
            taken = bool(bench.Setting(None, runtime, precision))
        except ValueError:
            taken = False
        assert accepts("efficiency.runtimes", f"{runtime} {precision}") == taken


@pytest.mark.parametrize(
    "override, words",
    [
        ({"global_pruning.criterion": "tayler"}, "criterion .*'tayler', did you mean 'taylor'"),
        ({"global_pruning.schedules": ["cubic", "onceshot"]}, "schedules.1 .*mean 'one-shot'"),
        ({"heads_svd_iht.forms": ["svd-iht"]}, r"forms.0 .*did you mean 'svd\+iht'"),
        ({"data.normalise": "imagnet"}, "did you mean 'imagenet'"),
        ({"global_pruning.criterion": "wanda"}, "compare inside one row alone"),
        ({"global_pruning.row_criterion": "obs"}, "compare inside one layer alone"),
        ({"efficiency.precision": "auto"}, "of two precisions"),
        ({"budget.distilled": ["svd"], "budget.target": "params"}, "for the target macs alone"),
        ({"train.lr": float("inf")}, "train.lr should be a finite number"),
        ({"data.normalise": [[0.5], [0.5]]}, r"or \[means, deviations\] with .*, got list"),
        ({"data.normalise": [[0.5] * 3, [0.5, 0.0, 0.5]]}, "with deviations above 0, got list"),
        ({"data.split_seed": -1}, "split_seed should be greater than or equal to 0"),
        ({"heads_svd_iht.forms": ["iht 0:4"]}, r"forms.0 .* 0 < n < m, got str 'iht 0:4'"),
        ({"heads_svd_iht.forms": ["svd", "svd+iht 5:4"]}, r"forms.1 .* 0 < n < m, got str"),
        ({"train.warmup_epochs": 8}, "train.warmup_epochs should be less than the 6 epochs of"),
        ({"budget.warmup_epochs": 1.5}, "budget.warmup_epochs should be less than the 1 epochs"),
        ({"global_pruning.epochs": 1, "global_pruning.warmup_epochs": 3.0}, "than the 1 epochs"),
        ({"global_pruning.steps": 9, "global_pruning.warmup_epochs": 1}, "leaves 1 of the epochs"),
        ({"budget.epochs": 0}, "budget.epochs should be greater than 0, got int 0"),
    ],
)
def test_a_misspelt_word_and_one_that_cannot_work_there_are_refused_with_the_reason(
    override, words
):
    with pytest.raises(ValueError, match=words):
        settings.study("demo", override=override)


@pytest.mark.parametrize(
    "override, error, words",
    [
        (
            {"train.epoch": 2},
            ValueError,
            "unknown value 'train.epoch', did you mean 'train.epochs'",
        ),
        ({"tarin.epochs": 2}, ValueError, "did you mean 'train.epochs'"),
        ({"train.epochs.more": 2}, ValueError, "unknown value"),
        ({"train.epochs": "2"}, TypeError, "train.epochs should be a valid integer, got str '2'"),
        ({"train.epochs": 2.5}, TypeError, "should be a valid integer, got float"),
        ({"train.epochs": True}, TypeError, "should be a valid integer, got bool"),
        ({"train.lr": True}, TypeError, "should be a valid number, got bool"),
        ({"data.augment.flip": 1}, TypeError, "should be a valid boolean, got int 1"),
        ({"train.epochs": None}, TypeError, "got NoneType"),
        ({"global_pruning.images": "all"}, TypeError, "integer of at least 1, or null, got str"),
        ({"data.skip_broken": 1}, TypeError, "data.skip_broken should be true, false or null"),
        ({"data.normalise": "image"}, ValueError, "should be train, imagenet, weights, or"),
        (
            {"global_pruning.sparsities": 0.5},
            TypeError,
            r"valid list, got float 0.5: write \[0.5\]",
        ),
        ({"global_pruning.sparsities": [0, "0.5"]}, TypeError, "sparsities.1 is a share .*got str"),
        ({"seeds": [0, True]}, TypeError, "seeds.1 should be a valid integer, got bool"),
        ({"seeds": []}, ValueError, "seeds should have at least 1 item"),
        ({"train": 2}, TypeError, "train is a section.*epochs"),
        ({"train": {}}, TypeError, "train is a section.*epochs"),
        ({"train.epochs": {"a": 2}}, TypeError, "train.epochs should be a valid integer, got dict"),
        ({"models.vit.depth": "deep"}, TypeError, "models.vit.depth should be a valid integer"),
        ({"models.vit.dept": 3}, ValueError, "did you mean 'models.vit.depth'"),
        (
            {"train.epochs": 0},
            ValueError,
            "there are none of vit and swin: give each model weights",
        ),
        ({"train.precision": "bf61"}, ValueError, "'auto', 'bf16' or 'float32', got str 'bf61'"),
        (["train.epochs", 2], TypeError, "override is a dict"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(override, error, words):
    with pytest.raises(error, match=words):
        settings.study("demo", override=override)


def test_an_unknown_study_names_the_nearest_and_all():
    with pytest.raises(
        ValueError, match="unknown study 'dmo', did you mean 'demo'.*cifar10-small.*path"
    ):
        settings.study("dmo")
    with pytest.raises(ValueError, match="'dmo', did you mean 'demo'") as error:
        runs.open_run("dmo", "vit")
    [line] = error.value._render_traceback_()  # all that IPython shows of it
    assert line.startswith("ValueError: unknown study 'dmo', did you mean 'demo'")


def test_a_study_of_ones_own_is_a_path(tmp_path):
    values = dict(settings.study("demo"))
    del values["name"]
    plain = json.loads(json.dumps(values))
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(plain))
    assert settings.study(own) == settings.study("demo") | {"name": "own"}

    own.write_text(yaml.safe_dump({**plain, "gloal_pruning": {}}))
    with pytest.raises(
        ValueError, match="unknown value 'gloal_pruning', did you mean 'global_pruning'"
    ):
        settings.study(own)
    own.write_text(yaml.safe_dump({key: value for key, value in plain.items() if key != "train"}))
    with pytest.raises(ValueError, match="own.yaml: train is missing"):
        settings.study(own)
    own.write_text(own.read_text() + "train: {lr: 2e-3}\n")  # text to YAML, which wants 2.0e-3
    with pytest.raises(ValueError, match="own.yaml .* line .*'2e-3' as text; write 0.002"):
        settings.study(own)

    own.write_text("train: [1")
    with pytest.raises(ValueError, match="own.yaml is not written as YAML"):
        settings.study(own)


@pytest.fixture
def demo_with(tmp_path):
    """A function that writes the demo's file with other values, of None for a value without it; gives its path."""
    plain = yaml.safe_load((files.repository() / "notebooks" / "params" / "demo.yaml").read_text())

    def write(changes):
        for dotted, value in changes.items():
            *parents, last = dotted.split(".")
            place = plain
            for parent in parents:
                place = place[parent]
            place[last] = value
            if value is None:
                del place[last]
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(plain))
        return tmp_path / "own.yaml"

    return write


def test_a_study_says_only_what_differs_from_its_base(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "first.yaml").write_text(
        "base: demo\nmodels: {own: {name: conv_vit}}\ntrain: {epochs: 3}\n"
        "data: {name: images, augment: {scale: [0.5, 1.0]}}\n"
    )
    (folder / "second.yaml").write_text("base: first.yaml\ntrain: {lr: 0.5}\n")
    demo, second = settings.study("demo"), settings.study(str(folder / "second.yaml"))
    assert second.train == {**demo.train, "epochs": 3, "lr": 0.5} and second.name == "second"
    # models and augmentation belong together and are taken whole
    assert list(second.models) == ["own"] and second.data.augment == {"scale": [0.5, 1.0]}
    assert second.budget == demo.budget and second.about.startswith("second, which is first but")
    for base, words in [
        ("dmeo", "own.yaml: base: unknown study 'dmeo', did you mean 'demo'"),
        ("none.yaml", f"there is no file {tmp_path / 'none.yaml'}"),
        ("own.yaml", "own.yaml is based on itself"),
    ]:
        (tmp_path / "own.yaml").write_text(f"base: {base}\n")
        with pytest.raises(ValueError, match=words):
            settings.study(str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    "changes, error, words",
    [
        (
            {"train.epochss": 3},
            ValueError,
            "unknown value 'train.epochss', did you mean 'train.epochs'",
        ),
        ({"other_seed": {}}, ValueError, "did you mean 'other_seeds'"),
        (
            {"data.image_sze": 3},
            ValueError,
            "unknown value 'data.image_sze', did you mean 'data.image_size'",
        ),
        ({"data.augment.scal": [0.5, 1.0]}, ValueError, "did you mean 'data.augment.scale'"),
        (
            {"train.epochs": "three"},
            TypeError,
            "train.epochs should be a valid integer, got str 'three'",
        ),
        ({"train.epochs": 2.5}, TypeError, "train.epochs should be a valid integer, got float"),
        ({"calibration.images": None}, ValueError, "calibration.images is missing"),
        ({"train.lr": None}, ValueError, "train.lr is missing"),
        (
            {"train.lr": None, "budget.kinds": None},
            ValueError,
            "own.yaml: train.lr and budget.kinds are missing; demo.yaml has every value, and",
        ),
        (
            {"train.lr": None, "budget.kinds": None, "seeds": 0},
            TypeError,
            "own.yaml: seeds should .*; train.lr and budget.kinds are missing; demo.yaml has",
        ),
        ({"train": 3}, TypeError, "train should be a valid dictionary, got int 3"),
        ({"seeds": 0}, TypeError, "seeds should be a valid list"),
        ({"seeds": []}, ValueError, "seeds should have at least 1 item"),
        ({"global_pruning.images": "all"}, TypeError, "integer of at least 1, or null"),
        ({"data.augment.erase": 30}, ValueError, "erase should be less than or equal to 1"),
        (
            {"data.augment": {"scale": [0.9, 0.1]}},
            ValueError,
            r"augment.scale should be \[least, most\] with 0 < least <= most <= 1, got list",
        ),
        ({"data.augment": {"crop": 4, "scale": [0.5, 1.0]}}, ValueError, "takes the place of crop"),
        ({"models": {}}, ValueError, "models should have at least 1 item"),
        ({"models": ["vit"]}, TypeError, "models should be a valid dictionary"),
        ({"models.vit": "conv_vit"}, TypeError, "models.vit should be a valid dictionary"),
        ({"models.vit.name": None}, ValueError, "models.vit.name is missing"),
        (
            {"models.vit.pretrained": "yes"},
            TypeError,
            "models.vit.pretrained should be a valid boolean",
        ),
    ],
)
def test_a_wrong_value_in_a_file_of_ones_own_is_named(demo_with, changes, error, words):
    with pytest.raises(error, match=words if words.startswith("own") else f"own.yaml: .*{words}"):
        settings.study(demo_with(changes))


def test_weights_are_taken_as_they_are_only_where_there_are_some(demo_with):
    given = {"name": "vit_tiny_patch16_224", "weights": "a.pth"}
    models = {"models.vit": given, "train.epochs": 0}
    with pytest.raises(ValueError, match="own.yaml: train.epochs: 0 .* there are none of swin:"):
        settings.study(demo_with(models))
    models["models.swin"] = {"name": "swin_tiny_patch4_window7_224", "pretrained": True}
    assert settings.study(demo_with(models)).train.epochs == 0
    with pytest.raises(ValueError, match="train.epochs should be greater than or equal to 0"):
        settings.study(demo_with(models | {"train.epochs": -1}))


def test_a_file_of_ones_own_may_have_other_options_and_what_came_later_is_off(demo_with):
    options = {
        "name": "vit_tiny_patch16_224",
        "pretrained": True,
        "drop_path_rate": 0.1,
        "weights": "some/where",
    }
    moments = [[0.5, 0.5, 0.5], [0.25, 0.25, 0.25]]
    changes = {
        "models": {"mine": options},
        "data.normalise": moments,
        "data.augment": {"scale": [0.5, 1.0]},
    }
    values = settings.study(
        demo_with(changes | {"train.mixup": None, "train.cutmix": None, "data.skip_broken": None})
    )
    assert values.models == {"mine": options} and values.data.normalise == moments
    assert (values.train.mixup, values.train.cutmix, values.data.skip_broken) == (0, 0, None)
    assert settings.study(demo_with({"budget.faster_at": 32}), override={"budget.faster_at": None})


@pytest.mark.parametrize(
    "dotted, wrong",
    [
        ("train.label_smoothing", [1.0, 10, -0.1]),
        ("train.ema", [1.0, 99.9]),
        ("sensitivity.ratios", [[0.1, 30], [0], [1.0]]),
        ("global_pruning.sparsities", [[50.0], [0.5, 1], [float("nan")]]),
        ("heads_svd_iht.ratios", [[0.2, 1.5], [-0.1]]),
        ("heads_svd_iht.kappa", [0, 1.0, 25.0]),
        ("budget.shares", [[1.5], [50], [0.5, 0.0]]),
    ],
)
def test_a_share_is_no_percentage(demo_with, dotted, wrong):
    for value in wrong:
        for arguments in [("demo", {dotted: value}), (demo_with({dotted: value}), None)]:
            with pytest.raises(
                ValueError,
                match=rf"{dotted}(\.\d)? is a share in [\[(]0, 1\), not a percentage, got",
            ):
                settings.study(arguments[0], override=arguments[1])


def test_other_seeds_have_values_of_their_own(demo_with):
    own = demo_with(
        {"seeds": [3, 0, 1], "other_seeds": {"train.epochs": 2, "budget.shares": [0.5]}}
    )
    first = settings.study(own)
    assert first == settings.study(own, seed=3) and "other_seeds" not in first
    for seed in (0, 1):
        assert settings.study(own, seed=seed) == settings.study(
            own, override={"train.epochs": 2, "budget.shares": [0.5]}
        )
    assert settings.study(own, seed=1, override={"train.epochs": 4}).train.epochs == 4
    assert runs.open_run(own, "vit", 1, {}).training()["epochs"] == 2
    assert runs.open_run(own, "vit", 3, {}).training()["epochs"] == first.train.epochs != 2


@pytest.mark.parametrize(
    "others, error, words",
    [
        (
            {"train.epoch": 2},
            ValueError,
            "unknown value 'train.epoch', did you mean 'train.epochs'",
        ),
        ({"train.epochs": "many"}, TypeError, "should be a valid integer"),
        ({"train": {"epochs": 2}}, TypeError, "train is a section"),
        ({"budget.shares": [50.0]}, ValueError, "budget.shares.0 is a share in"),
        ([2], TypeError, "other_seeds is a dict"),
    ],
)
def test_a_wrong_value_of_other_seeds_is_named_whichever_seed_is_run(
    demo_with, others, error, words
):
    with pytest.raises(error, match=f"own.yaml: .*{words}"):
        settings.study(demo_with({"other_seeds": others}))


# -- runs


def test_a_run_has_a_folder_of_its_own(data_root, lab):
    assert lab.folder == data_root / "runs" / "demo" / "vit" / "seed0" and lab.folder.is_dir()
    assert lab.path("x") == lab.folder / "x"
    assert (lab.study, lab.model_name, lab.seed) == ("demo", "vit", 0)
    assert runs.open_run("demo").folder == data_root / "runs" / "demo"


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (("demo", "vitt"), ValueError, "unknown model of study demo: 'vitt', did you mean 'vit'"),
        (("demo", "vit", "0"), TypeError, "seed should be a valid integer"),
        (("demo", "vit", True), TypeError, "seed should be a valid integer"),
        (("demo", "vit", -1), TypeError, "at least 0"),
    ],
)
def test_a_run_that_cannot_be_is_refused_and_leaves_nothing(data_root, arguments, error, words):
    with pytest.raises(error, match=words):
        runs.open_run(*arguments)
    assert not data_root.exists()


def test_no_permission_says_where_and_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(
        "VITLAB_DATA", str(tmp_path / "file")
    )  # a file where a folder should be: also for root
    with pytest.raises(PermissionError, match="cannot write to .*file.*VITLAB_DATA"):
        runs.open_run("demo", "vit")


def test_arguments_for_the_calls_that_a_notebook_makes(lab):
    assert lab.model == lab.params.models.vit
    plain = {"name": "shapes", "image_size": 32, "split_seed": 0, "normalise": "train"}
    plain["calibration"] = 256
    assert lab.data == plain | {"images": None, "skip_broken": None} and lab.origin["data"] == plain
    settings = lab.training("global_pruning")
    assert settings["epochs"] == lab.params.global_pruning.epochs != lab.params.train.epochs
    assert settings["batch_size"] == lab.params.train.batch_size and settings["seed"] == 0
    assert settings["augment"] == {"crop": 4, "flip": True} and "criterion" not in settings
    assert lab.training()["epochs"] == lab.params.train.epochs
    where = {"stage": "a", "folder": lab.path("training")}
    assert lab.training("global_pruning", stage="a") == {"recipe": settings} | where


def test_local_weights_are_found_from_anywhere():
    lab = runs.open_run("caltech101-small", "vit-transfer")
    assert lab.model["weights"] == str(files.repository() / "checkpoints/cifar10-small/vit")


@pytest.mark.parametrize("there", [True, False])
def test_weights_that_are_not_there_are_downloaded_if_the_study_says_so(tmp_path, there):
    values = (files.repository() / "notebooks/params/cifar10.yaml").read_text()
    own = tmp_path / "own.yaml"
    own.write_text(
        values.replace("    pretrained: true", "    pretrained: true\n    weights: vit.bin")
    )
    if there:
        (tmp_path / "vit.bin").write_bytes(b"weights")
    lab = runs.open_run(own, "vit")
    ways = {"weights": str(tmp_path / "vit.bin")} if there else {"pretrained": True}
    assert {name: lab.model.get(name) for name in ("weights", "pretrained")} == {
        "weights": None,
        "pretrained": None,
        **ways,
    }
    assert (lab.record({})["weights"] is not None) == there
    name = "vit_small_patch16_224"
    expected = {"name": name, "weights": ways["weights"]} if there else name
    assert lab.data["normalise"] == expected
    own.write_text(own.read_text().replace("pretrained: true", "pretrained: false"))
    if not there:
        with pytest.raises(FileNotFoundError, match="vit.bin"):
            runs.open_run(own, "vit").model  # noqa: B018


def test_the_head_is_fitted_alone_in_the_first_training_only():
    override = {"train.head": True, "train.layer_decay": 0.75, "train.epochs": 0}
    lab = runs.open_run("demo", "vit", override=override)
    assert lab.training()["head"] and not lab.training("budget")["head"]
    assert {lab.training(part)["layer_decay"] for part in ("train", "budget")} == {0.75}
    train.Recipe(**lab.training()), train.Recipe(**lab.training("budget"))
    with pytest.raises(
        ValueError, match="train.epochs: 0 takes weights as they are, and there are"
    ):
        settings.study("demo", override={"train.epochs": 0})


def test_a_shipped_checkpoint_is_of_the_same_settings_data_and_model(lab, monkeypatch, tmp_path):
    settings, folder = lab.training(), tmp_path / "checkpoints" / "demo" / "vit"
    other = runs.open_run("demo", "vit", 7)
    monkeypatch.setattr(files, "repository", lambda: tmp_path)
    images = SimpleNamespace(identity={}, description="drawn shapes")
    assert lab.shipped(settings, images) is None
    kept = {"settings": settings, "values": lab.origin, "data": "drawn shapes"}
    files.write_atomic(folder / "model.json", json.dumps({"extra": kept}))
    assert lab.shipped(settings, images) == folder
    assert lab.shipped(settings | {"epochs": 1}, images) is None
    assert lab.shipped(settings, SimpleNamespace(identity={}, description="other shapes")) is None
    del kept["settings"]["mixup"]  # of a checkpoint from before there was any
    files.write_atomic(folder / "model.json", json.dumps({"extra": kept}))
    assert lab.shipped(lab.training(), images) == folder
    assert lab.shipped(lab.training() | {"mixup": 0.2}, images) is None
    assert other.shipped(other.training(), images) is None
    seventh = tmp_path / "checkpoints" / "demo" / "vit-seed7"
    files.write_atomic(
        seventh / "model.json", json.dumps({"extra": {**kept, "settings": other.training()}})
    )
    assert other.shipped(other.training(), images) == seventh
    assert runs.checkpoint_id(seventh) == ("demo", "vit", 7) and runs.checkpoint_id(folder) == (
        "demo",
        "vit",
        0,
    )
    lab.params.data["image_size"] = 64
    assert lab.shipped(settings, images) is None


@pytest.mark.parametrize(
    "folder", sorted((files.repository() / "checkpoints").glob("*/*")), ids=lambda path: path.name
)
def test_the_checkpoints_that_the_repository_ships_are_those_of_its_studies(folder):
    one = runs.open_run(*runs.checkpoint_id(folder))
    images = SimpleNamespace(
        identity={}, description=json.loads((folder / "model.json").read_text())["extra"]["data"]
    )
    assert one.shipped(one.training(), images) == folder
    other = runs.open_run(*runs.checkpoint_id(folder), override={"train.mixup": 0.2})
    assert other.shipped(other.training(), images) is None


def test_calibration_takes_what_there_is(lab):
    class Split(list):
        def subset(self, n, *, seed):
            return Split(self[:n])

        def batches(self, size, *, device, **options):
            drawn.append(options)
            return (self[i : i + size] for i in range(0, len(self), size))

    drawn = []
    assert sum(map(len, lab.calibration(Split(range(100))))) == 100
    assert sum(map(len, lab.calibration(Split(range(10_000))))) == lab.params.calibration.images
    assert sum(map(len, lab.calibration(Split(range(100)), images=7))) == 7
    assert not any(drawn)
    for own, augment in ((False, True), (True, None)):
        lab.params.calibration["augment"] = own
        lab.calibration(Split(range(10)), augment=augment)
        assert drawn[-1] == {"augment": {"crop": 4, "flip": True}, "seed": 0}
    lab.calibration(Split(range(10)), augment=False)
    assert not drawn[-1]


def test_augmented_calibration_is_drawn_once_for_each_image(lab, published):
    store = np.random.default_rng(0).integers(256, size=(48, 32, 32, 3), dtype=np.uint8)
    sizes = {"image_size": 32, "window": 32, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    train = data.Split(store=store, indices=np.arange(48), labels=torch.arange(48) % 3, **sizes)
    options = {"images": 24, "augment": True}
    plain, drawn, again = (lab.calibration(train, **o) for o in ({"images": 24}, options, options))
    other = runs.open_run("demo", "vit", 1).calibration(train, **options)
    pairs = list(zip(plain, drawn, again, strict=True))
    assert all(x.equal(z) and not w.equal(x) and y.equal(v) for (w, v), (x, y), (z, _) in pairs)
    assert not other[0][0].equal(drawn[0][0])
    saved = lab.save_calibration(drawn, (0.5, 1.0)).iloc[0].to_dict()
    assert saved == {
        **{
            "study": "demo",
            "model": "vit",
            "seed": 0,
            "images": 24,
            "batch_size": 64,
            "labels": "true",
        },
        **{"augment": False, "calibration_loss": 0.5, "val_loss": 1.0},
    }
    lab.save_results("2_sensitivity", [ROW])
    assert results.read("demo").tables.calibration.labels.tolist() == ["true"], "a word, not a bool"


def test_a_missing_step_is_named_with_its_command(lab):
    with pytest.raises(FileNotFoundError) as error:
        lab.need("dense", "1_train")
    for part in ("dense is missing", "run notebooks/1_train.ipynb first", "JupyterLab"):
        assert part in str(error.value)
    assert "vitlab run 1_train --study demo --model vit --seed 0" in str(error.value)
    lab.path("dense").mkdir()
    assert lab.need("dense", "1_train") == lab.path("dense")
    with pytest.raises(ValueError, match="unknown notebook '1_tain', did you mean '1_train'"):
        lab.need("dense", "1_tain")


def test_an_overridden_run_stands_apart_and_reads_what_it_does_not_change(lab):
    lab.path("dense").mkdir()
    other = runs.open_run("demo", "vit", 0, {"global_pruning.epochs": 1})
    assert other.folder != lab.folder and other.params.global_pruning.epochs == 1
    assert other.need("dense", "1_train") == lab.path("dense")
    retrained = runs.open_run("demo", "vit", 0, {"train.epochs": 2})
    with pytest.raises(FileNotFoundError, match="--set 'train.epochs=2'"):
        retrained.need("dense", "1_train")
    values = [{"data.name": "/some/where"}, {"data.name": "/some/where else"}, {"train.lr": 1e-9}]
    names = {runs.open_run("demo", override=value).folder.name for value in values}
    assert len(names) == 3 and all(
        set(name) <= set("+.=,-_" + name) and "/" not in name for name in names
    )


# -- rows


def test_the_commit_says_dirty_and_strips_the_notebooks_of_a_fresh_checkout_once(tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    (tmp_path / "vitlab").mkdir()
    (tmp_path / "notebooks").mkdir()
    notebook = tmp_path / "notebooks" / "a.ipynb"
    notebook.write_text("code")
    git("init")
    git("add", "-A")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "first")
    git("config", "filter.strip.clean", f"echo once >>'{tmp_path}/calls'; cat")
    (tmp_path / ".git" / "info" / "attributes").write_text("*.ipynb filter=strip\n")
    os.utime(notebook, (1, 1))  # git no longer knows it by its time
    first, again, _ = (runs._commit.__wrapped__(tmp_path) for _ in range(3))
    assert first == again and len(first) == 10
    assert (tmp_path / "calls").read_text() == "once\n"
    notebook.write_text("other code")
    assert runs._commit.__wrapped__(tmp_path) == first + "+dirty"


def test_rows_carry_their_provenance_in_the_written_order(lab):
    frame = lab.save_results("1_train", [ROW, ROW | {"target": 1, "threads": 7}])
    assert list(frame)[: len(runs._COLUMNS)] == runs._COLUMNS and list(frame)[
        len(runs._COLUMNS) :
    ] == [
        "extra",
        "override",
    ]
    read = lab.load_results("1_train")
    assert list(read) == list(frame) and len(read) == 2
    first = read.iloc[0]
    assert (first.study, first.model, first.seed, first.split_seed) == ("demo", "vit", 0, 0)
    assert first.torch.startswith("2.") and first.timm and first.device and first.commit
    assert (
        pd.Timestamp(first.date).tzinfo and read.threads.tolist()[1] == 7
    )  # what a row says itself stays


@pytest.mark.parametrize("rows", [[{"stage": "dense"}], [{"method": "dense"}], []])
def test_rows_without_method_or_stage_are_refused(lab, rows):
    with pytest.raises(ValueError, match="method|stage"):
        lab.save_results("1_train", rows)
    assert not list(lab.folder.iterdir())


def test_a_target_is_a_number(lab):
    with pytest.raises(ValueError, match="50 percent"):
        lab.save_results("1_train", [ROW | {"target": "50 percent"}])


def test_a_bar_counts_the_outer_loop_and_names_the_newest_result(lab, monkeypatch):
    monkeypatch.setenv("VITLAB_HEADLESS", "0")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log = lab.results("3_global_pruning", SimpleNamespace(test=[]), lambda *_: {"top1": 75.25})
    shown = []
    for ratio in log.watch(iter([0.5, 0.9])):
        log.cut(method="units", target=ratio).add("cut", "a model")
        shown.append(str(log.bar))
    assert shown[0].startswith("3_global_pruning: 0 of 2")
    assert shown[0].endswith("units, cut: 75.2 %")


def test_results_of_a_notebook_are_those_of_rows_and_histories_written_by_hand(lab):
    images = SimpleNamespace(identity={}, description="drawn shapes", test=[1, 0, 1, 1])
    history = pd.DataFrame({"epoch": [1, 2], "val_top1": [50.0, 60.0], "seconds": [3.0, 4.5]})

    def measure(model, split):
        return {"top1": model * sum(split), "total": len(split), "top5": 100.0}

    log = lab.results("3_global_pruning", images, measure)
    cut = log.cut(method="units", criterion="fisher", target_kind="macs", target=0.5)
    cut.columns["form"] = "removed"
    cut.add("cut", 10, val_top1=40.0)
    row = cut.add("finetuned", 20, history=history, checkpoint="units-0.5")
    log.cut(method="ranks", target=0.1).add("unreachable", note="the floor is 0.2")
    dense = log.cut(method="dense")
    dense.add("dense+epochs", 30, history=history.assign(target=0.0), form="masked")
    assert row["top1"] == 60 and row["seconds"] == 7.5
    table, histories = log.save()

    about = dict(method="units", criterion="fisher", form="removed", target_kind="macs", target=0.5)
    spent = dict(stage="finetuned", checkpoint="units-0.5", epochs=2, seconds=7.5)
    rows = [
        about | dict(stage="cut", val_top1=40.0) | measure(10, images.test),
        about | spent | measure(20, images.test),
        dict(method="ranks", target=0.1, stage="unreachable", note="the floor is 0.2"),
        dict(method="dense", form="masked", stage="dense+epochs", epochs=2, seconds=7.5)
        | measure(30, images.test),
    ]
    by_hand = lab.save_results("3_global_pruning", rows, data="drawn shapes").drop(columns="date")
    pd.testing.assert_frame_equal(table.drop(columns="date"), by_hand)
    by_hand = [history.assign(**about), history.assign(method="dense", target=0.0)]
    by_hand = lab.save_history("3_global_pruning", by_hand)
    pd.testing.assert_frame_equal(histories, by_hand)

    other = lab.results("5_budget", images, measure)
    other.cut(method="ranks", target=0.1).add("unreachable", note="the floor is 0.2")
    table, history = other.save()
    assert len(table) == 1 and history is None
    with pytest.raises(ValueError, match="lack method and stage"):
        lab.results("5_budget", images, measure).save()


def test_results_keep_the_models_that_are_added_with_the_name_of_a_checkpoint(lab):
    images = SimpleNamespace(identity={}, description="drawn shapes", test=[1, 0, 1, 1])
    saved = []

    def save_model(model, folder, **options):
        saved.append((model, folder, options))

    log = lab.results("3_global_pruning", images, lambda model, split: {"top1": model}, save_model)
    cut = log.cut(method="units", target=0.5)
    cut.add("cut", 10)
    cut.add("finetuned", 20, checkpoint="units-0.5")
    cut.add("distilled", 30, checkpoint="units-0.5-distilled", masks={"fc1.weight": True})
    cut.add("dense", checkpoint="dense", top1=40)  # it was measured and saved elsewhere
    table, _ = log.save()
    assert table.checkpoint.fillna("").tolist() == ["", "units-0.5", "units-0.5-distilled", "dense"]
    assert saved == [
        (20, lab.path("units-0.5"), {"extra": cut.columns | {"stage": "finetuned", "top1": 20}}),
        (
            30,
            lab.path("units-0.5-distilled"),
            {
                "masks": {"fc1.weight": True},
                "extra": cut.columns | {"stage": "distilled", "top1": 30},
            },
        ),
    ]


@pytest.fixture
def published(data_root, monkeypatch, tmp_path):
    """Folder of the figures of the study demo, in a repository that has nothing else."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "params").symlink_to(files.repository() / "notebooks" / "params")
    monkeypatch.setattr(files, "repository", lambda: tmp_path)
    return tmp_path / "figures" / "demo"


def test_a_study_is_read_over_models_and_seeds(lab, published):
    with pytest.raises(FileNotFoundError, match="vitlab run 0 .* --study demo"):
        results.read("demo")
    (published.parents[1] / "Makefile").touch()
    with pytest.raises(FileNotFoundError, match="make study STUDY=demo"):
        results.read("demo")
    for model, seed in [("vit", 0), ("vit", 1), ("swin", 0)]:
        one = runs.open_run("demo", model, seed)
        one.save_results("1_train", [ROW])
        one.save_results("3_global_pruning", [ROW, ROW | {"override": None, "only": 1.5}])
        history = pd.DataFrame({"epoch": [1, 2], "train_top1": [10.0, 20.0]})
        one.save_history("1_train", [history, history.assign(method="dense")])
        one.save_table("heads", pd.DataFrame({"head": [0, 1]}, index=[5, 9]))
    runs.open_run("demo").save_table("data", pd.DataFrame({"split": ["train"]}))
    runs.open_run("demo", "vit", 0, {"train.epochs": 2}).save_results(
        "1_train", [ROW]
    )  # not of the study
    found = results.read("demo")
    assert len(found.results) == 9 and found.results.override.isna().all()
    assert found.results.groupby(["model", "seed"]).size().to_dict() == {
        ("swin", 0): 3,
        ("vit", 0): 3,
        ("vit", 1): 3,
    }
    assert (
        list(found.history)[:5] == ["study", "model", "seed", "notebook", "method"]
        and len(found.history) == 12
    )
    assert set(found.tables) == {"heads", "data"} and len(found.tables.heads) == 6
    assert found.tables.heads.notna().all(axis=None)
    assert len(results.read("demo", override={"train.epochs": 2}).results) == 1
    assert found.tables.heads["head"].tolist() == 3 * [0, 1]


def publish(folder, found, **changes):
    """Write what results.read found, rows of a study, as its figures, and the same of other models and seeds."""
    for name, frame in {"results": found.results, "history": found.history, **found.tables}.items():
        if name != "data":  # of the whole study
            others = [{"model": "swin"}, {"model": "gone"}, {"seed": 99}]
            frame = pd.concat([frame, *(frame.assign(**other) for other in others)])
        name = name if name in ("results", "history") else f"table-{name}"
        files.write_atomic(folder / f"{name}.csv", frame.assign(**changes).to_csv(index=False))


@pytest.fixture
def run(published):
    """A run of demo's vit that has saved something of everything."""
    lab = runs.open_run("demo", "vit", 0)
    for name in ("1_train", "3_global_pruning"):
        lab.save_results(name, [ROW | {"top1": 50, "params": 7}])
    lab.save_history("3_global_pruning", pd.DataFrame({"epoch": [1]}))
    lab.save_table("heads", pd.DataFrame({"head": [0, 1]}))
    runs.open_run("demo").save_table("data", pd.DataFrame({"split": ["train"]}))
    return lab


def test_timings_of_other_methods_stay(run, published):
    """6_efficiency times what several notebooks left: run again after one of them, it replaces that one's rows only.
    Timings of what no notebook makes any more go."""
    run.save_results("4_heads_svd_iht", [ROW | {"method": "svd"}])
    run.save_results("5_budget", [ROW | {"method": "pool"}])
    timed = ("svd", "pool", "dense", "of an older protocol")
    run.save_results("6_efficiency", [ROW | {"method": word, "latency_ms": 1.0} for word in timed])
    publish(published, results.read("demo"))
    run.save_results(
        "6_efficiency", [ROW | {"method": word, "latency_ms": 2.0} for word in ("pool", "dense")]
    )
    found = results.read("demo").results
    found = found[(found.model == "vit") & (found.notebook == "6_efficiency")]
    assert found.set_index("method").latency_ms.to_dict() == {"pool": 2.0, "dense": 2.0, "svd": 1.0}


def test_what_was_not_run_here_comes_from_the_figures(run, published):
    """Results of another notebook, seed or model stay; those measured anew, and unknown models and seeds, do not."""
    publish(published, results.read("demo"))
    for name in ("history-3_global_pruning.csv", "results-3_global_pruning.csv", "table-heads.csv"):
        run.path(name).unlink()
    run.save_results("1_train", [ROW | {"top1": 50.01, "params": 7}])
    found = results.read("demo")
    assert found.results.set_index(["model", "seed", "notebook"]).top1.to_dict() == {
        ("swin", 0, "1_train"): 50,
        ("swin", 0, "3_global_pruning"): 50,
        ("vit", 0, "1_train"): 50.01,
        ("vit", 0, "3_global_pruning"): 50,
    }
    notebooks = [f"swin seed 0 {name}" for name in ("1_train", "3_global_pruning")] + [
        "vit seed 0 3_global_pruning"
    ]
    assert sorted(found.from_figures) == sorted(
        [*notebooks, "vit seed 0 table-heads", "swin seed 0 table-heads"]
    )
    assert found.history.model.tolist() == ["swin", "vit"]
    assert found.tables.heads.model.tolist() == ["swin"] * 2 + ["vit"] * 2
    assert found.tables.data.split.tolist() == ["train"]
    assert results.read("demo", override={}).from_figures == found.from_figures
    with pytest.raises(FileNotFoundError):
        results.read("demo", override={"train.epochs": 2})


def test_figures_of_another_dense_model_or_of_old_times_do_not_count(run, published):
    publish(published, results.read("demo"))
    run.path("results-3_global_pruning.csv").unlink()
    run.save_results("1_train", [ROW | {"top1": 60, "params": 7}])
    found = results.read("demo")
    assert found.results.groupby("model").size().to_dict() == {"swin": 2, "vit": 1}
    publish(published, found, notebook="5_old")
    assert set(results.read("demo").results.model) == {"vit"}
    (published / "results.csv").write_text("study,model,seed,top1\ndemo,swin,0,50\n")
    assert set(results.read("demo").results.model) == {"vit"}


def test_rows_made_again_are_compared_with_the_kept_ones_within_the_spread_of_their_seeds(lab):
    cut = {
        "notebook": "5_budget",
        "method": "pool",
        "stage": "cut",
        "criterion": "fisher",
        "macs": 500.0,
    }
    kept = pd.DataFrame(
        [
            *(
                {"model": "vit", "seed": seed, "top1": 80.0 + 2 * seed, "target": 0.5} | cut
                for seed in (0, 1)
            ),
            {
                "model": "vit",
                "seed": 0,
                "top1": 90.0,
                "notebook": "1_train",
                "method": "dense",
                "stage": "dense",
            },
            {
                "model": "vit",
                "seed": 0,
                "top1": 90.0,
                "notebook": "6_efficiency",
                "method": "dense",
                "stage": "dense",
            },
            {"model": "swin", "seed": 0, "top1": 10.0, "target": 0.5} | cut,
        ]
    )
    kept["target"] = kept.target.astype(float)
    same = results._compare(kept, kept)
    assert same.agrees[same.macs.notna()].all() and len(same) == 4, "timings are left out"
    assert sorted(same[same.model == "vit"].spread) == [1.0, 2.0, 2.0]

    dense = kept[kept.method == "dense"].assign(target=None)  # as rows come from JSON
    found = results._compare(dense, kept)
    assert len(found) == 2 and found.top1.isna().sum() == 1, "a row that was not made again"
    assert not found[found.top1.isna()].agrees.any()

    again = kept[kept.seed == 0].assign(macs=lambda rows: rows.macs * 1.009)
    for change, agrees in [(0.0, True), (2.0, True), (-2.1, False)]:
        found = results._compare(again.assign(top1=again.top1 + change), kept)
        assert (
            bool(found[(found.model == "vit") & (found.method == "pool")].agrees.item()) is agrees
        )
        assert bool(found[found.model == "swin"].agrees.item()) is (change == 0), (
            "one seed: a point at least"
        )
    assert not results._compare(again.assign(macs=again.macs * 1.02), kept).agrees.any()
    with pytest.raises(ValueError, match="no result stands in both tables"):
        results._compare(again.assign(seed=7), kept)
    dense = dense.assign(
        macs=5.0
    )  # of its criterion CSV gives a column of numbers, as it has no entry
    assert results._compare(
        dense.assign(criterion=None), dense.assign(criterion=np.nan)
    ).agrees.all()


def test_figures_of_a_study_are_in_the_repository_and_of_an_overridden_one_are_not(
    data_root, published
):
    label = "demo+train.epochs=2"
    assert (
        runs.open_run("demo", override={"train.epochs": 2}).figures
        == data_root / "runs" / label / "figures"
    )
    assert runs.open_run("demo").figures == published


def test_a_study_in_short_has_a_table_and_a_sentence_for_each_model(published, capsys):
    assert main(["results", "dmo", "--short"]) == main(["results", "demo", "--short"]) == 1
    said = capsys.readouterr().err
    assert "did you mean 'demo'" in said and "notebook 7 writes it" in said
    rows = [
        ("swin", "structured", "removed", "sparsity", 0.6, 88.0, np.nan, np.nan, np.nan, 81.5, 3e6),
        ("vit", "heads+svd+iht columns", "factored", "ratio", 0.4, 93.0, 90.0, 91.5, np.nan, 92.25, 3e6),
        ("vit", "pool", "factored", "macs", 0.25, 93.0, 40.0, 60.0, 80.0, np.nan, 1e6),
        ("vit", "pool", "factored", "macs", 0.5, 92.75, 88.0, 90.0, 92.5, 93.25, 2e6),
    ]  # fmt: skip
    columns = ["model", "method", "form", "target_kind", "target", "dense", "cut", "compensated"]
    columns += ["reconstructed", "finetuned", "macs"]
    published.mkdir(parents=True)
    pd.DataFrame(rows, columns=columns).to_csv(published / "summary.csv", index=False)
    assert main(["results", "demo", "--short"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("swin") and lines[4].startswith("vit, test top-1 (%): 93.0 dense")
    assert [line.split()[-3:] for line in lines[6:9]] == [
        ["91.5", "92.3", "3.0"],
        ["factored", "80.0", "1.0"],
        ["92.5", "93.3", "2.0"],
    ]
    assert lines[8].startswith("one pool, 50% left")
    assert lines[9:] == [
        "",
        "before: after the last step that trains nothing; blank: not run",
        "vit: dense 92.8 %; half of the MACs, nothing trained: 92.5 %, fine-tuned: 93.3 %",
    ]


# -- files and progress


@pytest.mark.parametrize("content", ["ü", b"\0x", lambda path: path.write_text("drawn")])
def test_a_file_is_written_whole(tmp_path, content):
    path = tmp_path / "new" / "a.png"
    files.write_atomic(path, content)
    assert path.read_bytes() in ("ü".encode(), b"\0x", b"drawn")
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    def fails(path):
        assert path.suffix == ".png"  # savers look at the ending
        path.write_text("half")
        raise RuntimeError("no more")

    files.write_atomic(tmp_path / "a.png", "old")
    with pytest.raises(RuntimeError, match="no more"):
        files.write_atomic(tmp_path / "a.png", fails)
    assert (tmp_path / "a.png").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_what_killed_processes_left_goes_and_what_others_finish_meanwhile_is_no_error(tmp_path):
    old, new, gone = (tmp_path / f".{number}-a.png" for number in (1, 2, 3))
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (0, 0))
    gone.symlink_to(tmp_path / "renamed")  # it is listed, and not there
    files.write_atomic(tmp_path / "a.png", "whole")
    assert not old.exists() and new.exists() and (tmp_path / "a.png").read_text() == "whole"


def test_a_line_on_a_screen_is_the_same(capsys, monkeypatch):
    monkeypatch.setenv("VITLAB_HEADLESS", "0")
    files.log("a line")
    assert capsys.readouterr().out == "a line\n"


# -- the log of every row


def test_the_log_keeps_what_was_replaced_and_tells_the_parameters(lab, data_root, capsys):
    for top1 in (50.0, 60.0):
        lab.save_results("1_train", [ROW | {"top1": top1}, ROW | {"top1": top1 + 1}])
    other = runs.open_run("demo", "vit", 0, {"train.epochs": 2})
    other.save_results("1_train", [ROW])
    rows = results._gather("demo")
    own = rows[rows.folder == "demo/vit/seed0"]
    assert own.top1.tolist() == [60, 61] and len(rows) == 3 and own.commit.notna().all()
    log = [json.loads(line) for line in lab.path(runs.LOG).read_text().splitlines()]
    assert [line["top1"] for line in log] == [50, 51, 60, 61]
    assert len({line["save"] for line in log}) == 2
    values = [json.loads(text)["train"]["epochs"] for text in rows.parameters]
    assert sorted(values) == [2, lab.params.train.epochs, lab.params.train.epochs]
    assert json.loads(own.parameters.iloc[0])["models"] == lab.params.models.vit
    with pytest.raises(FileNotFoundError, match="no results of smoke"):
        results._gather("smoke")
    capsys.readouterr()
    assert main(["results", "smok"]) == 1 and "did you mean 'smoke'" in capsys.readouterr().err
    assert main(["results", "smoke"]) == 1 and main(["results", "demo"]) == 0


def test_a_line_that_was_cut_short_costs_itself_alone(lab, capsys):
    lab.save_results("1_train", [ROW])
    log = lab.path(runs.LOG)
    log.write_bytes(log.read_bytes()[:-40])
    lab.save_results("1_train", [ROW | {"top1": 1.0}])
    assert results._gather().top1.tolist() == [1.0] and "line 1 of" in capsys.readouterr().out


ADDING = """
import sys
from vitlab.studies import runs
for i in range(40):
    runs._append(sys.argv[1], [{"who": sys.argv[2], "i": i, "filling": "x" * 20_000}] * 2)
"""


def test_rows_that_are_added_at_once_are_all_there(tmp_path):
    log = tmp_path / "results.jsonl"
    both = [subprocess.Popen([sys.executable, "-c", ADDING, str(log), who]) for who in "ab"]
    assert [process.wait(60) for process in both] == [0, 0]
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted((row["who"], row["i"]) for row in rows) == sorted(
        (w, i) for w in "ab" for i in range(40) for _ in "12"
    )


# -- disks that are full


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # Python's own choice
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from vitlab import files
files.write_atomic(sys.argv[1], "x" * 2000)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a limit of file sizes")
def test_a_full_disk_says_what_to_do_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True
    )
    assert "is full: make room, or set VITLAB_DATA" in done.stderr and done.returncode == 1
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1

    def fails(path):
        raise RuntimeError(
            "PytorchStreamWriter failed writing file"
        )  # which is all that torch says

    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(OSError, match="is full: make room"):
        files.write_atomic(path, fails)


HOLDING = """
import sys, time
from vitlab import files
with files.lock(sys.argv[1], "the work"):
    print("holds", flush=True)
    time.sleep(60)
"""


def test_a_lock_file_that_a_killed_process_left_blocks_nobody(tmp_path):
    command = [sys.executable, "-c", HOLDING, str(tmp_path / "lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holds\n"
    with pytest.raises(RuntimeError, match="the work is under way in another process: wait for it"):
        files.lock(tmp_path / "lock", "the work").__enter__()
    process.kill()
    process.communicate()
    assert (tmp_path / "lock").exists()
    with files.lock(tmp_path / "lock", "the work"):
        pass


def test_studies_are_read_without_torch():
    code = "import sys; from vitlab.studies import settings; settings.study('demo'); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_one_at_a_time(tmp_path):
    with files.lock(tmp_path / "lock", "the work"):
        second = files.lock(tmp_path / "lock", "the work")
        with pytest.raises(RuntimeError, match="the work is under way in another process"):
            second.__enter__()
    with files.lock(tmp_path / "lock", "the work"):
        pass
