#!/usr/bin/env bash
# From recordings to a model's own continuations: data, AR, NAR, evaluation. `make demo` runs this.
# Every step goes on where it stopped; `run.sh --help` lists the options.
set -euo pipefail
recipe=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

stage=0
stop_stage=3
lang=en
data_dir=$recipe/data
exp_dir=$recipe/exp/audiolm
ar_minutes=8
nar_minutes=4
options="stage stop_stage lang data_dir exp_dir ar_minutes nar_minutes"
help_message="Usage: bash egs/asterisk/run.sh [options]

Trains an AudioLM on the Asterisk prompts and evaluates it on held-out clips.

Options:
  --stage N           first stage to run (default: $stage)
  --stop-stage N      last stage to run (default: $stop_stage)
  --lang LIST         languages, with commas: en,es,fr,it,ru (default: $lang)
  --data-dir DIR      recordings and tokens (default: $data_dir)
  --exp-dir DIR       checkpoints, logs and the report (default: $exp_dir)
  --ar-minutes M      training time of the AR decoder (default: $ar_minutes)
  --nar-minutes M     training time of the NAR decoder (default: $nar_minutes)

Stages:
  0  data        prepare.sh, all its stages
  1  AR          trainer_audiolm.py --train-stage 1
  2  NAR         trainer_audiolm.py --train-stage 2
  3  evaluation  evaluate.py: figures, continuations and report.html"
. "$recipe/../shared/parse_options.sh"
. "$recipe/../shared/helpers.sh"
data_dir=$(absolute_path "$data_dir")
exp_dir=$(absolute_path "$exp_dir")

# The reference run, whose band is drawn beside the curves, is of English.
reference=$recipe/conf/reference.json
[[ $lang == en ]] || reference=

# Threads that spin while they wait slow each other down where other programs run.
export OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0

if in_stage 0 "recordings and tokens"; then
  bash "$recipe/prepare.sh" --lang "$lang" --data-dir "$data_dir"
fi
if in_stage 1 "AR decoder, $ar_minutes minutes"; then
  "$python" "$recipe/bin/trainer_audiolm.py" --manifest-dir "$data_dir/tokenized" --exp-dir "$exp_dir" \
    --train-stage 1 --max-minutes "$ar_minutes" --reference "$reference"
fi
if in_stage 2 "NAR decoder, $nar_minutes minutes"; then
  "$python" "$recipe/bin/trainer_audiolm.py" --manifest-dir "$data_dir/tokenized" --exp-dir "$exp_dir" \
    --train-stage 2 --max-minutes "$nar_minutes" --reference "$reference"
fi
if in_stage 3 "evaluation on held-out clips"; then
  "$python" "$recipe/bin/evaluate.py" --checkpoint "$exp_dir/best-valid-loss.pt" \
    --manifest "$data_dir/tokenized/cuts_test.jsonl.gz" --output-dir "$exp_dir/report"
fi
