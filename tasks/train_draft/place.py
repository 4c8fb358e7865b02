"""Where one process of a training works: its device, the GPUs its target may spread over, and its peers.

The only module that asks for devices. A process without GPUs works on the CPU; one of several on a node takes its equal
share of the GPUs, one alone takes all. The head trains on the first; a target that does not fit there is spread over
the others, then main memory, then disk, by accelerate. Refuses to know what is trained.
Run it: nothing to run; `python -m pytest tests/tasks/test_train_draft_parallel.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from specs.errors import InputError

HEAD_ROOM = 0.4  # of the first GPU: the head, its optimizer and its activations
LAYER_ROOM = 0.1  # of the others: activations

Item = TypeVar("Item")


@dataclass(frozen=True)
class Place:
    """One of `world` processes, and what it owns."""

    rank: int = 0
    world: int = 1
    gpus: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the head trains and features arrive."""
        return torch.device("cuda", self.gpus[0]) if self.gpus else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the target: as checkpoints store it on a GPU; FP32 on a CPU, which has no fast BF16."""
        return torch.bfloat16 if self.gpus else torch.float32

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of a batch: all shares together are the batch."""
        return items[self.rank :: self.world]

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Each tensor becomes the sum over all processes."""
        if self.world > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def copy(self, tensors: Iterable[torch.Tensor]) -> None:
        """Each tensor becomes the first process's."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def alone() -> Place:
    """The plain path: one process with every GPU there is."""
    return Place(gpus=tuple(range(torch.cuda.device_count())))


def join(processes_per_node: int) -> Place:
    """One of several, as torchrun has numbered it: NCCL between GPUs, gloo between CPUs."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes_per_node:
        raise InputError(
            f"{processes_per_node} processes cannot share {gpus} GPUs",
            "draft.launch.processes_per_node",
            f"at most {gpus}",
        )
    dist.init_process_group("nccl" if gpus else "gloo")
    local, each = dist.get_node_local_rank(), gpus // processes_per_node
    if gpus:
        torch.cuda.set_device(local * each)
    return Place(dist.get_rank(), dist.get_world_size(), tuple(range(local * each, (local + 1) * each)))


def settle(target: Any, place: Place, offload: Path, memory: Mapping[int | str, int] | None = None) -> None:
    """Move the target to its devices. `memory` (bytes by GPU or "cpu") is what there is unless told otherwise.

    Embedding, final norm and lm_head stay where the head is: training reads them at every step. A layer that is not on
    a GPU visits the device as a whole, so that its experts can be read one by one.
    """
    if memory is None:
        if not place.gpus:
            return
        memory = _room(place)
    main = place.gpus[0] if place.gpus else "cpu"
    if sum(t.numel() * t.element_size() for t in target.state_dict().values()) <= memory[main]:
        target.to(place.device)
        return
    from accelerate import dispatch_model, infer_auto_device_map

    layer = type(target.model.layers[0]).__name__
    devices = dict(infer_auto_device_map(target, dict(memory), no_split_module_classes=[layer]))
    devices = {name: device for name, device in devices.items() if name.startswith("model.layers.")}
    devices |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), main)
    dispatch_model(target, devices, main_device=main, offload_dir=offload, preload_module_classes=[layer])


def _room(place: Place) -> dict[int | str, int]:
    """Bytes for the target on each of this process's GPUs, and in main memory."""
    from accelerate.utils import get_max_memory

    free = {name: size for name, size in get_max_memory().items() if name == "cpu" or name in place.gpus}
    room: dict[int | str, float] = {gpu: (1 - LAYER_ROOM) * free[gpu] for gpu in place.gpus}
    room[place.gpus[0]] = (1 - HEAD_ROOM) * free[place.gpus[0]]
    return {name: int(size) for name, size in {**room, "cpu": 0.9 * free["cpu"]}.items()}
