"""Training a network or an ensemble: epochs, checkpoint and resume, mixed precision, timing.

One loop serves a plain network (an ensemble of one), a BatchEnsemble and a deep ensemble. Each epoch ends with a
checkpoint that holds everything that decides what comes after, so on a CPU a run that was killed and resumed gives the
same numbers, bit for bit, as one that never stopped. At most the running epoch is repeated.
"""

import ctypes
import math
import os
import pickle
import re
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from ivon import IVON
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from tqdm import tqdm

from batchens import optimizers
from batchens.data.augment import augment
from batchens.data.catalog import DATASETS
from batchens.data.images import Images, normalise
from batchens.files import write_tensors
from batchens.layers import members, repeat
from batchens.metrics import measure, mixture, reliability, score
from batchens.models.deep_ensemble import DeepEnsemble
from batchens.results import CURVE, numbers, scheduler_job_id

Regime = Literal["repeat", "split"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Rows = list[dict[str, Any]]
GPU_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)  # RuntimeErrors that are no fault of a file


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


def choose_device(name: str) -> torch.device:
    """Return the device of that name ("auto": the GPU, where there is one), or say at once why it can't be used.

    On a GPU, float32 is what it says from then on: by torch's default convolutions are TF32, of 10 bits, on an A100 or H100.

    Raises:
        ValueError: there is no such device or no GPU, this torch holds no kernels for it, or ("auto") it can't start the GPU
            that the scheduler gave this job.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if name != "auto":
            raise ValueError(
                f"device {name!r} needs a GPU that torch can see, however torch {torch.__version__} sees none"
            )
        if given := _gpus_of_job():
            raise ValueError(
                f"a job that was given a GPU (CUDA_VISIBLE_DEVICES={given}) must train on it, however torch "
                f"{torch.__version__} can't start it: it was built without CUDA or for a newer driver than the node's, or the "
                "GPU is lost; see `nvidia-smi`, install a torch that fits, or ask the scheduler for no GPU"
            )
        return torch.device("cpu")
    try:
        device = torch.device("cuda" if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu or cuda, however: {name!r}") from error
    major, minor = torch.cuda.get_device_capability(device)
    kernels = torch.cuda.get_arch_list()
    if not any(arch.startswith(f"sm_{major}") and int(arch[3:].rstrip("af")) <= 10 * major + minor for arch in kernels):
        raise ValueError(
            f"torch {torch.__version__} holds no kernels for {torch.cuda.get_device_name(device)} (sm_{major}{minor}; it has "
            f"{', '.join(kernels)}); for a V100 install torch from the CUDA 12.6 wheels: "
            'pip install "torch<2.14" --index-url https://download.pytorch.org/whl/cu126'
        )
    torch.backends.cudnn.allow_tf32 = False
    return device


def _gpus_of_job() -> str:
    """Return the GPUs that a scheduler gave the job that this process is in; '' for none, or outside of one."""
    if os.environ.get("SUBMITIT_EXECUTOR") == "local" or not scheduler_job_id():
        return ""  # local workers are given what nvidia-smi lists, whatever torch was installed
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return given if re.match(r"\d|GPU-|MIG-", given) else ""  # older SLURMs say NoDevFiles to a job without a GPU


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for the next ones (Linux with glibc; elsewhere nothing happens).

    By default every large tensor is mapped anew and its pages are zeroed by the kernel, in every step. A step of the
    two-convolution network on one CPU thread, 4 members of 128 images, took 613 ms so, and 288 ms with memory kept
    (`benchmarks/training.py`).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def autocast_dtype(precision: Precision, device: torch.device, optimizer: torch.optim.Optimizer) -> torch.dtype:
    """Return the number format of forward passes: for "auto", bfloat16 on a GPU that has it, else float16, float32 on a CPU.

    Raises:
        ValueError: float16 on a CPU or with IVON.
    """
    ivon = isinstance(optimizer, IVON)
    if precision == "auto":
        if device.type == "cpu":
            return torch.float32
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float32 if ivon else torch.float16
    if precision == "fp16" and (device.type == "cpu" or ivon):
        raise ValueError(
            "fp16 needs a GPU and SGD or Adam (it scales the loss, which IVON can't follow); use bf16 or fp32"
        )
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def device_facts(
    device: torch.device, precision: Precision, optimizer: torch.optim.Optimizer, compiled: bool
) -> dict[str, Any]:
    """Return what a result says of how it was computed: device_name, number_format, compiled, torch."""
    cuda = device.type == "cuda"
    return {
        "device_name": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "number_format": str(autocast_dtype(precision, device, optimizer)).removeprefix("torch."),
        "compiled": compiled,
        "torch": torch.__version__,
    }


def schedule(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LRScheduler:
    """Return a linear warm-up from 1 % over `warmup_steps`, then a cosine down to 0 at `total_steps`, to step each step."""
    cosine = CosineAnnealingLR(optimizer, T_max=max(1, total_steps - warmup_steps))
    if warmup_steps == 0:
        return cosine
    warmup = LinearLR(optimizer, start_factor=0.01, total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_steps])


def member_losses(logits: Tensor, labels: Tensor, ensemble_size: int) -> Tensor:
    """Return each member's mean cross entropy, in nats: `(ensemble_size * batch, classes) -> (ensemble_size,)`."""
    return members(F.cross_entropy(logits.float(), labels, reduction="none"), ensemble_size).mean(1)


def check_batches(ensemble_size: int, regime: Regime, batch_size: int, examples: int) -> int:
    """Return the number of steps of an epoch; its last images, fewer than a batch, wait for another epoch's order."""
    if regime == "split" and batch_size % ensemble_size:
        raise ValueError(
            f"with regime split, batch_size must be divisible by ensemble_size, however: batch_size={batch_size}, "
            f"ensemble_size={ensemble_size}; choose another batch_size, or regime repeat"
        )
    if batch_size > examples:
        raise ValueError(
            f"batch_size must be at most the number of training images, however: {batch_size} > {examples}"
        )
    return examples // batch_size


def fit(
    model: nn.Module,
    images: Images,
    optimizer: torch.optim.Optimizer,
    *,
    ensemble_size: int,
    regime: Regime,
    epochs: int,
    warmup_epochs: float,
    batch_size: int,
    augmented: bool,
    seed: int,
    precision: Precision = "auto",
    compiled: bool = False,
    objective: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    posterior_samples: int = 0,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Rows], None] = lambda rows: None,
) -> Rows:
    """Train `model` on `images.train`, validate after each epoch, test once at the end; return all rows.

    `batch_size` is the number of new images of a step: under "repeat" every member sees all of them, under "split" a share.
    The loss is the mean of the members' losses; for a DeepEnsemble their sum, so that each network's gradient is that of
    its own loss, as if it were trained alone with this learning rate. An `objective` of (x, logits, labels), x being the batch
    that the network was given, is minimised in its place; the rows' NLL stays that of the labels.

    The test rows are followed by one of split reliability (`batchens.results.CURVE`). With IVON and `posterior_samples`, the
    predictions of the final network are averaged over so many draws from its posterior too, all members of all of them: splits
    validation_posterior and test_posterior.

    A `checkpoint` that is there already is gone on from. `on_epoch` is called after each checkpoint with the epoch's rows.

    Raises:
        ValueError: the batch does not divide or is larger than the data; a number format that does not go; samples of the
            posterior of another optimizer than IVON.
        Diverged: the training loss of an epoch, or a prediction after it, is not finite.
    """
    device = images.train.images.device
    dtype = autocast_dtype(precision, device, optimizer)
    steps = check_batches(ensemble_size, regime, batch_size, len(images.train))
    if posterior_samples and not isinstance(optimizer, IVON):
        raise ValueError(f"posterior_samples must be 0 but with IVON, however: {posterior_samples}")
    scheduler = schedule(optimizer, round(warmup_epochs * steps), epochs * steps)
    scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
    if scaler:  # it leaves out first steps while it looks for its scale, and the scheduler would warn of their order
        warnings.filterwarnings("ignore", r"Detected call of .lr_scheduler\.step", UserWarning)
    order = torch.Generator().manual_seed(seed)
    draws = torch.Generator(device).manual_seed(seed)
    saved = _Checkpoint(checkpoint, model, optimizer, scheduler, scaler, order, draws, dtype)
    rows: Rows = saved.load()
    first_epoch = 1 + max((row["epoch"] for row in rows), default=0)
    independent = isinstance(model, DeepEnsemble)
    dataset = DATASETS[images.name]
    if compiled:  # as in a process of its own: torch compiles 8 variants of a function, then no more
        torch.compiler.reset()
    network = torch.compile(model) if compiled else model

    def batch_of(indices: Tensor) -> tuple[Tensor, Tensor]:
        x, y = images.train.images[indices], images.train.labels[indices]
        if augmented:
            x = augment(x, flip=dataset.flip, padding=dataset.padding, generator=draws)
        x = normalise(x, images.mean, images.std, channels_last=True)
        return (repeat(x, ensemble_size), repeat(y, ensemble_size)) if regime == "repeat" else (x, y)

    def diverged(epoch: int) -> Diverged:
        return Diverged(
            f"the loss must stay a finite number, however it did not in epoch {epoch} of {epochs}: the learning rate is too "
            "high for this setting, or the precision too low; no result was written"
        )

    def train_epoch() -> tuple[Tensor, Tensor]:
        """Return each member's mean loss and accuracy over the epoch: (ensemble_size,), (ensemble_size,)."""
        model.train()
        losses, correct = torch.zeros(2, ensemble_size, device=device)
        for indices in torch.randperm(len(images.train), generator=order).to(device).split(batch_size)[:steps]:
            x, y = batch_of(indices)

            def loss_of(x: Tensor = x, y: Tensor = y) -> Tensor:
                with _autocast(device, dtype):
                    logits = network(x)
                each = member_losses(logits, y, ensemble_size)
                losses.add_(each.detach())
                correct.add_(members(logits.detach().argmax(-1) == y, ensemble_size).float().mean(1))
                if objective is not None:
                    return objective(x, logits, y)
                return each.sum() if independent else each.mean()

            optimizers.step(optimizer, loss_of, scaler)
            scheduler.step()
            progress.update()
        return losses / steps, correct / steps

    if device.type == "cpu":
        _give_freed_memory_back()
    progress = tqdm(total=epochs * steps, initial=(first_epoch - 1) * steps, unit="step", disable=None, leave=False)
    with progress:
        for epoch in range(first_epoch, epochs + 1):
            _synchronise(device)
            _reset_peak_memory(device)
            started = time.perf_counter()
            losses, correct = train_epoch()
            _synchronise(device)
            seconds = time.perf_counter() - started
            if not losses.isfinite().all():
                raise diverged(epoch)
            costs = {
                "seconds": seconds,
                "images_per_second": steps * batch_size / seconds,
                "peak_memory_mb": _peak_memory_mb(device),
            }
            new: Rows = [
                {"epoch": epoch, "split": "train", "member": m, "accuracy": accuracy, "nll": nll, **costs}
                for m, (accuracy, nll) in enumerate(zip(correct.tolist(), losses.tolist(), strict=True))
            ]
            evaluated = ("validation", "test") if epoch == epochs else ("validation",)
            for split in evaluated:
                log_probs = predict(model, images, split, ensemble_size, dtype)
                if not log_probs.isfinite().all():
                    raise diverged(epoch)
                labels = getattr(images, split).labels
                new += [{"epoch": epoch, "split": split, **row, **costs} for row in measure(log_probs, labels)]
                if split == "test":
                    curve = map(numbers, reliability(mixture(log_probs), labels))
                    new.append(
                        {"epoch": epoch, "split": "reliability", "member": None, **dict(zip(CURVE, curve, strict=True))}
                    )
            if epoch == epochs and posterior_samples:
                assert isinstance(optimizer, IVON)
                for split in evaluated:
                    total: Tensor | None = None  # of all draws at once, 64 of 8 members, CIFAR-100 would be 4 GB
                    for _ in range(posterior_samples):
                        with optimizers.sampled(optimizer):
                            drawn = mixture(predict(model, images, split, ensemble_size, dtype).double())
                        total = drawn if total is None else total.logaddexp(drawn)
                    assert total is not None
                    averaged = score(total - math.log(posterior_samples), getattr(images, split).labels)
                    new.append({"epoch": epoch, "split": f"{split}_posterior", "member": None, **averaged, **costs})
            rows += new
            saved.save(rows)
            on_epoch(new)
    return rows


@torch.no_grad()
def predict(
    model: nn.Module, images: Images, split: str, ensemble_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return each member's log probabilities of a split, float32: (ensemble_size, examples, classes)."""
    model.eval()
    parts = []
    for x in getattr(images, split).images.split(500):
        x = repeat(normalise(x, images.mean, images.std, channels_last=True), ensemble_size)
        with _autocast(x.device, dtype):
            logits = model(x)
        parts.append(members(F.log_softmax(logits.float(), -1), ensemble_size))
    return torch.cat(parts, 1)


class _Checkpoint:
    """What a run is after an epoch, in one file that is whole or absent."""

    def __init__(self, path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler,
                 scaler: torch.amp.GradScaler | None, order: torch.Generator, draws: torch.Generator,
                 dtype: torch.dtype):  # fmt: skip
        self.path, self.model, self.optimizer, self.scheduler = path, model, optimizer, scheduler
        self.scaler, self.order, self.draws, self.number_format = scaler, order, draws, str(dtype)

    def save(self, rows: Rows) -> None:
        if self.path is None:
            return
        cuda = self.draws.device.type == "cuda"
        state = {
            "model": self.model.state_dict(),
            "optimizer": optimizers.state_of(self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "order": self.order.get_state(),
            "draws": self.draws.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.draws.device) if cuda else None,
            "number_format": self.number_format,
            "rows": rows,
        }
        write_tensors(self.path, state)

    def load(self) -> Rows:
        """Put the saved state in place and return its rows; none when there is no checkpoint or it is of no use."""
        if self.path is None or not self.path.exists():
            return []
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if state["number_format"] != self.number_format:  # the GPU of another queue has another one
                raise ValueError(f"it is of {state['number_format']}, this run of {self.number_format}")
            self.model.load_state_dict(state["model"])
            optimizers.load_state(self.optimizer, state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.scaler:
                self.scaler.load_state_dict(state["scaler"])
            self.order.set_state(state["order"])
            self.draws.set_state(state["draws"])
            torch.set_rng_state(state["torch"])
            if state["cuda"] is not None:
                torch.cuda.set_rng_state(state["cuda"], self.draws.device)
        except GPU_ERRORS:
            raise
        except (RuntimeError, LookupError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the checkpoint {self.path} can't be gone on from; delete it to start the run again from its beginning (it "
                f"was made by other code, on another kind of device or by another torch: {reason})"
            ) from error
        return list(state["rows"])


def _autocast(device: torch.device, dtype: torch.dtype) -> Any:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _give_freed_memory_back() -> None:
    """Give the system back what earlier runs of this process left to be kept (see `keep_freed_memory`)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:  # 5 resets the peak resident size (Linux, proc(5))
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _peak_memory_mb(device: torch.device) -> float | None:
    """Return the peak since the reset, in MiB, of the GPU's allocated memory or of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
