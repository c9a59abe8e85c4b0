"""Files and folders that are renamed into place when they are complete."""

import pytest

from megaprune.utils.files import aside_of, put_in_place, put_in_place_once


def folder_with(path, text):
    path.mkdir()
    (path / "a").write_text(text)
    return path


def test_temporary_paths_of_one_result_differ_by_owner(tmp_path):
    final = tmp_path / "out.bin"
    assert aside_of(final) == tmp_path / "out.bin.tmp"
    assert aside_of(final, "1") == tmp_path / "out.bin.1.tmp"


def test_a_file_and_an_empty_folder_are_replaced(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).write_text(name)
    put_in_place(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "new"
    (tmp_path / "final").mkdir()
    put_in_place(folder_with(tmp_path / "aside", "new"), tmp_path / "final")
    assert (tmp_path / "final" / "a").read_text() == "new" and not (tmp_path / "aside").exists()


def test_a_folder_with_files_is_replaced_only_on_request(tmp_path):
    aside, final = folder_with(tmp_path / "aside", "new"), folder_with(tmp_path / "final", "old")
    with pytest.raises(OSError):
        put_in_place(aside, final)
    assert (final / "a").read_text() == "old"
    put_in_place(aside, final, replace=True)
    assert (final / "a").read_text() == "new" and not aside.exists()


def test_the_first_of_two_equal_folders_stays(tmp_path):
    first, second = folder_with(tmp_path / "1", "first"), folder_with(tmp_path / "2", "second")
    put_in_place_once(first, tmp_path / "final")
    put_in_place_once(second, tmp_path / "final")
    assert (tmp_path / "final" / "a").read_text() == "first" and second.is_dir()
    with pytest.raises(OSError):
        put_in_place_once(tmp_path / "3", tmp_path / "other")
