"""A prompt in the user's own words."""

from dataclasses import asdict, dataclass
from functools import cached_property
from string import Formatter

from .case import Case, Item, Text, Written
from .domains import DOMAINS
from .form import Form, Layout, candidates_of, distinct_titles, shuffled


WORDS = tuple(asdict(DOMAINS["item"]))


@dataclass(frozen=True, kw_only=True)
class Template(Form):
    """
    A prompt in your own words, with fields in braces. A brace that is meant as one is written twice.

    Takes `domain`, `features` and `chat` too, as of [`Form`].

    Args:
        prompt (`str`):
            With `{history}`, and where you want them `{candidates}` (target and negatives, in random order) and the words of
            the domain: `{singular}`, `{plural}`, `{past}`, `{verb}`, `{gerund}`, `{name}`.
        completion (`str`, *optional*, defaults to `"{title}"`):
            An answer. In plain text a space goes before it, unless it begins with one or with a new line, or the prompt ends with a new line.
        separator (`str`, *optional*, defaults to `", "`):
            What stands between the items of a list. An empty list is written "(none)".
        system (`str`, *optional*, defaults to `""`):
            A system message, as it is. For a chat.

    Raises:
        `ValueError`: a field is unknown or missing, the prompt ends with a space, or there is a system message without a
        chat.

    Example:

    ```python
    >>> from random import Random
    >>> from trl_dmpo.data.prompts import Case, Template

    >>> case = Case([{"title": "Alien"}], [], {"title": "Heat"}, True, [{"title": "Big"}, {"title": "Babe"}], Random(0))
    >>> form = Template(domain="film", prompt="Seen: {history}\\nWhich {singular} next: {candidates}?", completion="{title}.")
    >>> form.write(case)
    Text(prompt='Seen: Alien\\nWhich movie next: Babe, Big, Heat?', chosen=' Heat.', rejected=[' Big.', ' Babe.'])
    >>> Template(prompt="Which {singlar} next?")
    Traceback (most recent call last):
    ValueError: `prompt`: there is no field {singlar}; the field {history} is missing. Fields are: {history}, {candidates}, ...
    ```
    """

    prompt: str
    completion: str = "{title}"
    separator: str = ", "
    system: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        fields = _check_fields("prompt", self.prompt, ("history", "candidates", *WORDS), needed="history")
        _check_fields("completion", self.completion, ("title",), needed="title")
        if self.system and not self.chat:
            raise ValueError("`system` is a message of a chat. Set `chat=True`, or put it into the prompt.")
        if not self.chat and self.prompt.endswith((" ", "\t")):
            raise ValueError(
                "`prompt` ends with a space. Leave it out: the answers begin with one, as tokenizers expect."
            )
        object.__setattr__(self, "listed", "candidates" in fields)

    def write(self, case: Case) -> Text:
        layout = Layout("", self.separator)
        items = candidates_of(case) if self.listed else [case.target, *case.negatives]
        titles = distinct_titles(items)
        texts = {"history": self._list(case.history, layout)}
        if self.listed:
            texts["candidates"] = self._list([items[i] for i in shuffled(len(items), case.random)], layout)
        chosen, *rejected = [self._reply(self._completion.format(title=title)) for title in titles]
        return Text(self._ask(self._fill(self.prompt, **texts)), chosen, rejected)

    def answer(self, item: Item) -> Written:
        return self._complete(item["title"])

    def _complete(self, title: str) -> Written:
        return self._reply(self._completion.format(title=title))

    def _ask(self, question: str) -> Written:
        asked = super()._ask(question)
        return [{"role": "system", "content": self.system}, *asked] if self.system else asked

    def _reply(self, answer: str) -> Written:
        return super()._reply(answer) if self.chat else answer

    @cached_property
    def _completion(self) -> str:
        apart = self.chat or self.prompt.endswith("\n") or self.completion.startswith(("\n", " "))
        return self.completion if apart else f" {self.completion}"


def _check_fields(option: str, template: str, known: tuple[str, ...], needed: str) -> set[str]:
    """The fields of a template, each of which must be known and plain."""
    try:
        parsed = [(field, spec, conversion) for _, field, spec, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"`{option}`: {error}. Write {{{{ and }}}} for braces that are meant as such.") from error
    fields = {field for field, _, _ in parsed if field is not None}
    problems = [f"there is no field {{{field}}}" for field in sorted(fields - set(known))]
    if needed not in fields:
        problems.append(f"the field {{{needed}}} is missing")
    problems += [f"{{{field}}} takes no format" for field, spec, conversion in parsed if spec or conversion]
    if problems:
        have = ", ".join(f"{{{name}}}" for name in known)
        raise ValueError(f"`{option}`: {'; '.join(problems)}. Fields are: {have}.")
    return fields
