#!/usr/bin/env bash
# Any folder of recordings, to codec tokens. See README.md; `prepare.sh --help` lists the stages.
set -euo pipefail
recipe=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

stage=0
stop_stage=4
audio_dir=
manifest=
data_dir=$recipe/data
codec=valle_16khz
device=auto
min_duration=5
max_duration=15
num_jobs=2
options="stage stop_stage audio_dir manifest data_dir codec device min_duration max_duration num_jobs"
help_message="Usage: bash egs/folder/prepare.sh --audio-dir DIR [options]
       bash egs/folder/prepare.sh --manifest FILE [options]

Prepares your own recordings, of any sample rate and channel count: every wav, flac, ogg, opus, mp3, m4a, aac, aiff,
caf, wma, amr, webm and mp4 file in DIR and the folders below it, or those that FILE names. Files of the same name are
what belongs to a recording: clip.txt beside clip.wav is its transcript, clip.mid (or .midi) its score.

Options:
  --audio-dir DIR     your recordings (stages 0 and 1 need this or --manifest)
  --manifest FILE     CSV or JSON lines with a column path, and if you like duration, text, speaker, start, language,
                      split and midi; relative paths count from FILE
  --stage N           first stage to run (default: $stage)
  --stop-stage N      last stage to run (default: $stop_stage)
  --data-dir DIR      where everything goes (default: $data_dir)
  --codec NAME        codec name or folder (default: $codec)
  --device NAME       auto, cpu, cuda or cuda:N, for stage 2 (default: $device)
  --min-duration S    shortest cut, in seconds (default: $min_duration)
  --max-duration S    longest cut, in seconds (default: $max_duration)
  --num-jobs N        recordings that stage 1 converts at the same time (default: $num_jobs)

Stages (each can be killed and run again; run twice, nothing changes):
  0  download   nothing to download: looks whether there are recordings
  1  manifests  convert to the codec's rate, cut long recordings, split -> DATA/audio, DATA/manifests
  2  tokens     codec codes of every cut -> DATA/tokenized/codes
  3  cuts       DATA/tokenized/cuts_{train,validation,test}.jsonl.gz and utterances_{...}.jsonl.gz
  4  checks     statistics; splits disjoint, codes valid"
. "$recipe/../shared/parse_options.sh"
. "$recipe/../shared/helpers.sh"
data_dir=$(absolute_path "$data_dir")
if [ "$stage" -le 1 ] && [ -z "$audio_dir$manifest" ]; then
  parse_options_fail "--audio-dir is missing: the folder with your recordings (or --manifest, a table of them)"
fi
if [ -n "$audio_dir" ] && [ -n "$manifest" ]; then
  parse_options_fail "--audio-dir and --manifest together: expected one of them"
fi
if [ -n "$manifest" ]; then
  input=(--manifest "$manifest")
else
  input=(--audio-dir "$audio_dir")
fi

if in_stage 0 "look for recordings in '$audio_dir$manifest'"; then
  "$python" "$recipe/local/list_audio.py" "${input[@]}" --data-dir "$data_dir"
fi
if in_stage 1 "manifests"; then
  "$python" "$recipe/local/prepare_manifests.py" "${input[@]}" --data-dir "$data_dir" --codec "$codec" \
    --min-duration "$min_duration" --max-duration "$max_duration" --num-jobs "$num_jobs"
fi
shared_stages
