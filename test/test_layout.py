"""The house rules that a program can check: import direction, no star imports, no pickle, no home directories."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# each may import itself and what stands before it; config.py stands beside utils
LAYERS = [
    "utils",
    "native",
    "modules",
    "codecs",
    "data",
    "generation",
    "models",
    "engine",
    "evaluation",
    "serve",
    "bin",
    "egs",
]
BESIDE = {"config": "utils"}

OUTPUT_FOLDERS = {"data", "exp"}  # of recipes: what they write


def _files(*suffixes: str) -> list[Path]:
    """Source files of the project, without what is generated or installed."""
    files = [path for path in ROOT.iterdir() if path.is_file() and path.suffix in suffixes]
    for folder in ("valle", "egs", "test", "tools", "docs", ".ci"):
        for path in sorted((ROOT / folder).rglob("*")):
            parts = path.relative_to(ROOT).parts
            generated = parts[0] == "egs" and len(parts) > 2 and parts[2] in OUTPUT_FOLDERS
            if path.is_file() and path.suffix in suffixes and "__pycache__" not in parts and not generated:
                files.append(path)
    return files


PYTHON = _files(".py")
TEXT = [
    path
    for path in _files(".py", ".sh", ".md", ".yaml", ".yml", ".toml", ".txt", "")
    if path.name != "LICENSE"
]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _layer(path: Path) -> str | None:
    """The layer a file belongs to; None: it has none, as tests, tools and setup.py."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "egs":
        return "egs"
    if parts[0] != "valle":
        return None
    part = parts[1].removesuffix(".py")
    return BESIDE.get(part, part)


def _imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, full module name) of every import; of `from valle import x` also valle.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, base] if base else anchor)
            yield node.lineno, base
            if base == "valle":
                for alias in node.names:
                    yield node.lineno, f"valle.{alias.name}"


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _forbidden_imports(path: Path, tree: ast.AST) -> list[str]:
    own = _layer(path)
    if own is None or own == "__init__":
        return []
    package = ".".join(path.relative_to(ROOT).parent.parts)
    found = []
    for line, module in _imports(tree, package):
        parts = module.split(".")
        if parts[0] not in ("valle", "egs") or (parts[0] == "valle" and len(parts) == 1):
            continue
        other = "egs" if parts[0] == "egs" else BESIDE.get(parts[1], parts[1])
        if other in LAYERS and LAYERS.index(other) > LAYERS.index(own):
            found.append(f"{_name(path)}:{line}: {own} imports {module}")
    return found


def test_every_part_of_the_package_has_a_place():
    for path in sorted((ROOT / "valle").iterdir()):
        if path.name.startswith("__") or (path.is_file() and path.suffix != ".py"):
            continue
        assert _layer(path) in LAYERS, f"{_name(path)} stands in no layer: see docs/README.md"


def test_imports_point_one_way():
    assert len(PYTHON) > 20
    assert not [line for path in PYTHON for line in _forbidden_imports(path, _parse(path))]


def test_import_check_sees_what_it_must():
    tree = ast.parse(
        "from valle.engine import trainer\nfrom ..models import x\nfrom valle import bin\nimport valle.utils"
    )
    found = _forbidden_imports(ROOT / "valle" / "codecs" / "example.py", tree)
    assert [line.split(": ")[1] for line in found] == [
        "codecs imports valle.engine",
        "codecs imports valle.models",
        "codecs imports valle.bin",
    ]


def test_importing_the_package_is_light():
    assert not list(_imports(_parse(ROOT / "valle" / "__init__.py"), "valle"))


@pytest.mark.parametrize("path", PYTHON, ids=_name)
def test_python_house_rules(path):
    found = []
    for node in ast.walk(_parse(path)):
        where = f"{_name(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            found.append(f"{where}: star import")
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
            found.append(f"{where}: sys.path is edited or read; install the package instead")
        if isinstance(node, ast.Call):
            function, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if re.fullmatch(r"(pickle|dill|cloudpickle|joblib)\.(load|dump)s?", function):
                found.append(f"{where}: {function}")
            if function == "torch.load" and options.get("weights_only") != "True":
                found.append(f"{where}: torch.load without weights_only=True")
            if function in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
                found.append(f"{where}: np.load with pickled objects")
    assert not found


@pytest.mark.parametrize("path", [path for path in PYTHON if _layer(path)], ids=_name)
def test_opens_with_a_docstring(path):
    tree = _parse(path)
    assert not tree.body or ast.get_docstring(tree), f"{_name(path)} does not say what it does"


HOMES = re.compile(
    r"(?<![\w.~)}\]/])/(?:" + "|".join(["home", "Users", "root", "work", "workspace", "mnt"]) + r")/"
)
UNFINISHED = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")


@pytest.mark.parametrize("path", [path for path in TEXT if path != Path(__file__).resolve()], ids=_name)
def test_text_house_rules(path):
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        pytest.skip("not text")
    found = [
        f"{_name(path)}:{number}: {what}: {line.strip()[:80]}"
        for number, line in enumerate(lines, 1)
        for what, pattern in (("absolute path", HOMES), ("unfinished", UNFINISHED))
        if pattern.search(line)
    ]
    assert not found


def test_tests_mirror_the_package():
    """test/<part>/ belongs to valle/<part>/; egs and assets stand beside."""
    for path in sorted((ROOT / "test").iterdir()):
        if path.is_dir() and not path.name.startswith(("_", ".")):
            assert path.name in ("egs", "assets", "tools") or (ROOT / "valle" / path.name).is_dir(), _name(
                path
            )


def test_no_recipe_copies_a_trainer():
    """A recipe's bin/*.py calls valle.bin; what is long belongs into the package."""
    for path in sorted((ROOT / "egs").glob("*/bin/*.py")):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        assert len(lines) <= 25, f"{_name(path)}: {len(lines)} lines"
        assert "valle.bin" in path.read_text(encoding="utf-8"), _name(path)
