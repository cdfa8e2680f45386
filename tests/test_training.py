import functools
import itertools
import math
import mmap
import os
import resource

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchens import optimizers, training
from batchens.layers import batch_ensemble, members, repeat
from batchens.metrics import measure, mixture, reliability
from batchens.models.cnn import cnn
from batchens.models.deep_ensemble import DeepEnsemble
from batchens.models.mlp import mlp
from batchens.results import CURVE, METRICS, numbers
from batchens.training import (
    Diverged,
    autocast_dtype,
    check_batches,
    choose_device,
    device_facts,
    fit,
    predict,
    schedule,
)

METHODS = ("batchensemble", "deep_ensemble")


class Stopped(Exception):
    pass


def stop_after(epoch):
    def on_epoch(rows):
        if rows[0]["epoch"] == epoch:
            raise Stopped

    return on_epoch


def network(images, member=0):
    torch.manual_seed(member)
    return cnn(images.num_classes, *images.shape[:2])


def build(images, method="batchensemble", ensemble_size=2, batchnorm="shared"):
    if method == "single":
        return network(images)
    if method == "deep_ensemble":
        return DeepEnsemble([network(images, member) for member in range(ensemble_size)])
    factors = {"alpha_init": -0.5, "gamma_init": 0.5}
    return batch_ensemble(network(images), ensemble_size=ensemble_size, **factors, batchnorm=batchnorm)


def optimizer_of(name, model, images, learning_rate=0.02):
    options = {"learning_rate": learning_rate, "weight_decay": 1e-3, "training_examples": len(images.train)}
    return optimizers.build(name, model, **options)


def train(images, model, optimizer="sgd", learning_rate=0.02, **changed):
    """`fit` with the suite's optimizer of that name, or a given one; returns its rows."""
    if isinstance(optimizer, str):
        optimizer = optimizer_of(optimizer, model, images, learning_rate)
    settings = {"ensemble_size": 2, "regime": "repeat", "epochs": 3, "warmup_epochs": 1, "batch_size": 16} | changed
    torch.manual_seed(5)
    return fit(model, images, optimizer, **({"augmented": True, "seed": 0, "precision": "fp32"} | settings))


def measured(rows):
    return [{name: row.get(name) for name in ("epoch", "split", "member", *METRICS)} for row in rows]


def assert_same(model, other):
    state, theirs = model.state_dict(), other.state_dict()
    assert list(state) == list(theirs)
    assert [name for name in state if not torch.equal(state[name], theirs[name])] == []


# resuming


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "ivon"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_after_each_epoch_ends_bit_for_bit_as_one_that_was_not(method, optimizer, tiny_images, tmp_path):
    images = tiny_images("cifar10")
    whole = build(images, method)
    expected = train(images, whole, optimizer)
    for epoch in (1, 2):
        with pytest.raises(Stopped):
            train(
                images,
                build(images, method),
                optimizer,
                checkpoint=tmp_path / "c.pt",
                on_epoch=stop_after(epoch),
            )
    resumed = build(images, method)
    rows = train(images, resumed, optimizer, checkpoint=tmp_path / "c.pt")
    assert measured(rows) == measured(expected)
    assert_same(resumed, whole)


@pytest.mark.parametrize("batchnorm", ["member_affine", "member"])
def test_a_run_killed_within_an_epoch_repeats_that_epoch_only(batchnorm, tiny_images, tmp_path, monkeypatch):
    images = tiny_images("cifar10")
    whole = build(images, batchnorm=batchnorm)
    expected = train(images, whole)
    steps = []

    def step(*arguments):
        steps.append(1)
        if len(steps) == 7:  # the third of the second epoch
            raise Stopped
        optimizer_step(*arguments)

    optimizer_step = optimizers.step
    monkeypatch.setattr(optimizers, "step", step)
    with pytest.raises(Stopped):
        train(images, build(images, batchnorm=batchnorm), checkpoint=tmp_path / "c.pt")
    resumed = build(images, batchnorm=batchnorm)
    rows = train(images, resumed, checkpoint=tmp_path / "c.pt")
    assert len(steps) == 7 + 2 * 4
    assert measured(rows) == measured(expected)
    assert_same(resumed, whole)


def test_a_run_whose_last_checkpoint_is_there_trains_no_further(tiny_images, tmp_path, monkeypatch):
    images = tiny_images()
    model = build(images)
    rows = train(images, model, epochs=1, checkpoint=tmp_path / "c.pt")
    monkeypatch.setattr(optimizers, "step", None)
    again = build(images)
    assert train(images, again, epochs=1, checkpoint=tmp_path / "c.pt") == rows
    assert_same(again, model)


def checkpoint_of(images, path, method="batchensemble", optimizer="sgd"):
    train(images, build(images, method), optimizer, epochs=1, checkpoint=path)


def truncated(images, path):
    checkpoint_of(images, path)
    path.write_bytes(path.read_bytes()[:-1000])


def without_a_part(images, path):
    checkpoint_of(images, path)
    state = torch.load(path, weights_only=True)
    del state["order"]
    torch.save(state, path)


USELESS = {
    "empty": lambda images, path: path.write_bytes(b""),
    "text": lambda images, path: path.write_text("not a checkpoint"),
    "truncated": truncated,
    "a list": lambda images, path: torch.save([1, 2], path),
    "pickled code": lambda images, path: torch.save(nn.Linear(1, 1), path),
    "without a part": without_a_part,
    "of another network": lambda images, path: checkpoint_of(images, path, "deep_ensemble"),
    "of another optimizer": lambda images, path: checkpoint_of(images, path, optimizer="adam"),
}


@pytest.mark.parametrize("write", USELESS.values(), ids=USELESS)
def test_a_useless_checkpoint_is_named_with_what_to_do_in_one_line(write, tiny_images, tmp_path):
    images, path = tiny_images(), tmp_path / "c.pt"
    write(images, path)
    with pytest.raises(ValueError, match=r"^the checkpoint .*c\.pt can't be gone on from.* delete it.*$") as error:
        train(images, build(images), checkpoint=path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_the_checkpoint_of_a_run_in_another_number_format_is_refused(before, after, tiny_images, tmp_path):
    # as when a V100 (float16) goes on from what an A100 (bfloat16) left, or the other way round
    images, path = tiny_images(), tmp_path / "c.pt"
    train(images, build(images), epochs=1, checkpoint=path, precision=before)
    with pytest.raises(ValueError, match=r"can't be gone on from; delete it .*it is of torch\..*, this run of torch\."):
        train(images, build(images), checkpoint=path, precision=after)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
@pytest.mark.parametrize("name", ["load", "save"])
def test_what_goes_wrong_on_a_gpu_is_not_blamed_on_the_checkpoint(name, error, tiny_images, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise error("of the GPU")

    images, path = tiny_images(), tmp_path / "c.pt"
    checkpoint_of(images, path)
    monkeypatch.setattr(torch, name, fail)
    with pytest.raises(error, match="of the GPU"):
        train(images, build(images), checkpoint=path)


def test_a_disk_that_fills_up_is_an_oserror_and_the_last_checkpoint_stays(tiny_images, tmp_path):
    images, path = tiny_images(), tmp_path / "c.pt"
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = lambda rows: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))  # noqa: E731
    try:
        with pytest.raises(OSError):
            train(images, build(images), checkpoint=path, on_epoch=full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert list(tmp_path.iterdir()) == [path]
    assert {row["epoch"] for row in torch.load(path, weights_only=True)["rows"]} == {1}


# what is trained


@pytest.mark.parametrize("method", ["single", *METHODS])
def test_every_method_learns(method, tiny_images):
    images = tiny_images(train=256)
    rows = train(images, build(images, method), ensemble_size=1 if method == "single" else 2, epochs=4)
    assert all(row["accuracy"] > 0.9 for row in rows if row["split"] == "test")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_member_of_a_deep_ensemble_is_trained_as_if_alone(optimizer, tiny_images):
    images = tiny_images("cifar10")
    ensemble = build(images, "deep_ensemble", 3)
    together = measured(train(images, ensemble, optimizer, ensemble_size=3))
    for member in range(3):
        alone = network(images, member)
        rows = measured(train(images, alone, optimizer, ensemble_size=1))
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(ensemble.networks[member].state_dict()[name], value, rtol=1e-4, atol=1e-5)
        ours = [row for row in together if row["member"] == member]
        theirs = [row for row in rows if row["member"] == 0]
        assert [row["nll"] for row in ours] == pytest.approx([row["nll"] for row in theirs], rel=1e-4)
        assert [row["accuracy"] for row in ours] == [row["accuracy"] for row in theirs]


class KnowsTheLabel(nn.Module):
    """Reads the label off the first pixel, and remembers what it was shown in training."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.seen = []

    def forward(self, x):
        pixels = ((x * 0.25 + 0.5) * 255).round().int().flatten(1)
        if self.training:
            self.seen += [tuple(row) for row in pixels.tolist()]
        return F.one_hot(pixels[:, 0].long().clamp(max=3), 4) * self.scale


@pytest.fixture
def labelled_images(tiny_images):
    images = tiny_images()
    for split in (images.train, images.validation, images.test):
        split.images[:, 0, 0, 0] = split.labels
    return images


@pytest.mark.parametrize(("regime", "members_see"), [("repeat", "all"), ("split", "a share")])
def test_labels_follow_the_images_and_each_member_sees_what_the_regime_says(regime, members_see, labelled_images):
    ensemble = DeepEnsemble([KnowsTheLabel() for _ in range(4)])
    rows = train(labelled_images, ensemble, ensemble_size=4, regime=regime, epochs=1)
    assert {row["accuracy"] for row in rows if row["split"] != "reliability"} == {1}
    every_image = sorted(tuple(row) for row in labelled_images.train.images.flatten(1).int().tolist())
    seen = [one.seen for one in ensemble.networks]
    if members_see == "all":
        assert seen[0] == seen[1] == seen[2] == seen[3]
        assert sorted(seen[0]) == every_image
    else:
        assert [len(one) for one in seen] == [16] * 4
        assert sorted(itertools.chain(*seen)) == every_image


def test_the_order_of_images_is_the_seeds_and_not_the_methods_or_the_optimizers(labelled_images):
    def order(seed, ensemble_size, optimizer):
        torch.manual_seed(seed + 7)
        ensemble = DeepEnsemble([KnowsTheLabel() for _ in range(ensemble_size)])
        train(labelled_images, ensemble, optimizer, ensemble_size=ensemble_size, epochs=2, seed=seed)
        return ensemble.networks[0].seen

    assert order(0, 1, "sgd") == order(0, 2, "ivon")
    assert order(0, 1, "sgd") != order(1, 1, "sgd")
    assert order(0, 1, "sgd")[:64] != order(0, 1, "sgd")[64:]


def test_the_same_seed_gives_the_same_numbers_and_another_one_does_not(tiny_images):
    images = tiny_images("cifar10")
    one, same, other = (measured(train(images, build(images), epochs=1, seed=seed)) for seed in (0, 0, 1))
    assert one == same != other


def test_augmentation_is_for_training_only_and_can_be_left_out(labelled_images):
    model = KnowsTheLabel()
    object.__setattr__(labelled_images, "name", "fashion_mnist")  # has crops and flips
    rows = train(labelled_images, model, ensemble_size=1, epochs=1)
    assert [row["accuracy"] == 1 for row in rows[:-1]] == [False, True, True, True, True]
    rows = train(labelled_images, model, ensemble_size=1, epochs=1, augmented=False)
    assert all(row["accuracy"] == 1 for row in rows[:-1])


# learning rate


def by_formula(step, warmup, total, peak):
    if step < warmup:
        return peak * (0.01 + 0.99 * step / warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@pytest.mark.parametrize("warmup", [0, 1, 4, 9])
def test_the_learning_rate_rises_linearly_from_1_percent_and_falls_as_a_cosine_to_0(warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = schedule(optimizer, warmup, 10)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([by_formula(step, warmup, 10, 0.3) for step in range(11)], abs=1e-12)
    assert rates[0] == (pytest.approx(0.003) if warmup else 0.3) and max(rates) == pytest.approx(0.3)
    assert rates[10] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("warmup_epochs", [0, 0.5, 1])
def test_fit_makes_each_step_at_the_scheduled_rate(warmup_epochs, tiny_images, monkeypatch):
    images, rates = tiny_images(), []
    monkeypatch.setattr(
        optimizers, "step", lambda optimizer, *_: rates.append([g["lr"] for g in optimizer.param_groups])
    )
    with pytest.warns(UserWarning, match="optimizer.step"):
        train(images, build(images), epochs=2, warmup_epochs=warmup_epochs)
    expected = [by_formula(step, 4 * warmup_epochs, 8, 0.02) for step in range(8)]
    for group in (0, 1):
        assert [rate[group] for rate in rates] == pytest.approx(expected, abs=1e-12)


# what is refused


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "ivon"])
def test_a_diverging_loss_is_an_error_and_leaves_no_checkpoint(optimizer, tiny_images, tmp_path):
    images = tiny_images()
    with pytest.raises(
        Diverged, match="finite number, however it did not in epoch 1 of 3: the learning rate is too high"
    ):
        train(images, build(images), optimizer, learning_rate=1e20, checkpoint=tmp_path / "c.pt")
    assert list(tmp_path.iterdir()) == []


def test_after_divergence_the_checkpoint_is_that_of_the_last_good_epoch(tiny_images, tmp_path):
    images = tiny_images()
    model = build(images)
    poison = lambda rows: model[0].weight.data.fill_(math.nan)  # noqa: E731
    with pytest.raises(Diverged, match="in epoch 2 of 3"):
        train(images, model, checkpoint=tmp_path / "c.pt", on_epoch=poison)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert {row["epoch"] for row in state["rows"]} == {1}
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_network_that_the_last_step_ruined_is_not_a_result(tiny_images):
    images = tiny_images()  # one step: the training loss is that of the initial network
    with pytest.raises(Diverged):
        train(images, mlp(64, [8], 4), learning_rate=1e38, ensemble_size=1, epochs=1, warmup_epochs=0, batch_size=64)


def test_a_batch_that_does_not_fit_is_refused_before_training(tiny_images):
    images = tiny_images()
    with pytest.raises(ValueError, match="batch_size=16, ensemble_size=3; choose another batch_size, or regime repeat"):
        train(images, build(images, ensemble_size=3), ensemble_size=3, regime="split")
    with pytest.raises(ValueError, match="at most the number of training images, however: 65 > 64"):
        train(images, build(images), batch_size=65)
    assert check_batches(3, "repeat", 16, 64) == 4 == check_batches(4, "split", 12, 50)


def test_images_beyond_the_last_whole_batch_are_left_out_of_an_epoch(labelled_images):
    model = KnowsTheLabel()
    train(labelled_images, model, ensemble_size=1, batch_size=30, epochs=3)
    assert len(model.seen) == 3 * 60
    assert len(set(model.seen)) > 60


def test_fp16_is_refused_on_a_cpu_and_with_ivon(tiny_images):
    images = tiny_images()
    model = build(images)
    with pytest.raises(ValueError, match="fp16 needs a GPU and SGD or Adam"):
        train(images, model, precision="fp16")
    with pytest.raises(ValueError, match="fp16 needs a GPU and SGD or Adam"):
        autocast_dtype("fp16", torch.device("cuda"), optimizer_of("ivon", model, images))
    assert autocast_dtype("fp16", torch.device("cuda"), optimizer_of("adam", model, images)) == torch.float16


def test_bf16_runs_on_a_cpu_at_its_own_numbers(tiny_images):
    images = tiny_images()
    exact, rounded = (train(images, build(images), epochs=1, precision=p) for p in ("fp32", "bf16"))
    nlls = [[row["nll"] for row in rows[:-1]] for rows in (exact, rounded)]
    assert nlls[0] != nlls[1] and nlls[0] == pytest.approx(nlls[1], rel=0.1)


def test_on_a_cpu_auto_is_float32_and_the_facts_say_so(tiny_images):
    images = tiny_images()
    optimizer = optimizer_of("sgd", build(images), images)
    facts = device_facts(torch.device("cpu"), "auto", optimizer, False)
    expected = {"device_name": "cpu, 1 threads", "number_format": "float32", "compiled": False}
    assert facts == expected | {"torch": torch.__version__}
    assert device_facts(torch.device("cpu"), "bf16", optimizer, False)["number_format"] == "bfloat16"


def gpu(monkeypatch, capability, kernels):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: kernels)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # to be as it was again


@pytest.mark.parametrize(
    ("capability", "kernels", "drives"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90"], False),
        ((7, 0), ["sm_50", "sm_70", "sm_80"], True),
        ((8, 0), ["sm_86", "sm_90"], False),
        ((8, 9), ["sm_80", "sm_86"], True),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((12, 0), ["sm_90", "sm_100", "sm_120"], True),
        ((10, 0), ["sm_90", "sm_120"], False),
    ],
)
def test_a_gpu_is_used_exactly_if_torch_holds_kernels_for_it(capability, kernels, drives, monkeypatch):
    gpu(monkeypatch, capability, kernels)
    if drives:
        assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    else:
        with pytest.raises(ValueError, match=r"no kernels for Some GPU .*sm_\d+.* for a V100 install"):
            choose_device("auto")
    assert choose_device("cpu") == torch.device("cpu")


def test_float32_on_a_gpu_is_not_tf32(monkeypatch):
    gpu(monkeypatch, (8, 0), ["sm_80"])
    choose_device("cpu")
    assert torch.backends.cudnn.allow_tf32
    choose_device("auto")
    assert not torch.backends.cudnn.allow_tf32


def test_a_device_that_torch_has_no_name_for_is_refused_beside_a_gpu_too(monkeypatch):
    gpu(monkeypatch, (8, 0), ["sm_80"])
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, however: 'tpu'"):
        choose_device("tpu")


@pytest.mark.parametrize(
    ("job", "visible", "given"),
    [
        ({"SLURM_JOB_ID": "12"}, "0", True),
        ({"LSB_JOBID": "12"}, "1,2", True),
        ({"LSB_JOBID": "12"}, "GPU-5d8c8a26", True),
        ({"LSB_JOBID": "12"}, "MIG-5d8c8a26", True),
        ({"LSB_JOBID": "12"}, None, False),
        ({"LSB_JOBID": "12"}, "", False),
        ({"LSB_JOBID": "12"}, "-1", False),
        ({"SLURM_JOB_ID": "12"}, "NoDevFiles", False),
        ({}, "0", False),
        ({"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "12"}, "0", False),
    ],
)
def test_a_job_with_a_gpu_that_torch_cannot_start_does_not_train_on_the_cpu(job, visible, given, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in (job | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})).items():
        monkeypatch.setenv(name, value)
    if given:
        with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES={visible}.* torch .* can't start it: .* install a"):
            choose_device("auto")
    else:
        assert choose_device("auto") == torch.device("cpu")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.filterwarnings("error:Detected call of .lr_scheduler")
def test_steps_that_the_scaler_of_float16_leaves_out_are_nothing_to_warn_of(tiny_images, monkeypatch):
    monkeypatch.setattr(training, "autocast_dtype", lambda *_: torch.float16)
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**40))
    images, model = tiny_images(), mlp(64, [8], 4)
    start = model[1].weight.clone()
    train(images, model, ensemble_size=1, epochs=1)
    assert torch.equal(model[1].weight, start)


def test_every_run_of_a_process_is_compiled(tiny_images, monkeypatch):
    images, graphs = tiny_images(), []
    compile_with = torch.compile

    def backend(graph, inputs):
        graphs[-1] += 1
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model: compile_with(model, backend=backend))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    for width in (4, 8, 12):
        graphs.append(0)
        train(images, mlp(64, [width], 4), ensemble_size=1, epochs=1, compiled=True)
    assert graphs == [1, 1, 1]


def test_without_a_gpu_auto_is_the_cpu_and_cuda_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda' needs a GPU that torch can see"):
        choose_device("cuda")


# what is measured


def test_rows_have_each_epoch_split_and_member_once_and_test_at_the_end_only(tiny_images):
    images = tiny_images()
    rows = train(images, build(images), epochs=3)
    keys = [(row["epoch"], row["split"], row["member"]) for row in rows]
    splits = {1: ("train", "validation"), 2: ("train", "validation"), 3: ("train", "validation", "test")}
    assert keys == [
        (epoch, split, member)
        for epoch in (1, 2, 3)
        for split in splits[epoch]
        for member in ((0, 1) if split == "train" else (0, 1, None))
    ] + [(3, "reliability", None)]
    for row in rows[:-1]:
        assert row["seconds"] > 0
        assert row["images_per_second"] == pytest.approx(64 / row["seconds"])
        assert all(name in row for name in (METRICS if row["split"] != "train" else ("accuracy", "nll")))


class HungryToPredict(nn.Module):
    """Takes 64 MB to predict, which it then gives back, and next to nothing to train."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 4)

    def forward(self, x):
        if not self.training:
            mmap.mmap(-1, 2**26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
        return self.layer(x.flatten(1))


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures no peak of a span of time")
def test_the_peak_of_memory_is_that_of_training_in_every_epoch(tiny_images):
    rows = train(tiny_images(), HungryToPredict(), ensemble_size=1, epochs=3)
    peaks = [row["peak_memory_mb"] for row in rows if row["split"] == "train"]
    assert len(peaks) == 3 and max(peaks) < peaks[0] + 32


def test_the_test_rows_are_those_of_the_final_network(tiny_images):
    images = tiny_images()
    model = build(images)
    rows = train(images, model, epochs=2)
    expected = measure(predict(model, images, "test", 2), images.test.labels)
    assert measured(row for row in rows if row["split"] == "test") == measured(
        {"epoch": 2, "split": "test", **row} for row in expected
    )


def test_the_reliability_row_is_that_of_the_ensembles_test_prediction(tiny_images):
    images = tiny_images()
    model = build(images)
    row = train(images, model, epochs=1)[-1]
    log_probs = predict(model, images, "test", 2)
    curves = reliability(mixture(log_probs), images.test.labels)
    assert [row[name] for name in CURVE] == [numbers(values) for values in curves]


def test_posterior_rows_average_the_draws_that_follow_training_and_leave_the_network_at_the_mean(tiny_images):
    images = tiny_images()
    model, twin = build(images), build(images)
    rows = train(images, model, "ivon", epochs=2, posterior_samples=3)
    optimizer = optimizer_of("ivon", twin, images)
    assert measured(rows[:-2]) == measured(train(images, twin, optimizer, epochs=2))
    assert_same(model, twin)
    for row, split in zip(rows[-2:], ("validation", "test"), strict=True):
        draws = []
        for _ in range(3):
            with optimizers.sampled(optimizer):
                draws.append(predict(twin, images, split, 2))
        assert not torch.equal(draws[0], draws[1])
        expected = measure(torch.cat(draws), getattr(images, split).labels)[-1]
        assert (row["epoch"], row["split"], row["member"]) == (2, f"{split}_posterior", None)
        for name in ("accuracy", "nll", "brier", "ece"):
            assert row[name] == pytest.approx(expected[name], rel=1e-9)


def test_a_posterior_of_another_optimizer_is_refused(tiny_images):
    images = tiny_images()
    with pytest.raises(ValueError, match="posterior_samples must be 0 but with IVON, however: 2"):
        train(images, build(images), "sgd", posterior_samples=2)


def test_an_objective_is_minimised_in_place_of_the_cross_entropy_and_rows_keep_the_latter(tiny_images):
    images = tiny_images()
    usual, twin, still = (build(images) for _ in range(3))
    rows = train(images, usual)
    batches = []

    def mean_loss(x, logits, labels):
        batches.append(len(x))
        return members(F.cross_entropy(logits, labels, reduction="none"), 2).mean(1).mean()

    assert measured(train(images, twin, objective=mean_loss)) == measured(rows)
    assert_same(usual, twin)
    assert set(batches) == {32}
    untrained = train(images, still, epochs=2, objective=lambda x, logits, labels: 0.0 * logits.sum())
    losses = [row["nll"] for row in untrained if row["split"] == "train"]
    assert min(losses) > 1  # the loss on labels, of 4 classes, not the objective's 0


@pytest.mark.parametrize("method", METHODS)
def test_a_prediction_is_each_members_own_for_every_image_however_it_is_chunked(method, tiny_images):
    images = tiny_images(test=1100)
    model = build(images, method, 3)
    log_probs = predict(model, images, "test", 3)
    assert not model.training
    x = (images.test.images / 255 - 0.5) / 0.25
    with torch.no_grad():
        whole = members(model(repeat(x, 3)).log_softmax(-1), 3)
    torch.testing.assert_close(log_probs, whole, rtol=1e-4, atol=1e-5)
    if method == "deep_ensemble":
        with torch.no_grad():
            alone = torch.stack([one(x).log_softmax(-1) for one in model.networks])
        torch.testing.assert_close(log_probs, alone, rtol=1e-4, atol=1e-5)
