"""Whole or not at all."""

import errno
import os

import pytest

from training.files import whole_file, whole_folder, why_not_written

pytestmark = pytest.mark.train


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    file = tmp_path / "deep" / "one.txt"
    with whole_file(file) as place:
        place.write_text("first")
    with pytest.raises(OSError), whole_file(file) as place:
        place.write_text("sec")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert file.read_text() == "first" and os.listdir(file.parent) == ["one.txt"]


def test_a_folder_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    folder = tmp_path / "folder"
    with whole_folder(folder) as place:
        (place / "inner").mkdir()
        (place / "inner" / "a").write_text("1")
    with pytest.raises(ValueError), whole_folder(folder) as place:
        (place / "b").write_text("2")
        raise ValueError
    assert (folder / "inner" / "a").read_text() == "1" and os.listdir(tmp_path) == ["folder"]
    with whole_folder(folder) as place:
        (place / "c").write_text("3")
    assert os.listdir(folder) == ["c"] and os.listdir(tmp_path) == ["folder"]


def test_files_are_flushed_by_handles_that_windows_flushes(tmp_path, monkeypatch):
    flags, opened = {}, os.open

    def noted(path, how, *rest):
        flags[str(path)] = how
        return opened(path, how, *rest)

    with whole_file(tmp_path / "one") as place:
        place.write_text("1")
        monkeypatch.setattr(os, "open", noted)
    assert flags == {str(place): os.O_RDWR}


def test_what_is_said_of_a_failed_write(tmp_path):
    assert "the disk is full" in why_not_written(OSError(errno.ENOSPC, "x"), tmp_path / "a")
    assert "the disk is full" in why_not_written(RuntimeError("PytorchStreamWriter failed"), tmp_path / "a")
    assert "cannot be written (no)" in why_not_written(OSError("no"), tmp_path / "a")
