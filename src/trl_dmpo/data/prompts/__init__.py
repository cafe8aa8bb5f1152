"""Prompts: what is asked about a user, and the answers to tell apart. One form, one file; `PROMPTS` names them."""

from .budget import fit_history, token_counter
from .case import Case, Text
from .domains import DOMAINS, Domain
from .form import Form
from .like import Like
from .next_item import NextItem, NextItemFromList
from .rank import RankList, RankTwo
from .rating import Rating
from .template import Template


PROMPTS: dict[str, type[Form]] = {
    "next_item": NextItem,
    "next_item_from_list": NextItemFromList,
    "rank_two": RankTwo,
    "rank_list": RankList,
    "like": Like,
    "rating": Rating,
    "template": Template,
}

__all__ = [
    "DOMAINS",
    "PROMPTS",
    "Case",
    "Domain",
    "Form",
    "Like",
    "NextItem",
    "NextItemFromList",
    "RankList",
    "RankTwo",
    "Rating",
    "Template",
    "Text",
    "fit_history",
    "token_counter",
]
