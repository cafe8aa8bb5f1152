"""
How our docstrings, written as TRL writes its own, become Markdown; and how formulas become MathML.

`HFDocstrings` is a Griffe extension (mkdocstrings runs it), `on_page_content` a hook of MkDocs.
"""

import html
import re

import griffe
from latex2mathml.converter import convert


SECTION = re.compile(r"(Args|Parameters|Returns|Raises|Examples?):(.*)")
ARGUMENT = re.compile(r"(\w+) \((.*)\):$")
REFERENCE = re.compile(r"\[`~?([\w.]+)`\]")


def to_markdown(docstring: str, paths: dict[str, str]) -> str:
    """A docstring as Markdown; `paths` leads from the names of this package's objects to where they are documented."""

    def link(match: re.Match) -> str:
        name = match[1].split(".")[-1]
        code = f"<code>{name}</code>"
        return f'<autoref optional identifier="{paths[name]}">{code}</autoref>' if name in paths else f"`{name}`"

    lines, section, fence = [], None, None
    for line in docstring.splitlines():
        text = line.lstrip()
        if fence is not None or text.startswith(("```", "$$")):  # Code and formulas stay as they are
            lines.append(line)
            if fence is None:
                fence = text[:2]
            elif text.startswith(fence):
                fence = None
            continue
        if heading := SECTION.fullmatch(line):
            section = heading[1]
            lines += [f"**{'Parameters' if section == 'Args' else section}:**{heading[2]}", ""]
            continue
        if text and text == line:
            section = None  # Text at the margin ends the section
        if section is not None:
            line = line[4:]
            if section in ("Args", "Parameters") and (argument := ARGUMENT.fullmatch(line)):
                line = f"- **{argument[1]}** ({argument[2]}) —"
            elif section == "Raises" and line.startswith("`"):
                line = f"- {line}"
        if line.startswith("- ") and lines and lines[-1].strip() and not lines[-1].startswith(("- ", "  ")):
            lines.append("")
        lines.append(REFERENCE.sub(link, line))
    return "\n".join(lines)


class HFDocstrings(griffe.Extension):
    """Rewrites the docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        objects = list(walk(pkg))
        paths = {obj.name: obj.path for obj in objects if obj.is_class or obj.is_function}
        for obj in objects:
            if obj.docstring:
                obj.docstring.value = to_markdown(obj.docstring.value, paths)


def walk(obj: griffe.Object):
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from walk(member)


def on_page_content(content: str, **kwargs) -> str:
    """Formulas as MathML, which browsers draw without scripts."""

    def formula(match: re.Match) -> str:
        latex = html.unescape(match[2]).strip()[2:-2].strip()
        # LaTeX sets the name of a function apart from letters by itself
        latex = re.sub(r"(?<=[\w}])\s*\\log", r" \\, \\log", latex)
        latex = re.sub(r"\\log\s", r"\\log \\, ", latex)
        return convert(latex, display="block" if match[1] == "div" else "inline")

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', formula, content, flags=re.DOTALL)
