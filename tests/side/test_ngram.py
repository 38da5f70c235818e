"""Prefix n-gram tokens against the paper's formula, and their tables against a sum of embeddings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.alphabet import OneHot, Ternary
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.side.ngram import AllNgram, NgramVectors, PrefixNgram

MOST_ROWS = (2**63 - 1) // 2048  # for 2048 codewords


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 2048), st.integers(1, 8), st.integers(1, 1 << 40), st.data())
def test_tokens_follow_the_formula(K, n, num_rows, data):
    digits = data.draw(st.lists(st.lists(st.integers(0, K - 1), min_size=n, max_size=n), min_size=1, max_size=5))
    spec = SIDSpec((OneHot(K),) * n, "test")
    tokens_NP = PrefixNgram(spec, num_rows=num_rows, depth=n).tokens(spec.pack(torch.tensor(digits)))
    for row, codes in enumerate(digits):
        for i in range(1, n + 1):
            token = sum(K ** (i - t) * (codes[t - 1] + 1) for t in range(1, i + 1)) - 1  # unbounded integers
            assert int(tokens_NP[row, i - 1]) == token % num_rows


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.integers(1, 5), st.integers(1, 1 << 40), st.data())
def test_tokens_of_all_ngrams(K, n, num_rows, data):
    codes = data.draw(st.lists(st.integers(0, K - 1), min_size=n, max_size=n))
    depth = data.draw(st.integers(1, n))
    spec = SIDSpec((OneHot(K),) * n, "test")
    ngram = AllNgram(spec, num_rows=num_rows, depth=depth)
    expected, keys, prefixes = [], [], sum(K**i for i in range(1, depth + 1))
    for start in range(n):
        for i in range(1, min(depth, n - start) + 1):
            run = codes[start : start + i]
            token = sum(K ** (i - t) * (run[t - 1] + 1) for t in range(1, i + 1)) - 1 + start * prefixes
            expected.append(token % num_rows)
            keys.append(f"text_digits{start + 1}to{start + i}")
    assert ngram.tokens(spec.pack(torch.tensor([codes]))).tolist() == [expected]
    assert ngram.keys("text") == keys


def test_collection_sums_prefixes_of_each_source():
    spec = SIDSpec((OneHot(5),) * 3, "test")
    ngrams = {"text": PrefixNgram(spec, num_rows=50, depth=3), "image": PrefixNgram(spec, num_rows=20, depth=2)}
    collection = NgramVectors(ngrams, embedding_dim=4, device=torch.device("cpu"))
    digits = torch.randint(5, (6, 3), generator=torch.Generator().manual_seed(0))
    words_NW = spec.pack(digits)
    lengths = torch.tensor([2, 0, 4])
    keys, values, expected = [], [], []
    for source, ngram in ngrams.items():
        table = collection.collection.embeddings[f"{source}_ngrams"].weight
        torch.nn.init.normal_(table)
        tokens_NP = ngram.tokens(words_NW)
        keys += ngram.keys(source)
        values += tokens_NP.unbind(1)
        expected.append(table[tokens_NP].sum(1))
    features = KeyedJaggedTensor(keys=keys, values=torch.cat(values), lengths=lengths.repeat(len(keys)))
    torch.testing.assert_close(collection(features), torch.cat(expected, dim=1))


def test_refusals():
    with pytest.raises(ValueError, match="all one-hot of one size"):
        PrefixNgram(SIDSpec((OneHot(4), OneHot(5)), "test"), num_rows=10, depth=1)
    with pytest.raises(ValueError, match="all one-hot of one size"):
        PrefixNgram(SIDSpec((Ternary(),) * 4, "test"), num_rows=10, depth=1)
    with pytest.raises(ValueError, match="depth must be 1 to 3"):
        PrefixNgram(SIDSpec((OneHot(4),) * 3, "test"), num_rows=10, depth=4)
    spec = SIDSpec((OneHot(2048),) * 6, "test")
    for num_rows in (0, -3, MOST_ROWS + 1):
        with pytest.raises(ValueError, match=f"num_rows must be 1 to {MOST_ROWS}, got {num_rows}"):
            PrefixNgram(spec, num_rows=num_rows, depth=6)


def test_tokens_are_exact_up_to_the_most_rows():
    spec = SIDSpec((OneHot(2048),) * 6, "test")
    tokens_NP = PrefixNgram(spec, num_rows=MOST_ROWS, depth=6).tokens(spec.pack(torch.full((1, 6), 2047)))
    full = [sum(2048 ** (i - t) * 2048 for t in range(1, i + 1)) - 1 for i in range(1, 7)]
    assert full[-1] > 2**63 and tokens_NP[0].tolist() == [token % MOST_ROWS for token in full]
