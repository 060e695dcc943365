"""A table as text, CSV, JSON rows and pandas; intervals and correlations."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from qwen_scope_lens import stats
from qwen_scope_lens.pages import Page, Shaded, shaded_html
from qwen_scope_lens.tables import Table, View, plain, printable, shown

TABLE = Table.of(["feature", "rate", "texts"], [("a/b/1/2", 0.25, 1200), ("日本", None, 3)])


def test_text_is_aligned_also_with_wide_characters() -> None:
    assert TABLE.text().splitlines() == [
        "feature   rate  texts",
        "a/b/1/2  0.250  1,200",
        "日本         –      3",
    ]
    assert TABLE.text(most=1).splitlines()[-1] == "... and 1 more"


def test_terminals_obey_nothing_that_a_cell_holds() -> None:
    text = Table.of(["label"], [("\x1b[2Jgone\r\n\u202e",)]).text()
    assert "\x1b" not in text
    assert "\r" not in text
    assert r"\x1b[2Jgone\r\n\u202e" in text
    assert printable("naïve 語 👩‍💻") == "naïve 語 👩‍💻"


def test_notebooks_obey_nothing_that_a_cell_holds() -> None:
    """All notebooks' views and pages are made of these pieces."""
    bad = "\x1b[2J<b>\u202eabc"
    table = Table.of((bad,), [(bad,)], above=(bad,), below=(bad,))
    for made in (
        table._repr_html_(),
        shaded_html([(bad, [Shaded(bad, 0.5, bad)])]),
        Page(bad).heading(bad).text(bad).verbatim(bad).table((bad,), [(bad,)]).render(),
    ):
        assert not any(sign in made for sign in ("\x1b", "\u202e", "<b>"))
        assert "\\x1b[2J&lt;b&gt;\\u202eabc" in made


def test_csv_and_json_keep_the_cells() -> None:
    assert TABLE.csv() == "feature,rate,texts\na/b/1/2,0.25,1200\n日本,,3\n"
    odd = Table.of(["x", "y"], [(math.inf, np.float32(0.5)), (math.nan, np.arange(2))])
    assert json.loads(json.dumps(odd.records(), allow_nan=False)) == [
        {"x": None, "y": 0.5},
        {"x": None, "y": [0, 1]},
    ]
    assert list(TABLE.to_pandas()["texts"]) == [1200, 3]


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 cells for 3 columns"):
        Table.of(["a", "b", "c"], [(1, 2)])
    assert Table.of_records([{"a": 1}, {"b": 2}]).rows == ((1, None), (None, 2))


class Squares(View):
    """Forty numbers and their squares, with words around them."""

    def table(self, most: int | None = None) -> Table:
        rows = [(f"<b>{n}</b>", n * n / 8) for n in range(40)][:most]
        return Table.of(
            ["n", "an eighth of the square"],
            rows,
            above=("squares <i>",),
            below=("these were squares",),
            more=40 - len(rows),
            formats={"an eighth of the square": ".1e"},
            heat=("an eighth of the square",),
        )


def test_a_view_is_short_in_text_longer_in_a_notebook_and_whole_in_pandas() -> None:
    found = Squares()
    assert repr(found).splitlines() == [
        "Squares: squares <i>",
        "n         an eighth of the square",
        "<b>0</b>                  0.0e+00",
        "<b>1</b>                  1.2e-01",
        "<b>2</b>                  5.0e-01",
        "<b>3</b>                  1.1e+00",
        "<b>4</b>                  2.0e+00",
        "... and 35 more",
    ]
    html = found._repr_html_()
    assert html.count("<tr>") == 21
    assert "<b>" not in html
    assert "<i>" not in html
    assert "these were squares" in html
    assert "... and 20 more" in html
    strengths = [float(part[:4]) for part in html.split("rgba(240,130,30,")[1:]]
    assert strengths == sorted(strengths)
    assert strengths[-1] == 0.75
    assert len(found.to_pandas()) == 40
    text = str(found.table())
    assert text.endswith("these were squares")
    assert len(text.splitlines()) == 43


@pytest.mark.parametrize(
    ("cell", "text"),
    [(0.5, "0.500"), (1e-7, "1e-07"), (123456.0, "1.23e+05"), (0.0, "0.000"), (True, "yes")],
)
def test_cells_as_people_read_them(cell: object, text: str) -> None:
    assert shown(cell) == text


def test_plain_keeps_nested_data() -> None:
    assert plain({"a": (1, np.float64("nan")), 2: Table.of(["c"], [])}) == {
        "a": [1, None],
        "2": {
            "columns": ["c"],
            "rows": [],
            "above": [],
            "below": [],
            "more": 0,
            "formats": {},
            "heat": [],
        },
    }


def test_wilson_holds_near_zero_and_is_scipys() -> None:
    found = stats.proportion(0, 40)
    expected = scipy_stats.binomtest(0, 40).proportion_ci(0.95, method="wilson")
    assert (found.value, found.low, found.high) == (0.0, expected.low, expected.high)
    assert 0.05 < found.high < 0.12


def test_correlations_are_nan_where_nothing_varies() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 30))
    assert stats.pearson(x, y) == pytest.approx(scipy_stats.pearsonr(x, y).statistic)
    assert stats.spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
    assert math.isnan(stats.pearson(x, np.ones(30)))
    assert math.isnan(stats.spearman([1.0], [2.0]))


def test_draws_of_whole_groups_vary_more_than_single_values() -> None:
    groups = [n // 10 for n in range(200)]
    values = [float(group % 2) for group in groups]  # all of a group alike
    by_group = stats.draws_of_groups(values, groups).std()
    alone = stats.draws_of_groups(values, range(200)).std()
    assert 2 < by_group / alone < 5
    assert stats.between(0.5, [np.nan, 0.0, 1.0]).low == pytest.approx(0.025)
    assert stats.centred(0.6, [0.2, 0.4], most=0.65).high == pytest.approx(0.65, abs=0.02)
