import pytest

from vop.config import ConfigError, load
from vop.datasets.image_sets import open_image_sets

NAMES = ("map/a.jpg", "map/b.png", "map/deep/c.jpg", "phone/a.jpg", "phone/d.jpg", "e.jpg")


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "photos"
    for name in (*NAMES, "map/notes.txt", "map/a.depth.png"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def opened(**values):
    return open_image_sets(load(output="run", **values))


def test_a_collection_is_its_own_queries_and_database(root):
    sets = opened(images=str(root))
    assert sets.root == str(root)
    assert sets.names == sorted(NAMES)
    assert sets.queries == sets.database == tuple(sorted(NAMES))
    assert sets.skipped == {"not an image (.txt)": 1, "depth map (.depth.png)": 1}


def test_the_listing_is_what_a_catalog_takes(root):
    listing = opened(images=str(root)).listing().to_pylist()
    for row in listing:
        stat = (root / row["name"]).stat()
        assert row["path"] == str(root / row["name"])
        assert (row["size"], row["modified_ns"]) == (stat.st_size, stat.st_mtime_ns)
        assert row["scene"] == (row["name"].split("/")[0] if "/" in row["name"] else "")
    assert [row["name"] for row in listing] == sorted(NAMES)


def test_two_folders_are_named_from_their_common_folder(root):
    sets = opened(queries=str(root / "phone"), database=str(root / "map"))
    assert sets.root == str(root)
    assert sets.queries == ("phone/a.jpg", "phone/d.jpg")
    assert sets.database == ("map/a.jpg", "map/b.png", "map/deep/c.jpg")
    assert sets.names == sorted([*sets.queries, *sets.database])  # e.jpg was not asked for
    assert sets.skipped == {"not an image (.txt)": 1, "depth map (.depth.png)": 1}


def test_queries_may_lie_inside_the_database(root):
    sets = opened(queries=str(root / "map" / "deep"), database=str(root / "map"))
    assert sets.root == str(root / "map")
    assert sets.queries == ("deep/c.jpg",)
    assert sets.names == ["a.jpg", "b.png", "deep/c.jpg"]  # once each


def test_images_give_the_root_and_everything_the_sets_leave_open(root):
    sets = opened(images=str(root), queries=str(root / "phone"))
    assert sets.queries == ("phone/a.jpg", "phone/d.jpg")
    assert sets.database == tuple(sorted(NAMES))
    sets = opened(images=str(root), database=str(root / "map"))
    assert sets.queries == tuple(sorted(NAMES))
    assert sets.database == ("map/a.jpg", "map/b.png", "map/deep/c.jpg")


def test_a_glob_pattern_and_a_list_file(root, tmp_path):
    listed = tmp_path / "queries.txt"
    listed.write_text("# two of them\nphone/d.jpg\n\nmap/b.png\n")
    sets = opened(images=str(root), queries=str(listed), database=str(root / "map" / "*.jpg"))
    assert sets.queries == ("map/b.png", "phone/d.jpg")
    assert sets.database == ("map/a.jpg",)
    assert sets.names == sorted(NAMES)


def test_a_listed_file_that_is_missing_stays_to_be_reported(root):
    (root / "list.txt").write_text("e.jpg\ngone.jpg\n")
    sets = opened(images=str(root / "list.txt"))
    assert sets.names == ["e.jpg", "gone.jpg"]
    assert sets.listing()["size"].to_pylist() == [5, -1]


def test_what_is_missing_is_said(root, tmp_path):
    for values in ({}, {"queries": str(root)}, {"database": str(root)}):
        with pytest.raises(ConfigError, match="no images: give images=FOLDER, or queries=FOLDER and database=FOLDER"):
            opened(**values)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        opened(images=str(root / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        opened(images=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="outside the root"):
        opened(images=str(root / "map"), queries=str(root / "phone"))
