// Squared norms of sums of table rows on CPU, and the gradient of the table; side_energy.py says what they compute.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "codes.h"
#include "kernel.h"
#include "vec.h"

namespace sidrec {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kEvents = 256; // events at a time, whose chunk values stay in L1
using Float = Vec<kLanes>::Float;

// The table with rows of whole vectors: [R, width], zero beyond the columns there are.
at::Tensor padded(const at::Tensor& table) {
  const int64_t rest = table.size(1) % kLanes;
  return (rest ? at::constant_pad_nd(table, {0, kLanes - rest}) : table).contiguous();
}

// Calls work(t, rows, number of rows) for the events from .. to - 1: a row of each chunk, or fewer.
template <typename Work>
void for_events(const Layout& layout, const at::Tensor& words, int64_t from, int64_t to, Work work) {
  const int64_t F = layout.num_chunks();
  std::vector<uint16_t> values(F * kEvents);
  std::vector<int64_t> rows(F);
  for (int64_t begin = from; begin < to; begin += kEvents) {
    const int64_t n = std::min(kEvents, to - begin);
    const bool whole = layout.unpack(words.const_data_ptr<int64_t>(), words.size(1), begin, begin + n, values.data(), kEvents);
    for (int64_t t = 0; t < n; ++t) {
      int64_t count = 0;
      layout.for_rows(values.data(), kEvents, t, whole, [&](int64_t, int64_t row) { rows[count++] = row; });
      work(begin + t, rows.data(), count);
    }
  }
}

// The sum of a SID's rows, N vectors from column d on.
template <int N>
inline void add_rows(const float* table, int64_t width, const int64_t* rows, int64_t num_rows, int64_t d, Float* sum) {
  for (int i = 0; i < N; ++i) sum[i] = Float{};
  for (int64_t f = 0; f < num_rows; ++f) {
    const float* row = table + rows[f] * width + d;
    for (int i = 0; i < N; ++i) {
      Float x;
      std::memcpy(&x, row + i * kLanes, sizeof(x));
      sum[i] += x;
    }
  }
}

// Calls work(d, sums of N vectors of columns from d on) for the columns first .. last - 1; as many vectors at a time as fit.
template <int N, typename Work>
inline int64_t for_columns(const float* table, int64_t width, const int64_t* rows, int64_t num_rows, int64_t first,
                           int64_t last, Work work) {
  for (; first + N * kLanes <= last; first += N * kLanes) {
    Float sum[N];
    add_rows<N>(table, width, rows, num_rows, first, sum);
    for (int i = 0; i < N; ++i) work(first + i * kLanes, sum[i]);
  }
  if constexpr (N > 1) return for_columns<N / 2>(table, width, rows, num_rows, first, last, work);
  return first;
}

inline float total(Float x) {
  float half[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) half[i] = x[i] + x[i + kLanes / 2];
  return (half[0] + half[1]) + (half[2] + half[3]);
}

// The rows of a chunk, from some column on.
struct ChunkRows {
  const float* first;
  int64_t count;
};

constexpr int kMostVectors = 8; // that are summed at a time
constexpr float kNoRow[kMostVectors * kLanes] = {};

// Adds to n energies the squares of N vectors of columns of the sums of the events' rows.
template <int N>
inline void add_squares(const std::vector<ChunkRows>& chunks, int64_t width, const uint16_t* values, int64_t n, float* energy) {
  for (int64_t t = 0; t < n; ++t) {
    const uint16_t* value = values + t;
    Float sum[N] = {};
    for (const ChunkRows& rows : chunks) {
      const float* row = *value < rows.count ? rows.first + *value * width : kNoRow;
      value += kEvents;
      for (int i = 0; i < N; ++i) {
        Float x;
        std::memcpy(&x, row + i * kLanes, sizeof(x));
        sum[i] += x;
      }
    }
    Float squares{};
    for (int i = 0; i < N; ++i) squares += sum[i] * sum[i];
    energy[t] += total(squares);
  }
}

// The energies of the events from .. to - 1: of a block at a time, as many columns as there are registers for, then the next.
void find_energies(const Layout& layout, const at::Tensor& words, const float* table, int64_t width, int64_t from, int64_t to,
                   float* energy) {
  std::vector<uint16_t> values(layout.num_chunks() * kEvents);
  std::vector<ChunkRows> chunks;
  for (const Chunk& chunk : layout.chunks()) chunks.push_back({table + chunk.first_row * width, chunk.radix});
  for (int64_t begin = from; begin < to; begin += kEvents) {
    const int64_t n = std::min(kEvents, to - begin);
    layout.unpack(words.const_data_ptr<int64_t>(), words.size(1), begin, begin + n, values.data(), kEvents);
    std::fill(energy + begin, energy + begin + n, 0.0f);
    for (int64_t left = width / kLanes, vectors; left > 0; left -= vectors) {
      vectors = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      const auto add = vectors == 8 ? add_squares<8> : vectors == 4 ? add_squares<4> : vectors == 2 ? add_squares<2> : add_squares<1>;
      add(chunks, width, values.data(), n, energy + begin);
      for (ChunkRows& rows : chunks) rows.first += vectors * kLanes;
    }
    for (ChunkRows& rows : chunks) rows.first -= width;
  }
}

bool takes(const at::Tensor& words, const at::Tensor& table, at::IntArrayRef radices) {
  return may_run(table, {at::kFloat}) && words.dim() == 2 && table.dim() == 2 && table.size(0) == sum(radices);
}

at::Tensor side_energy(const at::Tensor& all_words, const at::Tensor& table, at::IntArrayRef radices,
                       at::IntArrayRef chunk_words) {
  if (!takes(all_words, table, radices)) {
    return reference("side_energy", all_words, table, radices, chunk_words)[0].toTensor();
  }
  const Layout layout(radices, chunk_words, 0);
  const at::Tensor words = ready(all_words);
  layout.check_words(words);
  const at::Tensor wide = padded(table), out = at::empty({words.size(0)}, table.options());
  const float* in = wide.const_data_ptr<float>();
  const int64_t width = wide.size(1);
  float* energy = out.mutable_data_ptr<float>();
  at::parallel_for(0, words.size(0), 4 * kEvents, [&](int64_t from, int64_t to) {
    find_energies(layout, words, in, width, from, to, energy);
  });
  return out;
}

// Threads share out the columns, so that no two add to one number.
at::Tensor side_energy_backward(const at::Tensor& all_words, const at::Tensor& table, const at::Tensor& all_grad,
                                at::IntArrayRef radices, at::IntArrayRef chunk_words) {
  if (!takes(all_words, table, radices) || all_grad.scalar_type() != at::kFloat ||
      !has_shape(all_grad, {all_words.size(0)})) {
    return reference("side_energy_backward", all_words, table, all_grad, radices, chunk_words)[0].toTensor();
  }
  const Layout layout(radices, chunk_words, 0);
  const at::Tensor words = ready(all_words), grad = ready(all_grad);
  layout.check_words(words);
  const at::Tensor wide = padded(table);
  at::Tensor sums = at::zeros_like(wide);
  const float *in = wide.const_data_ptr<float>(), *g = grad.const_data_ptr<float>();
  float* out = sums.mutable_data_ptr<float>();
  const int64_t width = wide.size(1);
  at::parallel_for(0, width / kLanes, 1, [&](int64_t from, int64_t to) {
    const int64_t first = from * kLanes;
    for_events(layout, words, 0, words.size(0), [&](int64_t t, const int64_t* rows, int64_t num_rows) {
      const float twice = 2 * g[t];
      for_columns<4>(in, width, rows, num_rows, first, to * kLanes, [&](int64_t d, Float x) {
        x *= twice;
        for (int64_t f = 0; f < num_rows; ++f) {
          float* row = out + rows[f] * width + d;
          Float sum;
          std::memcpy(&sum, row, sizeof(sum));
          sum += x;
          std::memcpy(row, &sum, sizeof(sum));
        }
      });
    });
  });
  return sums.slice(1, 0, table.size(1)).contiguous();
}

} // namespace

TORCH_LIBRARY_IMPL(sidrec, CPU, m) {
  m.impl("side_energy", side_energy);
  m.impl("side_energy_backward", side_energy_backward);
}

} // namespace sidrec
