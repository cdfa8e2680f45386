"""What a run spends besides its training steps: start-up, and data and augmentation.

    python -m benchmarks.training

Prints the seconds from the start of a process to its first finished training step, beside those that `import torch` alone
takes; and the images per second of whole epochs of `fit` (drawing, gathering, augmenting, normalising, stepping,
accounting) over those of the bare step on a batch that is there already; and what it saves on a CPU to keep the memory of
freed tensors. CIFAR-10's shapes, random pixels.
"""

import statistics
import subprocess
import sys
import tempfile
import time

import torch
import tyro
from torch import nn
from torch.nn import functional as F

from batchens import optimizers
from batchens.data.catalog import DATASETS
from batchens.data.images import Images, Split
from batchens.layers import batch_ensemble, repeat
from batchens.models.cnn import cnn
from batchens.models.vgg import vgg11
from batchens.training import autocast_dtype, fit, keep_freed_memory

FIRST_STEP = """
import sys, time, torch
from pathlib import Path
from scripts.parameter_testing import Config, main
from batchens.run import Folders
folder = Path(sys.argv[1])
from batchens import optimizers
step = optimizers.step
def timed(*arguments):
    step(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print(time.time())
    raise SystemExit
optimizers.step = timed
main(Config(), Folders(folder / "data", folder / "runs", folder / "results"))
"""


def start_up(rounds: int) -> None:
    """Print seconds from starting Python to a finished first step of the default run, and to a finished `import torch`."""
    with tempfile.TemporaryDirectory() as folder:
        programs = {
            "import torch": [sys.executable, "-c", "import torch, time; print(time.time())"],
            "first step": [sys.executable, "-c", FIRST_STEP, folder],
        }
        for name, command in programs.items():
            seconds = []
            for _ in range(rounds + 1):  # the first prepares the data and warms the disk cache
                started = time.time()
                ended = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds.append(float(ended.stdout.split()[-1]) - started)
            timed = sorted(seconds[1:])
            print(f"  {name:13} {statistics.median(timed):5.2f} s  ({timed[0]:.2f} to {timed[-1]:.2f})", flush=True)


def epochs(name: str, model: nn.Module, ensemble_size: int, examples: int, rounds: int) -> None:
    """Print images a second of a bare step and of whole epochs, and their ratio: median and range over rounds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = DATASETS["cifar10"]
    pixels = torch.randint(0, 256, (examples, 3, 32, 32), dtype=torch.uint8, device=device)
    split = Split(pixels, torch.randint(0, 10, (examples,), device=device))
    few = Split(pixels[:100], split.labels[:100])
    images = Images("cifar10", split, few, few, 10, spec.shape, spec.mean, spec.std, tuple("0123456789"), "random")
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = optimizers.build("sgd", model, learning_rate=0.01, weight_decay=5e-4, training_examples=examples)
    batch = 128
    x = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    x = repeat(x, ensemble_size)  # laid out as in training
    y = torch.randint(0, 10, (ensemble_size * batch,), device=device)
    dtype = autocast_dtype("auto", device, optimizer)
    scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(x)
        return F.cross_entropy(logits.float(), y)

    def bare() -> float:
        model.train()
        started = time.perf_counter()
        for _ in range(examples // batch):
            optimizers.step(optimizer, loss, scaler)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return examples // batch * batch / (time.perf_counter() - started)

    def whole() -> float:
        rows = fit(
            model,
            images,
            optimizer,
            ensemble_size=ensemble_size,
            regime="repeat",
            epochs=1,
            warmup_epochs=0,
            batch_size=batch,
            augmented=True,
            seed=0,
        )
        return float(rows[0]["images_per_second"])

    bare(), whole()
    measured = [(bare(), whole()) for _ in range(rounds)]
    over = sorted(whole / bare for bare, whole in measured)
    print(
        f"  {name:28} bare step {statistics.median(one for one, _ in measured):9.0f} images/s, whole epoch "
        f"{statistics.median(two for _, two in measured):9.0f}: {statistics.median(over):.3f} of it "
        f"({over[0]:.3f} to {over[-1]:.3f})",
        flush=True,
    )


def freed_memory(rounds: int) -> None:
    """Print ms of a step of the BatchEnsemble of the two-convolution network, one CPU thread, 4 members of 128 images."""
    model = batch_ensemble(cnn(10), ensemble_size=4, alpha_init=0.5, gamma_init=0.5)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(512, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (512,))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, prepare in (("freed memory given back", lambda: None), ("freed memory kept", keep_freed_memory)):
        prepare()
        times = []
        for _ in range(3 * rounds + 1):  # the first warms up
            started = time.perf_counter()
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()
            times.append(1000 * (time.perf_counter() - started))
        timed = sorted(times[1:])
        print(f"  {name:24} {statistics.median(timed):6.1f} ms  ({timed[0]:.1f} to {timed[-1]:.1f})", flush=True)
    torch.set_num_threads(threads)


def main(rounds: int = 5) -> None:
    """Time start-up and whole epochs.

    Args:
        rounds: timed repetitions of each
    """
    print("\nfrom the start of the process")
    start_up(rounds)
    print("\na step on one CPU thread")
    freed_memory(rounds)
    cuda = torch.cuda.is_available()
    print(
        f"\nwhole epochs over bare steps, batches of 128, {'GPU' if cuda else f'{torch.get_num_threads()} CPU threads'}"
    )
    for name, build, size, examples in (("cnn", cnn, 1, 10_240), ("cnn", cnn, 4, 3840), ("vgg11", vgg11, 1, 1280)):
        model: nn.Module = build(10)
        if size > 1:
            model = batch_ensemble(model, ensemble_size=size, alpha_init=0.5, gamma_init=0.5)
        label = f"{name}, {size} members" if size > 1 else name
        epochs(label, model, size, 45_056 if cuda else examples, rounds)


if __name__ == "__main__":
    tyro.cli(main)
