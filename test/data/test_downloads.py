"""Stage 0: links, archives, downloads; what is there afterwards is whole."""

import socket
import tarfile

import pytest

from valle.data import downloads
from valle.data.downloads import CorpusPart, provide
from valle.utils.errors import UserError

PART = CorpusPart(
    folder="Corpus/part-a",
    content=("*/text.tsv", "*/*.wav"),
    archives=("part-a.tar.gz", "part_a.tar.gz"),
    url="http://localhost:9/part-a.tar.gz",
    alike=True,
)


def never(folder):
    raise AssertionError("downloaded")


def make_part(folder):
    (folder / "7").mkdir(parents=True)
    (folder / "7" / "text.tsv").write_text("7\tseven\n")
    (folder / "7" / "7.wav").write_bytes(b"sound" * 1000)
    return folder


def make_archive(path, source, arcname):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(source, arcname=arcname)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("place", ["Corpus/part-a", "part-a", "."])
def test_the_users_folder_is_linked(tmp_path, place):
    mine = tmp_path / "part-a" if place == "." else tmp_path / "mine"
    unpacked = make_part(mine / place)
    for _ in range(2):
        provide(PART, tmp_path / "download", mine, never)
        target = tmp_path / "download" / "Corpus" / "part-a"
        assert target.is_symlink() and target.resolve() == unpacked.resolve()
    other = make_part(tmp_path / "other" / "part-a")
    provide(PART, tmp_path / "download", tmp_path / "other", never)
    assert target.resolve() == other.resolve()


def test_another_part_is_not_taken_for_it(tmp_path):
    mine = make_part(tmp_path / "part-b")
    with pytest.raises(
        UserError, match=r"holds neither the folder Corpus/part-a \(.*\) nor part-a.tar.gz or"
    ):
        provide(PART, tmp_path / "download", mine, never)


@pytest.mark.parametrize("arcname", ["Corpus/part-a", "part-a", "."])
@pytest.mark.parametrize("given", ["folder", "file", "download folder"])
def test_an_archive_is_unpacked_once(tmp_path, given, arcname):
    download = tmp_path / "download"
    place = download if given == "download folder" else tmp_path / "mine"
    archive = make_archive(place / "part_a.tar.gz", make_part(tmp_path / "source"), arcname)
    corpus_dir = {"folder": place, "file": archive, "download folder": None}[given]
    provide(PART, download, corpus_dir, never)
    target = download / "Corpus" / "part-a"
    assert (target / "7" / "7.wav").is_file() and not target.is_symlink()
    assert archive.is_file() and not [name for name in names(download) if name.startswith(".")]
    time = (target / "7").stat().st_ctime_ns
    provide(PART, download, corpus_dir, never)
    assert (target / "7").stat().st_ctime_ns == time


def test_half_an_archive_leaves_nothing_behind(tmp_path):
    archive = make_archive(tmp_path / "mine" / "part-a.tar.gz", make_part(tmp_path / "source"), "part-a")
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(UserError, match="is no whole tar archive"):
        provide(PART, tmp_path / "download", tmp_path / "mine", never)
    assert not (tmp_path / "download" / "Corpus").exists()
    make_archive(archive, tmp_path / "source", "part-a")
    provide(PART, tmp_path / "download", tmp_path / "mine", never)
    assert names(tmp_path / "download") == ["Corpus"]


def test_an_archive_of_something_else(tmp_path):
    (tmp_path / "source").mkdir()
    make_archive(tmp_path / "mine" / "part-a.tar.gz", tmp_path / "source", "part-a")
    with pytest.raises(UserError, match="does not hold Corpus/part-a"):
        provide(PART, tmp_path / "download", tmp_path / "mine", never)


def test_archives_inside_an_archive(tmp_path):
    part = CorpusPart(
        folder="data", content=("wav/train/*/*.wav",), archives=("data.tgz",), url="", nested="wav/*.tar.gz"
    )
    source = tmp_path / "data"
    (source / "wav").mkdir(parents=True)
    speaker = make_part(tmp_path / "speaker")
    make_archive(source / "wav" / "S1.tar.gz", speaker / "7", "train/S1")
    # Unpacked by hand, but not what is inside.
    with pytest.raises(UserError, match=r"archives like '.*S1.tar.gz' are not unpacked yet"):
        provide(part, tmp_path / "download", tmp_path, never)
    make_archive(tmp_path / "mine" / "data.tgz", source, "data")
    provide(part, tmp_path / "download", tmp_path / "mine", never)
    assert (tmp_path / "download" / "data" / "wav" / "train" / "S1" / "7.wav").is_file()
    assert names(tmp_path / "download" / "data" / "wav") == ["train"]


@pytest.fixture
def reachable(monkeypatch):
    monkeypatch.setattr(downloads, "unreachable", lambda url: None)


def test_download(tmp_path, reachable):
    def fetch(folder):
        assert socket.getdefaulttimeout() == downloads.READ_SECONDS
        make_part(folder / "Corpus" / "part-a")
        (folder / "part-a.tar.gz").touch()

    for fetch_or_not in (fetch, never):
        provide(PART, tmp_path, None, fetch_or_not)
        assert names(tmp_path) == ["Corpus"] and names(tmp_path / "Corpus" / "part-a") == ["7"]
    assert socket.getdefaulttimeout() is None


def test_a_download_that_breaks_off_is_taken_up(tmp_path, reachable):
    def breaks(folder):
        (folder / "part-a.tar.gz").write_bytes(b"half")
        raise TimeoutError("timed out")

    def resumes(folder):
        assert (folder / "part-a.tar.gz").read_bytes() == b"half"
        make_part(folder / "Corpus" / "part-a")

    with pytest.raises(
        UserError, match=r"timed out\); fetch http://localhost:9/part-a.tar.gz .* --corpus-dir"
    ):
        provide(PART, tmp_path, None, breaks)
    assert not (tmp_path / "Corpus").exists()
    provide(PART, tmp_path, None, resumes)


def test_a_download_that_is_no_archive_is_not_kept(tmp_path, reachable):
    def fetch(folder):
        (folder / "part-a.tar.gz").write_bytes(b"<html>")
        raise tarfile.ReadError("not a gzip file")

    with pytest.raises(UserError, match="what came is no whole tar archive"):
        provide(PART, tmp_path, None, fetch)
    assert names(tmp_path) == []


def test_what_was_downloaded_is_not_overwritten_by_a_link(tmp_path):
    make_part(tmp_path / "download" / "Corpus" / "part-a")
    with pytest.raises(UserError, match="was downloaded before; delete it"):
        provide(PART, tmp_path / "download", make_part(tmp_path / "part-a"), never)


def test_nobody_answers(tmp_path):
    with socket.socket() as free:  # a port where nothing listens
        free.bind(("127.0.0.1", 0))
        assert downloads.unreachable(f"http://127.0.0.1:{free.getsockname()[1]}/x") is not None
