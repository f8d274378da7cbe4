"""Flags, YAML and defaults."""

from dataclasses import dataclass

import pytest

from valle.config import DataConfig, ModelConfig, TrainConfig, chosen_by_user, option, parse
from valle.utils.errors import UserError

PARTS = [ModelConfig, DataConfig, TrainConfig]


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    (tmp_path / "conf").mkdir()
    recipe, own = tmp_path / "conf" / "a.yaml", tmp_path / "b.yaml"
    recipe.write_text("decoder_dim: 1\nnhead: 1\nnum-decoder-layers: 1\nexp_dir: exp/x\nbase_lr: 1\n")
    own.write_text("nhead: 2\nnum_decoder_layers: 2\n")
    model, data, train = parse("x", PARTS, ["--config", str(own), "--num_decoder_layers", "3"], recipe)
    assert (model.decoder_dim, model.nhead, model.num_decoder_layers) == (1, 2, 3)
    assert train.exp_dir == str(tmp_path / "exp" / "x"), "a recipe's paths are relative to the recipe"
    assert train.base_lr == 1.0 and isinstance(train.base_lr, float)
    assert data.num_buckets == 10


@pytest.mark.parametrize("flag", ["--norm-first", "--norm_first", "--norm-first="])
@pytest.mark.parametrize("text,value", [("true", True), ("False", False), ("1", True), ("no", False)])
def test_booleans_are_words(flag, text, value):
    argv = [flag + text] if flag.endswith("=") else [flag, text]
    assert parse("x", PARTS, argv)[0].norm_first is value


@pytest.mark.parametrize(
    "text,message",
    [("decoder_dimm: 3", "unknown key 'decoder_dimm'"), ("nhead: many", "expected int"),
     ("nhead: true", "expected int"),
     ("- 3", "key: value"), ("a: [", "no valid YAML"), ("train_stage: 9", "must be one of")],
)  # fmt: skip
def test_bad_yaml_is_named(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        parse("x", PARTS, ["--config", str(path)])


@pytest.mark.parametrize(
    "argv", [["--nhead", "x"], ["--unknown", "1"], ["--norm-first", "maybe"], ["--nhe", "3"]]
)
def test_bad_flags_are_named(argv):
    with pytest.raises(UserError, match="see --help"):
        parse("x", PARTS, argv)


def test_every_flag_of_the_recipes_family_is_known():
    flags = """
    model-name decoder-dim nhead num-decoder-layers num-quantizers scale-factor norm-first
    add-prenet prefix-mode share-embedding prepend-bos base-lr warmup-steps optimizer-name
    scheduler-name num-epochs start-epoch start-batch exp-dir max-duration filter-min-duration
    filter-max-duration num-buckets train-stage manifest-dir world-size master-port dtype
    accumulate-grad-steps save-every-n valid-interval max-steps keep-last-k average-period
    log-interval seed inf-check oom-check tensorboard
    """.split()
    known = {name for part in PARTS for name in part.__dataclass_fields__}
    assert {flag.replace("-", "_") for flag in flags} <= known


def test_optional_values_may_stay_unset():
    @dataclass
    class Part:
        """A part."""

        number: int | None = option(None, "a number")

    assert parse("x", [Part], [])[0].number is None and parse("x", [Part], ["--number", "3"])[0].number == 3


@dataclass
class Values:
    """Flags of several values."""

    gap: tuple[float, float] | None = option(None, "from, to", metavar=("FROM", "TO"))
    clips: tuple[str, ...] = option((), "files", metavar="CLIP", positional=True)
    number: int = option(1, "a number")


@pytest.mark.parametrize(
    "argv,expected",
    [
        ("", Values()),
        ("--gap 1 2.5", Values(gap=(1.0, 2.5))),
        ("--gap 1 2.5 a.wav", Values((1.0, 2.5), ("a.wav",))),
        ("a.wav --number 3 --gap -1 2", Values((-1.0, 2.0), ("a.wav",), 3)),
        ("a.wav --number 3 b_c.wav", Values(None, ("a.wav", "b_c.wav"), 3)),
    ],
)
def test_flags_of_two_values_and_words_without_a_flag(argv, expected):
    assert parse("x", [Values], argv.split()) == [expected]


@pytest.mark.parametrize(
    "argv,message",
    [
        ("--gap 1", "expected 2 arguments"),
        ("--gap a b", "invalid float"),
        ("a.wav --nonsense 1", "--nonsense"),
    ],
)
def test_bad_words_are_named(argv, message):
    with pytest.raises(UserError, match=message):
        parse("x", [Values], argv.split())


def test_words_are_refused_where_no_field_takes_them():
    with pytest.raises(UserError, match="a.wav"):
        parse("x", PARTS, ["a.wav"])


def test_several_values_in_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("gap: [1, 2.5]\nclips: [a.wav, b.wav]\n")
    assert parse("x", [Values], ["--config", str(path)]) == [Values((1.0, 2.5), ("a.wav", "b.wav"))]
    assert parse("x", [Values], ["--config", str(path), "c.wav"])[0].clips == ("c.wav",)
    path.write_text("gap: null\n")
    assert parse("x", [Values], ["--config", str(path)]) == [Values()]


@pytest.mark.parametrize(
    "text,expected",
    [("gap: 1", "a list of 2 float"), ("gap: [1]", "a list of 2 float"), ("gap: [1, true]", "a list of 2 float"),
     ("clips: a.wav", "a list of str"), ("number: [1]", "expected int")],
)  # fmt: skip
def test_bad_lists_in_yaml_are_named(tmp_path, text, expected):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=expected):
        parse("x", [Values], ["--config", str(path)])


def test_help_names_the_values(capsys):
    with pytest.raises(SystemExit):
        parse("x", [Values], ["--help"])
    shown = capsys.readouterr().out
    assert (
        "--gap FROM TO" in shown and "[CLIP ...]" in shown and "(default: 1)" in shown and "()" not in shown
    )


def test_a_number_or_a_word(tmp_path):
    assert parse("x", PARTS, ["--train-stage", "auto"])[2].train_stage == "auto"
    assert parse("x", PARTS, ["--train-stage", "2"])[2].train_stage == 2
    path = tmp_path / "c.yaml"
    for text, expected in (("auto", "auto"), ("1", 1)):
        path.write_text(f"train_stage: {text}\n")
        assert parse("x", PARTS, ["--config", str(path)])[2].train_stage == expected
    for wrong in ("both", "7", "-1"):
        with pytest.raises(UserError, match="train-stage"):
            parse("x", PARTS, ["--train-stage", wrong])
    path.write_text("train_stage: true\n")
    with pytest.raises(UserError, match="train_stage is True"):
        parse("x", PARTS, ["--config", str(path)])


def test_what_the_user_has_chosen_is_known_from_what_the_recipe_says(tmp_path):
    (tmp_path / "conf").mkdir()
    recipe, own = tmp_path / "conf" / "a.yaml", tmp_path / "b.yaml"
    recipe.write_text("decoder_dim: 1\nnhead: 1\nexp_dir: x\n")
    own.write_text("num_decoder_layers: 2\n")
    model, data, train = parse(
        "x", PARTS, ["--config", str(own), "--nhead", "16", "--max-steps", "3"], recipe
    )
    assert chosen_by_user(model) == {"num_decoder_layers", "nhead"}
    assert chosen_by_user(data) == set() and chosen_by_user(train) == {"max_steps"}
    assert chosen_by_user(ModelConfig()) == set()
