"""What the measurements have found, as text for people and as the entries of a table."""

from collections.abc import Iterator
from typing import Any

from gradkern.kernels.served import Key
from gradkern.ops.devices import CPU, GPU
from gradkern.ops.tables.candidates import DTYPES, Setting
from gradkern.ops.tables.table import entry
from gradkern.tuning.tune import Findings, Refused

NOISY = 0.1
"""Noise above which hardly any setting can win."""

HEAD = f"{'kernel':12}{'T':>4}  {'dtype':10}{'time':>10}{'of copy':>9}{'default':>9}{'noise':>7}  setting"


LEGEND = {
    CPU.type: """\
chunks     the Gramian: LONGEST, the most columns of a product; SCRATCH, the numbers that are copied at a time
columns    the combination: COLUMNS, the columns of a row that are added at a time""",
    GPU: """\
gramian, combine, adamw, project    BLOCK numbers are taken at a time, by so many threads
pieces     the Gramian: the programs that share its tiles, and the most tiles of one""",
}


def text(findings: Findings, kind: str, n_kept: int) -> str:
    """Return the findings as lines; ``n_kept`` of those that were not reached are in an earlier table."""
    return "\n".join(_lines(findings, kind, n_kept))


def _lines(findings: Findings, kind: str, n_kept: int) -> Iterator[str]:
    yield LEGEND[kind]
    yield "of copy    the bytes a second, as a share of a plain copy's; reading alone may exceed 100 %"
    yield "default    the same with the default setting"
    yield "noise      a setting has to be faster by more than this to take the default's place"
    yield HEAD
    for m in findings.measured:
        default = "wrong" if m.default is None else f"{m.default:.1%}"
        chosen = _setting(m.setting) + ("" if m.is_new else " (default)")
        numbers = f"{1e3 * m.seconds:>7.3f} ms{m.share:>9.1%}{default:>9}{m.noise:>7.0%}"
        yield f"{_place(m.key, kind)}{numbers}  {chosen}"
    for one in findings.one_launch:
        start, stop = one.setting
        won = f"{start:,} to {stop - 1:,} numbers" if stop else "at no length"
        ratios = ", ".join(f"{ratio:.2f} at {P:,}" for P, ratio in one.ratios.items())
        yield f"{_place(one.key, kind)}  faster than three {won}; its time over theirs: {ratios}"
    for wrong in findings.refused:
        yield f"{_place(wrong.key, kind)}  WRONG, {_refused(wrong)}: {wrong.problem}"
    done, left = findings.measured + findings.one_launch, len(findings.unreached)
    yield f"{sum(one.is_new for one in done)} of {len(done)} settings are not the defaults"
    if left:
        kept = f"{n_kept} keep the settings of an earlier table, and {left - n_kept} the defaults"
        yield f"time ended before {left} of {len(done) + left} measurements, of which {kept}; more --minutes reach more"
    if any(m.noise > NOISY for m in findings.measured):
        yield f"noise above {NOISY:.0%}: the machine was busy; measure again when nothing else runs"


def settings(findings: Findings) -> list[dict[str, Any]]:
    """Return the settings as entries of a table, with numbers for people."""
    return [
        entry(m.key, m.setting)
        | {"seconds": m.seconds, "share of copy": m.share, "default share": m.default, "noise": m.noise}
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
