import pytest

from vitlab.training import _folders, _shapes, data


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("VITLAB_HEADLESS", "1")


def tree_bytes(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")
    }


def test_shapes_are_the_same_each_time_and_no_two_alike(tmp_path):
    first, again = (
        tree_bytes(_shapes.make(tmp_path / name, per_class=(3, 1, 2))) for name in ("a", "b")
    )
    assert first == again and len(first) == 10 * 6 == len(set(first.values()))


def test_shapes_are_drawn_at_first_use(tmp_path, monkeypatch):
    draw = _shapes.make
    monkeypatch.setattr(_shapes, "make", lambda folder: draw(folder, per_class=(4, 2, 3)))
    images = data.load("shapes", root=tmp_path, image_size=32)
    assert images.name == "shapes" and len(images.classes) == 10
    assert [len(getattr(images, part)) for part in _folders.SPLITS] == [40, 20, 30]
    assert not (tmp_path / "building").exists()  # nothing half-written
    monkeypatch.setattr(_shapes, "make", None)
    assert (
        data.load("shapes", root=tmp_path, image_size=32).test.images == images.test.images
    ).all()


def test_shapes_do_not_overwrite(tmp_path):
    with pytest.raises(FileExistsError, match="exists"):
        _shapes.make(tmp_path)
