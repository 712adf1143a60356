"""Credentials stay out of errors, warnings, repr and records."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch

import kfactk
from kfactk.errors import KfactkError, KfactkWarning, MemoryExhaustedError, OptionError
from kfactk.masking import mask, mask_settings

SECRET = "hunter2"
ADDRESSES = [
    f"http://me:{SECRET}@host:5000/path",
    f"https://{SECRET}@host",
    f"HTTPS://me:{SECRET}@host",
    f"postgresql+psycopg2://me:{SECRET}@host:5432/db?sslmode=require",
    f"mysql://me:p@ss:{SECRET}@host/db",
    f"postgresql://me:a/b{SECRET}@host/db",
    f"http://host/?password={SECRET}",
    f"http://host/?user=me&auth_token={SECRET}&x=1",
    f"sqlite:///a.db?API_KEY={SECRET}",
    f"http://host;pwd={SECRET}",
    f"s3://bucket?X-Amz-Signature={SECRET}",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_credentials_of_addresses_are_masked(address: str) -> None:
    for text in (address, f"cannot reach '{address}': refused", f"({address}, http://other)"):
        assert SECRET not in mask(text)
        assert "***" in mask(text)
    assert "host" in mask(address) or not address.partition("://")[2].startswith(("me", SECRET))
    assert mask(mask(address)) == mask(address)


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000/#/experiments/3",
        "sqlite:////home/me/a@b/mlflow.db",
        "mail me@host about tokens=3, or password strength",
        "http://host:80/x?tokens_per_step=3",
        "no address: user:name@host",
        "",
    ],
)
def test_text_without_credentials_stays_as_it_is(text: str) -> None:
    assert mask(text) == text


def test_settings_are_masked_at_every_depth() -> None:
    address = ADDRESSES[0]
    settings = {
        "a": [address, {"b": (address, 1)}],
        "hub_token": SECRET,
        "password": "",
        "tokens": "12",
        "lr": 0.1,
        "none": None,
    }
    masked = mask_settings(settings)
    assert SECRET not in repr(masked)
    kept = {name: masked[name] for name in ("password", "tokens", "lr", "none")}
    assert kept == {"password": "", "tokens": "12", "lr": 0.1, "none": None}
    assert isinstance(masked["a"][1]["b"], tuple)
    assert settings["hub_token"] == SECRET  # the original does not change


@pytest.mark.parametrize("kind", [KfactkError, OptionError, MemoryExhaustedError, KfactkWarning])
def test_errors_and_warnings_mask_their_message(kind: type[Exception]) -> None:
    error = kind(f"cannot reach {ADDRESSES[0]}")
    assert SECRET not in str(error) + repr(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("address", ADDRESSES)
def test_recipes_show_no_credentials_and_load_again(address: str) -> None:
    recipe = kfactk.build(tracker={"name": "mlflow", "tracking_uri": address})
    for shown in (repr(recipe), json.dumps(recipe.summary()), repr(recipe.tracker)):
        assert SECRET not in shown
    assert kfactk.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.tracker.tracking_uri == address


class Telling:
    """A tracker that keeps the recipe it gets, and then fails with an address in its message."""

    every = 1
    recipe: Any = None

    def start(self, recipe: Any) -> None:
        self.recipe = recipe
        raise OSError(f"no route to {ADDRESSES[0]}")

    def record(self, step: int, metrics: Any) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def test_failing_trackers_show_no_credentials() -> None:
    with pytest.warns(KfactkWarning) as said:
        kfactk.build(tracker=Telling()).bind(torch.nn.Linear(2, 2))
    assert "no route to" in str(said[0].message)
    assert SECRET not in str(said[0].message)


def test_trackers_get_recipes_without_credentials(tmp_path: Any) -> None:
    path = tmp_path / "run.jsonl"
    label = {"name": "jsonl", "path": str(path), "every": 1}
    recipe = kfactk.build(tracker=label)
    recipe.tracker.start({"store": {"uri": ADDRESSES[0], "token": SECRET}})
    recipe.tracker.close()
    assert SECRET not in path.read_text()
    assert "http://***@host:5000/path" in path.read_text()
