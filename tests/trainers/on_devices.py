"""A trainer on CPUs that accelerate takes for devices, which it wants for FSDP: `accelerate launch` runs this."""

import importlib
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

start = PartialState.__init__


def on_devices(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type, self.device = DistributedType.MULTI_GPU, torch.device("cpu")


if __name__ == "__main__":
    PartialState.__init__ = on_devices
    torch.set_num_threads(1)
    importlib.import_module(f"hf_kvcache.trainers.{sys.argv[1]}").main(sys.argv[2:])
