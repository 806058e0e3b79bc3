"""Trackers that are named are known, each once, and their packages are there."""

from __future__ import annotations

import sys

import pytest

from alignctl.checks.trackers import check_trackers


@pytest.mark.parametrize(
    ("name", "package"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow-skinny"), ("trackio", "trackio")],
)
def test_a_package_that_is_not_there_is_told_with_what_installs_it(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, name, None)  # Python's way of saying that there is none
    for given in (name, [name]):
        (problem,) = check_trackers({"tracker": {"report_to": given}})
        assert problem.message == f"`tracker.report_to={name}` needs the package `{package}`"
        assert problem.hint == f"pip install {package}"
    in_a_container = {"tracker": {"report_to": name}, "launcher": {"container": ["apptainer", "exec", "image.sif"]}}
    assert not list(check_trackers(in_a_container))


@pytest.mark.parametrize("report_to", ["none", [], ["none"]])
def test_there_need_be_none(report_to):
    assert not list(check_trackers({"tracker": {"report_to": report_to}}))
