"""side_decode against unpacking and summing, for any stages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidrec_torchrec.codec.alphabet import OneHot, Ternary, parse_stages
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.ops.layout import digit_rows
from sidrec_torchrec.ops.side_decode import reference_backward, scaled_decode, scaled_reference, side_decode

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


def arguments(spec, words_NW, tables, limit=256):
    joined = spec.layout.join(limit)
    table_RD = joined.expand(digit_rows(tables, joined.digits))
    return words_NW, table_RD, list(joined.chunks.radices), list(joined.chunks.words)


def sum_by_digit(digits_NL, tables):
    return sum(table[digits_NL[:, j]] for j, table in enumerate(tables))


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("rows", [0, 1, 57])
def test_equals_the_sum_over_digits(stages, rows):
    spec = SIDSpec(parse_stages(stages), "test")
    digits_NL, words_NW, tables = make_inputs(spec, 6, rows)
    decoded_ND = side_decode(*arguments(spec, words_NW, tables))
    torch.testing.assert_close(decoded_ND, sum_by_digit(digits_NL, tables), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stages", ["ternary*25", "ternary*39", "onehot:32768*4", "onehot:7,onehot:32767*3,ternary*9"])
def test_words_where_a_chunk_changes(stages):
    """Kernels divide by floating point: around the multiples of what they divide by, and at both ends, they must be exact."""
    layout = SIDSpec(parse_stages(stages), "test").layout.join().chunks
    limit = layout.divisors[0] * layout.radices[0]
    generator = torch.Generator().manual_seed(0)
    words = [torch.tensor([0, 1, limit - 1, limit - 2])]
    for divisor in layout.divisors:
        multiple_N = torch.randint(limit // divisor, (200,), generator=generator) * divisor
        words += [multiple_N, (multiple_N - 1).clamp_min(0), (multiple_N + 1).clamp_max(limit - 1)]
    words_N1 = torch.cat(words).unsqueeze(1)
    for c, radix in enumerate(layout.radices):
        tables = [torch.zeros(r, 1) for r in layout.radices]
        tables[c] = torch.arange(radix).float().unsqueeze(1)
        decoded_N1 = side_decode(words_N1, torch.cat(tables), list(layout.radices), list(layout.words))
        assert decoded_N1[:, 0].long().equal(layout.values(words_N1)[:, c])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.just(Ternary()), st.integers(2, 600).map(OneHot)), min_size=1, max_size=24), st.integers(0, 9)
)
def test_any_stages(stages, seed):
    spec = SIDSpec(tuple(stages), "test")
    digits_NL, words_NW, tables = make_inputs(spec, 3, 9, seed)
    decoded_ND = side_decode(*arguments(spec, words_NW, tables))
    torch.testing.assert_close(decoded_ND, sum_by_digit(digits_NL, tables), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [3, 27, 100, 256])
@pytest.mark.parametrize("dim", [1, 8, 25, 64, 129])
def test_any_chunks_and_widths(limit, dim):
    spec = SIDSpec(parse_stages("onehot:300,ternary*50"), "test")
    digits_NL, words_NW, tables = make_inputs(spec, dim, 300)
    decoded_ND = side_decode(*arguments(spec, words_NW, tables, limit))
    torch.testing.assert_close(decoded_ND, sum_by_digit(digits_NL, tables), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_tables_are_summed_in_float32(dtype):
    spec = SIDSpec(parse_stages("ternary*25"), "test")
    _, words_NW, tables = make_inputs(spec, 12, 200)
    words_NW, table_RD, *chunks = arguments(spec, words_NW, tables)
    table_RD = table_RD.to(dtype)
    decoded_ND = side_decode(words_NW, table_RD, *chunks)
    assert decoded_ND.dtype == dtype
    # the sum of the rounded rows, itself rounded once; the last bit may turn with the order of the sum
    sum_ND = side_decode(words_NW, table_RD.double(), *chunks)
    torch.testing.assert_close(decoded_ND.double(), sum_ND, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_not_a_number_stays_so_in_low_precision():
    spec = SIDSpec(parse_stages("ternary*3"), "test")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        words_NW, table_RD, *chunks = arguments(spec, *make_inputs(spec, 9, 5)[1:])
        table_RD[:] = torch.nan
        assert side_decode(words_NW, table_RD.to(dtype), *chunks).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_in_kernels_equals_the_reference(dtype):
    spec = SIDSpec(parse_stages("onehot:300,ternary*50"), "test")
    words_NW, table_RD, *chunks = arguments(spec, *make_inputs(spec, 21, 700)[1:])
    table_RD = table_RD.to(dtype).requires_grad_()
    grad_ND = torch.randn(700, 21).to(dtype)
    side_decode(words_NW, table_RD, *chunks).backward(grad_ND)
    expected_RD = reference_backward(words_NW, grad_ND.double(), *chunks)
    tolerance = 1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(table_RD.grad.double(), expected_RD, rtol=tolerance, atol=1e-4)


def test_gradient_of_the_table():
    spec = SIDSpec(parse_stages("onehot:5,ternary*7"), "test")
    _, words_NW, tables = make_inputs(spec, 3, 6)
    words_NW, table_RD, *chunks = arguments(spec, words_NW, [t.double() for t in tables])
    table_RD.requires_grad_()
    assert torch.autograd.gradcheck(lambda table: side_decode(words_NW, table, *chunks), (table_RD,))


def test_words_out_of_range_never_read_outside_the_table():
    spec = SIDSpec(parse_stages("ternary*25"), "test")
    _, table_RD, *chunks = arguments(spec, *make_inputs(spec, 8, 1)[1:])
    words_NW = torch.tensor([[-1], [1 << 62], [torch.iinfo(torch.int64).min], [torch.iinfo(torch.int64).max]])
    decoded_ND = side_decode(words_NW, table_RD, *chunks)
    assert (decoded_ND.abs() <= sum(t.abs().amax() for t in table_RD.split(chunks[0]))).all()


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

    _, table_RD, *chunks = arguments(spec, words_NW, tables)

    class Decode(torch.nn.Module):
        def forward(self, words):
            return side_decode(words, table_RD, *chunks)

    program = torch.export.export(Decode(), (words_NW,), dynamic_shapes=({0: torch.export.Dim("N")},))
    many = spec.pack(digits_NL.repeat(5, 1))
    torch.testing.assert_close(
        program.module()(many), sum_by_digit(digits_NL, tables).repeat(5, 1), rtol=1e-5, atol=1e-5
    )


def test_wrong_tables_are_refused():
    spec = SIDSpec(parse_stages("onehot:5,ternary"), "test")
    with pytest.raises(ValueError, match=r"digit tables have \[3, 5\] rows, expected \[5, 3\]"):
        digit_rows([torch.zeros(3, 2), torch.zeros(5, 2)], spec.layout)
    words_NW, table_RD, *chunks = arguments(spec, *make_inputs(spec, 4, 6)[1:])
    with pytest.raises(ValueError, match="a table of 14 rows, expected 15"):
        side_decode(words_NW, table_RD[1:], *chunks)


@pytest.mark.parametrize("dim", [5, 64, 136])
def test_scaled_decode_scales_the_first_chunks(dim):
    generator = torch.Generator().manual_seed(0)
    radices, words = [243, 9, 300, 7], [0, 0, 1, 2]
    values_NC = torch.stack([torch.randint(r, (3000,), generator=generator) for r in radices], dim=1)
    words_NW = torch.stack([values_NC[:, 0] * 9 + values_NC[:, 1], values_NC[:, 2], values_NC[:, 3]], dim=1)
    table_RD, scale_N = torch.randn(559, dim, generator=generator), torch.rand(3000, generator=generator)
    first_C = torch.tensor([0, 243, 252, 552])
    rows_NCD = table_RD.double()[values_NC + first_C]
    for scaled in range(5):
        expected = scale_N.unsqueeze(1) * rows_NCD[:, :scaled].sum(1) + rows_NCD[:, scaled:].sum(1)
        actual = scaled_decode(words_NW, table_RD, scale_N, radices, words, scaled)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
        exact = scaled_reference(words_NW, table_RD.double(), scale_N.double(), radices, words, scaled)
        torch.testing.assert_close(exact, expected)
    torch.library.opcheck(scaled_decode, (words_NW[:9], table_RD, scale_N[:9], radices, words, 2))
