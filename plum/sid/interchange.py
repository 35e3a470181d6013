"""SID tables as other projects write them: read into a :class:`SidTable`, and written from one.

=============  ==================================  ============================================
format         files                               what is in them
=============  ==================================  ============================================
``index``      ``*.json`` (also .gz, .xz, .bz2)    LC-Rec, LETTER, MiniOneRec, MQL4GRec: item to
                                                   tokens, ``{"7": ["<a_12>", "<b_3>"]}``
``parquet``    ``*.parquet``                       OpenOneRec: ``pid``, ``codes`` (``sid`` in its
                                                   data set); or ``item_id``, ``codes``
``csv``        ``*.csv`` (also .gz, .xz, .bz2)     ``item_id``, then a column of codes a level
``grid``       ``*.npy``, ``*.safetensors``        GRID: integers ``[L, N]``, levels first, item
                                                   ids 0 to N - 1
=============  ==================================  ============================================

GRID saves its tensor with ``torch.save``, which is a pickle: reading one can run any code, so it
has to be saved as one of the formats above first.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plum.errors import InvalidArgument, InvalidData, MissingDependency
from plum.files import atomic_path
from plum.sid.table import SidTable
from plum.sid.vocabulary import SidVocabulary

Wide = npt.NDArray[np.int64]

INDEX_TEMPLATE = "<{level}_{code}>"
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt"}
_MAX_CODE = 1 << 24
_TOKEN = re.compile(r"(\D*(?:\d+\D+)*?)(\d+)(\D*)")
_SUFFIXES = ".json, .parquet, .csv, .npy or .safetensors"


def read_sids(path: str | Path, *, codebook_sizes: Sequence[int] | None = None) -> SidTable:
    """Reads a table of SIDs that another project wrote; the format follows from the name.

    Args:
        path: A file of one of the formats above.
        codebook_sizes: ``K_l`` of each level. None, as the files do not say: the smallest power
            of two that holds every code, the same for all levels; the last level of GRID's, which
            numbers the items on a SID, is as large as its largest code.

    Raises:
        InvalidArgument: the codes do not fit ``codebook_sizes``.
        InvalidData: the file is absent, damaged, of no known format or not of that format's form;
            the message names the item.
        MissingDependency: polars is not installed, for Parquet.
    """
    path = Path(path)
    name = path.name.removesuffix(path.suffix) if path.suffix in _OPEN else path.name
    suffix = Path(name).suffix.lower()
    if suffix in _PICKLES:
        raise InvalidData(
            path,
            "a file that can be read without running code",
            f"a pickle ({suffix})",
            "where it was written, save it with numpy.save(FILE, tensor.numpy())",
        )
    readers = {
        ".json": _read_index,
        ".parquet": _read_parquet,
        ".csv": _read_csv,
        ".npy": _read_npy,
        ".safetensors": _read_safetensors,
    }
    if suffix not in readers:
        raise InvalidData(path, f"a file that ends in {_SUFFIXES}", repr(path.name))
    if not path.is_file():
        raise InvalidData(path, "a file of SIDs", "a folder" if path.is_dir() else "no such file")
    item_ids, codes = readers[suffix](path)
    if not len(item_ids):
        raise InvalidData(path, "at least one item", "none")
    outside = np.argwhere((codes < 0) | (codes >= _MAX_CODE))
    if len(outside):
        row = int(outside[0, 0])
        raise InvalidData(
            f"{path}, item {item_ids[row]!r}", f"codes in [0, {_MAX_CODE})", codes[row].tolist()
        )
    if codebook_sizes is None:
        grid = suffix in (".npy", ".safetensors")
        levels = codes.shape[1] - (grid and codes.shape[1] > 1)
        codebook_sizes = [1 << int(codes[:, :levels].max()).bit_length()] * levels
        codebook_sizes += [int(codes[:, -1].max()) + 1] * (codes.shape[1] - levels)
    if len(codebook_sizes) != codes.shape[1]:
        raise InvalidArgument(
            "codebook_sizes", f"{codes.shape[1]} sizes, as {path} has levels", list(codebook_sizes)
        )
    return SidTable(item_ids, codes, codebook_sizes)


def write_sids(
    table: SidTable,
    path: str | Path,
    *,
    template: str = INDEX_TEMPLATE,
    id_column: str = "item_id",
) -> None:
    """Writes a table in the format that the name of the file asks for.

    Args:
        table: What is written.
        path: Ends in .json, .parquet, .csv or .npy, see above; .json and .csv also in .gz, .xz or
            .bz2 after it.
        template: Spelling of a token in .json, see :class:`SidVocabulary`.
        id_column: Name of the column of item ids, in Parquet only; ``"pid"`` writes OpenOneRec's,
            whose ids are integers. :func:`read_sids` reads back ``"item_id"`` and ``"pid"``.

    Raises:
        InvalidArgument: the name asks for no known format, the item ids are not what the format
            needs, or ``id_column`` is ``"codes"`` or given for another format than Parquet.
        MissingDependency: polars is not installed, for Parquet.
    """
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in _OPEN else path
    writers = {".json": _write_index, ".parquet": _write_parquet, ".csv": _write_csv,
               ".npy": _write_npy}  # fmt: skip
    writer = writers.get(stem.suffix)
    if writer is None or (stem != path and stem.suffix in (".parquet", ".npy")):
        raise InvalidArgument("path", f"a name that ends in {', '.join(writers)}", repr(path.name))
    if id_column == "codes" or (id_column != "item_id" and stem.suffix != ".parquet"):
        expected = "'item_id', or for Parquet any name but 'codes'"
        raise InvalidArgument("id_column", expected, f"{id_column!r} for {path.name}")
    with atomic_path(path) as temporary:
        writer(table, temporary, template if stem.suffix == ".json" else id_column)


def _text(path: Path) -> str:
    opener = _OPEN.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            return file.read().decode("utf-8").removeprefix("\ufeff")
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise InvalidData(path, "a whole file of UTF-8 text", error, "copy it again") from None


def _pairs(path: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Returns a hook that refuses a JSON object in which a key stands twice."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_distinct(path, [key for key, _ in pairs])
        return dict(pairs)

    return build


def _read_index(path: Path) -> tuple[list[str], Wide]:
    try:
        content = json.loads(_text(path), object_pairs_hook=_pairs(path))
    # A ValueError, too, is what Python says of a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise InvalidData(path, "a JSON file", error) from None
    if not isinstance(content, dict):
        raise InvalidData(path, "an object of items and their tokens", type(content).__name__)
    item_ids, rows = list(content), []
    spelling: list[tuple[str, str]] | None = None
    for item_id, tokens in content.items():
        where = f"{path}, item {item_id!r}"
        if not isinstance(tokens, list) or not tokens:
            raise InvalidData(where, 'a list of tokens such as "<a_12>"', repr(tokens)[:60])
        found = [_TOKEN.fullmatch(token) if isinstance(token, str) else None for token in tokens]
        if None in found:
            wrong = tokens[found.index(None)]
            raise InvalidData(where, 'tokens that hold a code, such as "<a_12>"', repr(wrong)[:60])
        parts = [match.groups() for match in found if match is not None]
        around = [(before, after) for before, _, after in parts]
        spelling = around if spelling is None else spelling
        if around != spelling:
            expected = "".join(f"{before}*{after}" for before, after in spelling)
            raise InvalidData(where, f"tokens like those of the first item, {expected}", tokens)
        try:
            rows.append([int(code) for _, code, _ in parts])
        except ValueError:
            # int() refuses thousands of digits.
            expected = f"codes in [0, {_MAX_CODE})"
            raise InvalidData(where, expected, "a number of thousands of digits") from None
    return item_ids, _as_table(path, item_ids, rows)


def _read_csv(path: Path) -> tuple[list[str], Wide]:
    try:
        lines = [row for row in csv.reader(io.StringIO(_text(path))) if row]
    except csv.Error as error:
        raise InvalidData(path, "a CSV file", error) from None
    if not lines or lines[0][0] != "item_id" or len(lines[0]) < 2:
        header = ",".join(lines[0]) if lines else "an empty file"
        raise InvalidData(path, "a header item_id,code_1,code_2,...", repr(header[:60]))
    item_ids, rows = [], []
    for number, line in enumerate(lines[1:], 2):
        try:
            # "1_12", level and code, is no number here, but 112 to int().
            rows.append([int(code.replace("_", "x")) for code in line[1:]])
        except ValueError:
            raise InvalidData(f"{path}, row {number}", "whole numbers", repr(line)[:60]) from None
        item_ids.append(line[0])
    _check_distinct(path, item_ids)
    return item_ids, _as_table(path, item_ids, rows, len(lines[0]) - 1)


def _read_parquet(path: Path) -> tuple[list[str], Wide]:
    polars = _polars("reading Parquet")
    try:
        frame = polars.read_parquet(path, glob=False)
    # On some damaged bytes polars panics.
    except (polars.exceptions.PolarsError, polars.exceptions.PanicException, OSError) as error:
        raise InvalidData(path, "a whole Parquet file", str(error).splitlines()[0]) from None
    names = [name for name in ("item_id", "pid") if name in frame.columns]
    lists = [name for name in ("codes", "sid") if name in frame.columns]
    if not names or not lists:
        expected = "columns item_id (or pid) and codes (or sid)"
        raise InvalidData(path, expected, ", ".join(frame.columns))
    ids, codes = frame[names[0]], frame[lists[0]]
    strings = (polars.String, polars.Categorical, polars.Enum)
    if not (ids.dtype in strings or ids.dtype.is_integer()) or ids.null_count():
        raise InvalidData(
            f"{path}, column {names[0]!r}", "strings or whole numbers", f"{ids.dtype}, or empty"
        )
    if not (codes.dtype in (polars.List, polars.Array) and codes.dtype.inner.is_integer()):
        raise InvalidData(f"{path}, column {lists[0]!r}", "lists of whole numbers", codes.dtype)
    item_ids = ids.cast(polars.String).to_list()
    _check_distinct(path, item_ids)
    if not item_ids:
        return [], np.zeros((0, 0), dtype=np.int64)
    # A code beyond int64 becomes null.
    numbers = codes.cast(polars.List(polars.Int64), strict=False)
    lengths = numbers.list.len().fill_null(0)
    levels = int(lengths.filter(lengths > 0).first() or 1)
    wrong = lengths != levels
    wrong |= numbers.list.eval(polars.element().is_null()).list.any().fill_null(True)
    if wrong.any():
        row = int(wrong.arg_max())
        got = codes[row] if codes[row] is None else codes[row].to_list()
        expected = f"{levels} codes in [0, {_MAX_CODE})"
        raise InvalidData(f"{path}, item {item_ids[row]!r}", expected, got)
    return item_ids, numbers.explode().to_numpy().reshape(len(item_ids), levels)


def _read_npy(path: Path) -> tuple[list[str], Wide]:
    try:
        # Mapped, a header that promises more than the file holds is an error and no allocation.
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise InvalidData(path, "a NumPy array of integers", error) from None
    if not isinstance(array, np.ndarray):
        raise InvalidData(path, "a NumPy array of integers", "an archive of arrays")
    return _from_grid(path, np.asarray(array))


def _read_safetensors(path: Path) -> tuple[list[str], Wide]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    # The last two are of types that NumPy has not, bf16 and fp8.
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        raise InvalidData(path, "a whole safetensors file of integers", error) from None
    if len(tensors) != 1:
        raise InvalidData(path, "one tensor of SIDs", f"{sorted(tensors)[:5]}")
    return _from_grid(path, next(iter(tensors.values())))


def _from_grid(path: Path, array: npt.NDArray[Any]) -> tuple[list[str], Wide]:
    whole = array.dtype.kind in "iu" or (
        array.dtype.kind == "f"
        and bool(((array == np.floor(array)) & (np.abs(array) < 2.0**63)).all())
    )
    if array.ndim != 2 or not whole or not array.size:
        raise InvalidData(path, "integers [L, N]", f"{array.dtype} {list(array.shape)}")
    if array.shape[0] > 26:
        raise InvalidData(
            path, "at most 26 levels in integers [L, N]", list(array.shape), "transpose it"
        )
    return [str(row) for row in range(array.shape[1])], array.T.astype(np.int64)


def _as_table(
    path: Path, item_ids: Sequence[str], rows: list[list[int]], levels: int | None = None
) -> Wide:
    levels = len(rows[0]) if levels is None and rows else levels
    for item_id, row in zip(item_ids, rows, strict=True):
        if len(row) != levels:
            raise InvalidData(f"{path}, item {item_id!r}", f"{levels} codes", row)
        if not all(0 <= code < _MAX_CODE for code in row):
            raise InvalidData(f"{path}, item {item_id!r}", f"codes in [0, {_MAX_CODE})", row)
    return np.asarray(rows, dtype=np.int64).reshape(len(rows), levels or 0)


def _check_distinct(path: Path, item_ids: Sequence[str]) -> None:
    if len(set(item_ids)) != len(item_ids):
        twice = next(item for item, count in Counter(item_ids).items() if count > 1)
        raise InvalidData(path, "every item once", f"{twice!r} twice")


def _write_index(table: SidTable, path: Path, template: str) -> None:
    spell = SidVocabulary(table.codebook_sizes, template).tokens_of
    content = {
        item_id: spell(codes)
        for item_id, codes in zip(table.item_ids, table.codes.tolist(), strict=True)
    }
    _write_text(path, [json.dumps(content, ensure_ascii=False)])


def _write_csv(table: SidTable, path: Path, _: str) -> None:
    buffer = io.StringIO()
    # Unless everything is quoted, Python leaves a carriage return bare, and does not read it back.
    bare = any("\r" in item_id for item_id in table.item_ids)
    writer = csv.writer(
        buffer, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC if bare else csv.QUOTE_MINIMAL
    )
    writer.writerow(["item_id", *(f"code_{level + 1}" for level in range(table.codes.shape[1]))])
    rows = zip(table.item_ids, table.codes.tolist(), strict=True)
    writer.writerows([item_id, *codes] for item_id, codes in rows)
    _write_text(path, [buffer.getvalue()])


def _write_text(path: Path, parts: Iterable[str]) -> None:
    with _OPEN.get(path.suffix, open)(path, "wt", encoding="utf-8", newline="") as file:
        file.writelines(parts)


def _write_parquet(table: SidTable, path: Path, id_column: str) -> None:
    polars = _polars("writing Parquet")
    ids = polars.Series(id_column, table.item_ids, dtype=polars.String)
    if id_column == "pid":
        numbers = ids.cast(polars.Int64, strict=False)
        # A second look, as "007" and "7" are two items and one number.
        if not (numbers.cast(polars.String) == ids).fill_null(False).all():
            wrong = ids.filter((numbers.cast(polars.String) != ids).fill_null(True))[0]
            raise InvalidArgument("id_column", "integer item ids for 'pid'", repr(wrong))
        ids = numbers
    codes = polars.Series("codes", table.codes.tolist(), dtype=polars.List(polars.Int64))
    polars.DataFrame([ids, codes]).write_parquet(path)


def _write_npy(table: SidTable, path: Path, _: str) -> None:
    rows = {item_id: row for row, item_id in enumerate(table.item_ids)}
    order = [rows.get(str(number), -1) for number in range(len(rows))]
    if -1 in order:
        raise InvalidArgument(
            "path", "item ids 0 to N - 1, which .npy cannot hold", f"no item {order.index(-1)}"
        )
    np.save(path, table.codes[order].T.astype(np.int64))


def _polars(what: str) -> Any:
    try:
        import polars
    except ImportError:
        raise MissingDependency("polars", "pipeline", what) from None
    return polars
