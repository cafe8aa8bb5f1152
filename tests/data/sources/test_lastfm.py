import pytest

from trl_dmpo.data.sources import lastfm


# As published: tabs, ends of Windows, quotes that quote nothing, artists without a picture, names in UTF-8, tags in Latin-1
ARTISTS = [
    "id\tname\turl\tpictureURL",
    "1\tMALICE MIZER\thttp://www.last.fm/music/MALICE+MIZER\thttp://userserve-ak.last.fm/serve/252/10808.jpg",
    '2\t"Weird Al" Yankovic\thttp://www.last.fm/music/Weird\thttp://userserve-ak.last.fm/serve/252/1.jpg',
    '3\tBjörk "\thttp://www.last.fm/music/Bj%C3%B6rk\t',
    "4\t \thttp://www.last.fm/music/+\thttp://userserve-ak.last.fm/serve/252/4.jpg",
    "5\tカヒミ・カリィ\thttp://www.last.fm/music/Kahimi\thttp://userserve-ak.last.fm/serve/252/5.jpg",
]
LISTENS = ["userID\tartistID\tweight", "2\t1\t13883", "2\t2\t11690", "2\t3\t7", "4\t3\t1", "4\t9\t3"]
TAGS = ["tagID\ttagValue", "1\tj-rock", "2\tmetal", "3\tchillout", "4\tél ectro", "5\t80s", "6\tx"]
TAGGINGS = [
    "userID\tartistID\ttagID\ttimestamp",
    "2\t1\t2\t1238536800000",  # 31 March 2009, 22:00
    "2\t1\t1\t1235862000000",  # the first one by this user: 28 February 2009, 23:00
    "2\t3\t4\t1238536800000",
    "2\t3\t5\t-428720400000",  # 1956
    "4\t1\t1\t1241128800000",  # of an artist whose listens are not in the list
    "4\t3\t4\t315529200000",  # 1979, and no other tagging of this artist by this user
    *(f"7\t5\t{tag}\t1241128800000" for tag in (6, 5, 4, 3, 2, 1)),
    "8\t5\t6\t1241128800000",
    "8\t4\t6\t1241128800000",
]


@pytest.fixture
def folder(tmp_path):
    for name, lines, encoding in (
        ("artists.dat", ARTISTS, "utf-8"),
        ("user_artists.dat", LISTENS, "utf-8"),
        ("tags.dat", TAGS, "latin-1"),
        ("user_taggedartists-timestamps.dat", TAGGINGS, "utf-8"),
    ):
        (tmp_path / name).write_bytes("".join(f"{line}\r\n" for line in lines).encode(encoding))
    return tmp_path


def test_taggings_date_the_listens(folder):
    log = lastfm.read(folder)
    rows = log.interactions.select("user_id", "item_id", "timestamp", "weight").rows()
    assert rows == [
        (2, 1, 1235862000, 13883),
        (2, 3, 1238536800, 7),
        (4, 1, 1241128800, None),
        (7, 5, 1241128800, None),
        (8, 5, 1241128800, None),
    ]
    assert (log.source, log.domain, log.has_time) == (
        "Last.fm HetRec 2011 2K (user_taggedartists-timestamps.dat, artists.dat)",
        "artist",
        True,
    )
    assert log.notes == {
        "taggings dated before Last.fm began": 2,
        "listens without a tag, which have no time": 3,
        "items without a title": 1,
        "interactions with an item without a title": 1,
    }
    assert "rating" not in log.interactions.columns


def test_artists_and_their_commonest_tags(folder):
    assert lastfm.read(folder).items.select("item_id", "title", "tags").rows() == [
        (1, "MALICE MIZER", ["j-rock", "metal"]),
        (2, '"Weird Al" Yankovic', None),
        (3, 'Björk "', ["él ectro", "80s"]),
        # x was given twice, the others once: by name, and chillout to metal are the first four
        (5, "カヒミ・カリィ", ["x", "80s", "chillout", "j-rock", "metal"]),
    ]


def test_without_taggings(folder):
    (folder / "user_taggedartists-timestamps.dat").unlink()
    log = lastfm.read(folder / "user_artists.dat")
    assert log.interactions.select("user_id", "item_id", "timestamp", "weight").rows() == [
        (2, 1, 0, 13883),
        (2, 2, 1, 11690),
        (2, 3, 2, 7),
        (4, 3, 3, 1),
    ]
    assert log.source == "Last.fm HetRec 2011 2K (user_artists.dat, artists.dat)"
    assert not log.has_time
    assert log.items.columns == ["item_id", "title"]


def test_what_is_found(folder):
    found = "Last.fm HetRec 2011 2K (user_taggedartists-timestamps.dat, artists.dat)"
    assert [lastfm.find(folder), lastfm.find(folder / "user_artists.dat")] == [found, found]
    assert lastfm.find(folder / "tags.dat") is None
    assert lastfm.find(folder / "absent") is None
    (folder / "artists.dat").unlink()
    assert lastfm.find(folder) is None
    with pytest.raises(
        ValueError, match=r"not Last.fm HetRec 2011 2K. Give the folder with artists.dat and user_artists.dat"
    ):
        lastfm.read(folder)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("artists.dat", "Björk".encode(), b"Bj\xf6rk", r"artists.dat, line 4: byte 0xF6 is not UTF-8"),
        ("user_artists.dat", b"11690", b"many", r"user_artists.dat, line 3: weight 'many' is not an integer"),
        (
            "user_artists.dat",
            b"weight",
            b"count",
            r"user_artists.dat: there is no column 'weight', only: userID, artistID, count",
        ),
        ("tags.dat", b"tagID\ttagValue", b"", r"tags.dat: "),
        (
            "user_taggedartists-timestamps.dat",
            b"8\t4\t6\t1241128800000\r\n",
            b"8\t4",
            r"timestamps.dat, line 15: the file is cut off: its last line has 2 fields of 4",
        ),
    ],
)
def test_broken_files(folder, name, old, new, message):
    file = folder / name
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))
    with pytest.raises(ValueError, match=message):
        lastfm.read(folder)
