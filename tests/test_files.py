import errno
import os
import signal
import subprocess
import sys

import pytest

from batchens.files import (
    ROOT,
    check_writable,
    data_folder,
    replacing,
    results_folder,
    runs_folder,
    write_tensors,
    write_text,
)


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "folder" / "file.csv"
    path.parent.mkdir()
    path.write_text("old")
    return path


def only_the_old(path):
    return path.read_text() == "old" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_when_the_block_raises_the_old_file_stays_and_nothing_else(error, old):
    with pytest.raises(error):
        with replacing(old) as temporary:
            temporary.write_text("half")
            raise error
    assert only_the_old(old)


def test_a_new_file_appears_only_when_the_block_has_ended(old):
    new = old.with_name("new.csv")
    with replacing(new) as temporary:
        temporary.write_text("whole")
        assert not new.exists()
        assert temporary.parent == new.parent and temporary.name.startswith(".") and temporary.name.endswith(".tmp")
    assert new.read_text() == "whole" and not temporary.exists()


def test_a_block_that_writes_nothing_is_an_error_and_the_old_file_stays(old):
    with pytest.raises(FileNotFoundError):
        with replacing(old):
            pass
    assert only_the_old(old)


def test_text_is_written_as_it_is(tmp_path):
    write_text(tmp_path / "text", "é\r\n\n")
    assert (tmp_path / "text").read_bytes() == "é\r\n\n".encode()


KILLED_WHILE_WRITING = """
import sys, time
from pathlib import Path
from batchens.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_writer_that_is_killed_leaves_the_old_file_whole_and_in_nobodys_way(old):
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(old)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
        assert writer.stdout.readline() == "written\n"
        writer.send_signal(signal.SIGKILL)
    assert old.read_text() == "old"
    assert list(old.parent.glob("*.csv")) == [old]
    write_text(old, "new")
    assert old.read_text() == "new"


BEYOND_A_LIMIT = """
import resource, sys
from pathlib import Path
from batchens.files import write_text
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_text(Path(sys.argv[1]), "x" * 100_000)
except OSError as error:
    print(error.errno, error.strerror)
"""


def test_a_file_that_may_not_grow_is_an_oserror_and_the_old_one_stays(old, python):
    ran = python(BEYOND_A_LIMIT, old)
    assert ran.stdout.split()[:1] == [str(errno.EFBIG)], ran.stderr
    assert only_the_old(old)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("needs the permission to mount a tmpfs")
    yield disk
    # lazily: a writer that failed may be open until its error is collected
    subprocess.run(["umount", "--lazy", str(disk)], check=True, timeout=10)


def test_a_full_disk_is_an_oserror_and_the_old_file_stays(small_disk):
    path = small_disk / "file.csv"
    path.write_text("old")
    with pytest.raises(OSError) as error:
        write_text(path, "x" * 100_000)
    assert error.value.errno == errno.ENOSPC
    assert only_the_old(path)


def test_tensors_on_a_full_disk_too_are_an_oserror(small_disk):
    import torch

    path = small_disk / "file.csv"
    write_tensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()
    with pytest.raises(OSError, match="could not be written") as error:
        write_tensors(path, {"a": torch.ones(100_000)})
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(path)
    assert path.read_bytes() == before and [one.name for one in small_disk.iterdir()] == [path.name]
    assert torch.equal(torch.load(path)["a"], torch.ones(3))


def test_a_full_disk_is_known_before_any_training(small_disk):
    check_writable(small_disk)
    assert list(small_disk.iterdir()) == []
    (small_disk / "all").write_bytes(b"x" * (64 * 1024 - os.sysconf("SC_PAGE_SIZE")))
    (small_disk / "rest").write_bytes(b"x" * os.sysconf("SC_PAGE_SIZE"))
    with pytest.raises(ValueError, match="No space left"):
        check_writable(small_disk)
    assert sorted(path.name for path in small_disk.iterdir()) == ["all", "rest"]


def test_a_folder_that_cannot_be_made_is_known_before_any_training(old):
    with pytest.raises(ValueError, match="choose another with --data, --runs or --results"):
        check_writable(old / "below a file")
    check_writable(old.parent / "new" / "deep")
    assert list((old.parent / "new" / "deep").iterdir()) == []


@pytest.mark.parametrize("name", ["data", "runs", "results"])
def test_folders_are_those_of_the_environment_else_in_the_repository(name, tmp_path, monkeypatch):
    folder = {"data": data_folder, "runs": runs_folder, "results": results_folder}[name]
    monkeypatch.setenv(f"BATCHENS_{name.upper()}", str(tmp_path / "there"))
    assert folder() == tmp_path / "there"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(f"BATCHENS_{name.upper()}", "relative")
    assert folder() == tmp_path / "relative"
    for unset in (lambda: monkeypatch.setenv(f"BATCHENS_{name.upper()}", ""),
                  lambda: monkeypatch.delenv(f"BATCHENS_{name.upper()}")):  # fmt: skip
        unset()
        assert folder() == ROOT / name
