// Packed SIDs to sums of table rows on CPU, and the gradient of the table; side_decode.py says what they compute.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "codes.h"
#include "vec.h"

namespace sidrec {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kEvents = 256; // events at a time, whose field values stay in L1

using Float = Vec<kLanes>::Float;

inline void store(float* out, Float x) { std::memcpy(out, &x, sizeof(x)); }

inline void store(at::BFloat16* out, Float x) {
  using Int = Vec<kLanes>::Int;
  Int bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const Int rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; // to nearest even
  const Int result = x == x ? rounded : Int{} + 0x7fc0;           // rounding would turn some NaN into infinity
  const auto halves = __builtin_convertvector(result, Vec<kLanes>::Short);
  std::memcpy(out, &halves, sizeof(halves));
}

inline void store(at::Half* out, Float x) {
#ifdef __F16C__
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(reinterpret_cast<__m256>(x), 0));
#else
  for (int64_t i = 0; i < kLanes; ++i) out[i] = static_cast<at::Half>(x[i]);
#endif
}

// out[d] = sum of rows[f][d] for N * kLanes columns.
template <int N, typename Out>
inline void add_rows(const float* const* rows, int64_t num_rows, int64_t d, Out* out) {
  Float sum[N] = {};
  for (int64_t f = 0; f < num_rows; ++f) {
    for (int i = 0; i < N; ++i) {
      Float x;
      std::memcpy(&x, rows[f] + d + i * kLanes, sizeof(x));
      sum[i] += x;
    }
  }
  for (int i = 0; i < N; ++i) store(out + d + i * kLanes, sum[i]);
}

template <typename Out>
void decode(const Layout& layout, const int64_t* words, int64_t num_words, int64_t N, const float* table, int64_t D,
            Out* out) {
  at::parallel_for(0, N, 4 * kEvents, [&](int64_t from, int64_t to) {
    const int64_t F = layout.num_fields();
    std::vector<uint16_t> values(F * kEvents);
    std::vector<const float*> rows(F);
    for (int64_t begin = from; begin < to; begin += kEvents) {
      const int64_t n = std::min(kEvents, to - begin);
      layout.unpack(words, num_words, begin, begin + n, values.data(), kEvents);
      for (int64_t t = 0; t < n; ++t) {
        for (int64_t f = 0; f < F; ++f) rows[f] = table + (layout.fields()[f].first_row + values[f * kEvents + t]) * D;
        Out* row = out + (begin + t) * D;
        int64_t d = 0;
        for (; d + 8 * kLanes <= D; d += 8 * kLanes) add_rows<8>(rows.data(), F, d, row);
        for (; d + kLanes <= D; d += kLanes) add_rows<1>(rows.data(), F, d, row);
        for (; d < D; ++d) {
          float sum = 0;
          for (int64_t f = 0; f < F; ++f) sum += rows[f][d];
          row[d] = static_cast<Out>(sum);
        }
      }
    }
  });
}

at::Tensor side_decode(const at::Tensor& words, const at::Tensor& table, at::IntArrayRef radices,
                       at::IntArrayRef field_words, at::ScalarType dtype) {
  const Layout layout(radices, field_words, 0);
  layout.check_words(words);
  TORCH_CHECK(table.size(0) == layout.num_rows(), "a table of ", table.size(0), " rows, expected ", layout.num_rows());
  at::Tensor out = at::empty({words.size(0), table.size(1)}, table.options().dtype(dtype));
  const auto run = [&](auto* data) {
    decode(layout, words.const_data_ptr<int64_t>(), words.size(1), words.size(0), table.const_data_ptr<float>(),
           table.size(1), data);
  };
  switch (dtype) {
    case at::kFloat: run(out.mutable_data_ptr<float>()); break;
    case at::kBFloat16: run(out.mutable_data_ptr<at::BFloat16>()); break;
    case at::kHalf: run(out.mutable_data_ptr<at::Half>()); break;
    default: TORCH_CHECK(false, "side_decode gives float32, bfloat16 or float16, not ", dtype);
  }
  return out;
}

// The gradient of the table, float32 [R, D]. Threads share out the columns, so that no two add to one number.
at::Tensor side_decode_backward(const at::Tensor& words, const at::Tensor& grad, at::IntArrayRef radices,
                                at::IntArrayRef field_words) {
  const Layout layout(radices, field_words, 0);
  layout.check_words(words);
  const int64_t N = words.size(0), D = grad.size(1), F = layout.num_fields();
  at::Tensor table = at::zeros({layout.num_rows(), D}, grad.options());
  const int64_t* word = words.const_data_ptr<int64_t>();
  const float* in = grad.const_data_ptr<float>();
  float* out = table.mutable_data_ptr<float>();
  at::parallel_for(0, (D + kLanes - 1) / kLanes, 2, [&](int64_t from, int64_t to) {
    const int64_t first = from * kLanes, width = std::min(to * kLanes, D) - first;
    std::vector<uint16_t> values(F * kEvents);
    for (int64_t begin = 0; begin < N; begin += kEvents) {
      const int64_t n = std::min(kEvents, N - begin);
      layout.unpack(word, words.size(1), begin, begin + n, values.data(), kEvents);
      for (int64_t t = 0; t < n; ++t) {
        const float* row = in + (begin + t) * D + first;
        for (int64_t f = 0; f < F; ++f) {
          float* sum = out + (layout.fields()[f].first_row + values[f * kEvents + t]) * D + first;
          for (int64_t d = 0; d < width; ++d) sum[d] += row[d];
        }
      }
    }
  });
  return table;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(sidrec_cpu, m) {
  m.def("side_decode(Tensor words, Tensor table, int[] radices, int[] field_words, ScalarType dtype) -> Tensor",
        side_decode);
  m.def("side_decode_backward(Tensor words, Tensor grad, int[] radices, int[] field_words) -> Tensor",
        side_decode_backward);
}

} // namespace sidrec
