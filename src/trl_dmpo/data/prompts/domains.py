"""The words for what an item is, so that a prompt reads like a person wrote it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Domain:
    """
    Words for a kind of item. Templates name them in braces: `"which {singular} will the user {verb} next?"`.

    Args:
        singular (`str`):
            One item: "movie".
        plural (`str`):
            Several: "movies".
        past (`str`):
            What a user has done with them: "watched".
        verb (`str`):
            What a user will do next: "watch".
        gerund (`str`):
            The doing: "watching".
        name (`str`, *optional*, defaults to `"title"`):
            What an item goes by: "title", or "name". Its plural has an s.

    Example:

    ```python
    >>> from trl_dmpo.data.prompts import Domain

    >>> Domain("recipe", "recipes", past="cooked", verb="cook", gerund="cooking").name
    'title'
    ```
    """

    singular: str
    plural: str
    past: str
    verb: str
    gerund: str
    name: str = "title"


DOMAINS = {
    # The word of the papers, whose prompts are then ours to the letter
    "film": Domain("movie", "movies", "watched", "watch", "watching"),
    "book": Domain("book", "books", "read", "read", "reading"),
    "game": Domain("game", "games", "played", "play", "playing"),
    "artist": Domain("artist", "artists", "listened to", "listen to", "listening to", name="name"),
    "product": Domain("product", "products", "bought", "buy", "buying", name="name"),
    "item": Domain("item", "items", "chosen", "choose", "choosing"),
}


def find_domain(domain: str | Domain) -> Domain:
    """
    The words of a domain.

    Args:
        domain (`str` or [`Domain`]):
            A key of `DOMAINS`, or the words themselves.

    Returns:
        [`Domain`]

    Raises:
        `ValueError`: there is no domain of this name.

    Example:

    ```python
    >>> from trl_dmpo.data.prompts.domains import find_domain

    >>> find_domain("artist").past
    'listened to'
    ```
    """
    if isinstance(domain, Domain):
        return domain
    if domain not in DOMAINS:
        raise ValueError(
            f"`domain`: there is no {domain!r}, only: {', '.join(DOMAINS)}. For other words, give a "
            "`trl_dmpo.data.prompts.Domain`."
        )
    return DOMAINS[domain]
