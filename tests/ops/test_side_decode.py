"""side_decode against unpacking and summing, for any stages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidrec_torchrec.codec.alphabet import OneHot, Ternary, parse_stages
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.ops.side_decode import chunk_tables, side_decode

STAGES = [
    "ternary",
    "ternary*25",
    "onehot:256,ternary*20",
    "onehot:300,ternary*50",
    "onehot:4*7",
    "ternary*3,onehot:100*9",
]


def make_inputs(spec: SIDSpec, dim: int, rows: int, seed: int = 0):
    """Digits, packed words, and a random table per digit."""
    generator = torch.Generator().manual_seed(seed)
    digits_NL = torch.stack([torch.randint(r, (rows,), generator=generator) for r in spec.radices], dim=1)
    tables = [torch.randn(r, dim, generator=generator) for r in spec.radices]
    return digits_NL, spec.pack(digits_NL), tables


def arguments(spec, words_NW, tables):
    c = chunk_tables(spec, tables)
    return words_NW, c.table_RD, c.word_C, c.divisor_C, c.size_C, c.first_row_C


def sum_by_digit(digits_NL, tables):
    return sum(table[digits_NL[:, j]] for j, table in enumerate(tables))


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("rows", [0, 1, 57])
def test_equals_the_sum_over_digits(stages, rows):
    spec = SIDSpec(parse_stages(stages), "test")
    digits_NL, words_NW, tables = make_inputs(spec, 6, rows)
    decoded_ND = side_decode(*arguments(spec, words_NW, tables))
    torch.testing.assert_close(decoded_ND, sum_by_digit(digits_NL, tables), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.just(Ternary()), st.integers(2, 600).map(OneHot)), min_size=1, max_size=24), st.integers(0, 9)
)
def test_any_stages(stages, seed):
    spec = SIDSpec(tuple(stages), "test")
    digits_NL, words_NW, tables = make_inputs(spec, 3, 9, seed)
    decoded_ND = side_decode(*arguments(spec, words_NW, tables))
    torch.testing.assert_close(decoded_ND, sum_by_digit(digits_NL, tables), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_tables(dtype):
    spec = SIDSpec(parse_stages("ternary*25"), "test")
    digits_NL, words_NW, tables = make_inputs(spec, 8, 20)
    c = chunk_tables(spec, tables)
    decoded_ND = side_decode(words_NW, c.table_RD.to(dtype), c.word_C, c.divisor_C, c.size_C, c.first_row_C)
    assert decoded_ND.dtype == dtype
    torch.testing.assert_close(decoded_ND.float(), sum_by_digit(digits_NL, tables), rtol=0.05, atol=0.2)


def test_gradient_of_the_table():
    spec = SIDSpec(parse_stages("onehot:5,ternary*7"), "test")
    _, words_NW, tables = make_inputs(spec, 3, 6)
    words_NW, table_RD, *chunks = arguments(spec, words_NW, [t.double() for t in tables])
    table_RD.requires_grad_()
    assert torch.autograd.gradcheck(lambda table: side_decode(words_NW, table, *chunks), (table_RD,))


def test_is_a_proper_operator():
    spec = SIDSpec(parse_stages("ternary*25"), "test")
    _, words_NW, tables = make_inputs(spec, 4, 6)
    words_NW, table_RD, *chunks = arguments(spec, words_NW, tables)
    torch.library.opcheck(side_decode, (words_NW, table_RD.requires_grad_(), *chunks))


def test_compiles_in_one_graph():
    spec = SIDSpec(parse_stages("onehot:5,ternary*50"), "test")
    _, words_NW, tables = make_inputs(spec, 4, 6)
    words_NW, table_RD, *chunks = arguments(spec, words_NW, tables)
    gradients = []
    for decode in (side_decode, torch.compile(side_decode, backend="aot_eager", fullgraph=True)):
        table_RD = table_RD.detach().requires_grad_()
        decode(words_NW, table_RD, *chunks).square().sum().backward()
        gradients.append(table_RD.grad)
    torch.testing.assert_close(*gradients)


def test_exports_with_any_number_of_rows():
    spec = SIDSpec(parse_stages("ternary*25"), "test")
    digits_NL, words_NW, tables = make_inputs(spec, 4, 6)

    class Decode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i, tensor in enumerate(arguments(spec, words_NW, tables)[1:]):
                self.register_buffer(f"constant_{i}", tensor)

        def forward(self, words):
            return side_decode(words, *self.buffers())

    program = torch.export.export(Decode(), (words_NW,), dynamic_shapes=({0: torch.export.Dim("N")},))
    many = spec.pack(digits_NL.repeat(5, 1))
    torch.testing.assert_close(
        program.module()(many), sum_by_digit(digits_NL, tables).repeat(5, 1), rtol=1e-5, atol=1e-5
    )


def test_wrong_tables_are_refused():
    spec = SIDSpec(parse_stages("onehot:5,ternary"), "test")
    with pytest.raises(ValueError, match=r"digit tables have \[3, 5\] rows, expected \[5, 3\]"):
        chunk_tables(spec, [torch.zeros(3, 2), torch.zeros(5, 2)])
