import json
import logging
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from trl_dmpo import Recommender
from trl_dmpo.data import card
from trl_dmpo.data.build_config import BuildConfig
from trl_dmpo.data.plan import make_plan
from trl_dmpo.data.prompts import Domain, NextItem, NextItemFromList, Template
from trl_dmpo.data.save import save_dataset

from ..conftest import TITLES
from ..data.test_log import make_log, taken
from .test_scorer import plain_scores


# Two films of one title, and ids that are no places
CATALOGUE = pl.DataFrame(
    {
        "item_id": [100 - place for place in range(13)],
        "title": [*TITLES, "Heat"],
        "year": [1980 + place for place in range(13)],
    }
)
HEATS = [98, 88]
HISTORIES = [["Alien", "Red Heat", "Big"], [], [93, "Jaws"]]
CHAT = Template(domain="film", prompt="Seen: {history}. Next {singular}?", system="Be brief.", chat=True)


@pytest.fixture(scope="module")
def model(model_path):
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def recommender(model, tokenizer):
    return Recommender(model, tokenizer, CATALOGUE, "next_item(domain='film')")


def brute_force(recommender, histories, k, left_out, normalize="sum"):
    """All items by one forward each, sorted by score and then by place, less those that are left out."""
    prompts = recommender.prompts(histories)
    scores = plain_scores(
        recommender.scorer.model, recommender.scorer.tokenizer, prompts, [recommender.answers] * len(prompts)
    )
    if normalize == "mean":
        lengths = [len(recommender.scorer.tokenizer(answer)["input_ids"]) + 1 for answer in recommender.answers]
        scores = [each / torch.tensor(lengths) for each in scores]
    ids = recommender.catalogue["item_id"].to_list()
    found = []
    for each, excluded in zip(scores, left_out, strict=True):
        places = [place for place in range(len(ids)) if ids[place] not in excluded]
        places.sort(key=lambda place: (-round(each[place].item(), 3), place))
        found.append([(ids[place], each[place].item()) for place in places[:k]])
    return found


def assert_recommended(found, expected):
    assert [each.ids for each in found] == [[item for item, _ in user] for user in expected]
    for each, user in zip(found, expected, strict=True):
        assert each.scores == pytest.approx([score for _, score in user], abs=1e-3)
        assert each.scores == sorted(each.scores, reverse=True)


@pytest.mark.parametrize("prompt", ["next_item(domain='film', features=['year'])", CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_exact_is_every_item_by_a_plain_forward(architecture, prompt, model_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_path(architecture), dtype=torch.float32)
    recommender = Recommender(model, tokenizer, CATALOGUE, prompt)
    done: list[int] = []
    found = recommender.recommend(HISTORIES, k=20, progress=done.append)
    own = [{100, 97, 96}, set(), {93, 89}]
    assert_recommended(found, brute_force(recommender, HISTORIES, 20, own))
    assert [len(each.ids) for each in found] == [10, 13, 11]
    assert sum(done) == 3
    assert found[1].titles == [dict(CATALOGUE.select("item_id", "title").iter_rows())[item] for item in found[1].ids]


def test_normalized_by_length(model, tokenizer):
    recommender = Recommender(model, tokenizer, CATALOGUE, normalize="mean")
    for options in ({}, {"method": "beam", "num_beams": 12}):
        found = recommender.recommend(HISTORIES, 5, exclude=None, **options)
        assert_recommended(found, brute_force(recommender, HISTORIES, 5, [set()] * 3, "mean"))


@pytest.mark.parametrize("prompt", ["next_item", CHAT], ids=["text", "chat"])
def test_with_as_many_beams_as_answers_the_search_is_exact(prompt, model, tokenizer):
    recommender = Recommender(model, tokenizer, CATALOGUE, prompt)
    for exclude in ("history", None, [100, 88], list(range(90, 101))):
        exact = recommender.recommend(HISTORIES, 6, exclude)
        found = recommender.recommend(HISTORIES, 6, exclude, method="beam", num_beams=12)
        assert_recommended(found, [list(zip(each.ids, each.scores, strict=True)) for each in exact])


def test_a_narrow_search_finds_good_items_and_scores_them_exactly(recommender):
    exact = {
        item: score
        for each in [recommender.recommend(["Big"], 13, None)]
        for item, score in zip(each.ids, each.scores, strict=True)
    }
    found = recommender.recommend(["Big"], 2, None, method="beam", num_beams=2)
    assert len(found.ids) == 2
    assert found.scores == pytest.approx([exact[item] for item in found.ids], abs=1e-4)


def test_equal_titles_share_a_score_and_are_each_returned(recommender):
    found = recommender.recommend(["Big"], 13, None)
    places = [found.ids.index(item) for item in HEATS]
    assert places[1] == places[0] + 1
    assert found.scores[places[0]] == found.scores[places[1]]
    for options in ({}, {"method": "beam"}):
        assert set(HEATS).isdisjoint(recommender.recommend(["Heat"], 13, **options).ids)
        assert [item for item in HEATS if item in recommender.recommend([98], 13, **options).ids] == [88]


def test_what_to_exclude(recommender):
    every = recommender.recommend(["Big"], 13, exclude=None).ids
    assert sorted(every) == sorted(CATALOGUE["item_id"])

    def without(*left_out):
        return [item for item in every if item not in left_out]

    assert recommender.recommend(["Big"], 13).ids == without(96)
    assert recommender.recommend(["Big"], 13, exclude=[]).ids == every
    assert recommender.recommend(["Big"], 13, exclude=["Jaws", 100]).ids == without(89, 100)
    two = recommender.recommend([["Big"], ["Big"]], 13, exclude=[["Heat"], []])
    assert [each.ids for each in two] == [without(*HEATS), every]
    assert recommender.recommend(["Big"], 13, exclude=every).ids == []
    assert recommender.recommend(["Big"], 13, exclude=every, method="beam").ids == []


def test_histories_by_id_and_by_title_and_only_their_latest_items(model, tokenizer):
    recommender = Recommender(model, tokenizer, CATALOGUE, CHAT, max_history=2)
    by_id = recommender.prompts([np.array([100, 97, 96])])
    assert by_id == recommender.prompts([("Alien", "Red Heat", "Big")])
    assert by_id[0][1]["content"] == "Seen: Red Heat, Big. Next movie?"
    assert 100 not in recommender.recommend([100, 97, 96], 13).ids


def test_a_title_that_the_catalogue_lacks_is_used_with_one_warning(recommender, caplog):
    with caplog.at_level(logging.WARNING):
        prompts = recommender.prompts([["Amelie", "Big"], ["{braces}", "Amelie"]])
    assert "- Amelie\n- Big" in prompts[0]
    assert "- {braces}\n- Amelie" in prompts[1]
    (record,) = caplog.records
    assert "no 'Amelie', which is in a history" in record.getMessage()
    assert "Did you mean 'Amélie'? Nor has it 1 other titles" in record.getMessage()


def test_a_catalogue_of_any_kind(model, tokenizer, recommender):
    titles = list(dict.fromkeys(TITLES))
    found = Recommender(model, tokenizer, titles, recommender.form).recommend(["Big"], 3, None)
    assert found.ids == found.titles
    from_dataset = Recommender(model, tokenizer, Dataset.from_polars(CATALOGUE), recommender.form)
    assert from_dataset.catalogue.equals(CATALOGUE)
    assert from_dataset.recommend(["Big"], 3) == recommender.recommend(["Big"], 3)


@pytest.mark.parametrize("method", ["exact", "beam"])
def test_a_history_that_is_too_long_is_named_before_anything_is_computed(method, recommender, monkeypatch):
    monkeypatch.setattr(recommender.scorer.model, "forward", None)
    with pytest.raises(ValueError, match=r"histories\[1\] has \d+ tokens"):
        recommender.recommend([["Big"], ["Big"] * 300, ["Jaws"]], method=method)
    with pytest.raises(ValueError, match=r"histories\[1\] has \d+ tokens"):
        recommender.rank([["Big"], ["Big"] * 300, ["Jaws"]], ["Jaws", "Big"])


def test_users_of_a_beam_search_go_through_in_parts(recommender, monkeypatch):
    expected = recommender.recommend(HISTORIES, 3, method="beam")
    monkeypatch.setattr("trl_dmpo.ranking.recommender._USERS_AT_A_TIME", 2)
    done = []
    found = recommender.recommend(HISTORIES, 3, method="beam", progress=done.append)
    assert [each.ids for each in found] == [each.ids for each in expected]
    assert sum(done) == len(HISTORIES) > 2


def test_rank_is_the_order_of_exact_scores(recommender):
    exact = recommender.recommend(["Big"], 13, None)
    some = [89, "Amélie", 98, 88]
    found = recommender.rank(["Big"], some)
    kept = [place for place, item in enumerate(exact.ids) if item in (89, 94, 98, 88)]
    assert found.ids == [exact.ids[place] for place in kept]
    assert found.scores == pytest.approx([exact.scores[place] for place in kept], abs=1e-4)
    several = recommender.rank([["Big"], ["Jaws"]], [some, [100]])
    assert several[0] == found
    assert several[1].titles == ["Alien"]


def test_a_form_that_lists_its_candidates(model, tokenizer):
    recommender = Recommender(model, tokenizer, CATALOGUE, NextItemFromList(wording="semicolons", domain="film"))
    (prompt,) = recommender.prompts([["Big"]], ["Jaws", 98, "Babe"])
    assert "Candidates: Jaws; Heat; Babe\n" in prompt
    found = recommender.rank(["Big"], ["Jaws", 98, "Babe"])
    (scores,) = plain_scores(model, tokenizer, [prompt], [[" Jaws", " Heat", " Babe"]])
    order = scores.argsort(descending=True).tolist()
    assert found.titles == [["Jaws", "Heat", "Babe"][place] for place in order]
    with pytest.raises(ValueError, match="lists candidates in its prompt, and cannot list a whole catalogue"):
        recommender.recommend(["Big"])
    with pytest.raises(ValueError, match="lists candidates in its prompt: give `candidates`"):
        recommender.prompts([["Big"]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.recommend("Big"), r"`histories` is 'Big'; give a list of items, such as \['Big'\]"),
        (lambda r: r.recommend([["Big"], "Jaws"]), r"`histories\[1\]` is 'Jaws'; give a list of items"),
        (lambda r: r.recommend([["Big"], [7]]), r"`histories\[1\]`: the catalogue has no item of the id 7"),
        (lambda r: r.recommend([["Big", None]]), r"`histories\[0\]`: the catalogue has no item of the id None"),
        (lambda r: r.recommend(["Big"], k=0), "`k` is 0, but it is at least 1"),
        (lambda r: r.recommend(["Big"], method="greedy"), "`method` is 'greedy', but it is 'exact' or 'beam'"),
        (lambda r: r.recommend(["Big"], num_beams=9), "`num_beams` is for `method='beam'`"),
        (lambda r: r.recommend(["Big"], method="beam", num_beams=9), "`num_beams` is 9, but it is at least 10"),
        (lambda r: r.recommend(["Big"], exclude="Jaws"), "`exclude` is 'Jaws', but it is 'history', None, or a list"),
        (lambda r: r.recommend(["Big"], exclude=["Jawz"]), "`exclude`: .* no item 'Jawz'. Did you mean 'Jaws'"),
        (lambda r: r.recommend([["Big"]], exclude=[[], []]), "`exclude` has 2 lists for 1 histories"),
        (lambda r: r.rank(["Big"], []), r"`candidates` has 0 lists for 1 histories"),
        (lambda r: r.rank([["Big"]], [[]]), r"`candidates`, of `histories\[0\]`: there are none"),
        (lambda r: r.rank(["Big"], ["Jaws", 89]), r"`candidates`, of `histories\[0\]`: 89 is there twice"),
        (lambda r: r.rank(["Big"], ["Heat"]), "several items of the catalogue are titled 'Heat'.*of: 98, 88"),
        (lambda r: r.recommend([["Jaws"] * 150]), r"histories\[0\] has .* tokens .* window is 512"),
    ],
)
def test_what_cannot_be_asked(call, message, recommender):
    with pytest.raises(ValueError, match=message):
        call(recommender)


@pytest.mark.parametrize(
    ("catalogue", "options", "message"),
    [
        (["Heat"], {}, "it has 1 rows, which leave nothing to choose"),
        (["Heat", " "], {}, r"row 1 \(item_id ' ', title ' '\) has no title"),
        (["Heat", "Big", "Heat", "Heat"], {}, r"row 2 .* repeats an earlier `item_id`; 1 others, too"),
        (CATALOGUE.drop("title"), {}, "there is no column 'title', only: item_id, year"),
        (pl.DataFrame({"item_id": [1, None], "title": ["A", "B"]}), {}, r"row 1 .*title 'B'\) has no `item_id`"),
        (pl.DataFrame({"item_id": [1.0, 2.0], "title": ["A", "B"]}), {}, "`item_id` is Float64; make it integers"),
        (pl.DataFrame({"item_id": [1, 2], "title": [1, 2]}), {}, "`title` is Int64; make it strings"),
        ({"Heat": 1}, {}, "`catalogue` is a mapping; give a polars frame"),
        (TITLES, {"prompt": "nextitem"}, "`prompt`: there is no 'nextitem'.* Did you mean next_item"),
        (TITLES, {"prompt": "rank_list"}, "an answer of the form RankList names no single item"),
        (TITLES, {"normalize": "max"}, "`normalize` is 'max', but it is 'sum' or 'mean'"),
        (TITLES, {"max_history": 0}, "`max_history` is 0, but it is at least 1"),
    ],
)
def test_what_cannot_be_made(catalogue, options, message, model, tokenizer):
    with pytest.raises(ValueError, match=message):
        Recommender(model, tokenizer, catalogue, **options)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        NextItem(
            domain=Domain("song", "songs", "heard", "hear", "hearing", "title"), features=("year",), wording="any"
        ),
        CHAT,
    ],
    ids=["own words", "template"],
)
def test_one_folder_holds_it_all(adapter, form, model_path, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    if adapter:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config)
        model.add_adapter("ref", config)  # as DMPO has it that goes on from an adapter
    saved = Recommender(model, tokenizer, CATALOGUE, form, normalize="mean", max_history=2)
    saved.save_pretrained(tmp_path / "all")
    saved.save_pretrained(tmp_path / "all")  # in its place
    assert (tmp_path / "all" / "adapter_config.json").exists() == adapter
    assert not (tmp_path / "all" / "ref").exists()
    loaded = Recommender.from_pretrained(tmp_path / "all")
    assert loaded.catalogue.equals(CATALOGUE)
    assert (loaded.form, loaded.normalize, loaded.max_history) == (form, "mean", 2)
    assert loaded.recommend(HISTORIES) == saved.recommend(HISTORIES)
    assert [path.name for path in tmp_path.iterdir()] == ["all"]


@dataclass(frozen=True, kw_only=True)
class Own(NextItem):
    pass


def test_what_cannot_be_saved_leaves_nothing(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"Own is a form of your own.*Add it to `trl_dmpo.data.prompts.PROMPTS`"):
        Recommender(model, tokenizer, CATALOGUE, Own()).save_pretrained(tmp_path / "out")
    config = LlamaConfig(**{**model.config.to_dict(), "_name_or_path": ""})
    base = AutoModelForCausalLM.from_config(config)
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="base model was not loaded from anywhere"):
        Recommender(adapter, tokenizer, CATALOGUE).save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    adapter = LoraConfig(r=2, target_modules="all-linear")
    named = get_peft_model(AutoModelForCausalLM.from_pretrained(model.name_or_path), adapter, adapter_name="dmpo")
    with pytest.raises(ValueError, match="the active adapter is dmpo, but only one of the name default"):
        Recommender(named, tokenizer, CATALOGUE).save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="notes is there and is not a recommender"):
        Recommender(model, tokenizer, CATALOGUE).save_pretrained(tmp_path / "notes")
    assert [path.name for path in tmp_path.rglob("*")] == ["notes", "diary.txt"]


def test_a_folder_that_is_no_recommender(recommender, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no recommender: there is no recommender.json. Make one with"):
        Recommender.from_pretrained(tmp_path)
    recommender.save_pretrained(tmp_path / "out")
    options = json.loads((tmp_path / "out" / "recommender.json").read_text())
    options["form"]["options"]["wording"] = "shouted"
    (tmp_path / "out" / "recommender.json").write_text(json.dumps(options))
    with pytest.raises(
        ValueError, match="the recommender cannot be read: ValueError: `wording`: there is no 'shouted'"
    ):
        Recommender.from_pretrained(tmp_path / "out")
    (tmp_path / "out" / "recommender.json").write_text("{")
    with pytest.raises(ValueError, match="the recommender cannot be read: JSONDecodeError"):
        Recommender.from_pretrained(tmp_path / "out")


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Save a prepared dataset whose prompts are of some form; returns its folder."""
    monkeypatch.setattr(card, "_draw_picture", lambda path, plans: None)

    def run(prompt):
        events = [(user, 100 - (5 * user + place) % 13, None, place) for user in range(6) for place in range(6)]
        log = make_log(taken(*events), CATALOGUE, "films", "film")
        options = {
            "prompt": prompt,
            "num_negatives": 2,
            "ranking_negatives": 2,
            "max_history": 2,
            "negatives": "uniform",
        }
        save_dataset([make_plan(log, BuildConfig(**options))], tmp_path / "data", options, overwrite=True)
        return tmp_path / "data"

    return run


@pytest.mark.parametrize(
    "prompt",
    [
        "next_item(wording='quotes', features=['year'])",
        "next_item_from_list(chat=True)",
        "template(prompt='{history}, then?', chat=True, completion='It is {title}.')",
    ],
)
def test_from_a_prepared_dataset_it_asks_as_that_does(prompt, model, tokenizer, prepare):
    folder = prepare(prompt)
    recommender = Recommender.from_prepared(model, tokenizer, folder)
    assert recommender.max_history == 2
    answers = dict(zip(recommender.catalogue["item_id"], recommender.answers, strict=True))
    for row in pl.read_parquet(next((folder / "ranking").glob("test*"))).iter_rows(named=True):
        (asked,) = recommender.prompts([row["history_ids"]], row["candidate_ids"])
        # Candidates are listed in random order
        assert sorted(str(asked)) == sorted(str(row["prompt"])) if "list" in prompt else asked == row["prompt"]
        assert [answers[item] for item in row["candidate_ids"]] == row["candidates"]


def test_prepared_prompts_of_several_wordings(model, tokenizer, prepare):
    recommender = Recommender.from_prepared(model, tokenizer, prepare("next_item(wording='any')"))
    assert recommender.form == NextItem(domain="film", wording="any")
    assert recommender.prompts([["Big"]])[0].startswith("A user has watched these movies")


def test_prepared_data_that_no_recommender_can_be_made_of(model, tokenizer, prepare, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no dataset of `trl-dmpo prepare`: there is no prepare.yaml"):
        Recommender.from_prepared(model, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="an answer of the form Like names no single item"):
        Recommender.from_prepared(model, tokenizer, prepare("like"))
    folder = prepare("next_item")
    (folder / "prepare.yaml").write_text("prompt: next_item\nmax_prompt_tokens: 64\n")
    with pytest.raises(ValueError, match=r"was prepared with `max_prompt_tokens`.*Prepare it with `max_history`"):
        Recommender.from_prepared(model, tokenizer, folder)
    (folder / "prepare.yaml").write_text("prompt: next_item(wording='semicolons')\n")
    with pytest.raises(ValueError, match=r"prompts cannot be written again from prepare.yaml"):
        Recommender.from_prepared(model, tokenizer, folder)
    items = next((folder / "items").glob("*.parquet"))
    items.rename(items.with_suffix(".old"))
    with pytest.raises(ValueError, match="has 0 catalogues in"):
        Recommender.from_prepared(model, tokenizer, folder)
