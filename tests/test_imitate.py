"""imitate: answers are the teacher's and are given once, the student learns them, a killed run goes on."""

import copy

import pytest
import torch
from conftest import OTHERS, toy
from test_train import Blobs, same

from vitlab import models
from vitlab.models import anatomy, checkpoint
from vitlab.pruning import shrink
from vitlab.training import imitate, train

RECIPE = dict(epochs=4, lr=2e-3, warmup_epochs=0.5, precision="float32")


@pytest.fixture
def teacher():
    return toy(**OTHERS["registers"])  # with a class token


def lessons(teacher, folder, **options):
    parts = [(Blobs(64), 16), (Blobs(100, seed=2), 8)]
    return imitate.Lessons(teacher, parts, folder, precision="float32", **options)


def student(teacher):
    torch.manual_seed(0)
    size = dict(embed_dim=24, depths=(2, 2), num_heads=(3, 6), window_size=2)
    classes = imitate.say(teacher, Blobs(1).x).shape[1]
    return models.create("conv_swin", num_classes=classes, image_size=16, **size)


def test_answers_are_the_teachers(teacher, tmp_path):
    found = lessons(teacher, tmp_path, views=2)
    for epoch in (0, 1, 2):
        batches = list(found.batches(24, shuffle=True, epoch=epoch))
        assert len(batches) == len(found) // 24 == 4  # the first split has no more
        for x, y in batches:
            assert torch.allclose(y, imitate.say(teacher, x), rtol=1e-3, atol=1e-3)
    first, again = (next(found.batches(24, shuffle=True, epoch=epoch)) for epoch in (0, 2))
    assert all(map(torch.equal, first, again)) and len(list(tmp_path.iterdir())) == 2


def test_new_views_are_answered_in_passing(teacher, tmp_path):
    found = lessons(teacher, None, views=None, augment=True, mixup=0.5)
    epochs = [list(found.batches(24, shuffle=True, epoch=epoch)) for epoch in (0, 1, 0)]
    for batches in epochs:
        for x, y in batches:
            assert torch.allclose(y, imitate.say(teacher, x), atol=1e-5)
    (first, _), (second, _), (again, _) = (batches[0] for batches in epochs)
    assert first.equal(again) and not first.equal(second)
    with pytest.raises(ValueError, match="need a folder"):
        lessons(teacher, None, views=2)


def test_mixed_images_lie_between_an_image_and_the_next(teacher):
    plain, mixed = (
        next(lessons(teacher, None, views=None, mixup=alpha).batches(24))[0] for alpha in (0, 1)
    )
    shares = (mixed - plain).flatten(1).norm(dim=1) / (plain.roll(1, 0) - plain).flatten(1).norm(
        dim=1
    )
    expected = torch.lerp(plain, plain.roll(1, 0), shares[:, None, None, None])
    assert torch.allclose(mixed, expected, atol=1e-5)
    assert 0 < shares.min() < shares.max() < 1


def test_a_teacher_says_its_class_token_and_the_mean_of_its_patches(teacher, vit, swin):
    x = Blobs(4).x
    tokens = teacher.forward_features(x)  # the class token, four registers, the patches
    assert imitate.say(teacher, x).equal(torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1))
    for model in (vit, swin):  # pooled already
        assert torch.allclose(model.get_classifier()(imitate.say(model, x)), model(x), atol=1e-5)


def test_a_student_learns_and_a_stopped_one_goes_on_without_the_teacher(
    teacher, tmp_path, monkeypatch
):
    whole = student(teacher)
    stopped = copy.deepcopy(whole)
    start = copy.deepcopy(whole.state_dict())

    def fit(model, folder):
        both = [lessons(teacher, folder, views=2), lessons(teacher, folder / "val")]
        return imitate.fit(model, *both, RECIPE, folder=folder)

    expected = fit(whole, tmp_path / "whole")
    assert expected.val_explained.iloc[-1] > expected.val_explained.iloc[0] + 10
    assert expected.train_loss.iloc[-1] < 0.9 * expected.train_loss.iloc[0]
    assert expected.val_loss.iloc[-1] == pytest.approx(1 - expected.val_explained.iloc[-1] / 100)
    measured, calls = imitate._Imitation.measured, []

    def stop(self):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(self)

    monkeypatch.setattr(imitate._Imitation, "measured", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, tmp_path / "stopped")
    monkeypatch.undo()
    monkeypatch.setattr(imitate, "say", lambda *_: pytest.fail("asked the teacher again"))
    stopped.load_state_dict(start)
    history = fit(stopped, tmp_path / "stopped")
    assert same(whole, stopped) and history.train_loss.equals(expected.train_loss)


def test_what_it_learnt_starts_a_classifier(teacher, tmp_path):
    model = student(teacher)
    teach = lessons(teacher, tmp_path)
    imitate.fit(model, teach, teach, RECIPE | {"epochs": 1})
    checkpoint.save(model, tmp_path / "model")
    options = model.recipe["options"]
    with pytest.warns(UserWarning, match="starts new with 3 classes"):
        new = models.create(
            "conv_swin", num_classes=3, image_size=16, weights=tmp_path / "model", **options
        )
    assert new.normalise == (Blobs.mean, Blobs.std)
    history = train.fit(
        new, Blobs(), Blobs(seed=1), RECIPE | {"epochs": 0, "head": True, "batch_size": 32}
    )
    assert history.val_top1.item() > 60


def test_answers_are_known_by_the_teacher_without_its_head(teacher, tmp_path):
    found = [lessons(teacher, tmp_path).identity]
    teacher.reset_classifier(7)
    found.append(lessons(teacher, tmp_path).identity)
    with torch.no_grad():
        teacher.cls_token.add_(1)
    found.append(lessons(teacher, tmp_path).identity)
    found.append(lessons(teacher, tmp_path, augment=True).identity)
    assert found[0] == found[1] and len(set(found)) == 3


def test_an_answer_that_was_cut_short_is_given_again(teacher, tmp_path):
    found = lessons(teacher, tmp_path)
    expected = [y for _, y in found.batches(24)]
    [file] = tmp_path.iterdir()
    answers = imitate.np.load(file, mmap_mode="r+")
    answers[30, 4:] = imitate.np.nan
    answers.flush()
    assert all(map(torch.equal, expected, (y for _, y in found.batches(24))))


def test_models_that_do_not_fit_are_refused(teacher, vit, tmp_path):
    teach = lessons(teacher, tmp_path)
    with pytest.raises(ValueError, match="the teacher has 48 features, the model 3 classes"):
        imitate.fit(vit, teach, teach, RECIPE)
    other = Blobs()
    other.std = (2.0,) * 3
    with pytest.raises(ValueError, match="normalised in several ways"):
        imitate.Lessons(teacher, [(Blobs(), 1), (other, 1)], tmp_path)
    teacher.normalise = other.mean, other.std
    with pytest.raises(ValueError, match="expect images normalised by"):
        lessons(teacher, tmp_path)


class Mislabelled(Blobs):
    """The same images with other labels."""

    def batches(self, *options, **named):
        for x, y in super().batches(*options, **named):
            yield x, (y + 1) % 3


def test_a_cut_model_learns_its_answers_again_from_images_alone(vit, teacher):
    """Labels play no part, neither of training nor of validation images."""
    recipe = {"epochs": 1, "warmup_epochs": 0, "lr": 2e-3, "batch_size": 16}
    recipe["precision"] = "float32"
    train.fit(vit, Blobs(), Blobs(seed=1), recipe)
    x = Blobs(seed=3).x
    small = shrink.remove(vit, {("stages.0", "width"): range(8)})

    def distance(model):
        said, meant = (each(x).log_softmax(1) for each in (model, vit))
        return (meant.exp() * (meant - said)).sum(1).mean().item()  # the divergence

    before, outcomes = distance(small), []
    for images in (Blobs, Mislabelled):
        model = anatomy.copied(small)
        history = imitate.relearn(model, vit, images(), images(seed=1), recipe | {"epochs": 2})
        outcomes.append(model)
    assert same(*outcomes) and distance(model) < before / 2
    assert history.stage.eq("relearned").all() and len(history) == 2


def test_features_are_learnt_again_where_some_of_them_went(teacher):
    teacher.reset_classifier(0)
    drop = {("stages.0", "width"): range(8), ("blocks.0", "neurons"): range(20)}
    small = shrink.remove(teacher, drop)
    left = shrink.features_left(teacher, drop)
    x = Blobs(seed=3).x

    def alike(model):
        return torch.cosine_similarity(model(x), teacher(x)[:, left]).mean().item()

    recipe = {"epochs": 3, "lr": 2e-3, "batch_size": 16, "precision": "float32"}
    before = alike(small)
    history = imitate.relearn(small, teacher, Blobs(), Blobs(seed=3), recipe, channels=left)
    assert alike(small) > before and len(left) == teacher.num_features - 8
    # The last epoch counts, whatever the one before was.
    assert history.val_cosine.iloc[-1] == pytest.approx(100 * alike(small), abs=1e-3)
    assert history.train_cosine.between(0, 100).all()
