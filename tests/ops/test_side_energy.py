"""side_energy against decode, then square; and its gradient."""

import pytest
import torch

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.ops.side_energy import reference, reference_backward, side_energy, side_energy_backward

STAGES = pytest.mark.parametrize("stages", ["ternary", "ternary*25", "onehot:300,ternary*50"])


def make(stages, events=1500, dim=13, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    spec = SIDSpec(parse_stages(stages), "")
    digits_NL = torch.stack([torch.randint(r, (events,), generator=generator) for r in spec.radices], dim=1)
    chunks = spec.layout.join().chunks
    table_RD = torch.randn(chunks.num_values, dim, generator=generator, dtype=dtype)
    return spec.pack(digits_NL), table_RD, list(chunks.radices), list(chunks.words)


def by_hand(words_NW, table_RD, radices, words):
    """One chunk after another, from divisions of each word."""
    vectors = []
    for word_W in words_NW.tolist():
        rest, rows = list(word_W), []
        first = sum(radices)
        for radix, word in reversed(list(zip(radices, words, strict=True))):
            first -= radix
            rest[word], value = divmod(rest[word], radix)
            rows.append(first + value)
        vectors.append(table_RD[rows].sum(0))
    return torch.stack(vectors).square().sum(1)


@STAGES
@pytest.mark.parametrize("dim", [1, 13, 64, 72])
def test_equals_decode_then_square(stages, dim):
    words, table, *chunks = make(stages, events=300, dim=dim)
    expected = by_hand(words, table.double(), *chunks)
    torch.testing.assert_close(side_energy(words, table, *chunks).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference(words, table.double(), *chunks), expected)


@STAGES
@pytest.mark.parametrize("dim", [13, 64])
def test_gradient_in_kernels_equals_the_reference(stages, dim):
    words, table, *chunks = make(stages, dim=dim)
    grad = torch.randn(len(words), generator=torch.Generator().manual_seed(1))
    actual = side_energy_backward(words, table, grad, *chunks).double()
    expected = reference_backward(words, table.double(), grad.double(), *chunks)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_gradient_of_the_table():
    words, table, *chunks = make("onehot:5,ternary*2", events=9, dim=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda table: side_energy(words, table, *chunks), (table.requires_grad_(),))


def test_is_a_proper_operator():
    words, table, *chunks = make("ternary*8", events=9, dim=3)
    torch.library.opcheck(side_energy, (words, table.requires_grad_(), *chunks))


def test_nothing():
    words, table, *chunks = make("ternary*8")
    table.requires_grad_()
    energy = side_energy(words[:0], table, *chunks)
    assert energy.shape == (0,)
    energy.sum().backward()
    assert not table.grad.any()


def test_threads_do_not_change_a_bit():
    words, table, *chunks = make("ternary*25", events=9000, dim=64)
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            energy = side_energy(words, table, *chunks)
            results.append((energy, side_energy_backward(words, table, energy, *chunks)))
    finally:
        torch.set_num_threads(threads)
    for energy, grad in results[1:]:
        assert energy.equal(results[0][0]) and grad.equal(results[0][1])


def test_bad_input_is_refused():
    words, table, *chunks = make("ternary*25")
    with pytest.raises(ValueError, match="a table of 1214 rows, expected 1215"):
        side_energy(words, table[1:], *chunks)
    with pytest.raises(ValueError, match="the table is torch.bfloat16; give it in float32"):
        side_energy(words, table.bfloat16(), *chunks)
