"""Edits, plans and places as data: what is refused, text and JSON round trips."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import BadFile, BadPlan, LayerOutOfRange, UnknownName
from qwen_scope_lens.steering import OPERATIONS, Edit, Plan, Where
from qwen_scope_lens.steering.plan_for import plan_for, read_features
from qwen_scope_lens.steering.where import TOKEN_CLASSES

REF = "mini-qwen3/w1k-l0-16/6/42"
OTHER = "mini-qwen3/w1k-l0-16/3/7"


def test_the_text_form_says_everything() -> None:
    edit = Edit.parse(f"{REF}:add:+2.0typical@generation,class=han")
    assert (str(edit.ref), edit.op, edit.strength, edit.unit) == (REF, "add", 2.0, "typical")
    assert edit.where == Where("generation", classes=("han",))
    assert Edit.parse(f"{REF}:ablate") == Edit(REF, "ablate")
    assert Edit.parse(f"{REF}:add:-0.1norm").unit == "norm"
    assert Edit.parse(f"{REF}:set:.5e1").strength == 5


def test_a_plan_for_what_names_features() -> None:
    rows = [SimpleNamespace(ref=OTHER), SimpleNamespace(ref=FeatureRef.parse(REF))]
    ranking = SimpleNamespace(rows=[*rows, rows[0]])
    plan = Plan([f"{OTHER}:add:-1typical@generation", f"{REF}:add:-1typical@generation"])
    for features in (ranking, rows, [OTHER, REF], iter([OTHER, REF, OTHER])):
        assert plan_for(features, "add", -1, "typical", "generation") == plan
    assert plan_for(ranking, "ablate", top=1) == Plan([f"{OTHER}:ablate"])
    assert plan_for(REF, "ablate", top=9) == Plan([f"{REF}:ablate"])
    for top in (0, -1):
        with pytest.raises(BadPlan, match="top="):
            plan_for(ranking, "ablate", top=top)
    with pytest.raises(BadPlan, match="no feature"):
        plan_for([], "ablate")
    with pytest.raises(UnknownName, match="5 is not"):
        plan_for([5], "ablate")


def test_features_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text(json.dumps({"rows": [{"ref": OTHER}, {"feature": REF, "label": "x"}]}))
    assert list(map(str, read_features(path))) == [OTHER, REF]
    rows = ("7", "[7]", "[]", '[{"feature": 7}]', '[{"feature": "a/b"}]')
    for content in ("", "[]", "7", "{}", "[" * 100_000, *(f'{{"rows": {row}}}' for row in rows)):
        path.write_text(content)
        with pytest.raises(BadFile, match=re.escape(str(path))):
            read_features(path)
    with pytest.raises(BadFile, match="qsl rank"):
        read_features(tmp_path / "none.json")


def test_a_plan_is_shown_as_a_table() -> None:
    plan = Plan([f"{REF}:add:+2sigma@generation", f"{OTHER}:ablate"]).calibrated({REF: 30})
    assert repr(plan).splitlines() == [
        "Plan",
        "feature                    operation  strength  unit     where       typical",
        f"{REF}  add              +2  typical  generation       30",
        f"{OTHER}   ablate            –  raw      both              –",
    ]
    assert plan._repr_html_().count("<tr>") == 3
    assert plan.to_pandas()["operation"].tolist() == ["add", "ablate"]


@pytest.mark.parametrize(
    "text",
    [
        REF,
        f"{REF}:",
        f"{REF}:add",
        f"{REF}:add:",
        f"{REF}:add:two",
        f"{REF}:add:nan",
        f"{REF}:add:2furlongs",
        f"{REF}:add:2:3",
        f"{REF}:explode:2",
        f"{REF}:ablate:1",
        f"{REF}:project_out:1",
        f"{REF}:cap:-1",
        f"{REF}:floor:-0.5",
        f"{REF}:scale:2typical",
        f"{REF}:add:1@",
        f"{REF}:add:1@nowhere",
        f"{REF}:add:1@prompt,generation",
        f"{REF}:add:1@class=klingon",
        f"{REF}:add:1@pos=8-3",
        f"{REF}:add:1@pos=1--1",
        f"{REF}:add:1@pos=",
    ],
)
def test_bad_edits_are_refused(text: str) -> None:
    with pytest.raises(BadPlan):
        Edit.parse(text)


def test_bad_addresses_are_refused_as_addresses() -> None:
    with pytest.raises(UnknownName):
        Edit.parse("nobody/nothing/6/42:ablate")
    with pytest.raises(LayerOutOfRange):
        Edit.parse("mini-qwen3/w1k-l0-16/6/1024:ablate")


def test_addresses_and_places_are_texts_or_objects() -> None:
    """Both are in the declared types, which a type checker reads."""
    place = Where("generation", classes="han", positions=range(3, 9))
    by_text = Edit(REF, "add", 2.0, where=str(place))
    assert by_text == Edit(FeatureRef.parse(REF), "add", 2.0, where=place)
    assert isinstance(by_text.ref, FeatureRef)
    assert by_text.where.positions == ((3, 9),)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), True, "3"])
def test_a_strength_is_a_finite_number(bad: object) -> None:
    with pytest.raises(BadPlan, match="finite"):
        Edit(REF, "add", bad)  # type: ignore[arg-type]


spans = st.one_of(
    st.integers(-20, 20).map(lambda i: (i, i + 1)),
    st.tuples(st.integers(0, 20), st.integers(1, 9)).map(lambda p: (p[0], p[0] + p[1])),
    st.integers(-20, 20).map(lambda i: (i, None)),
)
wheres = st.builds(
    Where,
    phase=st.sampled_from(["both", "prompt", "generation"]),
    positions=st.none() | st.lists(spans, min_size=1, max_size=3).map(tuple),
    classes=st.lists(st.sampled_from(sorted(TOKEN_CLASSES)), max_size=2).map(tuple),
    token_ids=st.lists(st.integers(0, 9999), max_size=2).map(tuple),
    roles=st.lists(st.sampled_from(["user", "assistant"]), max_size=2).map(tuple),
    skip_first=st.booleans(),
)


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    row = draw(st.sampled_from(OPERATIONS))
    strength = draw(st.integers(0, 64)) / 8 if row.takes_strength else None
    unit = draw(st.sampled_from(row.units))
    return Edit(draw(st.sampled_from([REF, OTHER])), row.name, strength, unit, draw(wheres))


@given(edits())
@settings(max_examples=100, deadline=None)
def test_every_edit_survives_text_and_json(edit: Edit) -> None:
    assert Where.of(str(edit.where)) == edit.where
    assert Edit.parse(str(edit)) == edit
    assert Edit.from_dict(json.loads(json.dumps(edit.to_dict()))) == edit


def test_a_plan_survives_a_file(tmp_path: Path) -> None:
    plan = Plan([f"{REF}:add:2typical", Edit(OTHER, "ablate", where="generation")])
    plan = plan.calibrated({REF: 1.5})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.layers == (3, 6)
    assert plan.edits[0].value == 3.0
    (tmp_path / "plan.json").write_text('{"format": "qsl-plan", "version": 1, "edits": [{}]}')
    with pytest.raises(BadFile, match=r"plan\.json"):
        Plan.load(tmp_path / "plan.json")


def test_contradictions_are_refused() -> None:
    for pair in (("ablate", "set:1"), ("set:1", "clamp:1"), ("ablate", "project_out")):
        with pytest.raises(BadPlan, match="decided twice"):
            Plan([f"{REF}:{op}" for op in pair])
    Plan([f"{REF}:set:1@prompt", f"{REF}:ablate@generation", f"{REF}:add:1", f"{REF}:add:2"])
    with pytest.raises(BadPlan, match="without edits"):
        Plan([])


def test_the_older_name_of_the_unit_is_read(tmp_path: Path) -> None:
    """In plan files of version 1, in text and in Python, where it warns."""
    new = Plan([f"{REF}:add:2typical"])
    row = {"ref": REF, "op": "add", "strength": 2.0, "unit": "sigma"}
    content = {"format": "qsl-plan", "version": 1, "edits": [row]}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    assert Plan.load(tmp_path / "plan.json") == new
    with pytest.deprecated_call(match="now called typical"):
        assert Plan([f"{REF}:add:2sigma"]) == new
    with pytest.deprecated_call(match="now called typical"):
        assert Edit(REF, "add", 2.0, "sigma") == new.edits[0]
    new.save(tmp_path / "new.json")
    assert json.loads((tmp_path / "new.json").read_text())["version"] == 2


def test_one_edit_is_a_plan() -> None:
    text = f"{REF}:add:2"
    assert Plan.of(text) == Plan.of(Edit.parse(text)) == Plan([text])
    assert Plan.of(Plan([text])) == Plan([text])
    with pytest.raises(BadPlan, match="expected a Plan"):
        Plan.of(3)  # type: ignore[arg-type]


def test_typical_needs_a_calibration() -> None:
    plan = Plan([f"{REF}:add:2typical"])
    with pytest.raises(BadPlan, match="calibrate"):
        _ = plan.edits[0].value
    with pytest.raises(BadPlan, match="not in the calibration"):
        plan.calibrated({OTHER: 1.0})


def test_plans_are_scaled_whole() -> None:
    plan = Plan([f"{REF}:add:2", f"{OTHER}:add:-1"])
    assert [e.strength for e in plan.times(-2).edits] == [-4, 2]
    assert [e.strength for e in plan.at(3).edits] == [3, 3]
    with pytest.raises(BadPlan, match="no strength"):
        Plan([f"{REF}:ablate"]).times(2)


def test_positions_in_python() -> None:
    assert Where(positions=range(3, 9)).positions == ((3, 9),)
    assert Where(positions=[0, slice(4, None), -1]).positions == ((0, 1), (4, None), (-1, 0))
    assert Where.mask([0, 1, 1, 0, 1]).positions == ((1, 2), (2, 3), (4, 5))
    with pytest.raises(BadPlan):
        Where(positions=range(0, 9, 2))
