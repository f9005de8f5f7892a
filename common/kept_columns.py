"""Columns of a source that a lake keeps beside its own: their names, their types, and cells as values of a type.

The types are few and plain, so that every reader of Parquet has them; and they are said, not guessed from the first
rows: a table of text has strings unless the user says otherwise.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa  # slow to import, and settings need only the names

KEPT_TYPES = ("string", "int64", "float64", "bool", "date", "timestamp")
_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_kept(asked: Iterable[str]) -> dict[str, str | None]:
    """Names of the columns to keep, each with its type or None where none is said, in order.

    Args:
        asked: ``NAME`` or ``NAME:TYPE``.

    Raises:
        ValueError: A type is unknown, a name is empty, said twice, or one of the lake's own columns.
    """
    found: dict[str, str | None] = {}
    own = [name.lower() for name in _own_names()] if (asked := tuple(asked)) else []
    for text in asked:
        name, mark, kind = text.rpartition(":")
        if not mark or kind not in KEPT_TYPES:
            name, kind = text, ""
        if mark and not kind and text.rpartition(":")[2].isidentifier() and text.lower() not in own:
            raise ValueError(
                f"column {text!r}: {text.rpartition(':')[2]!r} is no type. Expected NAME or NAME:TYPE with one of "
                f"{', '.join(KEPT_TYPES)}; for a column whose name holds a colon say its type, too"
            )
        # Some readers do not tell names apart by case.
        if not name or name.lower() in map(str.lower, found):
            raise ValueError(f"{text!r}: {'named twice' if name else 'a column needs a name'}")
        if name.startswith("mmkd_"):
            raise ValueError(f"{name!r}: names that begin with mmkd_ are the program's own. Rename it in the source")
        if name.lower() in own:
            raise ValueError(
                f"{name!r} is a column that every lake has, so that it cannot be kept under this name. "
                "Rename it in the source"
            )
        found[name] = kind or None
    return found


def kind_of_arrow(kind: pa.DataType) -> str | None:
    """The type of ours that holds an Arrow type's values; None if there is none (lists, structs, bytes)."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    families: dict[str, Callable[[pa.DataType], bool]] = {
        "string": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
        "int64": pa.types.is_integer,
        "float64": lambda kind: pa.types.is_floating(kind) or pa.types.is_decimal(kind),
        "bool": pa.types.is_boolean,
        "date": pa.types.is_date,
        "timestamp": pa.types.is_timestamp,
    }
    return next((name for name, belongs in families.items() if belongs(kind)), None)


def kept_schema(kept: Mapping[str, str]) -> pa.Schema:
    """Schema of the pairs of a lake that keeps these columns (name -> key of ``KEPT_TYPES``)."""
    import pyarrow as pa

    from common.schemas import PAIRS

    types = {
        "string": pa.string(),
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "date": pa.date32(),
        "timestamp": pa.timestamp("us"),
    }
    return pa.schema([*PAIRS, *(pa.field(name, types[kind]) for name, kind in kept.items())])


def _own_names() -> list[str]:
    from common.schemas import PAIRS

    return list(PAIRS.names)


def kept_value(cell: Any, kind: str) -> Any:
    """A cell as a value of a type; None for an empty one.

    Nothing is rounded or cut to fit, but fractions of a microsecond.

    Raises:
        ValueError, TypeError: It is no such value.
    """
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8")
    if isinstance(cell, str):
        cell = cell.encode("utf-8", "replace").decode("utf-8").replace("\0", "?").strip()
    if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
        return None
    return _MAKERS[kind](cell)


def _string(cell: Any) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, datetime.date | datetime.time):
        return cell.isoformat()
    return str(cell) if isinstance(cell, Decimal) else json.dumps(cell, ensure_ascii=False, default=str)


def _int64(cell: Any) -> int:
    if isinstance(cell, bool) or not isinstance(cell, int | float | str | Decimal):
        raise TypeError(f"a {type(cell).__name__}")
    value = int(cell)
    if (not isinstance(cell, str) and value != cell) or not -(2**63) <= value < 2**63:
        raise ValueError("not a whole number of 64 bits")
    return value


def _float64(cell: Any) -> float | None:
    if isinstance(cell, bool) or not isinstance(cell, int | float | str | Decimal):
        raise TypeError(f"a {type(cell).__name__}")
    value = float(cell)
    return None if math.isnan(value) else value  # which is what an empty cell is


def _bool(cell: Any) -> bool:
    if isinstance(cell, bool):
        return cell
    if isinstance(cell, str | int) and str(cell).lower() in _TRUTHS:
        return _TRUTHS[str(cell).lower()]
    raise ValueError(f"none of {', '.join(_TRUTHS)}")


def _date(cell: Any) -> datetime.date:
    if isinstance(cell, datetime.datetime):
        if cell.time() != datetime.time():
            raise ValueError("it has a time of day")
        return cell.date()
    return cell if isinstance(cell, datetime.date) else datetime.date.fromisoformat(_text(cell))


def _timestamp(cell: Any) -> datetime.datetime:
    if not isinstance(cell, datetime.datetime):
        cell = datetime.datetime.fromisoformat(cell.isoformat() if isinstance(cell, datetime.date) else _text(cell))
    # One zone for all, so that every reader sorts them alike.
    return cell.astimezone(datetime.UTC).replace(tzinfo=None) if cell.tzinfo else cell


def _text(cell: Any) -> str:
    if not isinstance(cell, str):
        raise TypeError(f"a {type(cell).__name__}")
    return cell


_MAKERS: dict[str, Callable[[Any], Any]] = {
    "string": _string,
    "int64": _int64,
    "float64": _float64,
    "bool": _bool,
    "date": _date,
    "timestamp": _timestamp,
}
