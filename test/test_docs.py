"""Commands in the documents parse against their real `--help`; Python blocks compile and their imports exist."""

import ast
import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "egs").glob("*/*.md")])

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")
# commands of the system, whose flags are not ours to check
FOREIGN = {
    "pip", "pip3", "git", "cd", "export", "source", ".", "ls", "tensorboard", "pre-commit", "mkdir", "cp", "cat",
    "ffmpeg", "ffplay", "aplay", "apt-get", "tail", "time", "pytest", "ruff", "mypy",
}  # fmt: skip


def _blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of the fenced blocks in a language."""
    return [
        (str(page.relative_to(ROOT)), text)
        for page in PAGES
        for found, text in FENCE.findall(page.read_text(encoding="utf-8"))
        if found in ({"bash", "sh", "shell"} if language == "bash" else {language})
    ]


def _commands(text: str) -> list[list[str]]:
    """The words of every command in a block: continued lines joined, comments and variables in front dropped."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        for separator in ("&&", ";", "|"):
            if separator in words:
                break
        else:
            separator = ""
        pieces: list[list[str]] = [[]]
        for word in words:
            if separator and word in ("&&", ";", "|"):
                pieces.append([])
            else:
                pieces[-1].append(word)
        for piece in pieces:
            while piece and re.match(r"^[A-Z_]+=", piece[0]):
                piece = piece[1:]
            if piece:
                commands.append(piece)
    return commands


def _is_python(word: str) -> bool:
    return re.fullmatch(r"(?:\S*/)?python3?", word) is not None


@functools.cache
def _help(*command: str) -> str:
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, (
        f"{' '.join(command)} --help: exit code {done.returncode}\n{done.stderr[-2000:]}"
    )
    return done.stdout


def _target(command: list[str]) -> tuple[tuple[str, ...], list[str]] | None:
    """What to ask for help, and the arguments it is given; None: a command of the system.

    Raises:
        AssertionError: a command that does not exist, or of a kind that nobody checks.
    """
    head, rest = command[0], command[1:]
    if head == "sbatch":
        head, rest = "torchrun", rest[rest.index("tools/slurm_train.sh") + 1 :]
    if head == "torchrun":
        place = next((i for i, word in enumerate(rest) if word == "-m" or word.endswith(".py")), None)
        assert place is not None, f"torchrun runs no program: {' '.join(command)}"
        head, rest = "python", rest[place:]
    if _is_python(head):
        if rest[:1] == ["-m"]:
            if not rest[1].startswith("valle"):
                return None
            return (sys.executable, "-m", rest[1]), rest[2:]
        assert rest and rest[0].endswith(".py"), f"not a program: {' '.join(command)}"
        assert (ROOT / rest[0]).is_file(), f"{rest[0]} does not exist"
        return (sys.executable, rest[0]), rest[1:]
    if head == "bash" and rest and rest[0].endswith(".sh"):
        assert (ROOT / rest[0]).is_file(), f"{rest[0]} does not exist"
        return ("bash", rest[0]), rest[1:]
    if head == "valle":
        return (sys.executable, "-m", "valle.bin.cli", *rest[:1]), rest[1:]
    if head in FOREIGN or Path(head).name in FOREIGN:
        return None
    raise AssertionError(f"a command that no test checks: {' '.join(command)}")


def _unknown_flags(page: str, command: list[str]) -> list[str]:
    if command[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return [f"{page}: make {word}" for word in command[1:] if "=" not in word and word not in targets]
    if command[:2] == ["bash", ".ci/run"] or command[0] == ".ci/run":
        return []
    target = _target(command)
    if target is None:
        return []
    words, arguments = target
    known = {flag.replace("_", "-") for flag in FLAG.findall(_help(*words))} | {"--help", "--debug"}
    given = [word.partition("=")[0] for word in arguments if FLAG.match(word)]
    return [
        f"{page}: {' '.join(words[1:])} has no {flag}"
        for flag in given
        if flag.replace("_", "-") not in known
    ]


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_parse(page):
    unknown = []
    for found, text in _blocks("bash"):
        if found == page:
            for command in _commands(text):
                unknown += _unknown_flags(page, command)
    assert not unknown


@pytest.mark.parametrize(("page", "text"), _blocks("python"))
def test_python_blocks_compile_and_their_imports_exist(page, text):
    for node in ast.walk(ast.parse(text, filename=page)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("valle"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{page}: {node.module} has no {alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("valle"):
                    importlib.import_module(alias.name)


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"^(?:[a-z]+:|#)", link):
            assert ((ROOT / page).parent / link.partition("#")[0]).exists(), f"{page}: {link}"


def test_readme_names_the_test_command_that_ci_runs():
    lines = re.findall(
        r"^(make [a-z-]*) *# the test command", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE
    )
    assert lines == ["make test"]
    assert "the test command" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_check_finds_a_wrong_flag(tmp_path):
    script = "import argparse\np = argparse.ArgumentParser()\np.add_argument('--right')\np.parse_args()\n"
    (tmp_path / "program.py").write_text(script)
    program = os.path.relpath(tmp_path / "program.py", ROOT)
    (command,) = _commands(f"FOO=1 python {program} \\\n  --right 1 --wrong=2  # a comment\n")
    assert _unknown_flags("page", command) == [f"page: {program} has no --wrong"]
