"""
Does it recommend better? Experiments on real data, each a file, from the data to tables and plots.

```bash
python -m benchmarks.quality sequence negatives --data ml-100k-and-others/ --work quality-work --jobs 2
```

An experiment is the name of a preset or a file. What is done is kept in `--work`: what was stopped goes on where it was.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .experiment import load_experiment
from .made_up import write_made_up_data
from .pool import be_quiet, make_pool, run_all
from .report import write_results


PRESETS = Path(__file__).parent / "presets"
RESULTS = PRESETS.parent / "results"
PAGES = Path(__file__).parents[2] / "docs" / "quality"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    be_quiet()
    if options.tiny:
        options.data.insert(0, write_made_up_data(options.work / "made up"))
    for name, folder in (("output", RESULTS), ("pages", PAGES)):
        if getattr(options, name) is None:
            # What is tried out is not to overwrite what was measured
            setattr(options, name, options.work / name if options.tiny or options.seeds else folder)
    experiments = [load_experiment(find_preset(name), options.tiny) for name in options.experiments]
    with make_pool(options.work, tuple(options.data), options.jobs) as pool:
        for experiment in experiments:
            if options.seeds:
                experiment.seeds = options.seeds
            run_all(pool, experiment, options.work, tuple(options.data))
            write_results(experiment, options.work, tuple(options.data), options.output, options.pages)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.quality", description=__doc__.split("\n")[1])
    parser.add_argument("experiments", nargs="+", help="Presets, by name, or files.")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="Folders with data sets and models.")
    parser.add_argument("--work", type=Path, default=Path("quality-work"), help="Where finished stages are kept.")
    parser.add_argument("--output", type=Path, help=f"Where results are written: {RESULTS.name}/ beside this file.")
    parser.add_argument("--pages", type=Path, help="Where tables, plots and cases are written: docs/quality/.")
    parser.add_argument("--jobs", type=int, default=1, help="Processes, each with its share of the cores.")
    parser.add_argument("--seeds", type=int, nargs="*", help="Instead of those of the experiment.")
    parser.add_argument("--tiny", action="store_true", help="A trial on made-up data, with the section `tiny`.")
    return parser.parse_args(arguments)


def find_preset(name: str) -> Path:
    """The file of an experiment."""
    for file in (Path(name), PRESETS / f"{name}.yaml"):
        if file.is_file():
            return file
    known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
    raise SystemExit(f"There is no experiment {name!r}. Give a file, or a preset: {known}.")


if __name__ == "__main__":
    main()
