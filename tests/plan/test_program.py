"""The facts of a program as JSON."""

import json

import pytest

from kbtrain.plan.program import ProgramFacts

pytestmark = pytest.mark.neutral


def test_facts_survive_json():
    facts = ProgramFacts(
        "h100", 8, 64, 1, 64, None, 10, 40, 40, 40, 80, 4, 256, 512, 64, 956, 1e6, 1.5e6,
        collectives={"all-reduce": (1, 70)}, exact={"state": "compiled: shapes"},
    )  # fmt: skip
    assert ProgramFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts
    assert facts.state_bytes == 40 + 80 + 4
