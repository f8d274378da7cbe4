#!/usr/bin/env bash
# ATEPP: expressive piano performances as MIDI, to codec tokens. See README.md; `prepare.sh --help` lists the stages.
set -euo pipefail
recipe=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

stage=0
stop_stage=4
midi_archive=
metadata=
audio_dir=
soundfont=
engine=
quality="unlabelled,high quality"
split_by=auto
check_clock=true
limit=0
data_dir=$recipe/data
codec=
train_codec=false
codec_minutes=
device=auto
min_duration=5
max_duration=15
jobs=2
options="stage stop_stage midi_archive metadata audio_dir soundfont engine quality split_by check_clock"
options="$options limit data_dir codec train_codec codec_minutes device min_duration max_duration jobs"
help_message="Usage: bash egs/atepp/prepare.sh --midi-archive ATEPP-1.2.zip --metadata ATEPP-metadata-1.2.csv [options]

Prepares ATEPP 1.2: 11,674 performances by 49 pianists as MIDI. The recordings are not distributed: bring your own
with --audio-dir, or let the MIDI be played with a SoundFont.

Options:
  --midi-archive ZIP  ATEPP-1.2.zip, or the folder that it was unpacked in (once, for stage 0)
  --metadata CSV      ATEPP-metadata-1.2.csv (default: the one in the archive)
  --audio-dir DIR     your recordings, named as the MIDI files: their path, or their number (perf_id)
  --soundfont FILE    .sf2 or .sf3 that plays the MIDI, without --audio-dir (default: one that is installed)
  --engine NAME       fluidsynth or tinysoundfont (default: the first of these that is installed)
  --quality LIST      the metadata's quality labels to keep, or all (default: '$quality')
  --split-by WHAT     metadata, composition, or auto: the metadata's column if there is one (default: $split_by)
  --check-clock BOOL  leave out recordings that do not run with their MIDI (default: $check_clock)
  --limit N           so many pieces, for a quick look; 0: all (default: $limit)
  --stage N           first stage to run (default: $stage)
  --stop-stage N      last stage to run (default: $stop_stage)
  --data-dir DIR      where everything goes (default: $data_dir)
  --codec NAME        codec name or folder (default: encodec_32khz)
  --train-codec BOOL  true: train the project's own codec on the train split, before stage 2 (default: $train_codec)
  --codec-minutes M   how long that takes at most (default: as conf/codec.yaml says)
  --device NAME       auto, cpu, cuda or cuda:N (default: $device)
  --min-duration S    shortest cut, in seconds (default: $min_duration)
  --max-duration S    longest cut, in seconds (default: $max_duration)
  --jobs N            pieces that are converted at the same time (default: $jobs)

Stages (each can be killed and run again; run twice, nothing changes):
  0  download   unpack your download of the MIDI files and metadata -> DATA/download
  1  manifests  recordings, or MIDI played, to FLAC at the codec's rate; cuts, splits -> DATA/audio, DATA/manifests
  2  tokens     with --train-codec true first the codec -> DATA/codec; codec codes of every cut -> DATA/tokenized/codes
  3  cuts       DATA/tokenized/cuts_{train,validation,test}.jsonl.gz and, with MIDI, utterances_{...}.jsonl.gz
  4  checks     statistics; splits disjoint, codes valid"
. "$recipe/../shared/parse_options.sh"
. "$recipe/../shared/helpers.sh"
. "$recipe/../shared/train_codec.sh"
data_dir=$(absolute_path "$data_dir")
choose_codec encodec_32khz

if in_stage 0 "unpack the download"; then
  "$python" "$recipe/local/unpack.py" --data-dir "$data_dir" \
    ${midi_archive:+--midi-archive "$midi_archive"} ${metadata:+--metadata "$metadata"}
fi
if in_stage 1 "recordings and manifests"; then
  "$python" "$recipe/local/prepare_manifests.py" --data-dir "$data_dir" --quality "$quality" \
    --split-by "$split_by" --limit "$limit" --check-clock "$check_clock" --codec "$codec" --train-codec "$train_codec" --jobs "$jobs" \
    --min-duration "$min_duration" --max-duration "$max_duration" ${audio_dir:+--audio-dir "$audio_dir"} \
    ${soundfont:+--soundfont "$soundfont"} ${engine:+--engine "$engine"}
fi
train_codec_stage
shared_stages
