"""Measure training images/s on a GPU: our Trainer, a bare loop, the encoder alone, and several processes on one GPU.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --encoder mobilenetv3_small_100 --processes 1 2 --batch-size 128

All run on drawn hands of 224 px in bfloat16. `bare` is a loop on one augmented batch that stays on the GPU. `encoder`
is the same with the sum of the means of the encoder's feature maps as loss. The runs are interleaved, and the table has
their medians. With several processes, each trains like a trial with its fraction of the memory, and all start together.
The table has the sum of their images/s, from one run.

Needs a GPU that torch can use. --rehearse runs a tiny version of everything on the CPU, to see that it works.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.data import make_config  # noqa: E402
from benchmarks.result_files import format_machine, write_results  # noqa: E402
from benchmarks.throughput import BenchmarkRun, measure_bare, measure_trainer, time_steps  # noqa: E402
from handpose.config import to_plain_values  # noqa: E402


def measure_encoder(run: BenchmarkRun) -> float:
    """Measure the seconds per step of the encoder on a resident batch: forward, backward and optimizer."""
    module = run.module.to(run.device).train()
    image = module.augment(run.resident(), torch.Generator().manual_seed(0)).image
    optimizer = torch.optim.AdamW(module.net.encoder.parameters(), lr=1e-4, fused=True)  # type: ignore[union-attr]

    def step() -> None:
        with run.autocast():
            loss = torch.stack([level.float().mean() for level in module.net.encoder(image)]).sum()  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return time_steps(step, run)


def measure_one_process(config: DictConfig, *, steps: int, repeats: int, folder: Path) -> dict[str, float]:
    """Measure the images/s of encoder, bare loop and Trainer: the medians of interleaved runs."""
    run = BenchmarkRun.from_config(config, steps=steps)
    sides = {
        "encoder": lambda: measure_encoder(run),
        "bare": lambda: measure_bare(run, augmented=False),
        "trainer": lambda: measure_trainer(run, folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(side())
    return {name: round(run.batch_size / statistics.median(values), 1) for name, values in seconds.items()}


def _train_in_process(
    config: DictConfig, steps: int, fraction: float, folder: Path, start: Barrier, rates: Any
) -> None:
    """Train in one of several processes on the GPU. If one fails, the others do not wait for it."""
    try:
        if config.trainer.accelerator != "cpu":
            torch.cuda.set_per_process_memory_fraction(fraction)
        run = BenchmarkRun.from_config(config, steps=steps)
        measure_trainer(run, folder)  # slow only once: selecting kernels, allocating memory
        start.wait()
        rates.put(run.batch_size / measure_trainer(run, folder))
    except BaseException:
        start.abort()
        raise


def measure_several_processes(config: DictConfig, number: int, *, steps: int, folder: Path) -> float | None:
    """Measure the images/s of all processes together. Return None if one of them failed, e.g. for lack of memory."""
    context = multiprocessing.get_context("spawn")
    config = OmegaConf.create(to_plain_values(config))  # resolve here what needs Hydra
    start, rates = context.Barrier(number, timeout=600), context.Queue()
    processes = [
        context.Process(target=_train_in_process, args=(config, steps, 1 / number, folder / str(i), start, rates))
        for i in range(number)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        return None
    return round(sum(rates.get() for _ in processes), 1)


def measure_row(
    config: DictConfig, *, processes: Sequence[int], steps: int, repeats: int, folder: Path
) -> dict[str, Any]:
    """Measure a row of the results."""
    rates = measure_one_process(config, steps=steps, repeats=repeats, folder=folder)
    shared = {
        str(number): measure_several_processes(config, number, steps=steps, folder=folder) for number in processes
    }
    return {
        "encoder": config.model.encoder.name,
        "batch_size": config.data.batch_size,
        "images_per_s": rates,
        "trainer_over_bare": round(rates["trainer"] / rates["bare"], 3),
        "processes_images_per_s": shared,
    }


def main() -> None:
    """Print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--encoder", nargs="+", default=["efficientnet_b4", "mobilenetv3_small_100"], help="encoders to measure"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per batch; default: %(default)s")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of processes that share the GPU"
    )
    parser.add_argument("--steps", type=int, default=30, help="training steps per run; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; default: %(default)s")
    parser.add_argument("--rehearse", action="store_true", help="run a tiny version on the CPU")
    parser.add_argument(
        "--output",
        type=Path,
        default=REPOSITORY / "benchmarks" / "results" / "gpu.json",
        help="file for the figures, as JSON; default: %(default)s",
    )
    given = parser.parse_args()
    if not (given.rehearse or torch.cuda.is_available()):
        sys.exit("benchmarks/gpu.py needs a GPU that torch can use, and this machine has none; --rehearse runs without")
    size, accelerator = (64, "cpu") if given.rehearse else (224, "gpu")
    print(f"{format_machine()}; bf16-mixed, {size} px, batches of {given.batch_size}; images/s")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for encoder in given.encoder:
            overrides = [
                f"data.batch_size={given.batch_size}",
                f"model.encoder.name={encoder}",
                f"trainer.accelerator={accelerator}",
                "trainer.precision=bf16-mixed",
            ]
            num_images = (given.steps + 5) * given.batch_size
            config = make_config(Path(name), image_size=size, num_images=num_images, overrides=overrides)
            row = measure_row(
                config, processes=given.processes, steps=given.steps, repeats=given.repeats, folder=Path(name) / "run"
            )
            rows.append(row)
            print(f"{encoder}: " + ", ".join(f"{side} {rate}" for side, rate in row["images_per_s"].items()))
            for number, rate in row["processes_images_per_s"].items():
                print(f"    {number} process(es): {'failed' if rate is None else rate}", flush=True)
    write_results(given.output, {"steps": given.steps, "repeats": given.repeats, "rows": rows})


if __name__ == "__main__":
    main()
