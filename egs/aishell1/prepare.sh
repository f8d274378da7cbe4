#!/usr/bin/env bash
# AISHELL-1, from download to codec tokens. See README.md; `prepare.sh --help` lists the stages.
set -euo pipefail
recipe=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

stage=0
stop_stage=4
corpus_dir=
data_dir=$recipe/data
codec=valle_16khz
device=auto
min_duration=5
max_duration=15
text_extractor=pinyin
language=cmn  # of the texts, as espeak-ng calls it
options="stage stop_stage corpus_dir data_dir codec device min_duration max_duration text_extractor"
help_message="Usage: bash egs/aishell1/prepare.sh [options]

Prepares AISHELL-1: 400 voices reading Mandarin, 178 hours.

Options:
  --corpus-dir DIR    data_aishell as you have it: unpacked, or its archive (default: download it)
  --stage N           first stage to run (default: $stage)
  --stop-stage N      last stage to run (default: $stop_stage)
  --data-dir DIR      where everything goes (default: $data_dir)
  --codec NAME        codec name or folder (default: $codec)
  --device NAME       auto, cpu, cuda or cuda:N, for stage 2 (default: $device)
  --min-duration S    shortest cut for AudioLM, in seconds (default: $min_duration)
  --max-duration S    longest cut for AudioLM, in seconds (default: $max_duration)
  --text-extractor X  text symbols of stage 3: pinyin, phonemes, characters or bytes (default: $text_extractor)

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
  "$python" "$recipe/local/download.py" --corpus-dir "$corpus_dir" --data-dir "$data_dir"
fi
if in_stage 1 "manifests"; then
  "$python" "$recipe/local/prepare_manifests.py" --data-dir "$data_dir" \
    --min-duration "$min_duration" --max-duration "$max_duration"
fi
shared_stages
