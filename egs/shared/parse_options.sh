# Reads the command line of a recipe: sourced by prepare.sh after it has set its options' defaults as variables.
#
#   stage=0; data_dir=...; help_message="..."
#   . parse_options.sh          # --data-dir DIR, --data_dir DIR and --data-dir=DIR all set $data_dir
#
# --help prints $help_message and exits with 0; an unknown option, a missing value, or a stage that is no number
# is one line on stderr and exit code 2. In the manner of Kaldi's script of the same name, written for this project.

parse_options_fail() {
  echo "error: $(basename -- "$0"): $1 (see --help)" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help)
      printf '%s\n' "$help_message"
      exit 0
      ;;
    --*=*)
      parse_options_flag=${1%%=*}
      parse_options_value=${1#*=}
      shift
      ;;
    --?*)
      parse_options_flag=$1
      [ $# -ge 2 ] || parse_options_fail "option '$1' needs a value"
      parse_options_value=$2
      shift 2
      ;;
    *)
      parse_options_fail "unexpected argument '$1'"
      ;;
  esac
  parse_options_name=${parse_options_flag#--}
  parse_options_name=${parse_options_name//-/_}
  # Only what the recipe declared in $options may be set: a flag must not overwrite PATH or HOME.
  case " $options " in
    *" $parse_options_name "*) ;;
    *) parse_options_fail "unknown option '$parse_options_flag'" ;;
  esac
  printf -v "$parse_options_name" '%s' "$parse_options_value"
done

for parse_options_name in stage stop_stage; do
  case "${!parse_options_name}" in
    '' | *[!0-9]*)
      parse_options_fail "--${parse_options_name//_/-} is '${!parse_options_name}', expected a number of 0 or more"
      ;;
  esac
done
