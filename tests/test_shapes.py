import pytest

from vitlab.training import data, shapes, sources


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("VITLAB_HEADLESS", "1")


def tree_bytes(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")
    }


def test_shapes_are_a_function_of_the_seed(tmp_path):
    counts = (3, 1, 2)
    first, again, other = (
        tree_bytes(shapes.make(tmp_path / str(i), per_class=counts, seed=seed))
        for i, seed in enumerate((0, 0, 1))
    )
    assert first == again and len(first) == 10 * 6 == len(set(first.values()))
    assert not set(first.values()) & set(other.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0",
        "1",
        "2",
    ]  # nothing half-written


def test_shapes_are_drawn_at_first_use(tmp_path, monkeypatch):
    draw = shapes.make
    monkeypatch.setattr(shapes, "make", lambda folder: draw(folder, per_class=(4, 2, 3)))
    images = data.load("shapes", root=tmp_path, image_size=32)
    assert images.name == "shapes" and len(images.classes) == 10
    assert [len(getattr(images, part)) for part in sources.SPLITS] == [40, 20, 30]
    monkeypatch.setattr(shapes, "make", None)
    assert (
        data.load("shapes", root=tmp_path, image_size=32).test.images == images.test.images
    ).all()


def test_shapes_do_not_overwrite(tmp_path):
    with pytest.raises(FileExistsError, match="is there already"):
        shapes.make(tmp_path)
    with pytest.raises(ValueError, match="three counts"):
        shapes.make(tmp_path / "new", per_class=(3, 0, 1))
