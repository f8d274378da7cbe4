"""Packed codes: the same as cut by cut, made once, and again when what they were made from has changed."""

import json
import multiprocessing
import os
import shutil
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from lhotse import CutSet, Features
from synthetic import write_tokenized

from valle.data import packed
from valle.data.manifests import read_manifest
from valle.data.packed import load_codes, open_packed
from valle.utils.errors import UserError


@pytest.fixture
def manifest(tokenized):
    return tokenized / "cuts_train.jsonl.gz"


def packs(manifest, split="cuts_train"):
    return sorted(path.name for path in (manifest.parent / "packed").glob(f"{split}-*"))


def file_number(codes):
    """Changes when a pack is built anew."""
    return (codes.folder / "codes.u16").stat().st_ino


def same_codes(codes, manifest, num_quantizers=4):
    cuts = list(read_manifest(manifest))
    assert len(codes) == len(cuts)
    for number, cut in enumerate(cuts):
        assert np.array_equal(codes[number], load_codes(cut, num_quantizers)), cut.id
    return True


def test_packed_codes_are_those_of_the_cuts(manifest):
    cuts = list(read_manifest(manifest))
    codes = open_packed(manifest, 4, 30)
    assert same_codes(codes, manifest)
    assert [codes.id(number) for number in range(len(codes))] == [cut.id for cut in cuts]
    assert codes.durations.tolist() == [cut.duration for cut in cuts]
    assert codes.frames.tolist() == [len(load_codes(cut)) for cut in cuts]
    assert codes[0].dtype == np.uint16
    assert same_codes(open_packed(manifest, 2, 30), manifest, 2), "the first quantizers alone"
    assert len(packs(manifest)) == 2


def test_ids_of_any_script_are_kept(manifest):
    cuts = list(read_manifest(manifest))
    names = ["ключ", "a", "鍵 1", "", "é"]
    for cut, name in zip(cuts, names, strict=False):
        cut.id = name
    CutSet.from_cuts(cuts).to_file(str(manifest))
    codes = open_packed(manifest, 4, 30)
    assert [codes.id(number) for number in range(6)] == [*names, cuts[5].id]


def test_codes_are_packed_once(manifest):
    first = open_packed(manifest, 4, 30)
    expected = [codes.copy() for codes in (first[0], first[23])]
    assert file_number(open_packed(manifest, 4, 30)) == file_number(first)
    # Not even their files are needed any more.
    shutil.rmtree(manifest.parent / "codes")
    again = open_packed(manifest, 4, 30)
    assert file_number(again) == file_number(first)
    assert np.array_equal(again[0], expected[0]) and np.array_equal(again[23], expected[1])


def test_a_pack_goes_to_a_worker_as_a_path(manifest):
    codes = open_packed(manifest, 4, 30)
    sent = ForkingPickler.dumps(codes)
    assert len(sent) < 1000 and np.array_equal(ForkingPickler.loads(sent)[7], codes[7])


def test_a_changed_manifest_is_packed_anew_and_its_old_pack_removed(manifest):
    open_packed(manifest, 4, 30)
    valid = open_packed(manifest.parent / "cuts_validation.jsonl.gz", 4, 30)
    before = packs(manifest)
    CutSet.from_cuts(list(read_manifest(manifest))[3:]).to_file(str(manifest))
    codes = open_packed(manifest, 4, 30)
    assert len(codes) == 21 and same_codes(codes, manifest)
    assert len(packs(manifest)) == 1 and packs(manifest) != before
    assert packs(manifest, "cuts_validation") == [valid.folder.name], "another manifest's stays"


@pytest.mark.parametrize("replaced", [False, True])
def test_changed_code_files_are_packed_anew(manifest, replaced):
    """Under the same name and manifest: written in place, or put in the old one's place."""
    before = file_number(open_packed(manifest, 4, 30))
    path = manifest.parent / "codes" / "train-005.npy"
    codes = np.load(path)
    if replaced:
        np.save(path.with_name("new.npy"), codes[::-1])
        path.with_name("new.npy").rename(path)
    else:
        np.save(path, codes[::-1])
        os.utime(path, ns=(1, 1))
    again = open_packed(manifest, 4, 30)
    assert np.array_equal(again[5], codes[::-1]) and same_codes(again, manifest)
    assert file_number(again) != before and len(packs(manifest)) == 1


def test_a_file_that_is_not_watched_itself_is_noticed_by_its_folder(tmp_path):
    folder = write_tokenized(tmp_path / "tokenized", {"train": 300})
    manifest = folder / "cuts_train.jsonl.gz"
    watched = open_packed(manifest, 4, 30).sources
    path = next(path for path in (folder / "codes").iterdir() if str(path) not in watched)
    codes = np.load(path)
    np.save(folder / "new.npy", codes[::-1])
    (folder / "new.npy").rename(path)
    assert same_codes(open_packed(manifest, 4, 30), manifest)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    "name", ["codes.u16", "ends.npy", "id_ends.npy", "ids.npy", "durations.npy", "pack.json"]
)
def test_a_truncated_pack_is_built_again(manifest, name):
    codes = open_packed(manifest, 4, 30)
    truncate(codes.folder / name)
    assert same_codes(open_packed(manifest, 4, 30), manifest)
    (codes.folder / name).unlink()
    again = open_packed(manifest, 4, 30)
    assert same_codes(again, manifest) and again.folder == codes.folder, "in the damaged one's place"
    assert len(packs(manifest)) == 1


def test_what_a_killed_build_left_is_removed(manifest):
    rest = manifest.parent / "packed" / ".unfinished-abc"
    (rest / "cuts_train").mkdir(parents=True)
    open_packed(manifest, 4, 30)
    assert not rest.exists()


def test_where_nothing_can_be_written_the_temporary_folder_serves(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (manifest.parent / "packed").write_text("a file where the folder would be")
    codes = open_packed(manifest, 4, 30)
    assert codes.folder.is_relative_to(tmp_path / "temporary") and same_codes(codes, manifest)
    assert file_number(open_packed(manifest, 4, 30)) == file_number(codes)
    # Two manifests of one name in two folders do not get into each other's way.
    before = file_number(codes)
    other = write_tokenized(tmp_path / "other", seed=1)
    (other / "packed").write_text("")
    assert same_codes(open_packed(other / manifest.name, 4, 30), other / manifest.name)
    assert codes.folder.is_dir() and file_number(open_packed(manifest, 4, 30)) == before
    monkeypatch.setattr("tempfile.tempdir", str(manifest))
    with pytest.raises(UserError, match="its codes cannot be packed .*packed.*set TMPDIR"):
        open_packed(manifest, 3, 30)


def test_codes_in_cut_features_are_packed(manifest, tmp_path):
    """Recipes in the manner of lifeiteng/vall-e keep the codes as features."""
    cuts = list(read_manifest(manifest))[:5]
    expected = [load_codes(cut) for cut in cuts]
    for cut, codes in zip(cuts, expected, strict=True):
        cut.custom = None
        np.save(tmp_path / f"{cut.id}.npy", codes.astype(np.float32))
        cut.features = Features(
            type="encodec", num_frames=len(codes), num_features=4, frame_shift=0.02, sampling_rate=16000, start=0.0,
            duration=cut.duration, storage_type="numpy_files", storage_path=str(tmp_path), storage_key=f"{cut.id}.npy",
            recording_id=cut.recording_id, channels=0,
        )  # fmt: skip
    old = tmp_path / "cuts_train.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(str(old))
    codes = open_packed(old, 4, 30)
    assert all(np.array_equal(codes[number], expected[number]) for number in range(5))
    np.save(tmp_path / f"{cuts[2].id}.npy", expected[2][::-1].astype(np.float32))
    os.utime(tmp_path / f"{cuts[2].id}.npy", ns=(1, 1))
    assert np.array_equal(open_packed(old, 4, 30)[2], expected[2][::-1])


def test_bad_codes_are_told_as_if_read_one_by_one(manifest):
    for quantizers, size in ((8, 30), (4, 5)):
        with pytest.raises(UserError) as one_by_one:
            for cut in read_manifest(manifest):
                load_codes(cut, quantizers, size)
        with pytest.raises(UserError) as packed:
            open_packed(manifest, quantizers, size)
        assert str(packed.value) == str(one_by_one.value)
    assert packs(manifest) == []
    (manifest.parent / "codes" / "train-007.npy").write_bytes(b"junk")
    with pytest.raises(UserError, match="train-007.*cannot be read"):
        open_packed(manifest, 4, 30)


def test_a_pack_of_another_codebook_does_not_hide_bad_codes(manifest):
    open_packed(manifest, 4, 30)
    with pytest.raises(UserError, match="expected 0 to 4"):
        open_packed(manifest, 4, 5)


def test_a_manifest_that_is_missing_or_empty_is_named(tmp_path):
    with pytest.raises(UserError, match="cuts_train.jsonl.gz' does not exist"):
        open_packed(tmp_path / "cuts_train.jsonl.gz", 4, 30)
    (tmp_path / "cuts_train.jsonl").write_text("")
    with pytest.raises(UserError, match="cuts_train.jsonl'"):
        open_packed(tmp_path / "cuts_train.jsonl", 4, 30)


def build(manifest, barrier, answers):
    barrier.wait()
    codes = open_packed(manifest, 4, 30)
    answers.put((file_number(codes), int(codes._codes.sum()), len(codes)))


def test_of_processes_that_pack_at_once_one_works_and_the_others_wait(tmp_path):
    folder = write_tokenized(tmp_path / "tokenized", {"train": 300})
    manifest = folder / "cuts_train.jsonl.gz"
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(3), context.Queue()
    workers = [context.Process(target=build, args=(manifest, barrier, answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert len(set(found)) == 1, "the same file: it was built once"
    assert found[0][1] == sum(int(load_codes(cut).sum()) for cut in read_manifest(manifest))
    left = sorted(path.name for path in (folder / "packed").iterdir())
    assert left == [".lock", *packs(manifest)]


def test_what_is_watched_does_not_grow_with_the_corpus(tmp_path):
    folder = write_tokenized(tmp_path / "tokenized", {"train": 600})
    codes = open_packed(folder / "cuts_train.jsonl.gz", 4, 30)
    sources = json.loads((codes.folder / "pack.json").read_text())["sources"]
    numbers = sorted(int(name[-7:-4]) for name in sources if name.endswith(".npy"))
    assert 64 <= len(numbers) < 128 and max(np.diff(numbers)) < 10 and numbers[-1] > 590


def test_reading_without_lhotse_gives_the_same(tmp_path, monkeypatch):
    """Whole cuts, shortened ones, others of the same array, marks, a float array: by either way, the same pack."""
    folder = write_tokenized(tmp_path / "data", {"train": 8})
    cuts = list(read_manifest(folder / "cuts_train.jsonl.gz"))
    cuts[1] = cuts[1].truncate(duration=0.73)
    cuts[2] = cuts[2].truncate(offset=0.2, duration=0.5)
    cuts[3].custom["prompt_duration"] = 0.25
    cuts[4].custom["prompt_duration"] = 1
    array = cuts[5].audio_features.array
    codes = np.load(f"{array.storage_path}/{array.storage_key}")
    np.save(f"{array.storage_path}/float.npy", codes.astype(np.float32))
    array.storage_key = "float.npy"
    manifest = folder / "cuts_mixed.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(manifest)
    fast = open_packed(manifest, 3, 30)
    taken = []
    original = packed._CodeReader.read
    monkeypatch.setattr(packed._CodeReader, "read", lambda *given: taken.append(original(*given) is not None))
    shutil.rmtree(folder / "packed")
    slow = open_packed(manifest, 3, 30)
    assert taken == [True, True, False, True, False, False, True, True]
    for index, cut in enumerate(cuts):
        assert fast.id(index) == slow.id(index) == cut.id
        assert np.array_equal(fast[index], slow[index]) and len(fast[index]) > 20
        assert np.array_equal(fast[index], load_codes(cut, 3))
    assert np.array_equal(fast.durations, slow.durations)
    assert np.array_equal(fast.prompt_durations, slow.prompt_durations, equal_nan=True)
    assert fast.sources == slow.sources
