"""What GPUs can do, as their makers say."""

import math
import os
from dataclasses import dataclass

import torch

from poweropd.errors import ConfigError
from poweropd.models import default_device
from poweropd.recipes import nearest

GIB, GB, TERA = 2**30, 1e9, 1e12


@dataclass(frozen=True)
class Machine:
    """One GPU, or this machine's CPU.

    Attributes:
        memory: bytes.
        bandwidth: bytes a second between memory and arithmetic.
        flops: a second, dense, in the precision of training: bf16 on a GPU, fp32 on a CPU.
        link: bytes a second to its neighbours, one way.
        device: torch's name of its kind.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    link: float
    device: str = "cuda"


def _gpu(name: str, gib: float, gb_a_second: float, tflops: float, gb_of_link: float) -> Machine:
    return Machine(name, gib * GIB, gb_a_second * GB, tflops * TERA, gb_of_link * GB)


# Dense bf16 with fp32 sums. Makers state links both ways together; here is one way, so half of that.
MACHINES = {
    each.name: each
    for each in (
        _gpu("a100-40", 40, 1555, 312, 300),  # NVIDIA A100 Tensor Core GPU datasheet (SXM4); NVLink 600 GB/s
        _gpu("a100-80", 80, 2039, 312, 300),  # the same
        _gpu("h100", 80, 3350, 989, 450),  # NVIDIA H100 datasheet (SXM5); NVLink 900 GB/s
        _gpu("h200", 141, 4800, 989, 450),  # NVIDIA H200 datasheet (SXM5)
        _gpu("b200", 180, 8000, 2250, 900),  # NVIDIA HGX B200 datasheet: 1.44 TB and 18 PFLOP/s dense of eight
        _gpu("l4", 24, 300, 121, 32),  # NVIDIA L4 datasheet, half of the sparse rate; PCIe 4.0 x16
        _gpu("l40s", 48, 864, 362, 32),  # NVIDIA L40S datasheet; PCIe 4.0 x16
        _gpu("rtx4090", 24, 1008, 165, 32),  # NVIDIA Ada GPU architecture whitepaper, appendix A; PCIe 4.0 x16
        _gpu(
            "rtx5090", 32, 1792, 210, 64
        ),  # NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A; PCIe 5.0 x16
        _gpu("mi300x", 192, 5300, 1307, 448),  # AMD Instinct MI300X data sheet; seven links of 128 GB/s both ways
    )
}
CPU = "cpu"


def here() -> Machine:
    """What this process would train on, of which only the memory is known."""
    device = default_device()
    if device.type == "cpu":
        return machine(CPU)
    properties = torch.cuda.get_device_properties(device)
    return Machine(properties.name, properties.total_memory, math.nan, math.nan, math.nan)


def machine(name: str) -> Machine:
    """A GPU by its name, or `cpu`: this machine, at the rates of the one of docs/performance.md.

    Raises:
        ConfigError: there is none of that name.
    """
    if name == CPU:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Machine(CPU, memory, 18 * GB, 0.25 * TERA, 1 * GB, device="cpu")
    if name not in MACHINES:
        raise ConfigError(f"--gpu: no figures of {name!r}; {nearest(name.lower(), [*MACHINES, CPU])}")
    return MACHINES[name]
