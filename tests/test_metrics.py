import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from batchens.data.vision import import_datasets
from batchens.metrics import accuracy, brier, disagreement, ece, epistemic, measure, mixture, nll, reliability


@pytest.fixture(scope="module")
def torchmetrics():
    import_datasets()  # it imports torchvision, as it can
    from torchmetrics.functional import classification

    return classification


def predictions(members=3, examples=500, classes=7, seed=0, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(members, examples, classes, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1), torch.randint(classes, (examples,), generator=generator)


def log_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


many = given(
    members=st.integers(1, 4),
    examples=st.integers(1, 50),
    classes=st.integers(2, 12),
    seed=st.integers(0, 99),
    sharpness=st.sampled_from([0.0, 0.1, 1.0, 5.0, 100.0]),
)


@many
def test_every_metric_equals_its_reference(torchmetrics, **arguments):
    log_probs, labels = predictions(**arguments)
    p = log_probs[0].exp()
    options = {"num_classes": arguments["classes"]}
    reference = torchmetrics.multiclass_accuracy(p, labels, average="micro", **options)
    assert accuracy(log_probs[0], labels) == pytest.approx(reference.item())
    assert nll(log_probs[0], labels) == pytest.approx(F.nll_loss(log_probs[0], labels).item())
    one_hot = F.one_hot(labels, arguments["classes"])
    assert brier(log_probs[0], labels) == pytest.approx((p - one_hot).square().sum(1).mean().item(), abs=1e-12)
    if arguments["sharpness"] > 0:  # uniform, a confidence may lie on the edge of a bin
        reference = torchmetrics.multiclass_calibration_error(p, labels, n_bins=15, norm="l1", **options)
        assert ece(log_probs[0], labels) == pytest.approx(reference.item(), abs=1e-6)


@many
def test_the_ensemble_is_the_mixture_and_never_worse_than_its_members_on_average(**arguments):
    log_probs, labels = predictions(**arguments)
    mean = log_probs.exp().mean(0)
    torch.testing.assert_close(mixture(log_probs).exp(), mean)
    *members, ensemble = measure(log_probs, labels)
    right = mean[torch.arange(len(labels)), labels]
    assert ensemble["nll"] == pytest.approx(-right.log().mean().item(), rel=1e-9, abs=1e-12)
    for metric in ("nll", "brier"):
        mean_of_members = sum(row[metric] for row in members) / len(members)
        assert ensemble[metric] <= mean_of_members + 1e-12


def test_measure_has_a_row_for_each_member_and_one_for_the_ensemble():
    log_probs, labels = predictions()
    rows = measure(log_probs.float(), labels)
    assert [row["member"] for row in rows] == [0, 1, 2, None]
    for m, row in enumerate(rows[:3]):
        assert row["nll"] == nll(log_probs[m].float().double(), labels)
        assert row["disagreement"] is row["epistemic"] is None
    assert rows[3]["disagreement"] > 0 and rows[3]["epistemic"] > 0


def test_an_ensemble_of_one_is_its_member():
    log_probs, labels = predictions(members=1)
    member, ensemble = measure(log_probs, labels)
    assert member | {"member": None} == ensemble


def test_ece_by_hand():
    # confidences 0.95, 0.95 (one right), 0.55 (right): (2 |0.5 - 0.95| + 1 |1 - 0.55|) / 3
    log_probs = log_of([0.95, 0.05], [0.95, 0.05], [0.45, 0.55])
    assert ece(log_probs, torch.tensor([0, 1, 1])) == pytest.approx((2 * 0.45 + 0.45) / 3)


def test_reliability_gives_what_ece_sums_up():
    torch.manual_seed(0)
    log_probs, labels = torch.randn(500, 4).mul(3).log_softmax(-1).double(), torch.randint(4, (500,))
    confidence, accuracies, share = reliability(log_probs, labels)
    assert share.sum().item() == pytest.approx(1)
    assert ((share == 0) == confidence.isnan()).all() and (share == 0).any()  # none is as unsure as below 1/4
    assert (share * (accuracies - confidence).abs()).nansum().item() == pytest.approx(ece(log_probs, labels), abs=1e-12)
    bins = (confidence * 15).ceil() - 1
    assert (bins[share > 0] == torch.arange(15)[share > 0]).all()


def test_errors_of_opposite_sign_cancel_in_a_bin_and_not_across_bins():
    same_bin, labels = log_of([0.61, 0.39], [0.65, 0.35]), torch.tensor([0, 1])
    assert ece(same_bin, labels) == pytest.approx(abs((1 - 0.61) - 0.65) / 2)
    two_bins = log_of([0.61, 0.39], [0.85, 0.15])
    assert ece(two_bins, labels) == pytest.approx(((1 - 0.61) + 0.85) / 2)


def test_a_uniform_prediction_is_calibrated_when_classes_are_equally_frequent():
    assert ece(torch.full((30, 3), 1 / 3, dtype=torch.float64).log(), torch.arange(30) % 3) == pytest.approx(0)


def test_ece_of_a_perfectly_calibrated_model_goes_to_0():
    log_probs, _ = predictions(members=1, examples=400_000, classes=5, sharpness=1.5)
    generator = torch.Generator().manual_seed(1)
    labels = torch.multinomial(log_probs[0].exp(), 1, generator=generator).squeeze(1)
    assert ece(log_probs[0], labels) < 0.004
    overconfident = (2 * log_probs[0]).log_softmax(-1)
    assert ece(overconfident, labels) > 0.1


def test_disagreement_is_the_mean_over_pairs_by_hand():
    predicted = torch.tensor([[0, 0, 1, 2], [0, 1, 1, 2], [0, 1, 2, 2]])
    assert disagreement(F.one_hot(predicted).double().log()) == pytest.approx((1 / 4 + 2 / 4 + 1 / 4) / 3)


def test_epistemic_by_hand():
    p, q = (0.9, 0.1), (0.4, 0.6)
    mean = (0.65, 0.35)
    entropy = [-sum(x * math.log(x) for x in one) for one in (mean, p, q)]
    assert epistemic(log_of([p], [q])) == pytest.approx(entropy[0] - (entropy[1] + entropy[2]) / 2)


def test_equal_members_have_no_epistemic_uncertainty_and_do_not_disagree():
    log_probs = predictions(members=1)[0].expand(4, -1, -1)
    assert epistemic(log_probs) == pytest.approx(0, abs=1e-14)
    assert disagreement(log_probs) == 0


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_certain_members_that_all_disagree_have_log_of_their_number_of_epistemic_uncertainty(classes):
    log_probs = torch.eye(classes, dtype=torch.float64).log()[:, None, :].expand(-1, 6, -1)
    assert epistemic(log_probs) == pytest.approx(math.log(classes))
    assert disagreement(log_probs) == 1


@many
def test_epistemic_uncertainty_is_between_0_and_log_of_the_number_of_members(**arguments):
    log_probs, _ = predictions(**arguments)
    assert -1e-12 <= epistemic(log_probs) <= math.log(len(log_probs)) + 1e-12


def test_probabilities_of_exactly_0_and_1_give_no_nan():
    right, wrong = torch.tensor([1.0, 0.0, 0.0]).log(), torch.tensor([0.0, 1.0, 0.0]).log()
    labels = torch.zeros(4, dtype=torch.int64)
    log_probs = torch.stack([right.expand(4, 3), wrong.expand(4, 3)])
    good, bad, both = measure(log_probs, labels)
    assert good == {
        "member": 0, "accuracy": 1, "nll": 0, "brier": 0, "ece": 0, "disagreement": None, "epistemic": None
    }  # fmt: skip
    assert (bad["accuracy"], bad["nll"], bad["brier"], bad["ece"]) == (0, math.inf, 2, 1)
    assert both["nll"] == pytest.approx(math.log(2)) and both["brier"] == pytest.approx(0.5)
    assert both["epistemic"] == pytest.approx(math.log(2)) and both["disagreement"] == 1
