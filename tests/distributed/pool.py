"""Processes that are the ranks of torch.distributed, and run many short jobs: an import of torch takes seconds."""

import io
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

START = 120
"""Seconds in which the processes must have started."""
JOB = 180
"""Seconds after which a job counts as hanging. Jobs take a second, or many on a machine that is busy otherwise."""


class Hanging(AssertionError):
    """A job has not ended in time."""


class Pool:
    """R processes, the ranks of the default group, with one more group of the first r ranks for each r below R.

    Args:
        R: the number of processes.
        folder: an empty folder for the file in which they meet.
        timeout: seconds after which a collective raises.
    """

    def __init__(self, R: int, folder: Path, timeout: float = JOB) -> None:
        context = mp.get_context("spawn")
        self._ends: list[Connection] = []
        self.processes = []
        for rank in range(R):
            own, other = context.Pipe()
            process = context.Process(target=_serve, args=(rank, R, str(folder / "store"), timeout, other), daemon=True)
            process.start()
            other.close()
            self._ends.append(own)
            self.processes.append(process)
        self.alive = True
        self._answers(self._ends, START)

    def run(self, job: Callable[..., Any], *args: Any, ranks: int, seconds: float = JOB) -> list[Any]:
        """Return what ``job(rank, group, *args)`` returns on each of the first ``ranks`` ranks.

        Raises:
            Hanging: a rank has not answered in time, and the pool is lost.
            AssertionError: a rank's job has raised, or its process has ended.
        """
        answers = self.run_with_errors(job, *args, ranks=ranks, seconds=seconds)
        for rank, (is_right, answer) in enumerate(answers):
            assert is_right, f"rank {rank}:\n{answer}"
        return [answer for _, answer in answers]

    def run_with_errors(
        self, job: Callable[..., Any], *args: Any, ranks: int, seconds: float = JOB
    ) -> list[tuple[bool, Any]]:
        """Return for each rank whether the job has returned, and its result, or else what it has raised as text."""
        for end in self._ends[:ranks]:
            end.send((job, ranks, args))
        return self._answers(self._ends[:ranks], seconds)

    def close(self) -> None:
        """End the processes."""
        self.alive = False
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def _answers(self, ends: list[Connection], seconds: float) -> list[tuple[bool, Any]]:
        answers = []
        for rank, end in enumerate(ends):
            if not end.poll(seconds):
                self.close()
                raise Hanging(f"rank {rank} has not answered in {seconds} s")
            try:
                is_right, answer = end.recv()
                answers.append((is_right, torch.load(io.BytesIO(answer), weights_only=False) if is_right else answer))
            except (EOFError, ConnectionError):
                self.alive = False
                answers.append((False, "the process has ended"))
        return answers


def _serve(rank: int, R: int, store: str, timeout: float, end: Connection) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=R, timeout=limit)
    groups = {r: dist.new_group(list(range(r)), timeout=limit) for r in range(1, R)}
    groups[R] = None
    end.send((True, _packed(None)))
    with suppress(EOFError):
        while True:
            job, ranks, args = end.recv()
            try:
                end.send((True, _packed(job(rank, groups[ranks], *args))))
            except Exception:
                end.send((False, traceback.format_exc()))


def _packed(x: Any) -> bytes:
    memory = io.BytesIO()
    torch.save(x, memory)
    return memory.getvalue()
