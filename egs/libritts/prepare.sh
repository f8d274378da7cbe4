#!/usr/bin/env bash
# LibriTTS, from download to codec tokens. See README.md; `prepare.sh --help` lists the stages.
set -euo pipefail
recipe=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

stage=0
stop_stage=4
corpus_dir=
data_dir=$recipe/data
parts=train-clean-100,dev-clean,test-clean
codec=valle_16khz
device=auto
min_duration=5
max_duration=15
text_extractor=phonemes
language=en-us  # of the texts, as espeak-ng calls it
options="stage stop_stage corpus_dir data_dir parts codec device min_duration max_duration text_extractor"
help_message="Usage: bash egs/libritts/prepare.sh [options]

Prepares LibriTTS: 2,456 voices reading English, 585 hours in seven parts.

Options:
  --corpus-dir DIR    LibriTTS as you have it: unpacked, or its archive (default: download it)
  --stage N           first stage to run (default: $stage)
  --stop-stage N      last stage to run (default: $stop_stage)
  --data-dir DIR      where everything goes (default: $data_dir)
  --parts LIST        parts, with commas, or all (default: $parts)
  --codec NAME        codec name or folder (default: $codec)
  --device NAME       auto, cpu, cuda or cuda:N, for stage 2 (default: $device)
  --min-duration S    shortest cut for AudioLM, in seconds (default: $min_duration)
  --max-duration S    longest cut for AudioLM, in seconds (default: $max_duration)
  --text-extractor X  text symbols of stage 3: phonemes, characters or bytes (default: $text_extractor)

Stages (each can be killed and run again; run twice, nothing changes):
  0  download   a link to your copy, your archive unpacked, or the download -> DATA/download
  1  manifests  splits; files are used where they lie, short neighbours joined to 5-15 s -> DATA/joined, DATA/manifests
  2  tokens     codec codes of every cut -> DATA/tokenized/codes
  3  cuts       DATA/tokenized/cuts_{train,validation,test}.jsonl.gz, utterances_{...}.jsonl.gz with text symbols
  4  checks     statistics; splits disjoint, codes valid"
. "$recipe/../shared/parse_options.sh"
. "$recipe/../shared/helpers.sh"
data_dir=$(absolute_path "$data_dir")

if in_stage 0 "download"; then
  if [ "$stop_stage" -ge 3 ]; then
    "$python" "$recipe/../shared/check_text_extractor.py" --text-extractor "$text_extractor" --language "$language"
  fi
  "$python" "$recipe/local/download.py" --corpus-dir "$corpus_dir" --data-dir "$data_dir" --parts "$parts"
fi
if in_stage 1 "manifests"; then
  "$python" "$recipe/local/prepare_manifests.py" --data-dir "$data_dir" --parts "$parts" \
    --min-duration "$min_duration" --max-duration "$max_duration"
fi
shared_stages
