"""From documents to a store: right codes, resumable, refusing what does not belong together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from feature_stores import GROUP, LAYER, mini_store

import qwen_scope_lens as qsl
from qwen_scope_lens.features.packed import stored_values
from qwen_scope_lens.features.store import FeatureStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return mini_store(tmp_path_factory.mktemp("mini") / "store", n_docs=10, layers=(2, LAYER))


def test_codes_are_those_of_capture_and_encode(store: FeatureStore) -> None:
    """One document alone through the model: same features, values to rounding."""
    model = qsl.load_model("mini-qwen3", up_to_layer=LAYER)
    texts = store.documents(["text"])["text"].to_pylist()
    for layer in store.layers:
        sae = qsl.load_sae(f"{GROUP}/{layer}")
        for doc in (0, 9):
            read = qsl.capture(model, [texts[doc]], [layer], max_tokens=64, truncate=True)
            truth = sae.encode_sparse(read.residuals[layer]).to_dense().numpy()
            found = store.by_token(doc, layer)
            np.testing.assert_allclose(
                found.codes.to_dense().numpy(), stored_values(truth), rtol=2e-3, atol=1e-3
            )
            assert found.token_ids.tolist() == read.token_ids.tolist()
            assert found.keep.tolist() == read.keep(layer).tolist()


def test_labels_and_manifest(store: FeatureStore) -> None:
    assert store.is_complete
    assert set(store.label_names) == {"lang", "domain"}
    assert store.manifest.model.id == "mini-qwen3"
    assert store.sae(LAYER).ref == f"{GROUP}/{LAYER}"
    assert store.n_docs == 10


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_lost_or_damaged_shard_is_made_again(store: FeatureStore, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy)
    before = files_of(copy)
    path = copy / "shards" / "00001" / f"layer{LAYER}" / "values.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the same size
    path.write_bytes(bytes(content))
    mini_store(copy, n_docs=10, layers=(2, LAYER))
    assert files_of(copy) == before
