"""``python -m bench distributed``: it counts the words of both contestants, and its results can be shown again."""

import json
from pathlib import Path

import pytest

from bench.__main__ import main

SMALL = "--layers 1 --width 64 --heads 2 --words 64 --batch 2 --length 4 --rounds 1"


def test_words_are_those_of_the_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["distributed", *SMALL.split(), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    (row,) = json.loads((tmp_path / "distributed.json").read_text())["rows"]
    plain, surgery, cut = row["words"].values()
    assert plain == 2 * (row["shared"] + row["own"])
    law = (row["T"] + 1) * row["shared"] + 2 * row["own"]
    # Parameters start at multiples of 8, and so do the shards of two ranks.
    assert law <= surgery <= law + 8 * 2 * (row["T"] + 1) * 40
    assert law <= cut <= law + 8 * 2 * (row["T"] + 1) * 40
    assert all(seconds >= 0 for kind in ("wall", "processor") for seconds in row[kind].values())
    main(["distributed", "--show", str(tmp_path / "distributed.json")])
    assert capsys.readouterr().out.strip() in printed
