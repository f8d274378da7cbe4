"""Every check of stage 4 fires on a folder that is corrupted in its way, and on nothing else."""

import json

import numpy as np
import pytest
from lhotse import CutSet
from synthetic import write_tokenized

from valle.bin import display_manifest_statistics
from valle.data.checks import check_codec, check_manifests, find_manifests
from valle.data.manifests import read_manifest
from valle.utils.errors import UserError

CODEC = {"name": "a", "fingerprint": "f00d", "num_quantizers": 4, "codebook_size": 30, "frame_rate": 50.0}


def rewrite(folder, change, split="train", number=3):
    """Change one cut of a manifest, or its codes where `change` returns an array; gives the cut's id."""
    path = folder / f"cuts_{split}.jsonl.gz"
    cuts = list(read_manifest(path))
    cut = cuts[number]
    codes_path = folder / "codes" / f"{cut.id}.npy"
    codes = change(cut, np.load(codes_path))
    if codes is not None:
        np.save(codes_path, codes)
        cut.custom["audio_features"].array.shape = list(codes.shape)
    CutSet.from_cuts(cuts).to_file(str(path))
    return cut.id


def set_codec(folder, **changes):
    info = json.loads((folder / "codec.json").read_text())
    (folder / "codec.json").write_text(json.dumps(info | changes))


def test_a_sound_folder_passes(tokenized, capsys):
    check_manifests(tokenized)
    display_manifest_statistics.main(["--manifest-dir", str(tokenized), "--check", "true"])
    assert "checked: splits are disjoint" in capsys.readouterr().out


def too_short(cut, codes):
    cut.duration = 0.0


def other_rate(cut, codes):
    cut.custom["audio_features"].frame_shift = 1 / 75


def without_codes(cut, codes):
    del cut.custom["audio_features"]


def changed(codes, value):
    codes = codes.copy()
    codes[-1, -1] = value
    return codes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (too_short, "is empty: its duration is 0 s"),
        (lambda cut, codes: codes[:0], "is empty: its codes have no frame"),
        (without_codes, "has no codes; run prepare.sh --stage 2"),
        (lambda cut, codes: codes[:, :3], "3 quantizers, but codec 'tiny' has 4"),
        (lambda cut, codes: np.concatenate([codes, codes], axis=1), "8 quantizers, but codec 'tiny' has 4"),
        (lambda cut, codes: codes[:-2], "frames, expected .* at 50 frames/s"),
        (lambda cut, codes: np.concatenate([codes, codes[:2]]), "frames, expected .* at 50 frames/s"),
        (lambda cut, codes: changed(codes, 30), "to 30, expected 0 to 29"),
        (lambda cut, codes: codes.astype(np.int64), "its codes are int64, expected uint16"),
        (lambda cut, codes: codes.astype(np.float32), "its codes are float32, expected uint16"),
        (other_rate, "said to have 75 frames/s, but codec 'tiny' has 50"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_each_fault_of_a_cut_is_named_with_it(tokenized, change, message, split):
    name = rewrite(tokenized, change, split)
    with pytest.raises(UserError, match=message) as caught:
        check_manifests(tokenized)
    assert f"cut '{name}'" in str(caught.value) and "prepare.sh --stage" in str(caught.value)


def test_code_files_shorter_than_the_manifest_says_are_found(tokenized):
    name = next(iter(read_manifest(tokenized / "cuts_train.jsonl.gz"))).id
    path = tokenized / "codes" / f"{name}.npy"
    np.save(path, np.load(path)[:-4])
    with pytest.raises(UserError, match=f"cut '{name}'"):
        check_manifests(tokenized)


@pytest.mark.parametrize("frames", [-1, 1])
def test_one_frame_more_or_less_is_no_fault(tokenized, frames):
    rewrite(tokenized, lambda cut, codes: codes[:-1] if frames < 0 else np.concatenate([codes, codes[:1]]))
    check_manifests(tokenized)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame_rate": 75.0}, "frame_rate is 75 Hz, but 16000 Hz in hops of 320 samples are 50 frames/s"),
        ({"hop_length": None}, "hop_length is None, expected a number above 0"),
        ({"codebook_size": 0}, "codebook_size is 0, expected a number above 0"),
        ({"sample_rate": "16k"}, "sample_rate is '16k', expected a number above 0"),
        ({"codebook_size": 20}, "expected 0 to 19"),
        ({"num_quantizers": 8}, "4 quantizers, but codec 'tiny' has 8"),
        ({"hop_length": 160, "frame_rate": 100.0}, "said to have 50 frames/s, but codec 'tiny' has 100"),
    ],
)
def test_codec_json_that_does_not_fit_is_named(tokenized, changes, message):
    set_codec(tokenized, **changes)
    with pytest.raises(UserError, match=message):
        check_manifests(tokenized)


def test_missing_and_empty_parts_of_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="'.*nowhere' does not exist; run prepare.sh --stage 0"):
        check_manifests(tmp_path / "nowhere")
    folder = write_tokenized(tmp_path / "tokenized")
    manifest = folder / "cuts_validation.jsonl.gz"
    whole = manifest.read_bytes()
    CutSet.from_cuts([]).to_file(str(manifest))
    with pytest.raises(UserError, match="cuts_validation.jsonl.gz' holds no cut"):
        check_manifests(folder)
    manifest.unlink()
    with pytest.raises(UserError, match="cuts_validation.jsonl.gz' does not exist; run prepare.sh --stage 3"):
        check_manifests(folder)
    manifest.write_bytes(whole)
    (folder / "codec.json").unlink()
    with pytest.raises(UserError, match="codec.json' does not exist; run prepare.sh --stage 2"):
        check_manifests(folder)


def test_folders_of_utterances_alone_are_checked_too(tokenized):
    for path in tokenized.glob("cuts_*"):
        path.rename(path.with_name(path.name.replace("cuts", "utterances")))
    assert list(find_manifests(tokenized)) == [f"utterances_{s}" for s in ("train", "validation", "test")]
    check_manifests(tokenized)
    (tokenized / "utterances_test.jsonl.gz").unlink()
    with pytest.raises(UserError, match="utterances_test.jsonl.gz' does not exist"):
        check_manifests(tokenized)


def test_a_cut_in_two_splits_is_found(tokenized):
    train, test = (list(read_manifest(tokenized / f"cuts_{s}.jsonl.gz")) for s in ("train", "test"))
    CutSet.from_cuts([*test, train[2]]).to_file(str(tokenized / "cuts_test.jsonl.gz"))
    with pytest.raises(UserError, match=f"'{train[2].id}' of test and cut '{train[2].id}' of train share id"):
        check_manifests(tokenized)
    # The same stretch of a recording under another name.
    CutSet.from_cuts([*test, train[2].with_id("renamed")]).to_file(str(tokenized / "cuts_test.jsonl.gz"))
    with pytest.raises(UserError, match=f"share recording '{train[2].id}' at 0.00 s"):
        check_manifests(tokenized)


def test_another_codec_than_the_checkpoints_is_refused_naming_both(tmp_path):
    same = CODEC | {"name": "/moved/a"}
    check_codec(CODEC, same, "c.pt", tmp_path)
    check_codec(CODEC, CODEC | {"num_quantizers": 8, "fingerprint": "beef"}, "c.pt", tmp_path)
    check_codec(CODEC, None, "c.pt", tmp_path)
    check_codec({}, CODEC, "c.pt", tmp_path)
    for changes, fact in (
        ({"fingerprint": "beef"}, r"\(fingerprint f00d\).* of 'b' \(fingerprint beef\)"),
        ({"frame_rate": 75.0}, r"\(fingerprint f00d, frame_rate 50.0\).* 'b' \(.*frame_rate 75.0\)"),
        ({"codebook_size": 31}, r"codebook_size 30\).* 'b' \(.*codebook_size 31\)"),
        ({"fingerprint": None}, r"codec 'a' \(fingerprint f00d\), but .* 'b' \(fingerprint None\)"),
    ):
        with pytest.raises(UserError, match=f"checkpoint 'c.pt' .*{fact}; run prepare.sh .* --codec a"):
            check_codec(CODEC, CODEC | {"name": "b"} | changes, "c.pt", tmp_path)
