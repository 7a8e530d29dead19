"""What a GPU offers a kernel, as numbers. Everything here is data; only ``probe`` asks a driver.

``h200`` holds measured rates: a copy (4.27e12 B/s, reads and writes counted) and a large bf16 product (778e12 FLOP/s).
``h100`` is the same chip with slower memory: its copy rate was read there (3.0e12 B/s), and the rest is the H200's. The
L2 rate of both is an estimate above what a kernel was seen to draw (6.3e12 B/s). For these two, ``calibrated`` says that
predicted times were held against kernels timed on the card: 24 times on an H200, thousands on an H100 (``attngen.formulas``).
The other records hold the makers' datasheet values times the fraction of the datasheet that was measured on the H200,
and say ``calibrated=False``. Limits (shared memory, registers, multiprocessors) are the documented ones for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from attngen.errors import Unavailable, UnknownDevice

MEMORY_FRACTION = 4.27 / 4.8  # of the datasheet's bandwidth, as a copy reaches it on an H200
TENSOR_FRACTION = 778 / 989  # of the datasheet's rate, as a large product reaches it on an H200
DEFAULT = "h200"


@dataclass(frozen=True)
class Device:
    """One GPU. Sizes in bytes, rates per second, ``*_per_clock`` for each multiprocessor (SM)."""

    name: str
    label: str
    backend: str  # "cuda" or "hip"
    arch: int | str  # 90 for compute capability 9.0, "gfx942"
    sms: int
    smem_block: int  # shared memory one block may ask for
    smem_sm: int
    registers_sm: int  # 32-bit registers
    warps_sm: int  # warps that can be resident
    l2_bytes: int
    hbm_bandwidth: float
    l2_bandwidth: float
    clock: float  # under load
    tensor16: float  # FLOP/s of 16-bit products that accumulate in fp32
    tensor32: float  # FLOP/s of TF32 products
    fp32: float  # FLOP/s without tensor cores
    exp_per_clock: int = 16
    lanes_per_clock: int = 128  # fp32 instructions
    latency: float = 0.3e-6  # from asking for memory to having it; fitted, see attngen.formulas
    launch: float = 3e-6
    warp_size: int = 32
    calibrated: bool = False
    gluon: bool = True  # whether kernels in Gluon may be planned for it

    @property
    def target(self) -> tuple[str, int | str, int]:
        """The arguments of Triton's ``GPUTarget``, for compilation ahead of time."""
        return self.backend, self.arch, self.warp_size

    @property
    def wgmma(self) -> bool:
        """Whether products are issued by groups of four warps and read their operands from shared memory (Hopper)."""
        return self.backend == "cuda" and self.arch == 90

    @property
    def hopper(self) -> bool:
        """Whether kernels of the hopper family may run there."""
        return self.wgmma and self.gluon


H200 = Device(
    name="h200",
    label="NVIDIA H200",
    backend="cuda",
    arch=90,
    sms=132,
    smem_block=227 << 10,
    smem_sm=228 << 10,
    registers_sm=65536,
    warps_sm=64,
    l2_bytes=50 << 20,
    hbm_bandwidth=4.27e12,
    l2_bandwidth=7.0e12,
    clock=1.755e9,
    tensor16=778e12,
    tensor32=389e12,
    fp32=66.9e12,
    calibrated=True,
)
_A100 = Device(
    name="a100",
    label="NVIDIA A100 80GB",
    backend="cuda",
    arch=80,
    sms=108,
    smem_block=163 << 10,
    smem_sm=164 << 10,
    registers_sm=65536,
    warps_sm=64,
    l2_bytes=40 << 20,
    hbm_bandwidth=2.039e12 * MEMORY_FRACTION,
    l2_bandwidth=4.0e12,
    clock=1.41e9,
    tensor16=312e12 * TENSOR_FRACTION,
    tensor32=156e12 * TENSOR_FRACTION,
    fp32=19.5e12,
    lanes_per_clock=64,
)
_L4 = Device(
    name="l4",
    label="NVIDIA L4",
    backend="cuda",
    arch=89,
    sms=58,
    smem_block=99 << 10,
    smem_sm=100 << 10,
    registers_sm=65536,
    warps_sm=48,
    l2_bytes=48 << 20,
    hbm_bandwidth=0.300e12 * MEMORY_FRACTION,
    l2_bandwidth=2.0e12,
    clock=2.04e9,
    tensor16=121e12 * TENSOR_FRACTION,
    tensor32=60e12 * TENSOR_FRACTION,
    fp32=30.3e12,
)
_MI300X = Device(
    name="mi300x",
    label="AMD Instinct MI300X",
    backend="hip",
    arch="gfx942",
    sms=304,
    smem_block=64 << 10,
    smem_sm=64 << 10,
    registers_sm=131072,
    warps_sm=32,
    l2_bytes=256 << 20,  # the memory-side cache, which every compute unit shares; each L2 serves only its own die
    hbm_bandwidth=5.3e12 * MEMORY_FRACTION,
    l2_bandwidth=12e12,
    clock=2.1e9,
    tensor16=1307e12 * TENSOR_FRACTION,
    tensor32=653e12 * TENSOR_FRACTION,
    fp32=163.4e12,
    warp_size=64,
)
_H100 = replace(H200, name="h100", label="NVIDIA H100 80GB HBM3", hbm_bandwidth=3.0e12)
_RTX4090 = replace(
    _L4,
    name="rtx4090",
    label="NVIDIA GeForce RTX 4090",
    sms=128,
    l2_bytes=72 << 20,
    hbm_bandwidth=1.008e12 * MEMORY_FRACTION,
    l2_bandwidth=5.0e12,
    clock=2.52e9,
    tensor16=165.2e12 * TENSOR_FRACTION,
    tensor32=82.6e12 * TENSOR_FRACTION,
    fp32=82.6e12,
)
DEVICES: dict[str, Device] = {d.name: d for d in (H200, _H100, _A100, _L4, _RTX4090, _MI300X)}


def resolve(target: str) -> Device:
    """The device of that name; "auto" is the card of this machine, or an H200 where there is none."""
    if target == "auto":
        import torch

        return probe() if torch.cuda.is_available() else DEVICES[DEFAULT]
    if target not in DEVICES:
        raise UnknownDevice(
            f'unknown target "{target}". Known: auto, {", ".join(DEVICES)}. '
            'Choose one of these, or "auto" on a machine with the card itself.'
        )
    return DEVICES[target]


def probe() -> Device:
    """The current card. Raises ``Unavailable`` without one."""
    import torch

    if not torch.cuda.is_available():
        raise Unavailable("there is no GPU here to ask. Name the one to plan for, for example h200.")
    return from_properties(torch.cuda.get_device_properties(torch.cuda.current_device()), hip=bool(torch.version.hip))


def from_properties(properties: Any, *, hip: bool) -> Device:
    """The known record of that card, or limits from the driver with rates scaled from the most similar known card."""
    arch = properties.gcnArchName.split(":")[0] if hip else 10 * properties.major + properties.minor
    for known in DEVICES.values():
        same_size = known.sms == properties.multi_processor_count and known.arch == arch
        if same_size and properties.name.startswith(known.label):
            return known
    return _scaled(_most_similar(arch), arch, properties)


def _most_similar(arch: int | str) -> Device:
    """Same maker, and the newest generation that is not newer than ``arch``."""
    if isinstance(arch, str):
        return DEVICES["mi300x"]
    older = [DEVICES[name] for name in ("h100", "rtx4090", "a100") if DEVICES[name].arch <= arch]  # type: ignore[operator]
    return older[0] if older else DEVICES["a100"]


def _scaled(model: Device, arch: int | str, properties: Any) -> Device:
    sms = properties.multi_processor_count
    share = sms / model.sms
    smem_sm = getattr(properties, "shared_memory_per_multiprocessor", model.smem_sm)
    return replace(
        model,
        name="".join(c if c.isalnum() else "-" for c in properties.name.lower()).strip("-"),
        label=properties.name,
        arch=arch,
        sms=sms,
        smem_block=getattr(properties, "shared_memory_per_block_optin", min(smem_sm, model.smem_block)),
        smem_sm=smem_sm,
        registers_sm=getattr(properties, "regs_per_multiprocessor", model.registers_sm),
        warps_sm=getattr(properties, "max_threads_per_multi_processor", 32 * model.warps_sm) // model.warp_size,
        l2_bytes=getattr(properties, "L2_cache_size", 0) or model.l2_bytes,
        hbm_bandwidth=_memory_rate(properties) or model.hbm_bandwidth * share,
        l2_bandwidth=model.l2_bandwidth * share,
        tensor16=model.tensor16 * share,
        tensor32=model.tensor32 * share,
        fp32=model.fp32 * share,
        calibrated=False,
    )


def _memory_rate(properties: Any) -> float | None:
    """Achievable bytes/s, where torch tells the memory clock (kHz, two transfers each) and the bus width (bits)."""
    clock, width = (getattr(properties, field, 0) for field in ("memory_clock_rate", "memory_bus_width"))
    return 2e3 * clock * width / 8 * MEMORY_FRACTION if clock and width else None
