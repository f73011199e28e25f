import hashlib
import os
import stat
import threading
from pathlib import Path

import pytest

from vop import files


def test_atomic_leaves_nothing_behind_on_an_exception(tmp_path):
    target = tmp_path / "new" / "file.bin"
    with pytest.raises(RuntimeError, match="midway"), files.atomic(target) as (filesystem, inner):
        with filesystem.open_output_stream(inner) as stream:
            stream.write(b"half")
        raise RuntimeError("midway")
    assert list(target.parent.iterdir()) == []


def test_atomic_keeps_the_old_file_on_an_exception(tmp_path):
    target = tmp_path / "file.bin"
    files.write_bytes(target, b"old")
    with pytest.raises(RuntimeError), files.atomic(target) as (_, inner):
        Path(inner).write_bytes(b"half of the new")
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file.bin": b"old"}


def test_a_temporary_file_is_hidden_and_beside_its_target(tmp_path):
    with files.atomic(tmp_path / "shard-00001.json") as (_, inner):
        Path(inner).touch()
        assert Path(inner).parent == tmp_path  # a rename within one file system is atomic
        assert Path(inner).name.startswith(".")
        assert not (tmp_path / "shard-00001.json").exists()


def test_a_reader_never_sees_part_of_a_file(tmp_path):
    target, done = tmp_path / "value.bin", threading.Event()
    contents = [bytes([i]) * 200_000 for i in range(2)]
    files.write_bytes(target, contents[0])

    def rewrite():
        for i in range(60):
            files.write_bytes(target, contents[i % 2])
        done.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    seen = set()
    while not done.is_set() or not seen:
        data = target.read_bytes()
        assert data in contents
        seen.add(data[0])
    writer.join()
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_the_permissions_the_user_asked_for(tmp_path, umask):
    before = os.umask(umask)
    try:
        files.write_bytes(tmp_path / "file.bin", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.bin").stat().st_mode) == 0o666 & ~umask


def test_json_has_a_fixed_layout(tmp_path):
    value = {"z": 1, "a": {"name": "Zürich 東京"}}
    files.write_json(tmp_path / "a.json", value)
    assert (tmp_path / "a.json").read_text() == '{\n  "z": 1,\n  "a": {\n    "name": "Zürich 東京"\n  }\n}\n'
    assert files.read_json(tmp_path / "a.json") == value


def test_reading_what_is_not_there_is_an_oserror(tmp_path):
    for read in (files.read_bytes, files.read_json, files.sha256):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nothing")
    with pytest.raises(OSError):
        files.read_bytes(tmp_path)
    assert not files.exists(tmp_path / "nothing")
    assert files.listing(tmp_path / "nothing") == {}
    files.remove(tmp_path / "nothing")


def test_listing_holds_files_only_with_their_sizes(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "b").write_bytes(b"12345")
    (tmp_path / "a").write_bytes(b"")
    assert list(files.listing(tmp_path).items()) == [("a", 0), ("b", 5)]


def test_remove_deletes_files_and_folders(tmp_path):
    files.write_bytes(tmp_path / "folder" / "deep" / "file", b"1")
    files.write_bytes(tmp_path / "file", b"1")
    files.remove(tmp_path / "folder")
    files.remove(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_sha256_of_a_file_of_several_pieces(tmp_path):
    data = bytes(range(256)) * 40_000
    (tmp_path / "file").write_bytes(data)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_paths_and_uris(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.absolute("a/../b") == f"{tmp_path}/b"
    assert files.absolute("s3://bucket/folder/") == "s3://bucket/folder"
    assert files.join("s3://bucket/folder/", "a", "b.txt") == "s3://bucket/folder/a/b.txt"
    assert files.join(tmp_path, "a") == f"{tmp_path}/a"
    files.write_bytes(f"file://{tmp_path}/by uri", b"1")
    assert files.read_bytes("by uri") == b"1"
    with pytest.raises(ValueError, match=r"cannot open 'gopher://host/x'"):
        files.resolve("gopher://host/x")
