"""What a network costs to run: parameters, FLOPs and latency."""

from __future__ import annotations

import contextlib
import copy
import logging
import platform
import timeit
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

WARM_UP = 3  # calls before anything is timed


@dataclass(frozen=True)
class Latency:
    """The time of one forward pass.

    Attributes:
        median_ms: median over the runs, in milliseconds a batch.
        iqr_ms: distance between the quartiles.
        device: `cpu`, or `cuda` with the GPU's name.
        threads: Torch threads.
        batch: images a run.
        runs: timed forward passes.
        low_ms, high_ms: smallest and largest median of a round: what was not steady shows here.
    """

    median_ms: float
    iqr_ms: float
    device: str
    threads: int
    batch: int
    runs: int
    low_ms: float
    high_ms: float

    @property
    def setup(self) -> str:
        """`cpu, 1 thread, batch 1`: two latencies compare only where this is equal."""
        return f"{self.device}, {self.threads} thread{'s' if self.threads > 1 else ''}, batch {self.batch}"


def parameters(network: nn.Module) -> int:
    """Number of scalars in the network's parameters, shared ones once. Buffers (batch statistics) do not count."""
    return sum(p.numel() for p in network.parameters())


def flops(network: nn.Module, size: int) -> int:
    """Floating-point operations of one forward pass on one image of `size` x `size` pixels.

    Counted are convolutions and matrix products, attention's included, at 2 for each multiply-add (twice the "MACs"
    or "FLOPs" of papers that count a multiply-add as one). Normalisation, activations and additions are not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which whoever counts nothing is spared

    # The counter asks for the gradient function of every input of a module, and a learned prompt is one.
    network = copy.deepcopy(network).requires_grad_(False)
    # A fused attention kernel is one operation that the counter may not know, and on the CPU the fast path of
    # nn.MultiheadAttention always is: both are taken apart here. timm's own switch is read when a network is built,
    # so it cannot do this.
    with _evaluating(network), torch.inference_mode(), _plain_attention(), FlopCounterMode(display=False) as counter:
        network(_images(network, 1, size))
    return int(counter.get_total_flops())


class _Alive(TorchDispatchMode):
    """Adds up the storages that are alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def hold(self, tensor: Any) -> None:
        """Counts a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size, key = storage.nbytes(), storage._cdata
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.hold, result)
        return result


def peak_bytes(network: nn.Module, size: int) -> int:
    """Memory of one forward pass on one image of `size` x `size` pixels: weights, input, and the activations that are
    alive at the same time. What kernels need for themselves is not counted, so it is the same on every device.
    """
    network = copy.deepcopy(network).requires_grad_(False)
    with _evaluating(network), torch.inference_mode(), _Alive() as alive:
        for tensor in (*network.parameters(), *network.buffers()):
            alive.hold(tensor)
        network(_images(network, 1, size))
    return alive.peak


def model_bytes(network: nn.Module) -> int:
    """Size of the network's weights and buffers in a file."""
    return sum(t.numel() * t.element_size() for t in network.state_dict().values())


def costs(network: nn.Module, size: int) -> dict[str, float]:
    """What a network costs on any device: `params_total`, `flops`, `memory_mb` and `model_mb` of a leaderboard's row.

    A network on the meta device will do.
    """
    return {
        "params_total": parameters(network),
        "flops": flops(network, size),
        "memory_mb": peak_bytes(network, size) / 1e6,
        "model_mb": model_bytes(network) / 1e6,
    }


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def latency(
    network: nn.Module,
    size: int,
    *,
    device: str = "cpu",
    threads: int = 1,
    batch: int = 1,
    min_run_time: float = 0.5,
    rounds: int = 1,
) -> Latency:
    """Times forward passes in inference mode, after a warm-up; the network itself stays where and as it is.

    See `timed` for a network that another runtime runs.

    Args:
        network: what to time.
        size: side of the square input, in pixels.
        device: where to time it; a copy is moved there.
        threads: Torch threads while timing.
        batch: images in each run.
        min_run_time: seconds of timed runs, at least.
        rounds: as in `timed`.
    """
    here = {p.device.type for p in network.parameters()} or {"cpu"}
    moved = network if here == {torch.device(device).type} else copy.deepcopy(network).to(device)
    images = _images(moved, batch, size)
    where = f"cuda ({torch.cuda.get_device_name(images.device)})" if images.is_cuda else str(images.device)
    with _evaluating(moved), torch.inference_mode():
        return timed(lambda: moved(images), where, threads, batch, min_run_time, rounds)


def timed(
    call: Callable[[], Any], device: str, threads: int, batch: int, min_run_time: float = 0.5, rounds: int = 1
) -> Latency:
    """Times calls of anything that runs a network once, after a warm-up.

    Args:
        call: one forward pass.
        device: how it is called in the result.
        threads: Torch threads while timing; another runtime's are its own affair.
        batch: images in each call.
        min_run_time: seconds of timed runs, at least, over all rounds.
        rounds: measurements one after the other; the median is over all of them.
    """
    # Torch's own clock waits for a GPU, which opens a context on it, even where nothing ran there.
    clock = {"timer": timeit.default_timer} if device == "cpu" else {}
    timer = _timer_class()("call()", globals={"call": call}, num_threads=threads, **clock)
    timer.timeit(WARM_UP)
    parts = [timer.blocked_autorange(min_run_time=min_run_time / rounds) for _ in range(rounds)]
    (measured,) = type(parts[0]).merge(parts)
    medians = [part.median * 1e3 for part in parts]
    return Latency(
        median_ms=measured.median * 1e3,
        iqr_ms=measured.iqr * 1e3,
        device=device,
        threads=threads,
        batch=batch,
        runs=sum(part.number_per_run * len(part.raw_times) for part in parts),
        low_ms=min(medians),
        high_ms=max(medians),
    )


def _timer_class() -> Any:
    """Imported late and without the warning about a CUDA toolkit on a machine that has no GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torch.utils.benchmark import Timer
    finally:
        logger.setLevel(level)
    return Timer


def _images(network: nn.Module, batch: int, size: int) -> torch.Tensor:
    """Zeros, of the type and on the device of the network."""
    first = next(network.parameters(), torch.empty(0))
    return torch.zeros(batch, 3, size, size, dtype=first.dtype, device=first.device)


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, with every module's own mode restored after."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as matrix products; the settings are restored after."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
