#!/usr/bin/env bash
# The Asterisk core sounds, from download to codec tokens. See README.md; `prepare.sh --help` lists the stages.
set -euo pipefail
recipe=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

stage=0
stop_stage=4
lang=en
data_dir=$recipe/data
codec=valle_16khz
device=auto
text_extractor=auto
options="stage stop_stage lang data_dir codec device text_extractor"
help_message="Usage: bash egs/asterisk/prepare.sh [options]

Prepares the Asterisk core sound prompts: recorded speech, one voice a language, 25 minutes each.

Options:
  --stage N           first stage to run (default: $stage)
  --stop-stage N      last stage to run (default: $stop_stage)
  --lang LIST         languages, with commas: en,es,fr,it,ru (default: $lang)
  --data-dir DIR      where everything goes (default: $data_dir)
  --codec NAME        codec name or folder (default: $codec)
  --device NAME       auto, cpu, cuda or cuda:N, for stage 2 (default: $device)
  --text-extractor X  text symbols of stage 3: phonemes, characters or bytes; auto: phonemes for one language where
                      they are installed (pip install 'valle[text]'), else characters (default: $text_extractor)

Stages (each can be killed and run again; run twice, nothing changes):
  0  download   the release tarball, else the Debian packages -> DIR/download/<lang>
  1  manifests  decode to 16 kHz FLAC, split, join neighbours to 5-15 s -> DIR/audio, DIR/joined, DIR/manifests
  2  tokens     codec codes of every cut -> DIR/tokenized/codes
  3  cuts       DIR/tokenized/cuts_{train,validation,test}.jsonl.gz, utterances_{...}.jsonl.gz with text symbols
  4  checks     statistics; splits disjoint, codes valid"
. "$recipe/../shared/parse_options.sh"
. "$recipe/../shared/helpers.sh"
data_dir=$(absolute_path "$data_dir")

# Text symbols: espeak-ng reads a whole corpus as one language.
case "$lang" in
  en) language=en-us ;;
  es) language=es-419 ;;
  fr) language=fr-fr ;;
  it | ru) language=$lang ;;
  *) language= ;;
esac
check_text_extractor() {
  "$python" "$recipe/../shared/check_text_extractor.py" --text-extractor "$text_extractor" --language "$language"
}
if [ "$stop_stage" -ge 3 ] && [ "$stage" -le 3 ]; then
  if [ "$text_extractor" = phonemes ] && [ -z "$language" ]; then
    parse_options_fail "--text-extractor phonemes is for one language, --lang is '$lang'; take characters"
  elif [ "$text_extractor" != auto ]; then
    check_text_extractor
  elif text_extractor=phonemes && [ -n "$language" ] && check_text_extractor 2> /dev/null; then
    log "text symbols: phonemes of $language"
  else
    text_extractor=characters
    log "text symbols: characters"
  fi
  language=${language:-en-us}  # characters have none
fi

if in_stage 0 "download ($lang)"; then
  "$python" "$recipe/local/download.py" --lang "$lang" --data-dir "$data_dir"
fi
if in_stage 1 "manifests ($lang)"; then
  "$python" "$recipe/local/prepare_manifests.py" --lang "$lang" --data-dir "$data_dir"
fi
shared_stages
