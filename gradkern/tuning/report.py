"""What the measurements have found, as text for people and as the entries of a table."""

from collections.abc import Iterator
from typing import Any

from gradkern.kernels.served import Key
from gradkern.ops.tables.candidates import DTYPES, Setting
from gradkern.ops.tables.table import entry
from gradkern.tuning.tune import Findings, Refused

HEAD = f"{'kernel':12}{'T':>4}  {'dtype':10}{'time':>10}{'of copy':>9}{'written':>9}{'noise':>7}  setting"


def text(findings: Findings, kind: str) -> str:
    """Return the findings as lines."""
    return "\n".join(_lines(findings, kind))


def _lines(findings: Findings, kind: str) -> Iterator[str]:
    yield "share of a copy's bandwidth with the chosen setting and with the written one; a gain below the noise is none"
    yield HEAD
    for m in findings.measured:
        written = "wrong" if m.written is None else f"{m.written:.1%}"
        chosen = _setting(m.setting) + ("" if m.is_new else " (written)")
        numbers = f"{1e3 * m.seconds:>7.3f} ms{m.share:>9.1%}{written:>9}{m.noise:>7.0%}"
        yield f"{_place(m.key, kind)}{numbers}  {chosen}"
    for one in findings.one_launch:
        start, stop = one.setting
        won = f"{start:,} to {stop - 1:,} numbers" if stop else "at no length"
        ratios = ", ".join(f"{ratio:.2f} at {P:,}" for P, ratio in one.ratios.items())
        yield f"{_place(one.key, kind)}  faster than three {won}; its time over theirs: {ratios}"
    for wrong in findings.refused:
        yield f"{_place(wrong.key, kind)}  WRONG, {_refused(wrong)}: {wrong.problem}"
    if findings.unreached:
        yield (
            f"{len(findings.unreached)} measurements were not reached, and keep the written settings: give more "
            "--minutes"
        )


def settings(findings: Findings) -> list[dict[str, Any]]:
    """Return the settings as entries of a table, with numbers for people."""
    return [
        entry(m.key, m.setting)
        | {"seconds": m.seconds, "share of copy": m.share, "written share": m.written, "noise": m.noise}
        for m in findings.measured
    ] + [entry(one.key, one.setting) | {"time over three": one.ratios} for one in findings.one_launch]


def refused(findings: Findings) -> list[dict[str, Any]]:
    """Return the settings whose results are wrong, as a table tells of them."""
    return [
        wrong.key._asdict()
        | {"setting": None if wrong.setting is None else wrong.setting._asdict(), "problem": wrong.problem}
        for wrong in findings.refused
    ]


def _place(key: Key, kind: str) -> str:
    dtype = str(DTYPES[kind][key.itemsize]).removeprefix("torch.")
    return f"{key.kernel:12}{key.rows:>4}  {dtype:10}"


def _refused(wrong: Refused) -> str:
    return "the kernel itself" if wrong.setting is None else _setting(wrong.setting)


def _setting(setting: Setting) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in setting._asdict().items())
