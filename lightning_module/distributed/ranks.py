"""The processes that train one model together: their number, who starts them, their exchanges.

A rank is a process with one device. Ranks are started by `processes.py` on one machine, by
torchrun or srun on many; here they connect. In a single process every function is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from torch import Tensor

from lightning_module.errors import RunError

STRATEGIES = ("single", "auto", "ddp", "fsdp")  # names in conf/strategy/ and of trainer.strategy
# Timeout while another rank of the machine tokenizes a large corpus.
_PATIENCE = timedelta(days=7)
# Each imports torch, 0.3 GB and 4 s of processor time: a mistyped number would block the machine.
_MOST_ON_CPU = 8

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The number of ranks and where they run.

    Attributes:
        here: Ranks on this machine.
        nodes: Machines.
        device: Kind of device, `cpu` or `cuda`.
        environment: The position of this process among ranks that were started externally
            (torchrun, srun, `distributed/processes.py`); None: there are none.
    """

    here: int
    nodes: int
    device: str
    environment: ClusterEnvironment | None

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.here * self.nodes

    @classmethod
    def of(cls, trainer: DictConfig) -> World:
        """From the settings of `conf/trainer` and `conf/strategy`.

        Raises:
            RunError: They contradict each other, this machine, or how this process was started.
        """
        strategy = trainer.strategy
        if isinstance(strategy, str) and strategy not in STRATEGIES:
            raise RunError(
                f"trainer.strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}"
            )
        try:
            # Lightning resolves devices=auto, -1, "0,2" or [0,2] on this machine.
            probe = L.Trainer(
                accelerator=trainer.accelerator,
                devices=trainer.devices if strategy != "single" else 1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                plugins=[LightningEnvironment()],
            )
        except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
            raise RunError(
                f"trainer.accelerator={trainer.accelerator} trainer.devices={trainer.devices} "
                f"cannot be used on this machine: {error}"
            ) from error
        device = probe.strategy.root_device.type
        if strategy == "single" and (str(trainer.devices) != "1" or trainer.num_nodes != 1):
            raise RunError(
                f"strategy=single trains on one device of one machine, but "
                f"trainer.devices={trainer.devices} trainer.num_nodes={trainer.num_nodes}: "
                "set strategy=ddp, or trainer.devices=1 trainer.num_nodes=1"
            )
        environment = _environment()
        if environment is None:
            if trainer.num_nodes != 1:
                raise RunError(
                    f"trainer.num_nodes={trainer.num_nodes} needs torchrun or srun to start "
                    "processes on every machine; set trainer.num_nodes=1 to train on this one"
                )
            most = max(_MOST_ON_CPU, os.cpu_count() or 1)
            if device == "cpu" and probe.num_devices > most:
                raise RunError(
                    f"trainer.devices={trainer.devices} needs as many processes, and this machine "
                    f"has {os.cpu_count()} processors: at most {most} are started on it"
                )
            return cls(probe.num_devices, 1, device, None)
        here, nodes = _started(environment)
        if strategy == "single":
            raise RunError(
                f"{here * nodes} processes were started, but strategy=single is one: "
                "set strategy=ddp"
            )
        asked = here if trainer.devices == "auto" else probe.num_devices
        if (asked, trainer.num_nodes) != (here, nodes):
            raise RunError(
                f"{here} processes per machine were started on {nodes} machines, but "
                f"trainer.devices={trainer.devices} trainer.num_nodes={trainer.num_nodes}: set "
                f"trainer.devices={here} trainer.num_nodes={nodes}"
            )
        return cls(here, nodes, device, environment)


def _environment() -> ClusterEnvironment | None:
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    # A single task of SLURM may start its own ranks.
    if SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1:
        return SLURMEnvironment()
    return None


def _started(environment: ClusterEnvironment) -> tuple[int, int]:
    size = environment.world_size()
    if isinstance(environment, TorchElasticEnvironment):
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return here, size // here
    nodes = int(os.environ.get("SLURM_NNODES", 1))
    return size // nodes, nodes


def make_strategy(name: str, world: World) -> Strategy | str:
    """Lightning's strategy for one of `STRATEGIES`."""
    if world.size == 1:
        return "auto"
    if name == "fsdp":
        # One file per checkpoint, readable with any number of ranks.
        return ModelParallelStrategy(
            data_parallel_size=world.size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return DDPStrategy(gradient_as_bucket_view=True)


def join(world: World, timeout: float) -> None:
    """Connects this rank with the others, before Lightning, which uses the connection.

    Args:
        world: The ranks.
        timeout: Seconds after which a rank that waits for another raises an error.
    """
    if world.size == 1 or dist.is_initialized():
        return
    environment = world.environment
    assert environment is not None, "several ranks are always started by something"
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    if world.device == "cuda":
        torch.cuda.set_device(environment.local_rank())
    # Always with gloo for tensors on the CPU: exchanges here do not synchronize with a GPU.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if world.device == "cuda" else "gloo",
        rank=environment.global_rank(),
        world_size=world.size,
        timeout=timedelta(seconds=timeout),
    )


def leave() -> None:
    """Closes the connection that `join` made."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of all ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(whole: int, number: int | None = None, of: int | None = None) -> slice:
    """The rows of `whole` that belong to a rank: contiguous blocks of equal length, up to one.

    Args:
        whole: Rows of all ranks.
        number: The rank; None: this one.
        of: Number of ranks; None: all.
    """
    number, of = rank() if number is None else number, of or size()
    return slice(number * whole // of, (number + 1) * whole // of)


def agree(value: float, highest: bool = True) -> float:
    """The highest (or lowest) value of all ranks; collective: every rank must call it."""
    if size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX if highest else dist.ReduceOp.MIN)
    return tensor.item()


def from_rank_zero(value: Result) -> Result:
    """The value of rank 0; collective."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def gathered(value: Result) -> list[Result]:
    """The values of all ranks, on rank 0; empty on the others. Collective."""
    if size() == 1:
        return [value]
    found: list[Any] | None = [None] * size() if rank() == 0 else None
    dist.gather_object(value, found, 0)
    return found or []


def gathered_rows(state: Any) -> Any:
    """The state of all ranks' rows, on rank 0's CPU.

    Args:
        state: A tensor [layers, rows of this rank, H], a tuple of such (LSTM), or None.
    """
    if size() == 1:
        return state
    parts = gathered(_on_cpu(state))
    if not parts or parts[0] is None:
        return None
    if isinstance(state, tuple):
        return tuple(torch.cat(of_all, 1) for of_all in zip(*parts, strict=True))
    return torch.cat(parts, 1)


def own_rows(state: Any) -> Any:
    """This rank's part of the result of `gathered_rows`, for any number of ranks."""
    if isinstance(state, tuple):
        return tuple(map(own_rows, state))
    return state if state is None else state[:, share(state.shape[1])].contiguous()


def _on_cpu(state: Any) -> Any:
    if isinstance(state, tuple):
        return tuple(s.cpu() for s in state)
    return state.cpu() if isinstance(state, Tensor) else state


def once(function: Callable[[], Result]) -> Result | None:
    """Calls the function on rank 0 alone; its exception is raised on every rank. Collective.

    Returns:
        Its result on rank 0; None on the others.
    """
    return _called_by(function, rank() == 0, None)


def once_a_machine(function: Callable[[], Result]) -> Result | None:
    """Calls the function on one rank of each machine, without a time limit; see `once`."""
    # torchrun and distributed/processes.py set LOCAL_RANK, srun SLURM_LOCALID.
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    if size() == 1:
        return function()
    patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        return _called_by(function, int(local) == 0, patient)
    finally:
        dist.destroy_process_group(patient)


def _called_by(
    function: Callable[[], Result], mine: bool, group: dist.ProcessGroup | None
) -> Result | None:
    if size() == 1:
        return function()
    result: Result | None = None
    error: Exception | None = None
    if mine:
        try:
            result = function()
        except Exception as raised:
            error = raised
    errors: list[Exception | None] = [None] * size()
    dist.all_gather_object(errors, error, group=group)
    for error in errors:
        if error is not None:
            raise error
    return result
