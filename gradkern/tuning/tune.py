"""All measurements of a card within some time: candidates are checked, and the right ones are timed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from gradkern.kernels.served import Key, served
from gradkern.kernels.settings import Sizes
from gradkern.ops.tables.candidates import DTYPES, Setting, candidates
from gradkern.tuning import sizes
from gradkern.tuning.contest import contest
from gradkern.tuning.forced import Forced
from gradkern.tuning.inputs import Inputs
from gradkern.tuning.subjects import SUBJECTS, compile_ahead, problem


@dataclass(frozen=True)
class Measured:
    """A setting that has been chosen, and why.

    Attributes:
        key: its launches.
        setting: the setting.
        seconds: the time of a run.
        share: the bytes it moves in a second, as a share of those that a copy moves.
        default: the same share for the default setting; None if its results are wrong.
        noise: the part by which a setting had to be faster.
    """

    key: Key
    setting: Setting
    seconds: float
    share: float
    default: float | None
    noise: float

    @property
    def is_new(self) -> bool:
        """Whether it is another one than the default."""
        return self.setting != served.tunable[self.key.kernel].default(self.key.rows, self.key.itemsize)


@dataclass(frozen=True)
class OneLaunch:
    """The range of lengths in which one launch wins, and by length its time over that of three launches."""

    key: Key
    setting: Sizes
    ratios: dict[int, float]

    @property
    def is_new(self) -> bool:
        """Whether it is taken for any length."""
        return self.setting.stop > 0


@dataclass(frozen=True)
class Refused:
    """A setting whose results are wrong, and the first wrong one in words."""

    key: Key
    setting: Setting | None
    """None for the one launch, which has no other setting than its range."""
    problem: str


@dataclass
class Findings:
    """What the measurements have found; ``unreached`` are those that there was no time for."""

    measured: list[Measured] = field(default_factory=list)
    one_launch: list[OneLaunch] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    unreached: list[Key] = field(default_factory=list)


def tuned(
    keys: Sequence[Key], kind: str, device: torch.device, seconds: float, progress: Callable[[str], object]
) -> Findings:
    """Check and measure the candidates of each key in turn.

    Args:
        keys: the keys, the most important ones first.
        kind: the kind of card whose dtypes are measured.
        device: the device.
        seconds: the time for all of it. Each key gets an equal part of what is left, and what its check takes. It is
            left out if the last check of its kernel took longer than what is left of all.
        progress: called with a line before each key.
    """
    findings, end = Findings(), time.monotonic() + seconds
    took: dict[str, float] = {}  # the last check of each kernel, most of it compiling
    inputs: dict[tuple[int, torch.dtype], Inputs] = {}
    for k, key in enumerate(keys):
        begun = time.monotonic()
        left = end - begun
        if took and left < took.get(key.kernel, max(took.values())):
            findings.unreached.append(key)
            continue
        dtype = DTYPES[kind][key.itemsize]
        progress(f"{key.kernel}, T = {key.rows}, {str(dtype).removeprefix('torch.')}")
        until = begun + left / (len(keys) - k)
        right = _right(key, device, findings)
        took[key.kernel] = time.monotonic() - begun
        if not right:
            continue
        if key.kernel == "one_launch":
            _drop(inputs)
            won, ratios = sizes.measured(key, dtype, until - time.monotonic(), device)
            findings.one_launch.append(OneLaunch(key, won, ratios))
            continue
        if (key.rows, dtype) not in inputs:
            _drop(inputs)
            inputs[key.rows, dtype] = Inputs(key.rows, dtype, device)
        settings = [setting for setting in right if setting is not None]
        findings.measured.append(_measured(key, settings, inputs[key.rows, dtype], until))
    return findings


def _drop(inputs: dict[tuple[int, torch.dtype], Inputs]) -> None:
    """Free the memory of inputs before others are made: it may not hold both."""
    inputs.clear()
    torch.cuda.empty_cache()  # does nothing without a GPU in use


def _right(key: Key, device: torch.device, findings: Findings) -> list[Setting | None]:
    """Return the candidates whose results are right; the others are refused. The one launch has None to check."""
    right: list[Setting | None] = []
    known: list[Setting | None] = [None] if key.kernel == "one_launch" else [*candidates(key)]
    compile_ahead(key, known, device)
    for setting in known:
        wrong = problem(key, setting, device)
        if wrong is None:
            right.append(setting)
        else:
            findings.refused.append(Refused(key, setting, wrong))
    return right


def _measured(key: Key, settings: Sequence[Setting], x: Inputs, until: float) -> Measured:
    subject = SUBJECTS[key.kernel]
    won = contest(
        [Forced({key: setting}) for setting in settings],
        lambda: subject.run(x),
        x.copy,
        until - time.monotonic(),
        x.device,
    )
    copy = 2 * x.J.numel() * x.J.itemsize / won.copy
    share, first = (subject.moved(x) / t / copy for t in (won.seconds, won.first))
    is_default = settings[0] == served.tunable[key.kernel].default(key.rows, key.itemsize)
    return Measured(key, settings[won.winner], won.seconds, share, first if is_default else None, won.noise)
