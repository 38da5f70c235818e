// Squared norms of sums of table rows on CPU, and the gradient of the table; side_energy.py says what they compute.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>
#include <type_traits>
#include <vector>

#include "codes.h"
#include "kernel.h"
#include "vec.h"

namespace sidrec {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kEvents = 256; // events at a time, whose chunk values stay in L1
using Float = Vec<kLanes>::Float;
constexpr float kNoRow[8 * kLanes] = {};

// The table with rows of whole vectors: [R, width], zero beyond the columns there are.
at::Tensor padded(const at::Tensor& table) {
  const int64_t rest = table.size(1) % kLanes;
  return (rest ? at::constant_pad_nd(table, {0, kLanes - rest}) : table).contiguous();
}

// Calls work(N, d, values, begin, n) for the events from .. to - 1, a block of n from ``begin`` on at a time, and for the columns
// first .. last - 1, the N vectors from d on at a time: as many as there are registers for.
template <typename Work>
void for_blocks(const Layout& layout, const at::Tensor& words, int64_t from, int64_t to, int64_t first, int64_t last, Work work) {
  std::vector<uint16_t> values(layout.num_chunks() * kEvents);
  for (int64_t begin = from; begin < to; begin += kEvents) {
    const int64_t n = std::min(kEvents, to - begin);
    layout.unpack(words.const_data_ptr<int64_t>(), words.size(1), begin, begin + n, values.data(), kEvents);
    int64_t d = first;
    const auto run = [&](auto N) {
      for (; d + N * kLanes <= last; d += N * kLanes) work(N, d, values.data(), begin, n);
    };
    run(std::integral_constant<int, 8>{});
    run(std::integral_constant<int, 4>{});
    run(std::integral_constant<int, 2>{});
    run(std::integral_constant<int, 1>{});
  }
}

// The rows of a chunk.
struct ChunkRows {
  const float* first;
  int64_t count;
};

// Of all chunks, from column d on.
std::vector<ChunkRows> rows_of(const Layout& layout, const float* table, int64_t width, int64_t d) {
  std::vector<ChunkRows> all;
  all.reserve(layout.num_chunks());
  for (const Chunk& chunk : layout.chunks()) all.push_back({table + chunk.first_row * width + d, chunk.radix});
  return all;
}

// Adds an event's rows to N vectors; calls keep(row) for each, kNoRow where a chunk chooses none.
template <int N, typename Keep>
inline void add_rows(const std::vector<ChunkRows>& chunks, int64_t width, const uint16_t* value, Float* sum, Keep keep) {
  for (const ChunkRows& rows : chunks) {
    const float* row = *value < rows.count ? rows.first + *value * width : kNoRow;
    keep(row);
    value += kEvents;
    for (int i = 0; i < N; ++i) {
      Float x;
      std::memcpy(&x, row + i * kLanes, sizeof(x));
      sum[i] += x;
    }
  }
}

inline float total(Float x) {
  float half[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) half[i] = x[i] + x[i + kLanes / 2];
  return (half[0] + half[1]) + (half[2] + half[3]);
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
    std::fill(energy + from, energy + to, 0.0f);
    for_blocks(layout, words, from, to, 0, width, [&](auto N, int64_t d, const uint16_t* values, int64_t begin, int64_t n) {
      const std::vector<ChunkRows> chunks = rows_of(layout, in, width, d);
      for (int64_t t = 0; t < n; ++t) {
        Float sum[N] = {}, squares{};
        add_rows<N>(chunks, width, values + t, sum, [](const float*) {});
        for (int i = 0; i < N; ++i) squares += sum[i] * sum[i];
        energy[begin + t] += total(squares);
      }
    });
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
    std::vector<const float*> rows(layout.num_chunks());
    const auto work = [&](auto N, int64_t d, const uint16_t* values, int64_t begin, int64_t n) {
      const std::vector<ChunkRows> chunks = rows_of(layout, in, width, d);
      for (int64_t t = 0; t < n; ++t) {
        Float sum[N] = {};
        const float** next = rows.data();
        add_rows<N>(chunks, width, values + t, sum, [&](const float* row) { *next++ = row; });
        for (int i = 0; i < N; ++i) sum[i] *= 2 * g[begin + t];
        for (const float* row : rows) {
          if (row == kNoRow) continue;
          float* own = out + (row - in);
          for (int i = 0; i < N; ++i) {
            Float x;
            std::memcpy(&x, own + i * kLanes, sizeof(x));
            x += sum[i];
            std::memcpy(own + i * kLanes, &x, sizeof(x));
          }
        }
      }
    };
    for_blocks(layout, words, 0, words.size(0), from * kLanes, to * kLanes, work);
  });
  return sums.slice(1, 0, table.size(1)).contiguous();
}

} // namespace

TORCH_LIBRARY_IMPL(sidrec, CPU, m) {
  m.impl("side_energy", side_energy);
  m.impl("side_energy_backward", side_energy_backward);
}

} // namespace sidrec
