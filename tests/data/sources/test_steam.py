import gzip

import pytest

from trl_dmpo.data.sources import steam


# As published: dicts of Python 2 (u'...') in version 2, of Python 3 in version 1; neither is JSON
GAMES = [
    "{u'publisher': u'Kotoshiro', u'genres': [u'Action', u'Casual'], u'app_name': u'Lost Summoner Kitty', u'title': u'Lost Kitty', "
    "u'tags': [u'Strategy', u'Indie'], u'price': 4.99, u'early_access': False, u'id': u'761140', u'metascore': None}",
    "{u'app_name': u\"Garry's Mod\\u2122\", u'id': u'4000', u'tags': [u'Sandbox']}",
    "{u'title': u'Only a Title', u'genres': [u'Indie'], u'id': u'30'}",
    "{u'id': u'50', u'genres': [u'Indie']}",
    "{u'app_name': u'No id', u'title': u'No id'}",
]
REVIEWS = [
    "{u'username': u'Chaos Syren', u'hours': 0.1, u'products': 41, u'product_id': u'4000', u'page_order': 0, u'date': u'2017-12-17', "
    "u'text': u'This would not be\\nacceptable \\xaf\\\\_(\\u30c4)_/\\xaf', u'early_access': False, u'page': 1}",
    "{u'username': u\"it's me\", u'user_id': u'76561198', u'hours': 51.1, u'product_id': u'30', u'date': u'2011-02-05', u'text': u''}",
    "{u'username': u'Chaos Syren', u'product_id': u'761140', u'date': u'2016-03-01', u'compensation': u'Product received for free'}",
    "{u'username': u'Chaos Syren', u'hours': 2, u'product_id': u'4000', u'date': u'2018-01-02'}",
    "{u'username': u'Chaos Syren', u'hours': 2.5, u'product_id': u'999', u'date': u'2018-01-02'}",
    "{u'username': u'Chaos Syren', u'hours': 2.5, u'product_id': u'30'}",
]
AUSTRALIAN_REVIEWS = [
    "{'user_id': '76561197970982479', 'user_url': 'http://steamcommunity.com/profiles/76561197970982479', 'reviews': ["
    "{'funny': '', 'posted': 'Posted November 5, 2011.', 'last_edited': '', 'item_id': '4000', 'helpful': 'No ratings yet', "
    "'recommend': True, 'review': 'Simple yet with great replayability.'}, "
    "{'funny': '', 'posted': 'Posted July 15, 2011.', 'last_edited': '', 'item_id': '30', 'recommend': False, 'review': \"It's\"}, "
    "{'funny': '', 'posted': 'Posted February 3.', 'last_edited': '', 'item_id': '761140', 'recommend': True, 'review': ''}]}",
    "{'user_id': 'js41637', 'user_url': 'http://steamcommunity.com/id/js41637', 'reviews': []}",
    "{'user_id': 'evcentric', 'user_url': '', 'reviews': [{'posted': 'Posted February 29, 2012.', 'last_edited': 'Last edited June 4.', "
    "'item_id': '761140', 'recommend': True, 'review': ''}]}",
]
AUSTRALIAN_ITEMS = [
    "{'user_id': '76561197970982479', 'items_count': 3, 'steam_id': '76561197970982479', 'items': ["
    "{'item_id': '4000', 'item_name': \"Garry's Mod\", 'playtime_forever': 6, 'playtime_2weeks': 0}, "
    "{'item_id': '30', 'item_name': 'Day of Defeat', 'playtime_forever': 0, 'playtime_2weeks': 0}, "
    "{'item_id': '10', 'item_name': 'Counter-Strike', 'playtime_forever': 7, 'playtime_2weeks': 1}]}",
    "{'user_id': 'js41637', 'items_count': 0, 'steam_id': '1', 'items': []}",
    "{'user_id': 'evcentric', 'items_count': 1, 'items': [{'item_id': '10', 'item_name': 'Counter-Strike', 'playtime_forever': 9}]}",
]
FILES = {
    "steam_reviews": REVIEWS,
    "steam_games": GAMES,
    "australian_user_reviews": AUSTRALIAN_REVIEWS,
    "australian_users_items": AUSTRALIAN_ITEMS,
}


@pytest.fixture(params=[".json", ".json.gz"])
def write(tmp_path, request):
    def write(*stems):
        for stem in stems:
            content = "\n".join(FILES[stem]).encode()
            (tmp_path / f"{stem}{request.param}").write_bytes(
                gzip.compress(content) if request.param.endswith("gz") else content
            )
        return tmp_path

    write.end = request.param
    return write


def test_reviews_of_all_users(write):
    log = steam.read(write(*FILES))
    assert log.interactions.select("user_id", "item_id", "timestamp", "hours").rows() == [
        ("Chaos Syren", 761140, 1456790400, None),
        ("Chaos Syren", 4000, 1513468800, 0.1),
        ("it's me", 30, 1296864000, 51.1),
    ]
    assert log.items.select("item_id", "title", "genres", "tags").rows() == [
        (30, "Only a Title", ["Indie"], None),
        (4000, "Garry's Mod™", None, ["Sandbox"]),
        (761140, "Lost Summoner Kitty", ["Action", "Casual"], ["Strategy", "Indie"]),
    ]
    assert log.notes == {
        "items without an id": 1,
        "items without a title": 1,
        "interactions without timestamp": 1,
        "interactions with an item without a title": 1,
        "repeated interactions, the first kept": 1,
    }
    assert (log.source, log.domain, log.has_time) == (
        f"Steam (steam_reviews{write.end}, steam_games{write.end})",
        "game",
        True,
    )
    assert "rating" not in log.interactions.columns


@pytest.mark.parametrize("titles", ["steam_games", "australian_users_items"])
def test_australian_reviews(write, titles):
    folder = write("australian_user_reviews", titles)
    log = steam.read(folder)
    known = [("76561197970982479", 30, 1310688000, 0.0), ("76561197970982479", 4000, 1320451200, 1.0)]
    if titles == "steam_games":
        known.append(("evcentric", 761140, 1330473600, 1.0))
        assert log.notes["reviews dated without a year"] == 1
        assert "interactions with an item without a title" not in log.notes
    else:
        assert log.notes == {"reviews dated without a year": 1, "interactions with an item without a title": 1}
        assert log.items.rows() == [(10, "Counter-Strike"), (30, "Day of Defeat"), (4000, "Garry's Mod")]
    assert log.interactions.select("user_id", "item_id", "timestamp", "rating").rows() == known
    assert log.source == f"Steam (australian_user_reviews{write.end}, {titles}{write.end})"


def test_games_of_australians(write):
    log = steam.read(write("australian_users_items"))
    assert log.interactions.select("user_id", "item_id", "minutes").rows() == [
        ("76561197970982479", 4000, 6),
        ("76561197970982479", 10, 7),
        ("evcentric", 10, 9),
    ]
    assert (log.notes, log.has_time) == ({"games owned and never played": 1}, False)
    assert log.source == f"Steam (australian_users_items{write.end})"


def test_a_file_is_read_for_itself(write):
    folder = write(*FILES)
    assert steam.find(folder / f"australian_user_reviews{write.end}") == (
        f"Steam (australian_user_reviews{write.end}, steam_games{write.end})"
    )
    assert "minutes" in steam.read(folder / f"australian_users_items{write.end}").interactions.columns
    assert steam.find(folder / f"steam_games{write.end}") is None


def test_errors(write, tmp_path):
    assert steam.find(tmp_path) is None
    with pytest.raises(
        ValueError, match=r"not Steam. Give the folder with steam_reviews.json.gz and steam_games.json.gz, with"
    ):
        steam.read(tmp_path)
    folder = write("steam_reviews", "australian_users_items")
    with pytest.raises(
        ValueError, match=r"steam_reviews.json.*: the titles are missing. Put steam_games.json.gz beside it."
    ):
        steam.read(folder)
    write("steam_games")
    file = folder / f"steam_reviews{write.end}"
    broken = "\n".join(REVIEWS)[:-20].encode()
    file.write_bytes(gzip.compress(broken) if write.end.endswith("gz") else broken)
    with pytest.raises(
        ValueError, match=r"steam_reviews.json.*, line 6: .* is not a Python dict or a JSON object. .* cut off"
    ):
        steam.read(folder)
