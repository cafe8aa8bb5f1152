"""
Rows for `trl-dmpo train` from two published files.

```bash
python benchmarks/real_rows.py llara lastfm_val.json lastfm.jsonl     # K = 19: the listed artists but the chosen one
python benchmarks/real_rows.py dmpo ml_1m_dpo_5.json ml_1m.jsonl      # K = 1: one row per user and negative
```

`llara` is the form of LLaRA and S-DPO, `dmpo` that of the DMPO paper, whose every row names two films of its own in the
prompt: the K answers of a user share no prompt, so a row has one rejected answer.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def from_llara(records: list[dict]) -> Iterator[dict]:
    for record in records:
        history = record["historyList"]
        history = history.split("::") if isinstance(history, str) else history
        listed = record["itemList"]
        chosen = record["trueSelection"]
        prompt = (
            f"This user has listened to {', '.join(history)}. Which of these artists will the user listen to next? "
            f"{', '.join(listed)}. Answer with the name of one artist."
        )
        rejected = dict.fromkeys(artist for artist in listed if artist != chosen)  # some lists name an artist twice
        yield {
            "prompt": message("user", prompt),
            "chosen": message("assistant", chosen),
            "rejected": [message("assistant", artist) for artist in rejected],
        }


def from_dmpo(records: list[dict]) -> Iterator[dict]:
    for record in records:
        chosen, rejected = record["output"]
        yield {
            "prompt": message("user", record["instruction"]),
            "chosen": message("assistant", chosen.strip()),
            "rejected": [message("assistant", rejected.strip())],
        }


FORMATS = {"llara": from_llara, "dmpo": from_dmpo}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    rows = list(FORMATS[options.format](json.loads(options.source.read_text())))
    options.target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows)} rows, K = {min(len(r['rejected']) for r in rows)} to {max(len(r['rejected']) for r in rows)}")
