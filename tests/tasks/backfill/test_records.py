"""Cutting text into records: any cut gives the same records, and the same as Python's own reader of CSV."""

import csv
import io

import pyarrow.csv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nograd.tasks.backfill.sources import records
from nograd.tasks.backfill.sources.records import Quoting, blocks
from nograd.tasks.errors import SourceError

COMMA = Quoting(b",")


def split(data, quoting, block_bytes=1 << 20, start=0, end=None):
    found = []
    end = len(data) if end is None else end
    for block in blocks(io.BytesIO(data), start, end, quoting, name="x", block_bytes=block_bytes):
        found.extend((block.offset + int(at), block.record(i)) for i, at in enumerate(block.starts))
    return found


fields = st.text(alphabet='ab,"\n\r;é', max_size=8)


@given(
    st.lists(st.lists(fields, min_size=2, max_size=3), max_size=12), st.sampled_from(["\n", "\r\n"]), st.integers(1, 40)
)
@settings(max_examples=200, deadline=None)
def test_what_a_csv_writer_wrote_comes_back_record_by_record_however_it_is_read(rows, newline, block_bytes):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=newline, quoting=csv.QUOTE_ALL).writerows(rows)
    data = text.getvalue().encode()
    found = split(data, COMMA, block_bytes)
    assert [next(csv.reader(io.StringIO(record.decode(), newline=""))) for _, record in found] == rows
    assert b"".join(record for _, record in found) == data
    for at, _ in found:  # reading from the start of any record gives the rest
        assert split(data, COMMA, block_bytes, start=at) == [pair for pair in found if pair[0] >= at]


@given(st.text(alphabet='a,"\n', max_size=40), st.integers(1, 9))
@settings(max_examples=500, deadline=None)
def test_any_text_however_malformed_is_cut_the_same_in_blocks_of_any_size(text, block_bytes):
    data = text.encode()
    assert split(data, COMMA, block_bytes) == split(data, COMMA)
    assert split(data, None, block_bytes) == split(data, None)


@pytest.mark.parametrize(
    "data",
    [
        b'1,5" pipe\n2,b\n3,"x\ny"\n',
        b'1,a"b"c\n"2","q ""uoted"" , and\nmore"\n',
        b'1,"abc"def\n2,x\n',
        b"\n\n1,2\n\r\n3,4\r\n\n",
        b"1,2",
        b'"a","b"',
    ],
)
def test_it_cuts_where_arrow_s_reader_cuts(data):
    found = split(data, COMMA)
    table = pyarrow.csv.read_csv(
        io.BytesIO(data),
        read_options=pyarrow.csv.ReadOptions(column_names=["a", "b"]),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
    )
    assert len(found) == table.num_rows


def test_empty_lines_are_no_records_and_the_last_needs_no_line_end():
    assert [record for _, record in split(b"\n\r\na\n\n b\r\nlast", None)] == [b"a\n", b" b\r\n", b"last"]


def test_a_quote_that_is_never_closed_is_refused_with_its_place(monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1 << 20)
    data = b'1,2\n3,"' + b"x\n" * (1 << 20)
    with pytest.raises(SourceError, match=r"in.csv: the record at byte 4 is longer than 1 MiB; is there a quote"):
        list(blocks(io.BytesIO(data), 0, len(data), COMMA, name="in.csv", block_bytes=1 << 16))
