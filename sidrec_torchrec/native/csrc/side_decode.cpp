// Packed SIDs to sums of table rows on CPU, and the gradient of the table; side_decode.py says what they compute.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "codes.h"
#include "operators.h"
#include "vec.h"

namespace sidrec {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kEvents = 256;          // events at a time, whose chunk values stay in L1
constexpr auto kDtypes = {at::kFloat, at::kBFloat16, at::kHalf};
constexpr int64_t kLargeOutput = 1 << 20; // bytes; what would not stay in cache anyhow

using Float = Vec<kLanes>::Float;

inline Float round_to(float*, Float x) { return x; }

inline Vec<kLanes>::Short round_to(at::BFloat16*, Float x) {
  using Int = Vec<kLanes>::Int;
  Int bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const Int rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; // to nearest even
  const Int result = x == x ? rounded : Int{} + 0x7fc0;           // rounding would turn some NaN into infinity
  return __builtin_convertvector(result, Vec<kLanes>::Short);
}

inline Vec<kLanes>::Short round_to(at::Half*, Float x) {
  Vec<kLanes>::Short result;
#ifdef __F16C__
  const __m128i halves = _mm256_cvtps_ph(reinterpret_cast<__m256>(x), 0);
  std::memcpy(&result, &halves, sizeof(result));
#else
  at::Half halves[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) halves[i] = static_cast<at::Half>(x[i]);
  std::memcpy(&result, halves, sizeof(result));
#endif
  return result;
}

// Writes kLanes numbers; past the caches if ``stream``, for which ``out`` must be aligned to their size.
template <bool stream, typename Out>
inline void store(Out* out, Float x) {
  const auto result = round_to(out, x);
#ifdef __AVX__
  if constexpr (stream && sizeof(result) == 32) {
    return _mm256_stream_ps(reinterpret_cast<float*>(out), reinterpret_cast<const __m256&>(result));
  } else if constexpr (stream) {
    return _mm_stream_si128(reinterpret_cast<__m128i*>(out), reinterpret_cast<const __m128i&>(result));
  }
#endif
  std::memcpy(out, &result, sizeof(result));
}

// The rows of an event, of which the first are multiplied by its scale.
struct Rows {
  std::vector<const float*> rows; // of all chunks, if it has all
  int64_t count = 0;
  int64_t scaled = 0;
  float scale = 1;

  // out[d ...] = their sum, N * kLanes columns.
  template <int N, bool stream, typename Out>
  inline void add(int64_t d, Out* out) const {
    Float sum[N] = {};
    add_some<N>(0, scaled, d, sum);
    if (scaled) {
      for (int i = 0; i < N; ++i) sum[i] *= scale;
    }
    add_some<N>(scaled, count, d, sum);
    for (int i = 0; i < N; ++i) store<stream>(out + d + i * kLanes, sum[i]);
  }

  template <int N>
  inline void add_some(int64_t from, int64_t to, int64_t d, Float* sum) const {
    for (int64_t f = from; f < to; ++f) {
      for (int i = 0; i < N; ++i) {
        Float x;
        std::memcpy(&x, rows[f] + d + i * kLanes, sizeof(x));
        sum[i] += x;
      }
    }
  }

  float add_one(int64_t d) const {
    float sum = 0;
    for (int64_t f = 0; f < scaled; ++f) sum += rows[f][d];
    if (scaled) sum *= scale;
    for (int64_t f = scaled; f < count; ++f) sum += rows[f][d];
    return sum;
  }
};

template <bool stream, typename Out>
void decode(const Layout& layout, const int64_t* words, int64_t num_words, int64_t N, const float* table, int64_t D,
            const float* scale, int64_t scaled_chunks, Out* out) {
  at::parallel_for(0, N, 4 * kEvents, [&](int64_t from, int64_t to) {
    const int64_t F = layout.num_chunks();
    std::vector<uint16_t> values(F * kEvents);
    Rows rows{std::vector<const float*>(F)};
    for (int64_t begin = from; begin < to; begin += kEvents) {
      const int64_t n = std::min(kEvents, to - begin);
      const bool whole = layout.unpack(words, num_words, begin, begin + n, values.data(), kEvents);
      for (int64_t t = 0; t < n; ++t) {
        if (scale) rows.scale = scale[begin + t];
        int64_t count = 0, scaled = 0;
        layout.for_rows(values.data(), kEvents, t, whole, [&](int64_t f, int64_t row) {
          rows.rows[count++] = table + row * D;
          scaled += f < scaled_chunks;
        });
        rows.count = count;
        rows.scaled = scaled;
        Out* row = out + (begin + t) * D;
        int64_t d = 0;
        for (; d + 8 * kLanes <= D; d += 8 * kLanes) rows.add<8, stream>(d, row);
        for (; d + kLanes <= D; d += kLanes) rows.add<1, stream>(d, row);
        for (; d < D; ++d) row[d] = static_cast<Out>(rows.add_one(d));
      }
    }
  });
#ifdef __AVX__
  if (stream) _mm_sfence();
#endif
}

// Asks for huge pages behind a large new tensor: faulting it in by pages of 4 KB takes longer than filling it.
void ask_for_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr()), end = begin + tensor.nbytes();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE); // a hint: may be refused
#endif
}

at::Tensor decode_all(const at::Tensor& words, const at::Tensor& table, const OptionalTensor& scale,
                      at::IntArrayRef radices, at::IntArrayRef chunk_words, int64_t scaled_chunks, at::ScalarType dtype) {
  const Layout layout(radices, chunk_words, 0);
  layout.check_words(words);
  at::Tensor out = at::empty({words.size(0), table.size(1)}, table.options().dtype(dtype));
  const bool large = static_cast<int64_t>(out.nbytes()) >= kLargeOutput;
  if (large) ask_for_huge_pages(out);
  const auto run = [&](auto* data) {
    const bool stream = large && table.size(1) % kLanes == 0 && reinterpret_cast<uintptr_t>(data) % 32 == 0;
    const auto* word = words.const_data_ptr<int64_t>();
    const auto* rows = table.const_data_ptr<float>();
    const float* factor = scale ? scale->const_data_ptr<float>() : nullptr;
    const int64_t scaled = scale ? scaled_chunks : 0;
    stream ? decode<true>(layout, word, words.size(1), words.size(0), rows, table.size(1), factor, scaled, data)
           : decode<false>(layout, word, words.size(1), words.size(0), rows, table.size(1), factor, scaled, data);
  };
  switch (dtype) {
    case at::kFloat: run(out.mutable_data_ptr<float>()); break;
    case at::kBFloat16: run(out.mutable_data_ptr<at::BFloat16>()); break;
    case at::kHalf: run(out.mutable_data_ptr<at::Half>()); break;
    default: TORCH_CHECK(false, "side_decode gives float32, bfloat16 or float16, not ", dtype);
  }
  return out;
}

at::Tensor side_decode(const at::Tensor& words, const at::Tensor& table, at::IntArrayRef radices,
                       at::IntArrayRef chunk_words) {
  if (!may_run(table, kDtypes) || words.dim() != 2 || table.dim() != 2 || table.size(0) != sum(radices)) {
    return reference("side_decode", words, table, radices, chunk_words)[0].toTensor();
  }
  const at::Tensor rows = table.to(at::kFloat).contiguous();
  return decode_all(ready(words), rows, std::nullopt, radices, chunk_words, 0, table.scalar_type());
}

// The gradient of the table, float32 [R, D]. Threads share out the columns, so that no two add to one number.
at::Tensor sum_by_row(const at::Tensor& words, const at::Tensor& grad, at::IntArrayRef radices,
                      at::IntArrayRef chunk_words) {
  const Layout layout(radices, chunk_words, 0);
  layout.check_words(words);
  const int64_t N = words.size(0), D = grad.size(1), F = layout.num_chunks();
  at::Tensor table = at::zeros({layout.num_rows(), D}, grad.options());
  const int64_t* word = words.const_data_ptr<int64_t>();
  const float* in = grad.const_data_ptr<float>();
  float* out = table.mutable_data_ptr<float>();
  at::parallel_for(0, (D + kLanes - 1) / kLanes, 2, [&](int64_t from, int64_t to) {
    const int64_t first = from * kLanes, width = std::min(to * kLanes, D) - first;
    std::vector<uint16_t> values(F * kEvents);
    for (int64_t begin = 0; begin < N; begin += kEvents) {
      const int64_t n = std::min(kEvents, N - begin);
      const bool whole = layout.unpack(word, words.size(1), begin, begin + n, values.data(), kEvents);
      for (int64_t t = 0; t < n; ++t) {
        const float* row = in + (begin + t) * D + first;
        layout.for_rows(values.data(), kEvents, t, whole, [&](int64_t, int64_t chosen) {
          float* sum = out + chosen * D + first;
          for (int64_t d = 0; d < width; ++d) sum[d] += row[d];
        });
      }
    }
  });
  return table;
}

at::Tensor side_decode_backward(const at::Tensor& words, const at::Tensor& grad, at::IntArrayRef radices,
                                at::IntArrayRef chunk_words) {
  if (!may_run(grad, kDtypes) || words.dim() != 2 || !has_shape(grad, {words.size(0), grad.size(-1)})) {
    return reference("side_decode_backward", words, grad, radices, chunk_words)[0].toTensor();
  }
  return sum_by_row(ready(words), grad.to(at::kFloat).contiguous(), radices, chunk_words).to(grad.scalar_type());
}

} // namespace

at::Tensor scaled_decode(const at::Tensor& words, const at::Tensor& table, const at::Tensor& scale,
                         at::IntArrayRef radices, at::IntArrayRef chunk_words, int64_t scaled_chunks) {
  if (!may_run(table, {at::kFloat}) || words.dim() != 2 || table.dim() != 2 || table.size(0) != sum(radices) ||
      scale.scalar_type() != at::kFloat || !has_shape(scale, {words.size(0)})) {
    return reference("scaled_decode", words, table, scale, radices, chunk_words, scaled_chunks)[0].toTensor();
  }
  return decode_all(ready(words), ready(table), ready(scale), radices, chunk_words, scaled_chunks, at::kFloat);
}

TORCH_LIBRARY_IMPL(sidrec, CPU, m) {
  m.impl("side_decode", side_decode);
  m.impl("side_decode_backward", side_decode_backward);
  m.impl("scaled_decode", scaled_decode);
}

} // namespace sidrec
