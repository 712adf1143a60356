"""Names from elsewhere lead to what does the same here."""

from __future__ import annotations

import re

import pytest

import kfactk
from kfactk.registry.other_names import OTHER_NAMES


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, names in OTHER_NAMES.items() for name in names]
)
def test_the_line_for_a_name_from_elsewhere_can_be_built(family: str, name: str) -> None:
    with pytest.raises(kfactk.UnknownStageError) as error:
        kfactk.build(**{family: {"name": name, "size": 3}})
    text = str(error.value)
    assert "Did you mean" not in text
    (line,) = re.findall(rf"{family}=(?:\{{.*?\}}|'\w+')", text)
    kfactk.build(**eval(f"dict({line})"))


def test_joint_leads_to_several_likelihoods() -> None:
    words = "likelihood={'policy': 'categorical', 'value': 'gaussian'}"
    with pytest.raises(kfactk.UnknownStageError, match=re.escape(words)):
        kfactk.build(likelihood={"name": "joint", "heads": ["policy", "value"]})
