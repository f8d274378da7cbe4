"""Symbol tables in k2's text format: which id a text symbol has. Between the text front ends and a model's embedding.

A file has one `symbol id` a line; `<eps>`, the empty symbol, is first and has id 0, which batches are padded with:

    <eps> 0
    ! 1
    _ 2
    aɪ 3
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from valle.utils.errors import UserError
from valle.utils.files import atomic_path

EPS = "<eps>"
UNK = "<unk>"
WORD_BORDER = "_"
ENDS = ("<bos>", "<eos>")  # begin and end of a text, where a model has been trained with them
SYMBOLS_FILE = "unique_text_tokens.k2symbols"


class SymbolTable:
    """Symbols and their ids, which run from 0 (`<eps>`) without a gap.

    Args:
        symbols: in the order of their ids, from 0 on.

    Raises:
        UserError: the first is not `<eps>`, one occurs twice, or is empty or has white space in it.
    """

    def __init__(self, symbols: Sequence[str] = (EPS,)) -> None:
        if not symbols or symbols[0] != EPS:
            found = repr(symbols[0]) if symbols else "nothing"
            raise UserError(f"symbol table: id 0 is {found}, expected '{EPS}'")
        self._ids: dict[str, int] = {}
        for symbol in symbols:
            if not symbol or symbol.split() != [symbol]:
                raise UserError(
                    f"symbol table: {symbol!r} is empty or has white space in it, which a table cannot hold"
                )
            if symbol in self._ids:
                raise UserError(f"symbol table: '{symbol}' occurs twice, as {self._ids[symbol]} and later")
            self._ids[symbol] = len(self._ids)
        self._symbols = list(symbols)

    @classmethod
    def build(cls, symbols: Iterable[str], unknown: bool = False) -> "SymbolTable":
        """The table of all symbols that occur: the same set gives the same table, whatever its order.

        Args:
            symbols: may repeat.
            unknown: also hold `<unk>`, as id 1, for symbols that are met later.
        """
        special = [EPS, UNK] if unknown else [EPS]
        return cls([*special, *sorted(set(symbols) - set(special))])

    def __len__(self) -> int:
        return len(self._symbols)

    def __iter__(self) -> Iterator[str]:
        return iter(self._symbols)

    def __contains__(self, symbol: object) -> bool:
        return symbol in self._ids

    def __getitem__(self, symbol_id: int) -> str:
        return self._symbols[symbol_id]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SymbolTable) and self._symbols == other._symbols

    def __repr__(self) -> str:
        return f"SymbolTable({len(self)} symbols)"

    def id(self, symbol: str) -> int:
        """The id of a symbol.

        Raises:
            UserError: the table does not hold it.
        """
        if symbol not in self._ids:
            raise UserError(
                f"symbol {symbol!r} is not in the table of {len(self)} text symbols; was it made with another "
                "--text-extractor or --language, or from texts without this symbol?"
            )
        return self._ids[symbol]

    def encode(self, symbols: Iterable[str], unknown: bool = False) -> list[int]:
        """Symbols -> ids.

        Args:
            symbols: of one text.
            unknown: take `<unk>` for what the table does not hold, instead of failing.

        Raises:
            UserError: a symbol that the table does not hold; `unknown`, but it has no `<unk>` either.
        """
        if unknown:
            other = self.id(UNK)
            return [self._ids.get(symbol, other) for symbol in symbols]
        return [self.id(symbol) for symbol in symbols]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Ids -> symbols.

        Raises:
            UserError: an id outside the table.
        """
        found = []
        for symbol_id in ids:
            if not 0 <= symbol_id < len(self._symbols):
                raise UserError(f"text symbol {symbol_id}: the table has ids from 0 to {len(self) - 1}")
            found.append(self._symbols[symbol_id])
        return found

    def to_text(self) -> str:
        """The content of its file."""
        return "".join(f"{symbol} {number}\n" for number, symbol in enumerate(self._symbols))

    @classmethod
    def from_text(cls, text: str, name: str = "symbol table") -> "SymbolTable":
        """The opposite of `to_text`. Lines may come in any order of their ids.

        Args:
            name: what errors call it.

        Raises:
            UserError: a line that is not `symbol id`, a symbol or an id twice, an id left out, no `<eps>` at 0.
        """
        by_id: dict[int, str] = {}
        ids: dict[str, int] = {}
        # Not splitlines: that also breaks at characters which may stand in a table as symbols.
        for number, line in enumerate(text.split("\n"), 1):
            fields = line.split()
            if not fields:
                continue
            if len(fields) != 2 or not (fields[1].isascii() and fields[1].isdigit()):
                raise UserError(
                    f"{name}, line {number}: '{line.strip()}', expected a symbol without spaces and its id"
                )
            symbol, symbol_id = fields[0], int(fields[1])
            if symbol in ids:
                raise UserError(
                    f"{name}, line {number}: symbol '{symbol}' occurs twice, as {ids[symbol]} and as {symbol_id}"
                )
            if symbol_id in by_id:
                raise UserError(
                    f"{name}, line {number}: id {symbol_id} is given twice, to '{by_id[symbol_id]}' and '{symbol}'"
                )
            by_id[symbol_id] = symbol
            ids[symbol] = symbol_id
        missing = next((number for number in range(len(by_id)) if number not in by_id), None)
        if missing is not None:
            raise UserError(f"{name}: no symbol has id {missing}; ids must run from 0 without a gap")
        if by_id.get(0) != EPS:
            found = f"'{by_id[0]}'" if by_id else "nothing"
            raise UserError(f"{name}: id 0 is {found}, expected '{EPS}'")
        return cls([by_id[number] for number in range(len(by_id))])

    def write(self, path: Path) -> None:
        """Write the file atomically; one with this content already is left alone."""
        content = self.to_text().encode()
        if path.is_file() and path.read_bytes() == content:
            return
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)

    @classmethod
    def read(cls, path: Path) -> "SymbolTable":
        """Read a file.

        Raises:
            UserError: there is none, it is no text, or what `from_text` says.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(
                f"symbol table '{path}' does not exist; run the stage of prepare.sh that writes it"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"symbol table '{path}' cannot be read ({error})") from error
        return cls.from_text(text, f"symbol table '{path}'")


def join_symbols(
    text: np.ndarray, prompt: np.ndarray | None, table: SymbolTable, ends: bool
) -> tuple[np.ndarray, int]:
    """What a model is given of a prompt's text and its own, a word border between them.

    Args:
        text, prompt: (L,) ids.
        table: of all symbols.
        ends: texts begin and end with a symbol of their own.

    Returns:
        (L,) int64 ids, and how many of them are the prompt's; the two ends are counted, as if it stood alone.
    """
    first = [] if prompt is None else prompt.tolist()
    if first and WORD_BORDER in table:
        first += table.encode([WORD_BORDER])
    ids = [*first, *text.tolist()]
    if ends:
        begin, end = table.encode(ENDS)
        ids = [begin, *ids, end]
    return np.array(ids, dtype=np.int64), len(first) + 2 * ends
