"""The processes of a measurement."""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.distributed.model import CUT, ONE_PASS, PLAIN, SURGERY, T_PASSES, Size, Steps
from gradkern.distributed import comm

WARM_UP = 2


def measured(R: int, size: Size, rounds: int) -> dict[str, Any]:
    """Return what rank 0 of R processes measures, each with one thread: words, and seconds by the kind of step."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (R, size, rounds, folder), R)
        return torch.load(Path(folder) / "row")


def _run(rank: int, R: int, size: Size, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=R)
    steps = Steps(size, rank)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in (PLAIN, SURGERY, CUT, ONE_PASS, T_PASSES)}
    for n in range(WARM_UP + rounds):
        for name, of_name in seconds.items():
            taken = _timed(steps, name)
            if n >= WARM_UP:
                of_name.append(taken)
    row = {
        "ranks": R,
        **size._asdict(),
        "shared": steps.shared,
        "own": steps.own,
        "words": {PLAIN: _words_of_ddp(steps)} | {name: _words_of_ours(steps, name) for name in (SURGERY, CUT)},
        "wall": {name: statistics.median(wall for wall, _ in of_name) for name, of_name in seconds.items()},
        "processor": {name: statistics.median(used for _, used in of_name) for name, of_name in seconds.items()},
    }
    if rank == 0:
        torch.save(row, Path(folder) / "row")
    del steps  # DistributedDataParallel holds the group
    dist.barrier()  # no rank ends while another one is still in a collective
    dist.destroy_process_group()
    os._exit(0)  # a thread of Gloo that asks for the interpreter while that ends would abort the process


def _timed(steps: Steps, name: str) -> tuple[float, float]:
    """Return a step's time by the clock, and the processor's time of all threads of this rank."""
    dist.barrier()
    clock, used = time.perf_counter(), time.process_time()
    steps.of(name)()
    dist.barrier()
    return time.perf_counter() - clock, time.process_time() - used


def _words_of_ddp(steps: Steps) -> int:
    """Return the words of a step times R / (R - 1): an all-reduce is a reduce-scatter and an all-gather."""
    steps.reduced = 0
    steps.of(PLAIN)()
    return 2 * steps.reduced


def _words_of_ours(steps: Steps, name: str) -> int:
    """Return the float32 words of a step times R / (R - 1); all messages beside them are of other dtypes."""
    count = 0
    gather, to_all = comm._all_gather, comm._all_to_all

    def counted(x: torch.Tensor) -> None:
        nonlocal count
        count += x.numel() if x.dtype == torch.float32 else 0

    def all_gather(x: torch.Tensor, shard: torch.Tensor, **kwargs: Any) -> Any:
        counted(x)
        return gather(x, shard, **kwargs)

    def all_to_all(room: torch.Tensor, x: torch.Tensor, **kwargs: Any) -> Any:
        counted(x)
        return to_all(room, x, **kwargs)

    comm._all_gather, comm._all_to_all = all_gather, all_to_all
    try:
        steps.of(name)()
    finally:
        comm._all_gather, comm._all_to_all = gather, to_all
    return count
