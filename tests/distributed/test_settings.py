"""Ranks with other tuning tables would add up in other orders: all raise, and tell which rank has which table."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gradkern.kernels.served import Key
from gradkern.ops.pytorch.chunks import LONGEST, SCRATCH, ChunkSetting, cut
from gradkern.ops.tables import reading
from gradkern.ops.tables.card import card_of
from gradkern.ops.tables.places import VARIABLE
from gradkern.ops.tables.table import entry, text_of
from tests.distributed.pool import Pool
from tests.distributed.test_faults import Step, forget

SHORTER, MORE = ChunkSetting(LONGEST // 2, SCRATCH), ChunkSetting(LONGEST, 2 * SCRATCH)


def write(path: Path, setting: ChunkSetting) -> str:
    card = card_of(torch.device("cpu"))
    assert card is not None
    path.write_text(text_of(card, datetime.now(UTC), [entry(Key("chunks", 3, 4), setting)], []))
    return str(path)


def read(file: str) -> None:
    os.environ[VARIABLE] = file
    reading.forget()
    cut.cache_clear()


def step_under(rank: int, group: Any, files: list[str], twice: bool) -> tuple[str, bool]:
    """Take a step under a table, in a new group of the same ranks; return what it raises, and whether it has written.

    With ``twice`` there was a right step before, under no table.
    """
    forget(group)
    step = Step(rank)
    if twice:
        step.take(group)
        step.model.zero_grad()
    read(files[rank])
    text = ""
    try:
        step.take(group)
    except RuntimeError as error:
        text = str(error)
    finally:
        read("off")
    has_written = any(p.grad is not None for p in step.model.parameters())
    step.take(group)  # all ranks are ready for it
    return text, has_written


def test_ranks_of_other_tables_raise_and_name_them(pool: Pool, tmp_path: Path) -> None:
    shorter, more = write(tmp_path / "shorter.json", SHORTER), write(tmp_path / "more.json", MORE)
    for files in (["off", shorter], [shorter, more]):
        for text, has_written in pool.run(step_under, files, files[0] == "off", ranks=2):
            for rank, file in enumerate(files):
                origin = "default settings (GRADKERN_TUNING is off)" if file == "off" else f"{file}, measured "
                assert f"rank {rank}: {origin}" in text
            assert "Set GRADKERN_TUNING to the same file on all ranks, or to off" in text
            assert not has_written


def test_ranks_of_equal_settings_take_the_step(pool: Pool, tmp_path: Path) -> None:
    """The files may differ: what counts is what they choose that is not the defaults."""
    first, second = write(tmp_path / "first.json", SHORTER), write(tmp_path / "second.json", SHORTER)
    written = write(tmp_path / "written.json", ChunkSetting(LONGEST, SCRATCH))
    for files in ([first, second], ["off", written]):
        assert pool.run(step_under, files, False, ranks=2) == [("", True)] * 2
