"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import trl_dmpo


MODULES = [m.name for m in pkgutil.walk_packages(trl_dmpo.__path__, "trl_dmpo.") if ".cli" not in m.name]


class Fenced(doctest.DocTestParser):
    """Examples stand in Markdown fences, which end an expected output."""

    def parse(self, string, name="<string>"):
        lines = ["" if line.strip().startswith("```") else line for line in string.splitlines()]
        return super().parse("\n".join(lines), name)


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    finder = doctest.DocTestFinder(parser=Fenced(), exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = []
    for test in finder.find(importlib.import_module(module)):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_there_are_examples():
    finder = doctest.DocTestFinder(parser=Fenced())
    found = [test.name for module in MODULES for test in finder.find(importlib.import_module(module)) if test.examples]
    assert len(found) >= 8, found
