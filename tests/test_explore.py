"""Tests of explore: the widgets show what the package's own calls give, from scores saved once."""

import contextlib
import copy
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import explore
import numpy as np
import pytest
import torch
from conftest import toy

from vitlab import files, models
from vitlab.evaluation import cost, evaluate
from vitlab.models import checkpoint
from vitlab.pruning import budget, factor, masks, pool, scores, shrink
from vitlab.studies import notebooks, runs
from vitlab.training import data


def toy_images():
    """60 random images of 16 px in 3 classes."""
    store = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    labels = torch.arange(60) % 3

    def split(low, high):
        return data.Split(
            store, np.arange(low, high), labels[low:high], 16, 16, (0.5,) * 3, (0.25,) * 3
        )

    return data.Dataset(
        "toy", ["a", "b", "c"], split(0, 24), split(24, 36), split(36, 60), 16, "toy"
    )


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setenv("VITLAB_DATA", str(tmp_path))
    monkeypatch.setattr(explore.data, "load", lambda **_: toy_images())
    return runs.open_run("smoke", "vit")


@pytest.fixture(scope="module", params=["vit", "swin"])
def opened(request, tmp_path_factory):
    """An Explorer of each toy, opened once for all tests."""
    toys = {
        "vit": dict(name="conv_vit", embed_dim=32, depth=2, num_heads=4),
        "swin": dict(
            name="conv_swin", embed_dim=24, depths=(2, 2), num_heads=(3, 6), window_size=2
        ),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITLAB_DATA", str(tmp_path_factory.mktemp("data")))
        patch.setattr(explore.data, "load", lambda **_: toy_images())
        lab = runs.open_run("smoke", "vit")
        checkpoint.save(toy(**toys[request.param]), lab.path("dense"))
        return explore.Explorer(lab)


@pytest.fixture
def explorer(opened, monkeypatch):
    """The same, its widgets as they were when it was opened."""
    monkeypatch.setattr(explore.data, "load", lambda **_: toy_images())
    for widget in (opened.block, opened.layer, opened.criterion, opened.unit_criterion):
        widget.index = 0
    opened.sparsity.value, opened.macs.value = 0.5, 0.95
    return opened


def states(explorer):
    """Which of STATES each pixel of the mask is, by number."""
    return np.asarray(explorer.layer_picture.image.get_array())


# -- what goes


@pytest.mark.parametrize(
    "criterion, sparsity", [("taylor", 0), ("taylor", 0.5), ("magnitude", 0.9), ("random", 0.99)]
)
def test_the_mask_shown_is_that_of_the_exact_count(explorer, criterion, sparsity):
    explorer.macs.value, explorer.criterion.value, explorer.sparsity.value = 1, criterion, sparsity
    weights = explorer.subject.weights[criterion]
    keep = masks.keep_largest(weights, sparsity=sparsity)
    total = sum(score.numel() for score in weights.values())
    assert sum(int((~mask).sum()) for mask in keep.values()) == round(sparsity * total)
    explorer.block.value = explorer.block.options[-1]
    for role, name in explorer.subject.layers[explorer.block.value].items():
        explorer.layer.value = role
        assert (states(explorer) == np.where(keep[name], 2, 0)).all()
        words = f"kept {int(keep[name].sum()):,} of {keep[name].numel():,}"
        assert explorer.layer_picture.mask.get_title() == words


def test_each_bar_counts_the_weights_of_its_bin(explorer):
    explorer.sparsity.value = 0.6
    shown = states(explorer)
    for least, bar in enumerate(explorer.layer_picture.stairs):
        assert bar.get_data().values.sum() == (shown >= least).sum()
    weights, line = explorer.subject.weights["taylor"], explorer.layer_picture.line
    dropped = torch.cat([score[~explorer.cut.keep[name]] for name, score in weights.items()])
    kept = torch.cat([score[explorer.cut.keep[name]] for name, score in weights.items()])
    assert line.get_visible() and line.get_xdata()[0] == dropped.max() <= kept.min()


@pytest.mark.parametrize("criterion", explore._UNITS)
def test_struck_out_heads_and_missing_neurons_are_those_of_the_plan(explorer, criterion):
    explorer.unit_criterion.value = criterion
    subject = explorer.subject
    for share in [subject.floor, 0.9, 0.95]:
        explorer.macs.value = share
        plan = budget.plan(subject.model, subject.units[criterion], macs=share)
        assert explorer.cut.drop == plan.drop == subject.plan(criterion, share).drop
        rows = [row.split("<td")[1:] for row in explorer.heads.value.split("<tr>")[2:]]
        for (block, neurons, *heads), name in zip(
            rows, dict.fromkeys(b for b, _ in subject.units[criterion]), strict=True
        ):
            assert f">{name}<" in block and len(heads) == len(
                subject.units[criterion][name, "heads"]
            )
            assert [i for i, head in enumerate(heads) if "<s " in head] == sorted(
                plan.drop.get((name, "heads"), ())
            )
            count = len(subject.units[criterion][name, "neurons"])
            assert f" {count - len(plan.drop.get((name, 'neurons'), ()))} of {count}<" in neurons


def test_the_slider_ends_at_the_least_share_that_a_plan_can_keep(explorer):
    subject, least = explorer.subject, explorer.macs.min
    assert least == subject.floor < 1
    budget.plan(subject.model, subject.units["taylor"], macs=least)
    with pytest.raises(pool.Unreachable):
        budget.plan(subject.model, subject.units["taylor"], macs=least - 0.01)


# -- what is left


def test_costs_are_those_of_the_model_that_is_really_smaller(explorer):
    explorer.sparsity.value, explorer.macs.value, explorer.criterion.value = 0.7, 0.9, "magnitude"
    model = copy.deepcopy(explorer.subject.model)
    magnitudes = {
        name: model.get_parameter(name).detach().abs()
        for name in explorer.subject.weights["magnitude"]
    }
    for name, mask in masks.keep_largest(magnitudes, sparsity=0.7).items():
        model.get_parameter(name).data *= mask
    small = shrink.remove(
        model, budget.plan(model, explorer.subject.units["fisher"], macs=0.9).drop
    )
    expected = {
        "MACs": cost.macs(small),
        "MACs if zeros were free": cost.macs(small, ideal=True),
        "parameters": sum(p.numel() for p in small.parameters()),
        "non-zero parameters": sum(int(p.count_nonzero()) for p in small.parameters()),
        "bytes in memory": cost.bytes_memory(small),
        "bytes on disk": cost.bytes_disk(small),
    }
    assert explore._costs(explorer.cut.model) == expected
    dense = cost.macs(explorer.subject.model)
    for number in (*expected.values(), dense):
        assert f"{number:,}<" in explorer.table.value
    assert (
        f"{expected['MACs'] / dense:.1%}" in explorer.table.value
        and expected["MACs"] <= 0.9 * dense
    )
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(explorer.cut.model(x), small(x))


def test_without_a_cut_the_model_is_the_dense_one(explorer):
    explorer.sparsity.value, explorer.macs.value = 0, 1
    assert explorer.cut.model is explorer.subject.model
    assert explorer.cut.masked == explorer.cut.removed == 0 and not explorer.cut.drop
    assert (states(explorer) == 2).all() and not explorer.layer_picture.line.get_visible()
    assert "<s " not in explorer.heads.value


def test_the_predicted_rise_is_the_sum_of_second_order_scores(explorer):
    subject = explorer.subject
    only_weights = subject.cut("taylor", 0.5, "fisher", 1)
    masked = sum(
        subject.weights["obd"][name][~mask].sum() for name, mask in only_weights.keep.items()
    )
    assert (
        only_weights.masked == pytest.approx(masked.item(), rel=1e-5) and only_weights.removed == 0
    )
    only_units = subject.cut("taylor", 0, "fisher", 0.9)
    assert only_units.removed == pytest.approx(subject.plan("fisher", 0.9).predicted, rel=1e-5)
    both = subject.cut("taylor", 0.5, "fisher", 0.9)  # weights of units that go are counted once
    assert both.masked < only_weights.masked and both.removed == only_units.removed > 0


def test_validation_images_are_tested_on_the_model_that_is_shown(explorer):
    explorer.sparsity.value = 0.95
    explorer.button.click()
    val = toy_images().val  # not test, which is reported on once, and not by what is chosen here
    for model in (explorer.subject.model, explorer.cut.model):
        correct = evaluate.accuracy(model, val).correct
        assert f"<b>{correct} ({correct / 12:.1%})</b>" in explorer.answer.value
    assert "Of 12 validation images" in explorer.answer.value
    assert explorer.test_image.value[1:4] == b"PNG"
    explorer.sparsity.value = 0.9  # what was tested is another cut now
    assert explorer.answer.value.count("Before the last move: Of 12 validation images") == 1


def test_the_measured_rise_stands_beside_the_one_predicted_of_the_same_images(explorer):
    for explorer.sparsity.value, explorer.macs.value in [(0, 1), (0.02, 1), (0.95, 0.95)]:
        explorer.button.click()
        batches = explorer.subject.lab.calibration(toy_images().train)
        rise = scores.loss(explorer.cut.model, batches) - scores.loss(
            explorer.subject.model, batches
        )
        predicted = explorer.cut.masked + explorer.cut.removed
        assert f"<b>{rise:+.2g}</b> nats, predicted: {predicted:+.2g}" in explorer.answer.value
        is_near = predicted / 3 <= rise <= 3 * predicted
        assert ("off by more than 3 times" in explorer.answer.value) != is_near and (
            is_near or predicted > 0
        )
    explorer.cut["masked"] = 10 * abs(rise)
    explorer.button.click()
    assert "off by more than 3 times" in explorer.answer.value


def test_missing_images_are_reported_below_the_button(explorer, monkeypatch):
    def nothing(**_):
        raise RuntimeError("no images here")

    monkeypatch.setattr(explore.data, "load", nothing)
    explorer.subject.__dict__.pop("images", None)
    explorer.button.click()
    assert "no images here" in explorer.answer.value


def test_the_lines_of_code_make_the_model_that_is_shown(explorer):
    for explorer.sparsity.value, explorer.macs.value in [(0.4, 1), (0.3, 0.95)]:
        names = {}
        exec(explorer.code.value, names)
        x = torch.randn(2, 3, 16, 16)
        assert torch.equal(names["small"](x), explorer.cut.model(x))
        assert cost.macs(names["small"]) == cost.macs(explorer.cut.model)


def test_lines_part_queries_keys_and_values(explorer):
    explorer.layer.value = "qkv"
    rows, _ = states(explorer).shape
    lines = explorer.layer_picture.parts
    assert [part.get_text() for part in lines if hasattr(part, "get_text")] == ["q", "k", "v"]
    ends = [part.get_ydata()[0] for part in lines if hasattr(part, "get_ydata")]
    assert ends == [rows / 3, 2 * rows / 3]
    explorer.layer.value = "fc1"
    assert explorer.layer_picture.parts == []


# -- scores and checkpoints


def test_scores_are_saved_once_and_come_back_bit_equal(lab, model, monkeypatch):
    checkpoint.save(model, lab.path("dense"))
    batches = lab.calibration(toy_images().train)
    options = {
        "weights": explore._WEIGHTS,
        "units": explore._UNITS,
        "labels": lab.params.calibration.labels,
    }
    fresh = scores.measure(model, batches, **options)
    explore._Subject("smoke/vit/seed0/dense", lab.path("dense"), lab)
    monkeypatch.setattr(explore.scores, "measure", None)  # calling it again would be an error
    again = explore._Subject("smoke/vit/seed0/dense", lab.path("dense"), lab)
    for group, saved in (("weights", again.weights), ("units", again.units)):
        assert list(saved) == list(fresh[group])
        for criterion, measured in fresh[group].items():
            assert list(saved[criterion]) == list(measured), (
                "in the model's order, by which ties are decided"
            )
            assert all(torch.equal(saved[criterion][key], score) for key, score in measured.items())


def test_another_checkpoint_or_calibration_is_another_key(lab, vit):
    def keys():
        explore._Subject("smoke/vit/seed0/dense", lab.path("dense"), lab)
        return {path.name for path in lab.path("explore").iterdir()}

    checkpoint.save(vit, lab.path("dense"))
    first = keys()
    checkpoint.save(vit, lab.path("dense"), extra={"top1": 50.0})  # the same model
    assert len(first) == 1 and keys() == first
    with torch.no_grad():
        next(vit.parameters()).add_(1e-3)
    checkpoint.save(vit, lab.path("dense"))
    second = keys()
    lab.params.calibration["images"] = 10
    assert len(second) == 2 and len(keys()) == 3 and first < second < keys()


def test_what_can_be_explored_is_listed_own_and_dense_ones_first(lab, vit):
    checkpoint.save(vit, lab.path("another"))
    checkpoint.save(vit, lab.path("dense"))
    checkpoint.save(vit, runs.open_run("demo", "swin", 3).path("dense"))
    folders = explore._checkpoints(lab)
    assert list(folders)[:3] == [
        "smoke/vit/seed0/dense",
        "smoke/vit/seed0/another",
        "demo/swin/seed3/dense",
    ]
    assert list(folders)[3].endswith("/seed0/shipped"), "its images are not here"
    said = {label: words for words, label in explore.Explorer(lab)._options()}
    assert said[list(folders)[0]] == list(folders)[0]
    assert said["cifar10-small/vit/seed0/shipped"].endswith("shipped — no images of cifar10")
    transferred = explore._checkpoints(runs.open_run("caltech101-small", "swin-transfer"))
    assert next(iter(transferred)) == "caltech101-small/swin-transfer/seed0/shipped"


def test_each_checkpoint_comes_with_the_images_of_its_own_run(lab, vit, tmp_path):
    checkpoint.save(vit, lab.path("dense"))
    checkpoint.save(vit, runs.open_run("demo", "swin", 3).path("dense"))
    folders = explore._checkpoints(lab)
    assert (
        explore._Subject("smoke/vit/seed0/dense", folders["smoke/vit/seed0/dense"], lab).lab is lab
    )
    other = explore._Subject("demo/swin/seed3/dense", folders["demo/swin/seed3/dense"], lab).lab
    assert (other.study, other.model_name, other.seed) == ("demo", "swin", 3)

    path = tmp_path / "own.yaml"
    path.write_text((files.repository() / "notebooks" / "params" / "smoke.yaml").read_text())
    checkpoint.save(vit, runs.open_run(path, "vit", 0).path("dense"))
    own = runs.open_run(path, "vit", 1)  # of a study that is known by its path alone
    folder = explore._checkpoints(own)["own/vit/seed0/dense"]
    assert explore._Subject("own/vit/seed0/dense", folder, own).lab.folder == folder.parent


def test_without_any_checkpoint_the_commands_that_make_one_are_named(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "repository", lambda: tmp_path / "clone")
    with pytest.raises(
        FileNotFoundError,
        match="train one with\n.*vitlab run 1_train --study smoke --model vit --seed 0",
    ):
        explore.Explorer(lab)


def test_a_model_that_was_cut_before_can_be_cut_further(lab, vit):
    cut = shrink.remove(vit, {("blocks.0", "heads"): range(4), ("blocks.1", "heads"): [2]})
    with torch.no_grad():
        cut.blocks[1].mlp.fc1.weight[:16] = 0
    checkpoint.save(cut, lab.path("dense"))
    explorer = explore.Explorer(lab)
    assert explorer.layer.options[0] == "fc1" and list(explorer.subject.layers["blocks.0"]) == [
        "fc1",
        "fc2",
    ]
    explorer.block.value, explorer.layer.value, explorer.sparsity.value = "blocks.1", "qkv", 0.05
    explorer.block.value = "blocks.0"  # which has no such layer: its first one is shown
    assert (states(explorer) >= 0).all() and states(explorer).shape == (64, 32)
    explorer.macs.value = explorer.macs.min
    assert cost.macs(explorer.cut.model) <= explorer.macs.min * cost.macs(cut)


def test_weights_of_factored_layers_can_be_masked_and_units_stay(lab, vit):
    thin, _ = factor.compress(vit, ratio=0.5, method="svd", multiple=1)
    checkpoint.save(thin, lab.path("dense"))
    explorer = explore.Explorer(lab)
    assert explorer.layer.options[0] == "qkv first" and explorer.macs.disabled
    explorer.sparsity.value = 0.25
    weights = explorer.subject.weights["taylor"]
    zeros = sum(int((explorer.cut.model.get_parameter(name) == 0).sum()) for name in weights)
    assert zeros == round(0.25 * sum(score.numel() for score in weights.values()))
    assert not explorer.cut.drop and "units cannot" in explorer.status.value


def test_a_factored_checkpoint_can_be_chosen_while_units_of_another_go(lab, vit):
    checkpoint.save(vit, lab.path("dense"))
    thin, _ = factor.compress(vit, ratio=0.5, method="svd", multiple=1)
    checkpoint.save(thin, lab.path("ranks"))
    explorer = explore.Explorer(lab)
    assert explorer.macs.value < 1 and explorer.cut.drop
    explorer.checkpoint.value = "smoke/vit/seed0/ranks"
    assert explorer.status.value.startswith("Its layers were cut before")
    assert explorer.macs.value == 1 and not explorer.cut.drop
    assert cost.macs(explorer.cut.model) == cost.macs(thin)
    explorer.button.click()
    assert "validation images the checkpoint gets" in explorer.answer.value
    assert "dense" not in explorer.answer.value + explorer.table.value
    explorer.checkpoint.value = "smoke/vit/seed0/dense"
    assert explorer.status.value == "" and cost.macs(explorer.cut.model) == cost.macs(vit)


def test_a_checkpoint_without_images_is_not_opened_and_nothing_is_downloaded(
    lab, vit, tmp_path, monkeypatch
):
    checkpoint.save(vit, lab.path("dense"))
    (tmp_path / "cifar10").mkdir()  # as a download that failed leaves it
    explorer = explore.Explorer(lab)
    monkeypatch.setattr(explore.data, "load", lambda **_: pytest.fail("images were looked for"))
    explorer.checkpoint.value = "cifar10-small/vit/seed0/shipped"
    assert explorer.checkpoint.value == explorer.label == "smoke/vit/seed0/dense"
    assert "vit/seed0/shipped: not opened: no images of cifar10" in explorer.status.value


def test_lines_of_code_name_a_file_of_ones_own_from_everywhere(lab, vit, tmp_path, monkeypatch):
    text = (files.repository() / "notebooks" / "params" / "smoke.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    own = runs.open_run("own.yaml", "vit")
    checkpoint.save(vit, own.path("dense"))
    explorer = explore.Explorer(own)
    assert f'runs.open_run("{tmp_path / "own.yaml"}", "vit", 0)' in explorer.code.value


def test_a_checkpoint_that_cannot_be_opened_says_why_and_the_last_one_stays(lab, vit):
    for name in ("dense", "other"):
        checkpoint.save(vit, lab.path(name))
    (lab.path("other") / "model.safetensors").write_bytes(b"cut short")
    explorer = explore.Explorer(lab)
    before = explorer.checkpoint.value, explorer.cut
    explorer.checkpoint.value = "smoke/vit/seed0/other"
    assert (
        explorer.checkpoint.value,
        explorer.cut,
    ) == before and "altered or cut short" in explorer.status.value


# -- in the browser


@pytest.fixture
def jupyterlab(tmp_path):
    """Address of a JupyterLab that has a copy of the notebook, of the study smoke, whose ViT is there, untrained."""
    lab = runs.open_run("smoke", "vit")  # under tmp_path
    checkpoint.save(models.create(**lab.model, num_classes=10, image_size=32), lab.path("dense"))
    text = (files.repository() / "notebooks" / "explore.ipynb").read_text()
    shutil.copy(files.repository() / "notebooks" / "explore.py", tmp_path)  # which it imports
    (tmp_path / "explore.ipynb").write_text(
        text.replace('study = \\"demo\\"', 'study = \\"smoke\\"')
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, settings = secrets.token_hex(16), str(tmp_path / "jupyter")
    environment = {name: value for name, value in os.environ.items() if name != "VITLAB_HEADLESS"}
    environment |= {
        "JUPYTER_CONFIG_DIR": settings,
        "JUPYTER_DATA_DIR": settings,
        "JUPYTER_RUNTIME_DIR": settings,
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--allow-root",
    ]
    command += [
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        f"--notebook-dir={tmp_path}",
    ]
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(120):
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}"),
            ):
                break
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/lab/tree/explore.ipynb?token={token}"
    finally:
        server.terminate()  # its kernels go with it
        server.wait(60)


@pytest.fixture
def chromium():
    """A page of a headless Chromium."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: .venv/bin/pip install -e .[browser]"
    )
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if path is None:
        pytest.skip("needs Chromium on the PATH: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser.new_page(viewport={"width": 1400, "height": 1300})
        browser.close()


@pytest.mark.long
def test_sliders_and_the_button_answer_in_jupyterlab(chromium, lab, jupyterlab):
    page = chromium
    page.set_default_timeout(120_000)
    page.goto(jupyterlab)
    page.get_by_text("| Idle").wait_for()
    page.wait_for_timeout(2000)  # cells that are run before all is connected are lost
    page.locator(".lm-MenuBar-itemLabel").get_by_text("Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    pictures, sliders = page.locator("img.widget-image"), page.locator(".noUi-handle")
    shown = [
        pictures.nth(0),
        page.locator(".widget-html table").nth(0),
    ]  # the mask; heads and neurons
    shown[1].wait_for()
    look = "each => each.src || each.innerText"
    queries = (
        "[document.querySelector('img.widget-image'), document.querySelector('.widget-html table')]"
    )
    for number in (0, 1):  # the sparsity moves the mask alone, the budget heads and neurons
        before, state = [each.screenshot() for each in shown], shown[number].evaluate(look)
        sliders.nth(number).focus()
        for _ in range(10):
            page.keyboard.press("ArrowLeft")
        page.wait_for_function(
            f"([n, state]) => ({look})({queries}[n]) != state", arg=[number, state]
        )
        page.wait_for_timeout(3000)  # until the last of the moves is drawn
        after = [each.screenshot() for each in shown]
        assert before[number] != after[number] and (number == 1 or before[1] == after[1])
    assert not pictures.nth(1).is_visible()
    page.get_by_role("button", name="test on images").click()
    page.get_by_text("validation images the checkpoint gets").wait_for()
    pictures.nth(1).wait_for()
    assert page.get_by_text("Traceback").count() == 0


@pytest.mark.long
def test_the_notebook_runs_headless_and_keeps_pictures_instead_of_widgets(tmp_path, monkeypatch):
    monkeypatch.setenv("VITLAB_DATA", str(tmp_path))
    lab = runs.open_run("smoke", "vit")
    checkpoint.save(models.create(**lab.model, num_classes=10, image_size=32), lab.path("dense"))
    done = notebooks._execute(notebooks._find_notebook("explore"), {"study": "smoke"})
    outputs = [
        out for cell in json.loads(done.read_text())["cells"] for out in cell.get("outputs", [])
    ]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 1
    assert any(
        "MACs if zeros were free" in "".join(out.get("data", {}).get("text/html", ""))
        for out in outputs
    )
