import gzip
import json

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dmpo.data.sources import json_lines
from trl_dmpo.data.sources.json_lines import read_loose_json_lines, scan_json_lines


COLUMNS = {
    "user": pl.String,
    "stars": pl.Float64,
    "read": pl.Boolean,
    "shelves": pl.List(pl.Struct({"name": pl.String})),
}
LINES = [
    '{"user": "a\\u00e9", "stars": 4, "read": true, "text": "not wanted"}',
    "",
    '{"shelves": [{"name": "poetry", "count": "3"}, {}], "user": 7, "stars": 0.5}',
    "  ",
    "{}",
]
ROWS = [
    ("aé", 4.0, True, None),
    ("7", 0.5, None, [{"name": "poetry"}, {"name": None}]),
    (None, None, None, None),
]


def strict(path):
    return scan_json_lines(path, COLUMNS).collect()


def loose(path):
    return read_loose_json_lines(path, COLUMNS)


READERS = pytest.mark.parametrize("read", [strict, loose])


@pytest.fixture(params=["lines.json", "lines.json.gz"])
def write(tmp_path, request):
    def write(content):
        content = content if isinstance(content, bytes) else content.encode()
        path = tmp_path / request.param
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return path

    return write


@READERS
@pytest.mark.parametrize("block", [1, 7, 1 << 24])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_lines(write, read, block, ends, monkeypatch):
    monkeypatch.setattr(json_lines, "_BLOCK", block)
    for content in (ends.join(LINES), ends.join(["\ufeff" + LINES[0], *LINES[1:], ""])):
        frame = read(write(content))
        assert (frame.rows(), dict(frame.schema)) == (ROWS, COLUMNS)
    assert read(write("\ufeff{}")).rows() == [(None,) * 4]


def test_python_dicts(write, monkeypatch):
    lines = [
        """{u'user': u'it\\'s "x" \\xe9\\n', 'read': False, u'text': None, 'stars': 1}""",
        """{'user': u"it's \\xe9\\u2713 \\\\x41 \\\\", 'read': True, 'shelves': [{'name': 'a', u'count': 3}]}""",
        """{'user': 'None, True and {u\\'False\\': "0"}'}""",
        """{"user": "JSON \\"1\\" \\/ \\\\", "read": false, "stars": null}""",
        """{'user': 'a' 'b', 'shelves': ({'name': "c\\x41"},)}""",
    ]
    want = [
        ('it\'s "x" é\n', 1.0, False, None),
        ("it's é✓ \\x41 \\", None, True, [{"name": "a"}]),
        ("None, True and {u'False': \"0\"}", None, None, None),
        ('JSON "1" / \\', None, False, None),
        ("ab", None, None, [{"name": "cA"}]),
    ]
    assert loose(write("\n".join(lines))).rows() == want
    # All but the last, of strings side by side and a tuple, go the fast way
    monkeypatch.delattr(json_lines, "_as_json_line")
    assert loose(write("\n".join(lines[:4]))).rows() == want[:4]


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.text("'\"\\u\\x0n{}:, \n\t", max_size=8)
values = st.fixed_dictionaries(
    {"user": st.none() | words, "stars": st.none() | st.integers(-9, 9), "read": st.none() | st.booleans()},
    optional={"True": words, "text": st.lists(words | st.booleans() | st.none(), max_size=3)},
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(values, st.booleans()), min_size=1, max_size=4))
def test_what_python_prints_comes_back(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("loose") / "rows.json"
    path.write_text("\n".join(json.dumps(row) if as_json else repr(row) for row, as_json in rows), encoding="utf-8")
    got = read_loose_json_lines(path, {name: COLUMNS[name] for name in ("user", "stars", "read")})
    assert got.rows(named=True) == [{name: row[name] for name in ("user", "stars", "read")} for row, _ in rows]


def test_values_that_are_not_json(write):
    path = write("""{"user": "a", "stars": NaN}\n{'user': 'b', 'stars': 2, 'ids': (1, 2)}""")
    assert loose(path).select("user", "stars").rows() == [("a", None), ("b", 2.0)]
    with pytest.raises(ValueError, match=r"line 1: .*NaN.* is not a JSON object"):
        strict(path)


@READERS
@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (
            '{"user": "b", "sta',
            r"line 4: .*sta' is not a .*JSON object. Mend or remove the line or, if the file is cut off, get it",
        ),
        ('{"user":', "line 4: .* is not a .*JSON object"),
        ('{"user": "b"} {"user": "c"}', "line 4: .* is not a .*JSON object"),
        ("user,stars", "line 4: 'user,stars' is not a .*JSON object"),
        (b'{"user": "\xe9"}', "line 4: .* is not a .*JSON object"),
        ('{"stars": "four"}', "line 4: stars 'four' is not of type Float64. Mend or remove the line"),
        ('{"shelves": "poetry"}', r"line 4: shelves 'poetry' is not of type List\(Struct"),
        ('{"user": "' + "x" * 200, r"line 4: '\{\"user\": \"x{39}\.\.\.x{26}' is not"),
    ],
)
def test_broken_lines(write, read, line, fault):
    line = line if isinstance(line, bytes) else line.encode()
    for after in (b"", b"\n{}\n{}\n"):
        path = write(b'{"user": "a"}\n\n{}\n' + line + after)
        with pytest.raises(ValueError, match=fault) as error:
            read(path)
        assert str(error.value).startswith(f"{path}, line 4: ")


@READERS
def test_files_cut_off(tmp_path, read, monkeypatch):
    monkeypatch.setattr(json_lines, "_BLOCK", 64)
    path = tmp_path / "lines.json.gz"
    whole = gzip.compress(b"".join(b'{"user": "%d"}\n' % number for number in range(1000)))
    path.write_bytes(whole[:-20])
    with pytest.raises(
        ValueError,
        match=r"lines.json.gz: in line \d+ or after it, the compressed data is cut off.* Get the file again",
    ):
        read(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(
        ValueError, match=r"in line 1 or after it, the compressed data is cut off or broken .Not a gzipped file"
    ):
        read(path)
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match=r"lines.json.gz: the file is empty. Get it again."):
        read(path)
