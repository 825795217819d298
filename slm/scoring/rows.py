"""The rows of a table: which column is answered, their keys, and how they are cut into parts.

A row's key is a hash of the row, or of its column `id`. Its seed and its part follow from the key
alone: neither the order of rows nor the number of executors changes an answer.
"""

from functools import partial
from typing import TYPE_CHECKING

from slm.config.use import Score
from slm.errors import InputError
from slm.records import LoggedModel
from slm.scoring.worker import Answer, Work, answer_batches

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

# Parts are ranges of buckets, so that rows are counted before it is known how many parts there are.
BUCKETS = 4096
MAX_PARTS = 512  # each part reads the input again
BUCKET, DIGEST, SEED = "__score_bucket", "__score_digest", "__score_seed"


def column_of(table: "DataFrame", model: LoggedModel, settings: Score) -> str:
    """The column to answer; InputError unless the model can answer what it holds."""
    is_chat, name = model.interface == "chat", settings.column
    if not model.is_onnx:
        raise InputError(f"model_uri is {model.name}; score asks ONNX models of this project.")
    if settings.system is not None and not is_chat:
        raise InputError(
            f"score.system is for chat models; {model.name} takes prompts as they are."
        )
    wanted = [name] if name else ["messages", "prompt"] if is_chat else ["prompt"]
    column = next((name for name in wanted if name in table.columns), None)
    if column is None:
        raise InputError(
            f"the input has no column {' or '.join(wanted)}; it has {', '.join(table.columns)}. "
            "Give score.column=<one of them>."
        )
    kind = table.schema[column].dataType.simpleString()
    if kind != "string" and not (is_chat and kind.startswith("array<struct<")):
        or_lists = " or lists of messages" if is_chat else ""
        raise InputError(
            f"column {column} holds {kind[:80]}; {model.name} answers strings{or_lists}."
        )
    return column


def holds_messages(table: "DataFrame", column: str) -> bool:
    """Whether a column holds conversations: as lists, or as JSON if it is called messages."""
    return column == "messages" or table.schema[column].dataType.typeName() == "array"


def require_columns(table: "DataFrame", settings: Score) -> None:
    """Raise InputError if the column `id` is missing, or if an added one is there already."""
    if settings.id is not None and settings.id not in table.columns:
        raise InputError(f"score.id is {settings.id}; the input has {', '.join(table.columns)}.")
    if taken := {settings.prefix + name for name in Answer._fields} & set(table.columns):
        raise InputError(
            f"the input has {', '.join(sorted(taken))} already. Name the added columns otherwise: "
            "score.prefix=second_"
        )


def with_keys(table: "DataFrame", settings: Score) -> "DataFrame":
    """The table with each row's bucket and digest before its columns, and its seed after them."""
    from pyspark.sql import functions as F

    def digest(names: list[str]) -> "Column":
        row = F.struct(*(F.col(f"`{name}`") for name in sorted(names)))
        return F.xxhash64(F.to_json(row, {"timeZone": "UTC"}))  # sessions differ in time zone

    row = digest(table.columns)
    key = digest([settings.id]) if settings.id else row
    seed = F.lit(None).cast("long")
    if (given := settings.parameters.get("seed")) is not None:
        seed = F.xxhash64(F.lit(given).cast("long"), key).bitwiseAND(F.lit(2**63 - 1))
    bucket = F.pmod(key, F.lit(BUCKETS)).cast("int")
    return table.select(bucket.alias(BUCKET), row.alias(DIGEST), "*", seed.alias(SEED))


def counted(rows: "DataFrame") -> tuple[dict[int, int], str]:
    """The rows in each bucket, and a sum over all rows that tells this input from another."""
    from pyspark.sql import functions as F

    numbers = F.count(F.lit(1)), F.sum(F.col(DIGEST).cast("decimal(20,0)"))
    found = [tuple(row) for row in rows.groupBy(BUCKET).agg(*numbers).collect()]
    return {bucket: n for bucket, n, _ in found}, str(sum(int(digests) for *_, digests in found))


def parts_of(rows: int, rows_per_part: int) -> int:
    """How many parts to make; at least one, so that an empty table has an empty answer."""
    return max(1, min(MAX_PARTS, -(-rows // rows_per_part)))


def first_bucket(part: int, parts: int) -> int:
    return -(-part * BUCKETS // parts)


def rows_of_parts(counts: dict[int, int], parts: int) -> dict[int, int]:
    """The rows in each part."""
    expected = dict.fromkeys(range(parts), 0)
    for bucket, rows in counts.items():
        expected[bucket * parts // BUCKETS] += rows
    return expected


def part_of(rows: "DataFrame", part: int, parts: int) -> "DataFrame":
    """The rows of one part."""
    from pyspark.sql import functions as F

    return rows.where(
        F.col(BUCKET).between(first_bucket(part, parts), first_bucket(part + 1, parts) - 1)
    )


def answered(rows: "DataFrame", tasks: int, work: Work) -> "DataFrame":
    """The rows with their answers, computed by so many tasks.

    Arrow takes every column through as it is; through pandas, an integer column with nulls would
    come out as floats.
    """
    from pyspark.sql import types as T

    kinds = (T.StringType(), T.StringType(), T.LongType(), T.LongType(), T.StringType())
    names = [work.prefix + name for name in Answer._fields]
    added = [T.StructField(name, kind) for name, kind in zip(names, kinds, strict=True)]
    schema = T.StructType([*rows.drop(BUCKET, DIGEST, SEED).schema.fields, *added])
    keyed = rows.drop(BUCKET, DIGEST).repartition(tasks)
    return keyed.mapInArrow(partial(answer_batches, work=work), schema)
