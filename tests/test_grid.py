from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchens.grid import grid, run_id, unique


@dataclass(frozen=True)
class Config:
    dataset: str = "digits"
    alpha_init: float | None = 0.5
    learning_rate: float = 0.1
    ensemble_size: int = 4
    augment: bool = True
    seed: int = 0
    device: str = "auto"

    NAMED: ClassVar = ("dataset", "ensemble_size", "alpha_init", "learning_rate", "seed")
    INCIDENTAL: ClassVar = ("device",)


def test_a_grid_is_every_combination_with_the_last_axis_fastest():
    configs = grid(Config(), dataset=["a", "b"], seed=range(3))
    assert configs == [Config(dataset=name, seed=seed) for name in ("a", "b") for seed in (0, 1, 2)]
    assert grid(Config()) == [Config()]


def test_an_axis_that_is_no_field_is_refused_with_the_fields():
    with pytest.raises(ValueError, match=r"however: 'sed'; one of: \['alpha_init', .* 'seed'\]"):
        grid(Config(), sed=range(3))


def test_the_id_of_a_run_never_changes():
    # results on disk carry it: another algorithm would run everything again
    assert run_id(Config()) == "digits-m4-a0.5-lr0.1-s0-47cf2135"
    assert run_id(Config(alpha_init=-0.5, learning_rate=1e-5)).startswith("digits-m4-an0.5-lr1en05-s0-")
    assert run_id(Config(alpha_init=None, dataset="my/set")).startswith(
        "digits".replace("digits", "my_set-m4-lr0.1-s0-")
    )


def test_the_id_is_the_same_in_every_process(python):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_grid as t; print(t.run_id(t.Config(seed=7)))"
    ids = {python(code, Path(__file__).parent, PYTHONHASHSEED=str(seed)).stdout.strip() for seed in (1, 2)}
    assert ids == {run_id(Config(seed=7))}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset", "cifar10"),
        ("alpha_init", None),
        ("alpha_init", -0.5),
        ("learning_rate", 0.1 + 1e-12),
        ("ensemble_size", 5),
        ("augment", False),
        ("seed", 1),
    ],
)
def test_every_field_that_decides_the_result_changes_the_id(name, value):
    assert run_id(replace(Config(), **{name: value})) != run_id(Config())


def test_incidental_fields_do_not_change_the_id_and_make_no_second_run():
    assert run_id(Config(device="cpu")) == run_id(Config())
    assert [config.seed for config in unique([Config(), Config(seed=1), Config(device="cpu")])] == [0, 1]


def test_numbers_that_are_equal_are_one_setting():
    assert run_id(Config(learning_rate=1)) == run_id(Config(learning_rate=1.0))
    assert run_id(Config(alpha_init=-0.0)) == run_id(Config(alpha_init=0)) == run_id(Config(alpha_init=0.0))


numbers = st.floats(allow_nan=False, allow_infinity=False)
configs = st.builds(
    Config, alpha_init=st.none() | numbers, learning_rate=numbers, seed=st.integers(0), ensemble_size=st.integers(1)
)


@given(one=configs, other=configs)
def test_ids_are_equal_exactly_if_the_settings_are_and_are_names_of_files(one, other):
    assert (run_id(one) == run_id(other)) == (one == other)
    assert run_id(one) == run_id(replace(one))
    assert not set(run_id(one)) & set("/\\ \n:*?")


def test_login_nodes_need_no_torch(python):
    modules = "files grid results run data.catalog".split()
    imports = ", ".join([*(f"batchens.{name}" for name in modules), "scripts.parameter_testing"])
    ran = python(f"import sys, {imports}; print(*{{'torch', 'pandas'}} & set(sys.modules))")
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr
