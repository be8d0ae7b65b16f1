"""The processes that encode a corpus together, and what they tell each other."""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from lightning_knnmt.checks import check_at_least
from lightning_knnmt.storage.errors import DatastoreError

T = TypeVar("T")
START_TIMEOUT = timedelta(minutes=10)  # until all processes have started
WAIT_TIMEOUT = timedelta(days=1)  # the first rank may read a large store through while the others wait


@dataclass(frozen=True)
class Ranks:
    """All processes of a build, seen by one of them; `Ranks()` is a process by itself.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
        group: What they talk through, with the backend gloo, which notices at once when one is gone.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def each(self, make: Callable[[], T]) -> list[T]:
        """What every rank makes, in the order of the ranks, on all of them.

        Raises:
            Exception: The error of the first rank that failed, on all of them.
            DatastoreError: A rank is gone.
        """
        if self.size == 1:
            return [make()]
        from torch import distributed

        made: T | None = None
        failed: Exception | None = None
        try:
            made = make()
        except Exception as error:
            failed = error
        told: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(told, (made, None if failed is None else _sendable(failed)), self.group)
        except RuntimeError as gone:
            raise failed or DatastoreError(
                f"another process of this build has ended ({gone}); run the same command again, and it continues"
            ) from gone
        if failed is not None:
            raise failed  # with its own traceback
        for _, theirs in told:
            if theirs is not None:
                raise theirs
        return [result for result, _ in told]

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on all ranks; its error is raised on all of them."""
        result: T = self.each(lambda: make() if self.rank == 0 else None)[0]  # type: ignore[assignment]
        return result


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return DatastoreError(f"another process failed: {type(error).__name__}: {error}")
    return error


@dataclass(frozen=True)
class Processes:
    """How many processes encode, as options of `lightning.Fabric`; under `torchrun` or SLURM, how many were started.

    Attributes:
        devices: Processes on each machine; with GPUs, one for each.
        num_nodes: Machines; all of them see the datastore's folder.
        accelerator: `auto`: that of the model's device.
        strategy: `auto`: DDP.
    """

    devices: int = 1
    num_nodes: int = 1
    accelerator: str = "auto"
    strategy: str = "auto"

    def __post_init__(self) -> None:
        check_at_least(1, devices=self.devices, num_nodes=self.num_nodes)

    @contextmanager
    def start(self, model: Any) -> Iterator[Ranks]:
        """Start what is not started yet, each process with its model on its own device.

        Raises:
            ValueError: Another number of processes was started than was asked for.
            DatastoreError: Not all of them have come.
        """
        wanted = self.devices * self.num_nodes
        by, started = started_processes()
        if by is not None and started != wanted:
            raise ValueError(
                f"{by} started {started} processes, but devices is {self.devices} and num_nodes {self.num_nodes}, "
                "expected numbers whose product is that of the processes"
            )
        if wanted == 1:
            yield Ranks()
            return
        from lightning.fabric import Fabric
        from lightning.fabric.strategies import DDPStrategy
        from torch import distributed

        accelerator = model.device.type if self.accelerator == "auto" else self.accelerator
        strategy = DDPStrategy(timeout=START_TIMEOUT) if self.strategy in ("auto", "ddp") else self.strategy
        try:
            fabric = Fabric(accelerator=accelerator, devices=self.devices, num_nodes=self.num_nodes, strategy=strategy)
            fabric.launch()
            group = distributed.new_group(timeout=WAIT_TIMEOUT, backend="gloo")
        except RuntimeError as error:
            raise DatastoreError(f"the {wanted} processes of this build could not all be started: {error}") from error
        model.to(fabric.device)
        try:
            yield Ranks(fabric.global_rank, fabric.world_size, group)
        finally:
            distributed.destroy_process_group()


def started_processes() -> tuple[str | None, int]:
    """The command that has started this process beside others, if one has, and how many it has started.

    A shell that SLURM opened, or a script that it runs, is no such command: `srun` is.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun", int(os.environ["WORLD_SIZE"])
    if "SLURM_STEP_NUM_TASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return "srun", int(os.environ["SLURM_STEP_NUM_TASKS"])
    return None, 1


def refuse_several_processes(command: str) -> None:
    """Refuse to run what one process does alone in several.

    Raises:
        ValueError: Others were started beside this one.
    """
    by, started = started_processes()
    if started > 1:
        raise ValueError(f"{by} started {started} processes, but {command} runs in one; start one, without {by}")
