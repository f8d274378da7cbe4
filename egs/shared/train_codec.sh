# A recipe's own codec, for where the weights of the published ones cannot be had. Sourced after helpers.sh; expects
# $recipe, $data_dir, $device, and the options $codec (empty: not chosen), $train_codec and $codec_minutes.

choose_codec() {
  # choose_codec DEFAULT: sets $codec to the user's choice, the recipe's own codec, or DEFAULT.
  case "$train_codec" in
    true) ;;
    false) codec=${codec:-$1} && return ;;
    *) parse_options_fail "--train-codec is '$train_codec', expected true or false" ;;
  esac
  if [ -n "$codec" ]; then
    parse_options_fail "--train-codec true makes the codec that the tokens come from; leave out --codec '$codec'"
  fi
  codec=$data_dir/codec
}

train_codec_stage() {
  # Between stages 1 and 2: data/codec, trained on the recordings of the train split, unless it is there.
  [ "$train_codec" = true ] && [ "$stage" -le 2 ] && [ "$stop_stage" -ge 2 ] || return 0
  if [ -f "$data_dir/codec/config.json" ]; then
    log "codec: '$data_dir/codec' is there; delete it to train another"
    return
  fi
  log "codec: training on the train split -> '$data_dir/codec'"
  "$python" "$recipe/bin/trainer_codec.py" --manifest "$data_dir/manifests/cuts_codec.jsonl.gz" \
    --exp-dir "$data_dir/codec_training" --device "$device" ${codec_minutes:+--max-minutes "$codec_minutes"}
  "$python" "$recipe/bin/trainer_codec.py" --exp-dir "$data_dir/codec_training" --export "$data_dir/codec"
}
