"""Rows come in from any tabular file; what is wrong with one is named with its place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_train.datasets_source import open_dataset, read_dataset
from dist_train.errors import DataError
from dist_train.table_files import expand_files, read_files

COLUMNS = {"text": "data.text_columns", "queue": "data.label_column"}
ROWS = [{"text": "my laptop,\nit is broken", "queue": "hardware"}, {"text": 'the "vpn" is slow', "queue": "network"}]
TSV = 'text\tqueue\n"my laptop,\nit is broken"\thardware\n"the ""vpn"" is slow"\tnetwork\n'
CSV = 'id,text,queue\n1,"my laptop,\nit is broken",hardware\n\n2,"the ""vpn"" is slow",network\n\n'


def _read(*files: Path, columns: dict[str, str] = COLUMNS) -> list[dict[str, Any]]:
    chosen = expand_files([str(file) for file in files], "data.path")
    return [row for batch in read_files(chosen, columns) for row in batch]


def _write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.csv": lambda path: path.write_text(CSV),
    "bom.csv": lambda path: path.write_bytes(b"\xef\xbb\xbf" + CSV.encode()),
    "crlf.csv": lambda path: path.write_bytes(CSV.encode().replace(b"\n", b"\r\n").replace(b",\r\n", b",\n")),
    "a.TSV": lambda path: path.write_text(TSV),
    "a.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n"),
    "a.parquet": _write_parquet,
    "a.csv.gz": lambda path: path.write_bytes(gzip.compress(CSV.encode())),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert _read(tmp_path / name) == ROWS


def test_several_files_and_patterns_are_read_in_order(tmp_path: Path) -> None:
    for number in (2, 1):
        (tmp_path / f"2026-0{number}.csv").write_text(f"text,queue\nticket {number},a\n")
    first, second = tmp_path / "2026-01.csv", tmp_path / "2026-02.csv"
    assert [row["text"] for row in _read(tmp_path / "2026-*.csv")] == ["ticket 1", "ticket 2"]
    assert [row["text"] for row in _read(second, first)] == ["ticket 2", "ticket 1"]


@pytest.mark.parametrize("split", [None, "train"])
def test_a_folder_saved_by_datasets_is_read_with_its_class_names(tmp_path: Path, split: str | None) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "queue": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"text": ["x", "y"], "queue": [1, 0]}, features=features)
    (datasets.DatasetDict({split: data}) if split else data).save_to_disk(tmp_path / "saved")
    loaded = open_dataset(str(tmp_path / "saved"), None)
    assert loaded is not None
    assert list(loaded) == [split or ""]
    batches = list(read_dataset(loaded[split or ""], "saved", COLUMNS))
    assert batches == [[{"text": "x", "queue": "b"}, {"text": "y", "queue": "a"}]]
    with pytest.raises(DataError, match="no column 'label'"):
        list(read_dataset(loaded[split or ""], "saved", {"label": "data.label_column"}))


def test_all_columns_are_read_where_none_are_named(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        write(tmp_path / name)
        rows = [row for batch in read_files(expand_files(str(tmp_path / name), "data.path")) for row in batch]
        assert [{key: row[key] for key in ROWS[0]} for row in rows] == ROWS, name
        assert set(rows[0]) <= {"id", "text", "queue"}


def test_a_folder_of_parquet_is_read_in_order_and_its_partitions_are_columns(tmp_path: Path) -> None:
    for part, text in (("month=02/queue=b", "late"), ("month=01/queue=a%2Fb", "early"), ("month=01/queue=a", "first")):
        (tmp_path / "data" / part).mkdir(parents=True)
        pq.write_table(pa.table({"text": [text]}), tmp_path / "data" / part / "part-0.parquet")
    (tmp_path / "data" / "month=01" / "queue=__HIVE_DEFAULT_PARTITION__").mkdir()
    nameless = tmp_path / "data" / "month=01" / "queue=__HIVE_DEFAULT_PARTITION__" / "part-0.parquet"
    pq.write_table(pa.table({"text": ["nameless"]}), nameless)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), nameless.with_name("part-1.parquet"))
    nameless.with_name("_metadata.parquet").write_bytes(b"of no interest")
    columns = {"text": "data.text_columns", "queue": "data.label_column", "month": "data.split_column"}
    rows = _read(tmp_path / "data", columns=columns)
    assert [(row["text"], row["queue"], row["month"]) for row in rows] == [
        ("nameless", None, "01"),
        ("first", "a", "01"),
        ("early", "a/b", "01"),
        ("late", "b", "02"),
    ]
    with pytest.raises(DataError, match="no column 'year'"):
        _read(tmp_path / "data", columns={"year": "data.time_column"})
    files = expand_files(str(tmp_path / "data"), "data.path")
    assert [row for batch in read_files(files[1:2]) for row in batch] == []
    assert files[0].num_rows() == 1


def test_a_plain_folder_is_no_data_set(tmp_path: Path) -> None:
    assert open_dataset(str(tmp_path), None) is None
    with pytest.raises(DataError, match="a folder that `datasets` did not save"):
        expand_files(str(tmp_path), "data.path")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", ["a.csv is empty", "data.path"]),
        ("a.csv", b"text,queue\n", ["has a header, but no rows"]),
        ("a.csv", b"text,label\nx,y\n", ["no column 'queue'", "Columns that exist: text, label", "data.label_column"]),
        ("a.csv", b"text,queue\nx,y\nx,y,z\n", ["a.csv:3: this record has 3 fields", "the header has 2"]),
        ("a.csv", b'text,queue\nx,y\n"never closed,y\n', ["a.csv:3", "quote that is not closed"]),
        ("a.csv", b'text,queue\n"two\nlines",y\ncaf\xe9,y\n', ["record 2, line 4: byte 0xe9", "iconv"]),
        ("a.tsv", b"text\tqueue\ncaf\xe9\ty\n", ["record 1, line 2"]),
        ("a.jsonl", b'{"text": "x", "queue": "y"}\n{"text": "\xff"}\n', ["record 2, line 2: byte 0xff"]),
        (
            "a.csv.gz",
            gzip.compress(b'text,queue\n"two\nlines",y\ncaf\xe9,y\n', mtime=0),
            ["a.csv.gz: record 2, line 4"],
        ),
        ("a.csv.gz", gzip.compress(b"text,queue\nx,y\n", mtime=0)[:-9], ["no whole gzip file"]),
        ("a.csv.gz", b"text,queue\nx,y\n", ["no whole gzip file"]),
        ("a.jsonl", b'{"text": "x", "queue": "y"}\n{"text": \n', ["a.jsonl:2: this line is no JSON"]),
        ("a.jsonl", b'["x"]\n', ["a.jsonl:1", "must be a JSON object", "list"]),
        ("a.jsonl", b'{"text": "x"}\n', ["a.jsonl:1 has no column 'queue'"]),
        ("a.jsonl", b"\n\n", ["no rows in it"]),
        ("a.parquet", b"PAR1 and nothing else", ["a.parquet is no Parquet file"]),
        ("a.xlsx", b"x", ["ending that is not known", ".csv"]),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refusal:
        _read(tmp_path / name)
    for word in words:
        assert word in str(refusal.value)


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "tickets.csv").write_text(CSV)
    with pytest.raises(DataError, match=r"no such file\. Did you mean .*tickets\.csv"):
        _read(tmp_path / "tickts.csv")
    with pytest.raises(DataError, match="no file matches it"):
        _read(tmp_path / "2027-*.csv")
