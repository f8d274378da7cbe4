"""Symbol tables: k2's file format, exact both ways, and clear about what is wrong with a file."""

import random

import pytest

from valle.data.symbols import SymbolTable
from valle.utils.errors import UserError


def test_a_table_is_built_from_a_set_whatever_its_order():
    symbols = ["b", "ɡ", "_", "a", "aɪ", "b", "<eps>"]
    table = SymbolTable.build(symbols)
    assert list(table) == ["<eps>", "_", "a", "aɪ", "b", "ɡ"]
    for seed in range(5):
        random.Random(seed).shuffle(symbols)
        assert SymbolTable.build(symbols) == table
    assert list(SymbolTable.build(["a"], unknown=True)) == ["<eps>", "<unk>", "a"]


def test_the_file_is_k2s(tmp_path):
    table = SymbolTable.build(["ˈ", "oʊ", "!", "<0x20>"])
    table.write(tmp_path / "t.k2symbols")
    assert (tmp_path / "t.k2symbols").read_bytes() == "<eps> 0\n! 1\n<0x20> 2\noʊ 3\nˈ 4\n".encode()
    assert SymbolTable.read(tmp_path / "t.k2symbols") == table
    assert [path.name for path in tmp_path.iterdir()] == ["t.k2symbols"]


def test_the_same_table_is_not_written_again(tmp_path):
    path = tmp_path / "new" / "t.k2symbols"
    SymbolTable.build(["a"]).write(path)
    before = path.stat()
    SymbolTable.build(["a"]).write(path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino
    SymbolTable.build(["b"]).write(path)
    assert SymbolTable.read(path)[1] == "b"


def test_files_of_others_are_read():
    # tabs, more than one space, another order, empty lines, Windows' line ends
    assert list(SymbolTable.from_text("b   2\r\n\n<eps>\t0\r\na 1\r\n")) == ["<eps>", "a", "b"]


def test_ids_and_back():
    table = SymbolTable.build(["a", "b"], unknown=True)
    assert table.encode(["b", "a", "b"]) == [3, 2, 3]
    assert table.decode([3, 2, 0]) == ["b", "a", "<eps>"]
    assert table.encode(["z", "a"], unknown=True) == [1, 2]
    assert "a" in table and "z" not in table and len(table) == 4 and table.id("<eps>") == 0
    with pytest.raises(UserError, match="symbol 'z' is not in the table of 4"):
        table.encode(["a", "z"])
    with pytest.raises(UserError, match="'<unk>' is not in the table"):
        SymbolTable.build(["a"]).encode(["z"], unknown=True)
    for wrong in (-1, 4):
        with pytest.raises(UserError, match=f"text symbol {wrong}: the table has ids from 0 to 3"):
            table.decode([wrong])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<eps> 0\na 1\na 2\n", "line 3: symbol 'a' occurs twice, as 1 and as 2"),
        ("<eps> 0\na 1\nb 1\n", "line 3: id 1 is given twice, to 'a' and 'b'"),
        ("<eps> 0\na 1\nb 3\n", "no symbol has id 2; ids must run from 0"),
        ("<eps> 0\na b 1\n", "line 2: 'a b 1', expected a symbol without spaces"),
        ("<eps> 0\n  1\n", "line 2: '1', expected a symbol"),
        ("<eps> 0\na -1\n", "line 2: 'a -1', expected a symbol"),
        ("<eps> 0\na one\n", "line 2: 'a one', expected a symbol"),
        ("<eps> 0\na ²\n", "line 2"),
        ("a 0\nb 1\n", "id 0 is 'a', expected '<eps>'"),
        ("", "id 0 is nothing"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, message):
    path = tmp_path / "t.k2symbols"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="symbol table '.*t.k2symbols'") as caught:
        SymbolTable.read(path)
    assert message in str(caught.value)


def test_no_file_and_no_text_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist; run"):
        SymbolTable.read(tmp_path / "none")
    with pytest.raises(UserError, match="cannot be read"):
        SymbolTable.read(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe 0\n")
    with pytest.raises(UserError, match="cannot be read"):
        SymbolTable.read(tmp_path / "bytes")


@pytest.mark.parametrize("symbol", ["", " ", "a b", "a\n", "\u3000"])
def test_symbols_with_space_are_refused(symbol):
    with pytest.raises(UserError, match="empty or has white space"):
        SymbolTable.build(["a", symbol])


def test_symbols_must_be_different_and_eps_the_first():
    with pytest.raises(UserError, match="'a' occurs twice"):
        SymbolTable(["<eps>", "a", "a"])
    with pytest.raises(UserError, match="id 0 is 'a'"):
        SymbolTable(["a"])
    with pytest.raises(UserError, match="id 0 is nothing"):
        SymbolTable([])
