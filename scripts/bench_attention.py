"""How fast is each kernel that attends to packed rows, and how far from float32? Pairs whose prompt is half of a row.

    python scripts/bench_attention.py                                       # on the GPU, else short rows on the CPU
    python scripts/bench_attention.py --lengths 8192 32768 --head-sizes 128 --dtypes bfloat16

Prints docs/engine.md's table: milliseconds of a layer's attention, forward and backward (the least of all turns, the
first ones left out because they compile), and the relative error of what comes out and of its gradients.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from alignctl.engine.attention import by_spans, flash, sdpa_by_parts
from alignctl.engine.layout import Layout, pack

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lengths = [1024, 4096, 8192, 16384, 32768] if cuda else [256, 1024]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="tokens of one sequence of a pair")
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--turns", type=int, default=10)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{card}, torch {torch.__version__}, {arguments.heads} heads, {arguments.key_heads} of keys", flush=True)
    print(
        "| tokens of a row | head size | dtype | kernel | ms | error | error of gradients |\n|" + "---|" * 7, flush=True
    )
    for length in arguments.lengths:
        for head_size in arguments.head_sizes:
            layout = pair(length, device)
            torch.manual_seed(0)
            shapes = [
                (1, heads, layout.input_ids.numel(), head_size)
                for heads in (arguments.heads,) + (arguments.key_heads,) * 2
            ]
            inputs = [torch.randn(shape, device=device) for shape in shapes]
            weights = torch.randn(shapes[0], device=device)
            right = once(lambda *given: sdpa_by_parts(*given, layout, None, 0.0), inputs, weights)  # noqa: B023
            for dtype in (getattr(torch, name) for name in arguments.dtypes):
                for kernel, attend in kernels(layout, dtype).items():
                    given = [one.to(dtype) for one in inputs]
                    ms = least(attend, given, weights.to(dtype), arguments.turns)
                    out, *gradients = (
                        error(found, expected)
                        for found, expected in zip(once(attend, given, weights.to(dtype)), right, strict=True)
                    )
                    name = str(dtype).removeprefix("torch.")
                    numbers = f"{ms:.2f} | {out:.1e} | {max(gradients):.1e}"
                    print(f"| {length:,} | {head_size} | {name} | {kernel} | {numbers} |", flush=True)


def pair(length: int, device: torch.device) -> Layout:
    """Two sequences of a length that share the first half."""
    first = torch.randint(3, 1000, (length,))
    second = first.clone()
    second[length // 2 :] = 1000 + torch.arange(length - length // 2)
    return pack([first, second], [(0, 1)], device)


def kernels(layout: Layout, dtype: torch.dtype) -> dict[str, Attend]:
    """Those that run with this type on the device of a layout; besides them TRL's way, padded rows."""
    ways: dict[str, Attend] = {
        "sdpa": lambda *given: sdpa_by_parts(*given, layout, None, 0.0),
        "padded": lambda *given: padded(*given, layout),
    }
    if layout.input_ids.is_cuda:
        compiled = torch.compile(flex_attention)
        ways["flex"] = lambda *given: compiled(*given, block_mask=layout.block_mask, enable_gqa=True)
        if dtype.itemsize == 2:
            ways["flash"] = lambda *given: by_spans(*given, layout, None, flash)
    return ways


def padded(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Both sequences whole, side by side; what both have is given back once, from the first."""
    rows = [one[0][:, layout.where].transpose(0, 1) for one in (query, key, value)]
    out = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
    shared = layout.groups[0].shared
    return torch.cat([out[0], out[1][:, shared:]], 1)[None]


def once(attend: Attend, inputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    """What comes out, and the gradients of the inputs."""
    inputs = [one.detach().requires_grad_() for one in inputs]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights)]


def least(attend: Attend, inputs: list[Tensor], weights: Tensor, turns: int) -> float:
    """Milliseconds of the fastest turn."""
    inputs = [one.detach().requires_grad_() for one in inputs]
    seconds = []
    for _ in range(turns + 2):
        wait(weights.device)
        began = time.perf_counter()
        torch.autograd.grad(attend(*inputs), inputs, weights)
        wait(weights.device)
        seconds.append(time.perf_counter() - began)
    return 1000 * min(seconds[2:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
