"""Environments are made quietly, and bad ids are answered with good ones."""

from __future__ import annotations

import warnings

import pytest

from cpql.environments import make_environment
from cpql.errors import ConfigError


def test_the_old_version_is_made_without_its_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment = make_environment("Hopper-v4")
    assert environment.spec is not None and environment.spec.max_episode_steps == 1000
    environment.close()


def test_options_reach_gymnasium() -> None:
    environment = make_environment("Hopper-v4", max_episode_steps=7)
    assert environment.spec is not None and environment.spec.max_episode_steps == 7
    environment.close()


@pytest.mark.parametrize(
    ("id", "text"),
    [
        ("Hoper-v4", "did you mean Hopper-v4"),
        ("Hopper-v9", "did you mean Hopper-v"),
        ("Hopper-v2", "can't be made"),
        ("", "no environment id"),
        ("nowhere/Hopper-v4", "no environment 'nowhere/Hopper-v4'"),
        ("not an id!", "not an id!"),
    ],
)
def test_an_unknown_id_is_one_line_with_the_nearest(id: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_environment(id)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
