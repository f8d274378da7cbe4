#!/usr/bin/env bash
# MAESTRO v3: piano recordings with their MIDI, to codec tokens. See README.md; `prepare.sh --help` lists the stages.
set -euo pipefail
recipe=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

stage=0
stop_stage=4
corpus_dir=
split_by=metadata
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
options="stage stop_stage corpus_dir split_by check_clock limit data_dir codec train_codec codec_minutes device"
options="$options min_duration max_duration jobs"
help_message="Usage: bash egs/maestro/prepare.sh --corpus-dir maestro-v3.0.0 [options]

Prepares MAESTRO v3.0.0: 199 hours of a competition's Disklaviers in 1,276 performances, each with its MIDI.

Options:
  --corpus-dir DIR    the unpacked corpus, with maestro-v3.0.0.csv or .json (required for stages 0 and 1)
  --split-by WHAT     metadata or composition (default: $split_by; its splits are disjoint by composition, too)
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
  0  download   nothing is downloaded: looks whether DIR holds the corpus
  1  manifests  recordings to FLAC at the codec's rate; cuts with their MIDI, splits -> DATA/audio, DATA/manifests
  2  tokens     with --train-codec true first the codec -> DATA/codec; codec codes of every cut -> DATA/tokenized/codes
  3  cuts       DATA/tokenized/cuts_{train,validation,test}.jsonl.gz and, with MIDI, utterances_{...}.jsonl.gz
  4  checks     statistics; splits disjoint, codes valid"
. "$recipe/../shared/parse_options.sh"
. "$recipe/../shared/helpers.sh"
. "$recipe/../shared/train_codec.sh"
data_dir=$(absolute_path "$data_dir")
choose_codec encodec_32khz
if [ "$stage" -le 1 ] && [ -z "$corpus_dir" ]; then
  parse_options_fail "--corpus-dir is missing: the folder maestro-v3.0.0, from https://magenta.tensorflow.org/datasets/maestro"
fi

if in_stage 0 "look for the corpus in '$corpus_dir'"; then
  "$python" "$recipe/local/find_corpus.py" --corpus-dir "$corpus_dir"
fi
if in_stage 1 "recordings and manifests"; then
  "$python" "$recipe/local/prepare_manifests.py" --corpus-dir "$corpus_dir" --data-dir "$data_dir" \
    --split-by "$split_by" --check-clock "$check_clock" --limit "$limit" --codec "$codec" \
    --train-codec "$train_codec" --min-duration "$min_duration" --max-duration "$max_duration" --jobs "$jobs"
fi
train_codec_stage
shared_stages
