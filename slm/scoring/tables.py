"""Tables in and out: how they are read, and how answers are kept part by part.

A row's part follows from the row alone. A part is written as a whole, over whatever a killed run
left of it, and is done if it has as many rows as the input has for it. So a run goes on where
another ended, without a row lost or twice. What the run is, its Manifest, stands beside the
answers: in `<output>/_score`, or among the properties of the table.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.config.use import Format
from slm.errors import InputError
from slm.running.tracking import calling_folder

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

SUFFIXES = {
    ".parquet": Format.parquet,
    ".csv": Format.csv,
    ".json": Format.json,
    ".jsonl": Format.json,
    ".ndjson": Format.json,
    ".delta": Format.delta,
}
# CSV as RFC 4180 has it: texts keep their quotes, line ends and spaces. JSON keeps its nulls.
READ: dict[Format, dict[str, Any]] = {
    Format.csv: {"header": True, "multiLine": True, "escape": '"'},
}
WRITE: dict[Format, dict[str, Any]] = {
    Format.csv: {
        "header": True,
        "escape": '"',
        "ignoreLeadingWhiteSpace": False,
        "ignoreTrailingWhiteSpace": False,
    },
    Format.json: {"ignoreNullFields": False},
}
PART = "score_part"  # the column by which the output is partitioned
PROPERTY = "slm.score"


@dataclass(frozen=True)
class Place:
    """Where a table is: a path, a URI, or a name in Spark's catalog."""

    name: str
    format: Format


def place_of(parameter: str, name: str | None, given: Format | None) -> Place:
    """The place that a parameter names, its format given or told by its suffix.

    Names without a suffix and without a slash are tables. A relative path starts where the user is.
    """
    if not name:
        raise InputError(f"{parameter} is missing: pass {parameter}=<a path, a URI or a table>.")
    found = given or SUFFIXES.get(Path(name).suffix)
    if found is None and re.fullmatch(r"[\w-]+(\.[\w-]+){0,2}", name):
        found = Format.table
    if found is None:
        known = ", ".join(SUFFIXES)
        raise InputError(
            f"{parameter}={name} does not tell its format: it ends in none of {known}. Give "
            f"score.{parameter}_format={'|'.join(f.value for f in Format)}."
        )
    if found is Format.table or re.match(r"\w[\w+.-]*:", name) or name.startswith("/"):
        return Place(name, found)
    return Place((calling_folder() / Path(name).expanduser()).resolve().as_uri(), found)


def read(spark: "SparkSession", place: Place) -> "DataFrame":
    """The table; InputError if there is none. All columns of a CSV are strings."""
    from pyspark.errors import AnalysisException

    try:
        if place.format is Format.table:
            return spark.table(place.name)
        reader = spark.read.format(place.format.value).options(**READ.get(place.format, {}))
        return reader.load(place.name)
    except AnalysisException as error:
        raise InputError(f"input={place.name} cannot be read: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Spark's words for an error: the first line, without its codes."""
    first = str(error).strip().split("\n")[0]
    return re.sub(r"^\[[A-Z_.]+\] | SQLSTATE: \w+$", "", first)


@dataclass(frozen=True)
class Manifest:
    """What one run of score answers, with what, and how it is cut into parts.

    `model` is the digest of the model's content. `columns` are the input's, with their types, and
    `fingerprint` is a sum over its rows, whatever their order.
    """

    model: str
    column: str
    id: str | None
    system: str | None
    parameters: dict[str, Any]
    context_length: int | None
    prefix: str
    columns: list[str]
    rows: int
    fingerprint: str
    parts: int

    def json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of(cls, text: str, output: str) -> "Manifest":
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"output={output} was written by another version of score. Give another output."
            ) from error

    def require_same(self, other: "Manifest", output: str) -> None:
        """Raise InputError if the output at hand is of another run than `other`."""
        for key, ours in asdict(other).items():
            theirs = getattr(self, key)
            if key != "parts" and ours != theirs:
                what = "rows were others" if key == "fingerprint" else f"{key} was {shown(theirs)}"
                now = "" if key == "fingerprint" else f", and is {shown(ours)}"
                raise InputError(
                    f"output={output} belongs to another run: its {what}{now}. Give another "
                    "output, or remove this one."
                )


def shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


@dataclass
class Files:
    """Answers as files: each part has its folder, and two parts may be under way."""

    spark: "SparkSession"
    place: Place
    at_once = 2

    def manifest(self) -> Manifest | None:
        """The manifest; None if there is nothing. InputError if there is something else."""
        from pyspark.errors import AnalysisException

        try:
            lines = self.spark.read.text(f"{self.place.name}/_score", wholetext=True).collect()
        except AnalysisException:
            lines = []
        if lines:
            return Manifest.of(lines[0].value, self.place.name)
        try:
            reader = self.spark.read.format("binaryFile").option("recursiveFileLookup", True)
            empty = reader.load(self.place.name).select("path").isEmpty()
        except AnalysisException:
            return None
        if not empty:
            raise not_ours(self.place)
        return None

    def begin(self, manifest: Manifest, _: "DataFrame") -> None:
        from pyspark.sql import functions as F

        text = self.spark.range(1, numPartitions=1).select(F.lit(manifest.json()).alias("value"))
        text.write.mode("overwrite").text(f"{self.place.name}/_score")

    def answers(self, like: "DataFrame") -> "DataFrame":
        """What is answered so far, in the columns of `like`."""
        from pyspark.sql import types as T

        schema = T.StructType([*like.schema.fields, T.StructField(PART, T.IntegerType())])
        reader = self.spark.read.format(self.place.format.value).schema(schema)
        return reader.options(**READ.get(self.place.format, {})).load(self.place.name)

    def rows_kept(self, like: "DataFrame") -> dict[int, int]:
        """The number of rows in each part that has any."""
        found = self.answers(like).groupBy(PART).count().collect()
        return {part: rows for part, rows in found if part is not None}

    def write(self, part: int, frame: "DataFrame") -> None:
        """Keep a part as a whole, in place of what there is of it."""
        writer = frame.write.format(self.place.format.value).mode("overwrite")
        writer.options(**WRITE.get(self.place.format, {})).save(f"{self.place.name}/{PART}={part}")

    def fit(self, frame: "DataFrame") -> "DataFrame":
        """The columns as the format can hold them: a CSV holds JSON for lists and objects."""
        from pyspark.sql import functions as F
        from pyspark.sql import types as T

        if self.place.format is not Format.csv:
            return frame
        nested = (T.ArrayType, T.MapType, T.StructType)
        return frame.select(
            *(
                F.to_json(f.name).alias(f.name) if isinstance(f.dataType, nested) else f.name
                for f in frame.schema.fields
            )
        )


@dataclass
class Delta(Files):
    """Answers as a Delta table at a path: one commit for each part, one part at a time."""

    at_once = 1

    def answers(self, like: "DataFrame") -> "DataFrame":
        from pyspark.errors import AnalysisException
        from pyspark.sql import functions as F

        try:
            return self.spark.read.format("delta").load(self.place.name)
        except AnalysisException:  # no part was written yet
            return like.limit(0).withColumn(PART, F.lit(0))

    def write(self, part: int, frame: "DataFrame") -> None:
        from pyspark.sql import functions as F

        writer = frame.withColumn(PART, F.lit(part)).write.format("delta").mode("overwrite")
        writer = writer.option("replaceWhere", f"{PART} = {part}").partitionBy(PART)
        writer.save(self.place.name)


@dataclass
class CatalogTable(Files):
    """Answers as a table of Spark's catalog, partitioned by part; one part at a time.

    Spark's own tables of files could not take two: both would use one temporary folder.
    """

    at_once = 1

    def manifest(self) -> Manifest | None:
        if not self.spark.catalog.tableExists(self.place.name):
            return None
        rows = self.spark.sql(f"SHOW TBLPROPERTIES {self.place.name}").collect()
        text = {row.key: row.value for row in rows}.get(PROPERTY)
        if text is None:
            raise not_ours(self.place)
        return Manifest.of(bytes.fromhex(text).decode(), self.place.name)

    def begin(self, manifest: Manifest, like: "DataFrame") -> None:
        from pyspark.sql import functions as F

        empty = like.limit(0).withColumn(PART, F.lit(0))
        source = self.spark.conf.get("spark.sql.sources.default", "parquet")
        writer = empty.writeTo(self.place.name).using(source).partitionedBy(F.col(PART))
        # In hex, since Spark 4.3 shows no property whose value holds the word "token".
        writer.tableProperty(PROPERTY, manifest.json().encode().hex()).create()

    def answers(self, _: "DataFrame") -> "DataFrame":
        return self.spark.table(self.place.name)

    def write(self, part: int, frame: "DataFrame") -> None:
        columns = ", ".join(f"`{name}`" for name in self.answers(frame).columns if name != PART)
        self.spark.sql(
            f"INSERT OVERWRITE TABLE {self.place.name} PARTITION ({PART} = {part}) "
            f"SELECT {columns} FROM {{answers}}",
            answers=frame,
        )


def not_ours(place: Place) -> InputError:
    return InputError(f"output={place.name} exists, and score did not write it. Give another one.")


KEEPERS: dict[Format, Callable[["SparkSession", Place], Files]] = {
    Format.delta: Delta,
    Format.table: CatalogTable,
}


def keeper_of(spark: "SparkSession", place: Place) -> Files:
    """What keeps the answers at that place."""
    return KEEPERS.get(place.format, Files)(spark, place)
