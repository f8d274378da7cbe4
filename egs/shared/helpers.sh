# What every prepare.sh needs: log lines, the guard of a stage, the interpreter, the shared stages 2 to 4.
# Sourced; expects $recipe (the recipe's folder), and after parse_options.sh $stage, $stop_stage, $data_dir, $codec.

repository=$(cd -- "$recipe/../.." && pwd)

log() {
  # 2024-05-01 12:00:00 prepare.sh: message
  echo "$(date '+%Y-%m-%d %H:%M:%S') $(basename -- "$recipe")/$(basename -- "$0"): $*" >&2
}

in_stage() {
  # in_stage N "what it does": true when stage N was asked for, and says so.
  [ "$stage" -le "$1" ] && [ "$stop_stage" -ge "$1" ] || return 1
  log "stage $1: $2"
}

absolute_path() {
  # A path as the caller wrote it -> independent of the current folder. It need not exist.
  case "$1" in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s\n' "$PWD/$1" ;;
  esac
}

find_python() {
  # $PYTHON when set, else the repository's .venv, else python3.
  if [ -n "${PYTHON:-}" ]; then
    printf '%s\n' "$PYTHON"
  elif [ -x "$repository/.venv/bin/python" ]; then
    printf '%s\n' "$repository/.venv/bin/python"
  elif command -v python3 > /dev/null; then
    command -v python3
  else
    echo "error: no python3 found; run 'make install' in $repository, or set PYTHON" >&2
    exit 2
  fi
}

python=$(find_python) || exit 2
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"

shared_stages() {
  # Stages 2 to 4 are the same for every corpus that has data/manifests/cuts_all.jsonl.gz.
  if in_stage 2 "codec tokens"; then
    "$python" -m valle.bin.tokenizer --manifest "$data_dir/manifests/cuts_all.jsonl.gz" \
      --output-dir "$data_dir/tokenized" --codec "$codec" --device "$device"
  fi
  if in_stage 3 "cuts for train, validation and test"; then
    if [ -n "${text_extractor:-}" ]; then  # recipes with transcripts
      "$python" -m valle.bin.text_tokens --manifest-dir "$data_dir/tokenized" \
        --text-extractor "$text_extractor" --language "$language"
    fi
    "$python" -m valle.bin.split_manifest --manifest-dir "$data_dir/tokenized"
  fi
  if in_stage 4 "statistics, checks and codec audit"; then
    "$python" -m valle.bin.display_manifest_statistics --manifest-dir "$data_dir/tokenized" --check true
    "$python" -m valle.bin.audit_codec --manifest-dir "$data_dir/tokenized" --device "$device" \
      --audit-cuts "${audit_cuts:-40}"
  fi
}
