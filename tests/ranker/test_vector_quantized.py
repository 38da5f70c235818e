"""Product quantization against faiss: its codes of our codebooks, and how much of a vector each of the two loses."""

import faiss
import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.ranker.arms import ARMS, ArmConfig, ArmInputs
from sidrec_torchrec.ranker.arms.vector_quantized import ProductQuantizer

ITEMS, PARTS = 3000, 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sources() -> list[np.ndarray]:
    """Two sources of 24 and 40 values, clustered and of falling variance."""
    rng = np.random.default_rng(0)
    centre_KD = rng.normal(size=(40, 64))
    x_ND = centre_KD[rng.integers(40, size=ITEMS)] + rng.normal(size=(ITEMS, 64)) * 0.97 ** np.arange(64)
    return [x_ND[:, :24].astype(np.float16), x_ND[:, 24:].astype(np.float16)]


def faiss_quantizer(dim: int) -> faiss.ProductQuantizer:
    faiss.omp_set_num_threads(1)
    return faiss.ProductQuantizer(dim, PARTS, 8)


def error(x_ND: np.ndarray, decoded_ND: np.ndarray) -> float:
    return float(np.square(x_ND - decoded_ND).sum() / np.square(x_ND - x_ND.mean(0)).sum())


def decode(code_NM: np.ndarray, codebooks) -> np.ndarray:
    return np.concatenate([book.numpy()[code_NM[:, m]] for m, book in enumerate(codebooks)], axis=1)


def test_codes_are_those_of_faiss_and_no_more_is_lost(sources):
    x_ND = np.concatenate(sources, axis=1).astype(np.float32)
    ours, theirs = ProductQuantizer.fit(sources, np.arange(ITEMS), PARTS), faiss_quantizer(64)
    code_NM = ours.encode(sources)
    faiss.copy_array_to_vector(
        np.stack([book.numpy() for book in ours.codebooks]).astype(np.float32).ravel(), theirs.centroids
    )
    np.testing.assert_array_equal(code_NM, theirs.compute_codes(x_ND))
    np.testing.assert_allclose(decode(code_NM, ours.codebooks), theirs.decode(code_NM), rtol=1e-6)
    theirs.train(x_ND)
    lost = error(x_ND, theirs.decode(theirs.compute_codes(x_ND)))
    assert error(x_ND, decode(code_NM, ours.codebooks)) < 1.02 * lost < 0.5


def test_an_event_carries_eight_bytes_which_the_model_decodes(sources, tmp_path):
    events_N = np.random.default_rng(1).integers(3, size=ITEMS)
    np.save(tmp_path / "events.npy", events_N)
    for name, array in zip("ab", sources, strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    vectors = {name: tmp_path / f"{name}.npy" for name in "ab"}
    arm = ARMS["pq"](ArmInputs(num_items=ITEMS, vectors=vectors, training_events=tmp_path / "events.npy"), ArmConfig())
    item_N = np.array([5, ITEMS - 1, -1, 0], np.int32)
    word_N = arm.values(item_N)["pq_codes"]
    assert word_N.dtype == torch.int64 and word_N.shape == (4,)
    batch = KeyedJaggedTensor(keys=["pq_codes"], values=word_N, lengths=torch.ones(4, dtype=torch.int64))
    vector_ND = arm.module(CPU)(batch).numpy()
    quantizer = ProductQuantizer.fit(sources, np.flatnonzero(events_N), PARTS)  # of what training has alone
    expected_ID = decode(quantizer.encode(sources), quantizer.codebooks).astype(np.float32)
    np.testing.assert_array_equal(vector_ND[[0, 1, 3]], expected_ID[[5, ITEMS - 1, 0]])
    assert arm.stored(item_N)["pq_codes"].to_pylist() == [word_N[0].item(), word_N[1].item(), None, word_N[3].item()]


def test_short_vectors_and_few_items(sources):
    narrow = [array[:50, :2] for array in sources]
    quantizer = ProductQuantizer.fit(narrow, np.arange(50), PARTS)
    code_NM = quantizer.encode(narrow)
    assert code_NM.shape == (50, 4)
    x_ND = np.concatenate(narrow, axis=1)
    np.testing.assert_allclose(decode(code_NM, quantizer.codebooks), x_ND, atol=1e-6)  # fewer items than codewords
    with pytest.raises(ValueError, match="at least one item"):
        ProductQuantizer.fit(sources, np.arange(0), PARTS)
