"""accelerate's FSDP2 on CPU ranks.

It turns its FSDP on where there is an accelerator only. One line of its state is set here as it sets it there; all the
rest, from `prepare` to what it saves, is its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


def as_torchrun() -> None:
    """Tell this process what torchrun would; the group is there already, so that nobody listens at the port."""
    os.environ |= {
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }


@contextmanager
def sharding_on_cpu() -> Iterator[None]:
    """Accelerators that are made inside shard, if they are told to."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    made = AcceleratorState.__init__

    def turned_on(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = turned_on
    try:
        yield
    finally:
        AcceleratorState.__init__ = made


def sharding_accelerator() -> Any:
    """An Accelerator that shards by FSDP2 over all ranks."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    as_torchrun()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    with sharding_on_cpu():
        return Accelerator(cpu=True, fsdp_plugin=plugin)
