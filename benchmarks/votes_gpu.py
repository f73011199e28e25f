"""Speed of the votes on a graphics card, float16 descriptors: both kernels, against the card's own matrix product.

    python benchmarks/votes_gpu.py [--embedding 256] [--rounds 9] [--sweep]

For K = 20 and 100, with all patches and with a quarter of them padding (4:3 images). TFLOP/s counts the useful work
only, 2 P0 P1 E for each pair, once also where both directions are scored; the peak is one large float16 product in the
same run. Three times are taken:

    kernel      the launch on resident descriptors
    call        with the planning of it
    end to end  `CudaShard.votes`, NumPy arrays in and out: queries go to the card, the votes of every pair come back

Every number is the median of interleaved rounds, by the card's own clock but for end to end. `--sweep` tries tiles for
the Triton kernel. Without a CUDA device it ends with code 2; `--device cpu` with small sizes is a trial of the script,
not a measurement. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch

from vop.retrieval import cuda

REPEATS = 5  # launches of one timing


def collection(images: int, P: int, E: int, words: int, device: torch.device) -> torch.Tensor:
    """Unit descriptors (images, P, E) float16: each patch shows one of `words` things: 1 / words of pairs hit."""
    generator = torch.Generator(device).manual_seed(0)
    centres = torch.randn((words, E), device=device, generator=generator)
    patches = torch.empty((images, P, E), dtype=torch.float16, device=device)
    for i in range(0, images, 256):
        shape = patches[i : i + 256].shape[:2]
        seen = centres[torch.randint(words, shape, device=device, generator=generator)]
        seen = seen + 0.4 * torch.randn(seen.shape, device=device, generator=generator)
        patches[i : i + 256] = torch.nn.functional.normalize(seen, dim=-1).half()
    return patches


def seconds(function: Callable, device: torch.device, repeats: int = REPEATS) -> float:
    """Time of one call, by the card's clock if there is one."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - start) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def medians(functions: dict, device: torch.device, rounds: int) -> dict:
    """Median time of every function over interleaved rounds; the first round compiles and warms up."""
    times: dict = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            taken = seconds(function, device)
            if turn:
                times[name].append(taken)
    return {name: float(np.median(values)) for name, values in times.items()}


def triton_kernel(device: torch.device):
    """The module of the Triton kernel, or None, with the reason printed, where it cannot run."""
    try:
        from vop.retrieval import cuda_kernel
    except ImportError as error:
        print(f"the torch kernel alone: {error}")
        return None
    if cuda_kernel.runs_on(device):
        return cuda_kernel
    print(f"the torch kernel alone: the Triton kernel does not run on {device}")
    return None


def check(found: tuple, expected: tuple, E: int) -> None:
    """Both kernels must give the same votes, or the comparison says nothing; see `cuda.tolerance`."""
    (sums, counts), (expected_sums, expected_counts) = found[:2], expected[:2]
    same = counts == expected_counts
    if (~same).float().mean() > 1e-3:
        raise SystemExit(f"{int((~same).sum())} of {same.numel()} counts differ between the kernels")
    bound = counts * (2 * cuda.tolerance(E) + counts * 2.0**-22)
    if ((sums - expected_sums).abs() > bound)[same].any():
        raise SystemExit("sums differ between the kernels by more than rounding")


@dataclasses.dataclass(frozen=True)
class Case:
    """Q queries with K random candidates each, of which the first `used` patches take part."""

    x: torch.Tensor
    y: torch.Tensor
    query: torch.Tensor
    place: torch.Tensor
    used: int
    bound: float

    def arguments(self) -> tuple:
        """What both kernels take."""
        sizes = (torch.full((len(t),), self.used, dtype=torch.int32, device=t.device) for t in (self.x, self.y))
        x_sizes, y_sizes = sizes
        return self.x, x_sizes, self.y, y_sizes, self.query, self.place, self.bound

    @property
    def flops(self) -> float:
        return 2.0 * len(self.query) * self.used**2 * self.x.shape[2]


def case(x: torch.Tensor, y: torch.Tensor, K: int, used: int, bound: float) -> Case:
    rng = np.random.default_rng(K)
    place = np.concatenate([np.sort(rng.choice(len(y), K, replace=False)) for _ in range(len(x))])
    query = torch.arange(len(x), device=x.device).repeat_interleave(K)
    x, y = (torch.where(torch.arange(t.shape[1], device=t.device)[:, None] < used, t, 0) for t in (x, y))
    return Case(x, y, query, torch.from_numpy(place).to(x.device), used, bound)


def end_to_end(item: Case, kernel: str, workspace: int) -> Callable:
    """`CudaShard.votes` of the case, from and to the host."""
    masks = None if item.used == item.x.shape[1] else np.tile(np.arange(item.x.shape[1]) < item.used, (len(item.y), 1))
    globals_, rows = np.zeros((len(item.y), 1), np.float32), np.arange(len(item.y))
    shard = cuda.CudaShard(item.y, globals_, rows, masks, device=item.x.device, kernel=kernel, workspace=workspace)
    queries, query_masks = item.x.cpu().numpy(), None if masks is None else np.tile(masks[0], (len(item.x), 1))
    query, place = item.query.cpu().numpy(), item.place.cpu().numpy()
    wanted = SimpleNamespace(queries=query, rows=place, mutual=np.zeros(len(query), bool))
    return lambda: shard.votes(queries, query_masks, wanted, 1 - item.bound)


def measured(item: Case, name: str, functions: dict, options, peak: Callable) -> dict:
    """Rates of one case: the given ways to compute it, interleaved with the peak."""
    device, queries = item.x.device, len(item.x)
    times = medians({"peak": peak, **functions}, device, options.rounds)
    top = 2.0 * options.gemm**3 / times.pop("peak") / 1e12
    print(f"{name:<12} peak {top:.1f} TFLOP/s")
    result: dict = {"peak_tflops": round(top, 2)}
    for way, taken in times.items():
        rate = item.flops / taken / 1e12
        columns = f"{1e3 * taken:>9.3f} ms {queries / taken:>11.0f} queries/s {rate:>8.2f} TFLOP/s {rate / top:>7.1%}"
        print(f"  {way:<22} {columns}")
        result[way.replace(" ", "_")] = {
            "ms": round(1e3 * taken, 4),
            "queries_per_s": round(queries / taken, 1),
            "tflops": round(rate, 3),
            "share_of_peak": round(rate / top, 4),
        }
    return result


def ways(item: Case, cuda_kernel, workspace: int) -> dict:
    """How a case can be computed: name -> function. Checks first that the kernels agree."""
    arguments = item.arguments()
    torch_votes = chunked(cuda.pair_votes, arguments, workspace)
    functions = {"torch kernel": torch_votes, "torch end to end": end_to_end(item, "torch", workspace)}
    if cuda_kernel is None:
        return functions
    x, x_sizes, y, y_sizes, query, place, bound = arguments
    check(cuda_kernel.pair_votes(*arguments, False), torch_votes(), x.shape[2])
    for both in (False, True):
        tile = cuda_kernel.default_tile(x, both)
        plan = cuda_kernel.plan(query, place, y_sizes, y.shape[1], tile)
        label = "triton both" if both else "triton"
        functions[f"{label} kernel"] = lambda plan=plan, both=both, tile=tile: cuda_kernel.run(
            x, x_sizes, y, plan, len(query), bound, both, tile
        )
    functions["triton call"] = lambda: cuda_kernel.pair_votes(*arguments, False)
    functions["triton end to end"] = end_to_end(item, "triton", workspace)
    return functions


def chunked(kernel: Callable, arguments: tuple, workspace: int) -> Callable:
    """The torch kernel in parts that keep within the workspace, as the shard runs it."""
    x, x_sizes, y, y_sizes, query, place, bound = arguments
    P, S, E = x.shape[1], y.shape[1], x.shape[2]
    size = max(1, workspace // (8 * (P + S) * E + 10 * P * S))

    def run() -> tuple:
        parts = [
            kernel(x, x_sizes, y, y_sizes, q, j, bound, False)
            for q, j in zip(query.split(size), place.split(size), strict=True)
        ]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    return run


def tiles(cuda_kernel, both: bool) -> list:
    """Tiles worth trying on a card with 227 KB on the chip."""
    shapes = [(128, 128, 256, 8), (128, 64, 256, 8), (64, 64, 256, 4), (64, 128, 256, 4), (256, 64, 256, 8)]
    shapes += [(128, 128, 64, 8), (128, 64, 64, 4), (128, 128, 128, 8), (64, 64, 64, 4)]
    pairs = (5, 10) if not both else (5,)
    return [cuda_kernel.Tile(*shape, stages, n) for shape in shapes for stages in (2, 3) for n in pairs]


def sweep(item: Case, cuda_kernel, options, both: bool) -> list[dict]:
    """Rate of the Triton kernel for every tile that fits the card, best first."""
    from triton import OutOfResources

    x, x_sizes, y, y_sizes, query, place, bound = item.arguments()
    found = []
    for tile in tiles(cuda_kernel, both):
        plan = cuda_kernel.plan(query, place, y_sizes, y.shape[1], tile)

        def launch(plan=plan, tile=tile):
            return cuda_kernel.run(x, x_sizes, y, plan, len(query), bound, both, tile)

        try:
            launch()
        except OutOfResources as error:
            print(f"  {tile}: {error}")
            continue
        taken = medians({"kernel": launch}, x.device, 3)["kernel"]
        found.append({**dataclasses.asdict(tile), "tflops": round(item.flops / taken / 1e12, 2)})
    found.sort(key=lambda entry: -entry["tflops"])
    for entry in found:
        print("  " + "  ".join(f"{key} {value}" for key, value in entry.items()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--patches", type=int, default=256)
    parser.add_argument("--embedding", type=int, default=256)
    parser.add_argument("--queries", type=int, default=512, help="queries in a batch")
    parser.add_argument("--database", type=int, default=8000, help="images in the shard")
    parser.add_argument("--candidates", type=int, nargs="+", default=[20, 100], help="values of K")
    parser.add_argument("--words", type=int, default=100, help="things that patches show; 1 / words of pairs hit")
    parser.add_argument("--radius", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--gemm", type=int, default=8192, help="size of the product that is the peak")
    parser.add_argument("--workspace", type=int, default=2**32, help="bytes for a launch")
    parser.add_argument("--sweep", action="store_true", help="also try tiles for the Triton kernel")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: this benchmark measures a graphics card (--device cpu is a trial of the script)")
        sys.exit(2)

    every = collection(options.database + options.queries, options.patches, options.embedding, options.words, device)
    y, x = every[: options.database], every[options.database :]
    a, b = torch.randn((2, options.gemm, options.gemm), device=device).half()
    cuda_kernel, bound = triton_kernel(device), float(np.float32(1 - options.radius))
    result: dict = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in ("patches", "embedding", "queries", "database")},
    }
    for K in options.candidates:
        for used in (options.patches, options.patches * 3 // 4):
            name = f"k{K}" if used == options.patches else f"k{K}_masked"
            item = case(x, y, K, used, bound)
            if "hit_density" not in result:
                counts = cuda.pair_votes(*item.arguments()[:4], item.query[:K], item.place[:K], bound, False)[1]
                result["hit_density"] = round(float(counts.sum()) / (K * used**2), 4)
                print(f"{result['device']}: {100 * result['hit_density']:.2f}% of patch pairs hit")
            functions = ways(item, cuda_kernel, options.workspace)
            result[name] = measured(item, name, functions, options, lambda: torch.matmul(a, b))
            if cuda_kernel is not None:
                ratio = result[name]["torch_kernel"]["ms"] / result[name]["triton_kernel"]["ms"]
                result[name]["triton_times_torch"] = round(ratio, 2)
                print(f"  the Triton kernel is {ratio:.2f} times as fast as the torch kernel")
            if options.sweep and cuda_kernel is not None:
                for both in (False, True):
                    print(f"tiles, {'both directions' if both else 'one direction'}:")
                    result[name]["sweep_both" if both else "sweep"] = sweep(item, cuda_kernel, options, both)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
