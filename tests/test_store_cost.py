"""What an extraction costs on paper: the table follows from the rows of the catalog."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen_scope_lens.catalog import find_group
from qwen_scope_lens.errors import LayerOutOfRange, WrongSettings
from qwen_scope_lens.stores.cost import Job, cost, cost_table, parameters

GROUP = find_group("qwen3-8b-base/w64k-l0-50")


def test_a_row_by_hand() -> None:
    found = cost(GROUP, Job(peak=1e15, utilisation=0.5))
    second = 1e15 * 0.5
    assert found.layers == 36
    assert found.forward_hours == pytest.approx(2 * 8e9 * 1e9 / second / 3600)
    assert found.sae_hours == pytest.approx(36 * 2 * 4096 * 65536 * 1e9 / second / 3600)
    assert found.shards == 977  # 4 million documents, 4,096 per shard
    assert 13e12 < found.bytes < 14e12
    for documents, shards in ((1, 1), (4096, 1), (4097, 2), (3 * 4096, 3)):
        assert cost(GROUP, Job(tokens=250 * documents)).shards == shards


def test_it_grows_with_what_it_is_made_of() -> None:
    job = Job(layers=6)
    once, twice = cost(GROUP, job), cost(GROUP, replace(job, tokens=2e9))
    assert twice.gpu_hours == pytest.approx(2 * once.gpu_hours)
    assert twice.bytes == pytest.approx(2 * once.bytes)
    assert once.forward_hours == pytest.approx(cost(GROUP, Job()).forward_hours / 6)
    wider = find_group("qwen3-30b-a3b-base/w128k-l0-100")
    assert parameters(wider.backbone) == 3e9  # the active ones
    assert cost(wider, job).files > once.files  # indices_high.npy
    assert len(cost_table(Job()).rows) == 14


def test_impossible_jobs_are_refused() -> None:
    for layers in (0, 37, 99):
        with pytest.raises(LayerOutOfRange, match="expected 1 to 36, which qwen3-8b-base"):
            cost(GROUP, Job(layers=layers))
    deepest = max(cost_table(Job()).records(), key=lambda row: row["layers"])["layers"]
    with pytest.raises(LayerOutOfRange, match=f"expected 1 to {deepest}"):
        cost_table(Job(layers=deepest + 1))
    shallower = cost_table(Job(layers=deepest)).records()
    assert len({row["layers"] for row in shallower}) > 1  # these have fewer, and the table says so
    for wrong in ({"tokens": 0}, {"utilisation": 1.5}, {"peak": float("nan")}):
        with pytest.raises(WrongSettings, match="sizes above 0"):
            Job(**wrong)
