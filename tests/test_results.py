import math
import os
import subprocess
import warnings

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchens.files import ROOT
from batchens.results import (
    METRICS,
    damage,
    differences,
    provenance,
    read_results,
    result_path,
    scheduler_job_id,
    write_run,
)


def rows_of(run_id, count=3, **columns):
    return [
        {"run_id": run_id, "experiment": "e", **columns, "epoch": epoch, "split": "validation", "member": None}
        for epoch in range(1, count + 1)
    ]


def written(folder, run_id="run-a0.5-0123abcd", **columns):
    path = result_path(folder, "e", run_id)
    write_run(path, rows_of(run_id, **columns))
    return path


texts = st.text(st.sampled_from("abcXYZ 0189,;\"'_-./é"), max_size=12).map(lambda text: f"x{text}")
values = {
    "real": st.floats(allow_nan=False),
    "whole": st.integers(-(2**53), 2**53),
    "maybe": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "member": st.none() | st.integers(0, 15),
}


@given(rows=st.lists(st.fixed_dictionaries(values), min_size=1, max_size=12), text=texts)
def test_what_is_written_is_read_exactly(rows, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    rows = [{"run_id": "r-1", "experiment": "e", "text": text, **row} for row in rows]
    write_run(result_path(folder, "e", "r-1"), rows)
    read = read_results(folder, "e")
    assert list(read.columns) == [*rows[0], "rows"]
    assert (read["rows"] == len(rows)).all()
    for name in rows[0]:
        for before, after in zip((row[name] for row in rows), read[name], strict=True):
            assert pd.isna(after) if before is None else before == after
            if isinstance(before, float) and before == 0:
                assert math.copysign(1, before) == math.copysign(1, after)


@pytest.mark.parametrize("text", ["none", "12345_7", "member_affine", "1f2e3d4c5b", "cpu, 2 threads"])
def test_the_suites_own_words_stay_words(text, tmp_path):
    written(tmp_path, text=text)
    assert set(read_results(tmp_path, "e")["text"]) == {text}


def test_members_are_whole_numbers_and_the_ensemble_has_none(tmp_path):
    rows = [row | {"member": member} for row, member in zip(rows_of("r-1"), (0, 1, None), strict=True)]
    write_run(result_path(tmp_path, "e", "r-1"), rows)
    read = read_results(tmp_path, "e")
    assert str(read["member"].dtype) == "Int64"
    assert read["member"][1] == 1 and read["member"].isna().tolist() == [False, False, True]


# whole or seen not to be


@pytest.mark.parametrize("count", [1, 9, 10, 11])
def test_a_file_cut_short_at_any_byte_is_seen(count, tmp_path):
    path = written(tmp_path, count=count, nll=1.5)
    assert damage(path) is None
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        assert damage(path) is not None, length


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: b"", "not a result"),
        (lambda content: b"alpha,beta\n1,2\n", "not a result"),
        (lambda content: bytes(len(content)), "not a result"),
        (lambda content: content + content, "cut short"),
        (lambda content: content + content.splitlines(True)[-1], "cut short"),
        (lambda content: b"".join(content.splitlines(True)[:2] + content.splitlines(True)[3:]), "cut short"),
        (lambda content: content.replace(b"run-a0.5-0123abcd", b"run-a0.5-00000000"), "renamed"),
    ],
)
def test_what_is_no_whole_result_is_named_and_left_out(change, reason, tmp_path):
    written(tmp_path, "good-1")
    path = written(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    assert damage(path).startswith(reason)
    with pytest.warns(UserWarning, match=rf"left out .*0123abcd\.csv: {reason}"):
        read = read_results(tmp_path, "e")
    assert set(read["run_id"]) == {"good-1"}


def test_a_renamed_file_is_not_the_result_of_its_new_name(tmp_path):
    path = written(tmp_path)
    other = path.rename(path.with_name("run-a0.5-ffffffff.csv"))
    assert damage(other) == "renamed: its rows are of the run run-a0.5-0123abcd"


def test_a_complete_result_is_never_overwritten(tmp_path):
    path = written(tmp_path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="written once"):
        written(tmp_path, count=5)
    assert path.read_bytes() == before


def test_a_damaged_result_is_kept_beside_the_new_one_and_read_no_more(tmp_path):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    half = path.read_bytes()
    written(tmp_path, count=2)
    assert damage(path) is None
    assert path.with_name(path.name + ".damaged1").read_bytes() == half
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_results(tmp_path, "e")) == 2


# read


def test_results_of_several_headers_are_one_table(tmp_path):
    written(tmp_path, "old-1", alpha_init=0.5)
    written(tmp_path, "old-2", alpha_init=None)
    written(tmp_path, "new-1", alpha_init=0.1, gamma_init=-0.5)
    read = read_results(tmp_path, "e").set_index("run_id")
    assert len(read) == 9
    assert read.loc["old-1", "alpha_init"].eq(0.5).all() and read.loc["old-2", "alpha_init"].isna().all()
    assert read.loc["new-1", "gamma_init"].eq(-0.5).all() and read.loc["old-1", "gamma_init"].isna().all()


def test_without_results_the_table_is_empty(tmp_path):
    assert read_results(tmp_path, "e").empty


def test_files_that_are_being_written_are_not_read(tmp_path):
    path = written(tmp_path)
    path.with_name(f".{path.name}.host.1.tmp").write_text("half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_results(tmp_path, "e")) == 3


# provenance


@pytest.mark.parametrize(
    ("environment", "job_id"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12_3"),
        ({"LSB_JOBID": "77", "LSB_JOBINDEX": "0"}, "77"),
        ({"LSB_JOBID": "77", "LSB_JOBINDEX": "5"}, "77_5"),
        ({"SUBMITIT_LOCAL_JOB_ID": "9"}, "9"),
    ],
)
def test_the_job_is_the_schedulers_and_an_array_element_has_its_index(environment, job_id, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert scheduler_job_id() == provenance()["job_id"] == job_id


def test_provenance_names_the_commit_that_ran():
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    facts = provenance()
    assert facts["commit"] == head.stdout.strip()
    assert facts["finished"].endswith("+00:00")


# differences


def metrics(value, **changed):
    return {"epoch": 1, "split": "test", "member": None} | dict.fromkeys(METRICS, value) | changed


def test_differences_are_the_largest_of_each_metric_over_matching_rows():
    ours = [metrics(0.5), metrics(0.5, member=0, ece=None), metrics(0.5, epoch=2, nll=3.0)]
    theirs = [metrics(0.5, epoch=2, nll=1.0), metrics(0.25), metrics(0.5, member=0, ece=None)]
    assert differences(ours, theirs) == dict.fromkeys(METRICS, 0.25) | {"nll": 2.0}
    assert differences(ours, ours) == dict.fromkeys(METRICS, 0.0)


def test_a_nan_against_a_number_is_not_no_difference():
    for ours, theirs in [(1.0, math.nan), (math.nan, 1.0)]:
        assert not differences([metrics(ours)], [metrics(theirs)])["nll"] == 0


def test_rows_of_curves_are_not_compared():
    row = {"epoch": 1, "split": "test", "member": "", "accuracy": 0.5}
    curve = {"epoch": 1, "split": "weights", "member": "", "accuracy": "", "x": "1 2"}
    assert differences([row, curve], [row]) == {"accuracy": 0.0}


def test_a_row_that_only_one_run_has_is_an_error_whichever_it_is():
    one, two = [metrics(0.5)], [metrics(0.5), metrics(0.5, epoch=2)]
    for ours, theirs in [(two, one), (one, two)]:
        with pytest.raises((KeyError, ValueError)):
            differences(ours, theirs)
