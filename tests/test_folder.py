import os
import sys
import tempfile
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from bad_images import write_zoo

import vop.storage
from vop.datasets.folder import list_images


def touch(root, *names, data=b"x"):
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def names(*args, **kwargs):
    return [image.name for image in list_images(*args, **kwargs).images]


def test_folder_is_recursive_sorted_and_reports_what_it_skips(tmp_path):
    touch(tmp_path, "b/2.PNG", "b/deep/er/1.jpg", "a.jpg", "Zürich 1.jpeg", "x.jpg/inside.webp")
    touch(tmp_path, "notes.txt", "README", ".hidden.jpg", ".cache/1.jpg", "b/2.depth.png", "phone.HEIC")
    collection = list_images(tmp_path)
    assert [i.name for i in collection.images] == sorted(
        ["Zürich 1.jpeg", "a.jpg", "b/2.PNG", "b/deep/er/1.jpg", "x.jpg/inside.webp"]
    )
    scenes = {i.name: i.scene for i in collection.images}
    assert scenes["a.jpg"] == scenes["Zürich 1.jpeg"] == "" and scenes["x.jpg/inside.webp"] == "x.jpg"
    assert scenes["b/2.PNG"] == scenes["b/deep/er/1.jpg"] == "b"
    assert collection.skipped == {
        "not an image (.txt)": 1,
        "not an image (no extension)": 1,
        "hidden": 2,
        "depth map (.depth.png)": 1,
        ".heic (not supported: convert to JPEG)": 1,
    }
    assert collection.root == str(tmp_path) and len(collection) == 5


def test_sizes_times_and_paths_are_those_of_the_files(tmp_path):
    touch(tmp_path, "a/1.jpg", data=b"12345")
    (image,) = list_images(str(tmp_path) + "/").images
    stat = Path(image.path).stat()
    assert (image.size, image.modified_ns) == (5, stat.st_mtime_ns)
    (tmp_path / "list.txt").write_text("a/1.jpg\n")
    assert list_images(tmp_path / "list.txt").images == (image,)


def test_names_keep_their_unicode_form(tmp_path):
    decomposed = "Zu\u0308rich.jpg"
    touch(tmp_path, decomposed)
    assert names(tmp_path) == [decomposed]


def test_whole_zoo_is_listed(tmp_path):
    assert sorted(write_zoo(tmp_path)) == names(tmp_path)


def test_links_are_followed_and_cycles_end(tmp_path):
    touch(tmp_path, "root/a/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "root/a/up").symlink_to(tmp_path / "root")
    (tmp_path / "root/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/self").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/gone.jpg").symlink_to(tmp_path / "nowhere")
    collection = list_images(tmp_path / "root")
    assert [i.name for i in collection.images] == ["a/1.jpg", "linked/2.jpg"]
    assert collection.skipped == {"link to a folder above": 2, "broken link or special file": 1}


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system refuses such names")
def test_names_that_are_not_unicode_are_skipped(tmp_path):
    touch(tmp_path, "1.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(b"x")
    collection = list_images(tmp_path)
    assert len(collection) == 1 and collection.skipped == {"name is not valid UTF-8": 1}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg", "b[1].jpg"]),
        ("?.*", ["a.jpg"]),
        ("*/*.jpg", ["s1/1.jpg", "s2/1.jpg"]),
        ("s[2-9]/*", ["s2/1.jpg"]),
        ("**/1.jpg", ["deep/er/1.jpg", "s1/1.jpg", "s2/1.jpg"]),
        ("deep/**", ["er/1.jpg"]),
        ("b[1].jpg", ["b[1].jpg"]),  # a file of that very name comes before the pattern
    ],
)
def test_globs(tmp_path, pattern, expected):
    touch(tmp_path, "a.jpg", "b[1].jpg", "a.txt", "s1/1.jpg", "s2/1.jpg", "deep/er/1.jpg", ".h/1.jpg")
    (tmp_path / "folder.jpg").mkdir()
    assert names(f"{tmp_path}/{pattern}") == expected


def test_list_rules(tmp_path):
    touch(tmp_path, "a.jpg", "with space.jpg", "PINHOLE 3.jpg", "q/1.jpg", "q/two words.png", "noextension")
    lines = [
        "\ufeff# comment",
        "",
        "./a.jpg\r",
        "with space.jpg  ",
        "PINHOLE 3.jpg",
        "q/1.jpg SIMPLE_RADIAL 1600 1200 1432.2 800 600 -2.5e-2",
        "q/two words.png OPENCV 640 480 500 500 320 240 0 0 0 0",
        "noextension",
    ]
    (tmp_path / "list.txt").write_bytes("\n".join(lines).encode())
    assert names(tmp_path / "list.txt") == sorted(
        ["a.jpg", "with space.jpg", "PINHOLE 3.jpg", "q/1.jpg", "q/two words.png", "noextension"]
    )


def test_list_relative_to_a_root(tmp_path):
    touch(tmp_path, "images/q/1.jpg")
    touch(tmp_path, "queries/night.txt", data=b"q/1.jpg PINHOLE 8 8 9 9 4 4\n")
    (image,) = list_images(tmp_path / "queries/night.txt", root=str(tmp_path / "images")).images
    assert (image.name, image.scene, image.size) == ("q/1.jpg", "q", 1)


def test_list_of_absolute_paths(tmp_path):
    touch(tmp_path, "data/a/1.jpg", "data/b/2.jpg")
    touch(tmp_path, "list.txt", data=f"{tmp_path}/data/a/1.jpg\n{tmp_path}/data/x/../b/2.jpg\n".encode())
    collection = list_images(tmp_path / "list.txt")
    assert collection.root == str(tmp_path / "data")
    assert [i.name for i in collection.images] == ["a/1.jpg", "b/2.jpg"]


def test_missing_files_of_a_list_stay_to_be_reported(tmp_path):
    touch(tmp_path, "here.jpg", "folder.jpg/1.jpg", "list.txt", data=b"here.jpg\ngone.jpg\nfolder.jpg\n")
    found = {image.name: (image.size, image.modified_ns) for image in list_images(tmp_path / "list.txt").images}
    assert found["gone.jpg"] == found["folder.jpg"] == (-1, -1)
    assert found["here.jpg"][0] > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.jpg\n../b.jpg\n", r"list.txt, line 2: '../b.jpg' leaves .* set root"),
        ("q/../../b.jpg\n", r"line 1: '../b.jpg' leaves"),
        ("a.jpg\nq.jpg\n./a.jpg\n", r"'a.jpg' is listed twice"),
        ("# nothing\n", r"no images in .*list.txt; found nothing else"),
        ("a\xff.jpg\n", r"list.txt is not UTF-8 text"),
    ],
)
def test_bad_lists_are_refused(tmp_path, content, message):
    (tmp_path / "list.txt").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        list_images(tmp_path / "list.txt")


def test_several_sources_share_a_root(tmp_path):
    touch(tmp_path, "q/1.jpg", "db/1.jpg", "db/2.png", "one.jpg")
    assert names([tmp_path / "q", f"{tmp_path}/db/*.png", tmp_path / "one.jpg"]) == ["db/2.png", "one.jpg", "q/1.jpg"]
    with pytest.raises(ValueError, match=r"'1.jpg' is listed twice"):
        list_images([tmp_path / "q", tmp_path / "q/1.jpg"])
    with pytest.raises(ValueError, match=r"q/1.jpg lies outside the root .*db"):
        list_images(tmp_path / "q", root=str(tmp_path / "db"))
    with pytest.raises(ValueError, match="no common folder"):
        list_images([tmp_path / "q", f"file://{tmp_path}/db"])


def test_empty_and_absent_sources(tmp_path):
    touch(tmp_path, "a.txt", "b.txt", "c.mp4")
    with pytest.raises(ValueError, match=r"found 2 not an image \(.txt\), 1 not an image \(.mp4\).* .jpg") as error:
        list_images(tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="an empty list of sources"):
        list_images([])


def test_uris_of_local_files(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/b/2.jpg")
    collection = list_images(f"file://{tmp_path}/a")
    assert collection.root == f"file://{tmp_path}/a"
    assert [(i.name, i.path) for i in collection.images] == [
        ("1.jpg", f"file://{tmp_path}/a/1.jpg"),
        ("b/2.jpg", f"file://{tmp_path}/a/b/2.jpg"),
    ]


def test_object_store(tmp_path, monkeypatch):
    """A folder stands in for the store: same calls, same paths (`bucket/key`)."""
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(vop.storage, "remote", lambda *bucket: store)
    touch(tmp_path, "bucket/photos/q/1.jpg", "bucket/photos/2.depth.png", "bucket/photos/.h/3.jpg", data=b"123")
    touch(tmp_path, "bucket/list.txt", data=b"photos/q/1.jpg\nphotos/gone.jpg\n")
    collection = list_images("s3://bucket/photos/")
    (image,) = collection.images
    assert (collection.root, image.name, image.path) == ("s3://bucket/photos", "q/1.jpg", "s3://bucket/photos/q/1.jpg")
    assert image.size == 3 and image.modified_ns == (tmp_path / "bucket/photos/q/1.jpg").stat().st_mtime_ns
    assert collection.skipped == {"hidden": 1, "depth map (.depth.png)": 1}
    assert names("s3://bucket/**/1.jpg") == ["photos/q/1.jpg"]
    assert [(i.name, i.size) for i in list_images("s3://bucket/list.txt").images] == [
        ("photos/gone.jpg", -1),
        ("photos/q/1.jpg", 3),
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_folder_without_permission_is_an_error_not_a_smaller_collection():
    """Root may read everything, so the check runs in a child that is nobody (pytest's own folders are closed to it)."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        touch(folder, "1.jpg", "closed/2.jpg")
        Path(folder, "closed").chmod(0)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                list_images(folder)
            except PermissionError as error:
                status = 0 if "closed" in str(error) else 2
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        Path(folder, "closed").chmod(0o755)
    assert os.waitstatus_to_exitcode(status) == 0
