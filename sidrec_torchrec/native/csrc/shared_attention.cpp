// Attention of queries that share their events, on CPU; shared_attention.py says what it computes, and has the same two ways.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "attention_events.h"
#include "codes.h"
#include "kernel.h"
#include "operators.h"
#include "vec.h"

namespace sidrec {
namespace {

constexpr int64_t kChunkLimit = 256; // as layout.py has it
// Nanoseconds; as shared_attention.py has them.
constexpr int64_t kDecode = 150'000, kDecodeAnEvent = 200, kPairDecoded = 5;
constexpr int64_t kQueryByCode = 3'000, kPairByCode = 6;
constexpr int64_t kFewQueries = 16; // that a thread is not worth while for

// Neighbouring queries that read the same events at the same time.
struct Run {
  int64_t first, stop; // queries
  int64_t begin, end;  // events
};

// The runs that read something.
std::vector<Run> runs_of(const at::Tensor& begin, const at::Tensor& end, const OptionalTensor& time, int64_t num_events) {
  const int64_t *from = begin.const_data_ptr<int64_t>(), *to = end.const_data_ptr<int64_t>();
  const int64_t* at = time ? time->const_data_ptr<int64_t>() : nullptr;
  std::vector<Run> runs;
  for (int64_t m = 0, stop; m < begin.size(0); m = stop) {
    for (stop = m + 1; stop < begin.size(0); ++stop) {
      if (from[stop] != from[m] || to[stop] != to[m] || (at && at[stop] != at[m])) break;
    }
    TORCH_CHECK(0 <= from[m] && to[m] <= num_events, "query ", m, " reads events ", from[m], " to ", to[m], " of ", num_events);
    if (from[m] < to[m]) runs.push_back({m, stop, from[m], to[m]});
  }
  return runs;
}

bool decoding_pays(int64_t queries, int64_t events) {
  const int64_t decoded = kDecode + events * (kDecodeAnEvent + queries * kPairDecoded);
  return decoded < queries * (kQueryByCode + events * kPairByCode);
}

// [Q, H, d] of queries [Q, H, d], keys and values [T, H, d], and what scores also have, [T, H].
at::Tensor attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& bias) {
  const auto by_head = [](const at::Tensor& x) { return x.transpose(0, 1).unsqueeze(0); };
  const at::Tensor mask = bias.t().contiguous().unsqueeze(0).unsqueeze(2).expand({-1, -1, query.size(0), -1});
  return at::scaled_dot_product_attention(by_head(query), by_head(key), by_head(value), mask, 0.0, false, 1.0)
      .squeeze(0)
      .transpose(0, 1);
}

at::Tensor shared_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const at::Tensor& bias, const at::Tensor& sink, const at::Tensor& begin,
                            const at::Tensor& end) {
  if (!may_run(query, {at::kFloat}) || begin.dim() != 1 || begin.sizes() != end.sizes()) {
    return reference("shared_attention", query, key, value, bias, sink, begin, end)[0].toTensor();
  }
  at::Tensor pooled = at::zeros_like(query, at::MemoryFormat::Contiguous);
  for (const Run& run : runs_of(ready(begin), ready(end), std::nullopt, key.size(0))) {
    const auto events = [&](const at::Tensor& x) { return x.slice(0, run.begin, run.end); };
    const auto with_none = [&](const at::Tensor& x) { return at::constant_pad_nd(events(x), {0, 0, 0, 0, 0, 1}); };
    const at::Tensor biases = at::cat({events(bias), sink.unsqueeze(0)});
    pooled.slice(0, run.first, run.stop)
        .copy_(attend(query.slice(0, run.first, run.stop), with_none(key), with_none(value), biases));
  }
  return pooled;
}

// The product of two rows of n numbers.
inline float product(const float* a, const float* b, int64_t n) {
  using Float = Vec<8>::Float;
  Float sums{};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    Float x, y;
    std::memcpy(&x, a + i, sizeof(x));
    std::memcpy(&y, b + i, sizeof(y));
    sums += x * y;
  }
  float sum = 0;
  for (int lane = 0; lane < 8; ++lane) sum += sums[lane];
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

inline void add(float weight, const float* row, int64_t n, float* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += weight * row[i];
}

// The arguments of shared_code_attention, ready.
struct Shared {
  at::Tensor query, words, begin, end, key, value, bias, sink;
  OptionalTensor event_time, query_time, scale;
  std::vector<int64_t> radices, digit_words;
  int64_t scaled_digits;

  int64_t num_others() const { return value.size(0) - key.size(0); }

  // What queries at these places pool, by code, to their rows of ``pooled``. In loops: a request of one candidate would take
  // longer to call operators than they take.
  void attend_by_code(const std::vector<int64_t>& places, float* pooled) const {
    const int64_t Q = places.size(), H = query.size(1), d = query.size(2), V = key.size(0), X = value.size(0);
    const int64_t U = bias.size(0), R = V + U;
    const auto chosen = [&](const at::Tensor& x) {
      at::Tensor own = at::empty({Q}, x.options());
      for (int64_t i = 0; i < Q; ++i) own.mutable_data_ptr<int64_t>()[i] = x.const_data_ptr<int64_t>()[places[i]];
      return own;
    };
    const at::Tensor scores = at::empty({Q, R, H}, query.options());
    const float *queries = query.const_data_ptr<float>(), *keys = key.const_data_ptr<float>();
    const float *values = value.const_data_ptr<float>(), *biases = bias.const_data_ptr<float>();
    at::parallel_for(0, Q, kFewQueries, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const float* own = queries + places[i] * H * d;
        float* out = scores.mutable_data_ptr<float>() + i * R * H;
        for (int64_t v = 0; v < V; ++v) {
          for (int64_t h = 0; h < H; ++h) out[v * H + h] = product(own + h * d, keys + (v * H + h) * d, d);
        }
        std::copy(biases, biases + U * H, out + V * H);
      }
    });
    const auto [mass, lse] =
        code_attention(words, chosen(begin), chosen(end), scores, event_time,
                       query_time ? OptionalTensor(chosen(*query_time)) : query_time, scale, radices, digit_words,
                       scaled_digits, true);
    at::parallel_for(0, Q, kFewQueries, [&, &mass = mass, &lse = lse](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const float* weights = mass.const_data_ptr<float>() + i * R * H;
        float* own = pooled + places[i] * H * d;
        std::fill(own, own + H * d, 0.0f);
        for (int64_t v = 0; v < X; ++v) {
          for (int64_t h = 0; h < H; ++h) add(weights[v * H + h], values + (v * H + h) * d, d, own + h * d);
        }
        for (int64_t h = 0; h < H; ++h) {
          // the share of events, against the sink
          const float share = 1 / (1 + std::exp(sink.const_data_ptr<float>()[h] - lse.const_data_ptr<float>()[i * H + h]));
          for (int64_t j = 0; j < d; ++j) own[h * d + j] *= share;
        }
      }
    });
  }

  // What the queries of a run pool: one sum of rows an event, one event more that is the sink.
  at::Tensor decode_and_attend(const Run& run, const Layout& layout, const at::Tensor& table) const {
    const int64_t T = run.end - run.begin, W = words.size(1), H = query.size(1), d = query.size(2);
    at::Tensor own_words = at::full({T + 1, W + 1}, -1, words.options()); // the sink has no digits but the last
    at::Tensor own_scale = at::ones({T + 1}, table.options());
    int64_t* to = own_words.mutable_data_ptr<int64_t>();
    const int64_t* from = words.const_data_ptr<int64_t>() + run.begin * W;
    for (int64_t t = 0; t < T; ++t) {
      std::copy(from + t * W, from + (t + 1) * W, to + t * (W + 1));
      to[t * (W + 1) + W] = !event_time ? 0 : gap_bucket(query_time->const_data_ptr<int64_t>()[run.first] -
                                                         event_time->const_data_ptr<int64_t>()[run.begin + t]);
    }
    to[T * (W + 1) + W] = kGapBuckets;
    if (scale) own_scale.slice(0, 0, T).copy_(scale->slice(0, run.begin, run.end));
    std::vector<int64_t> chunk_radices, chunk_words;
    for (const Chunk& chunk : layout.chunks()) {
      chunk_radices.push_back(chunk.radix);
      chunk_words.push_back(chunk.word);
    }
    const at::Tensor decoded = scaled_decode(own_words, table, own_scale, chunk_radices, chunk_words,
                                             layout.chunks_of_first(scaled_digits));
    const auto part = [&](int64_t i) { return decoded.slice(1, i * H * d, (i + 1) * H * d).unflatten(1, {H, d}); };
    return attend(query.slice(0, run.first, run.stop), part(0), part(1), decoded.slice(1, 2 * H * d, 2 * H * d + H));
  }

  // All digits and one more: the time gap, or that an event is the sink.
  Layout layout() const {
    std::vector<int64_t> all = radices, all_words = digit_words;
    all.push_back(kGapBuckets + 1);
    all_words.push_back(words.size(1));
    return Layout(all, all_words, kChunkLimit);
  }

  // Rows whose sum is an event's keys, values and biases, [R, 2 * H * d + H, padded to eights].
  at::Tensor decode_table(const Layout& layout) const {
    const int64_t V = key.size(0), A = num_others(), H = bias.size(1);
    const at::Tensor gaps = bias.size(0) > A ? bias.slice(0, A) : at::zeros({kGapBuckets, H}, bias.options());
    const at::Tensor biases = at::cat({bias.slice(0, 0, A), gaps, sink.unsqueeze(0)});
    const at::Tensor rows = at::cat({at::constant_pad_nd(key.flatten(1), {0, 0, 0, A + kGapBuckets + 1}),
                                     at::constant_pad_nd(value.flatten(1), {0, 0, 0, kGapBuckets + 1}),
                                     at::constant_pad_nd(biases, {0, (8 - H % 8) % 8, V, 0})},
                                    1);
    const int64_t width = rows.size(1);
    int64_t num_rows = 0, first = 0; // first: the row of the next digit's first value
    for (const Chunk& chunk : layout.chunks()) num_rows += chunk.radix;
    at::Tensor table = at::empty({num_rows, width}, rows.options());
    const float* digit_rows = rows.const_data_ptr<float>();
    float* sums = table.mutable_data_ptr<float>(); // of this chunk's digits so far
    for (const Chunk& chunk : layout.chunks()) {
      std::fill(sums, sums + width, 0.0f);
      int64_t n = 1;
      for (int64_t j = chunk.first_digit; j < chunk.first_digit + chunk.num_digits; ++j) {
        const int64_t radix = layout.radix(j);
        for (int64_t k = n - 1; k >= 0; --k) { // from the back: in place
          for (int64_t v = radix - 1; v >= 0; --v) {
            const float *base = sums + k * width, *own = digit_rows + (first + v) * width;
            float* to = sums + (k * radix + v) * width;
            for (int64_t d = 0; d < width; ++d) to[d] = base[d] + own[d];
          }
        }
        n *= radix;
        first += radix;
      }
      sums += chunk.radix * width;
    }
    return table;
  }
};

at::Tensor shared_code_attention(const at::Tensor& query, const at::Tensor& words, const at::Tensor& begin,
                                 const at::Tensor& end, const at::Tensor& key, const at::Tensor& value,
                                 const at::Tensor& bias, const at::Tensor& sink, const OptionalTensor& event_time,
                                 const OptionalTensor& query_time, const OptionalTensor& scale, at::IntArrayRef radices,
                                 at::IntArrayRef digit_words, int64_t scaled_digits) {
  const int64_t M = query.size(0), N = words.size(0);
  const bool taken =
      may_run(query, {at::kFloat}) && query.dim() == 3 && words.dim() == 2 && value.size(0) == sum(radices) &&
      scaled_digits <= static_cast<int64_t>(radices.size()) && key.size(0) == sum(radices.slice(0, scaled_digits)) &&
      bias.size(0) == value.size(0) - key.size(0) + (event_time ? kGapBuckets : 0) && has_shape(begin, {M}) &&
      has_shape(end, {M}) && event_time.has_value() == query_time.has_value() && has_shape(event_time, {N}) &&
      has_shape(query_time, {M}) && has_shape(scale, {N}) && (!scale || scale->scalar_type() == at::kFloat) &&
      Layout(radices, digit_words, kChunkLimit).chunks_of_first(scaled_digits) >= 0;
  if (!taken) {
    return reference("shared_code_attention", query, words, begin, end, key, value, bias, sink, event_time, query_time,
                     scale, radices, digit_words, scaled_digits)[0]
        .toTensor();
  }
  const Shared shared{ready(query), ready(words), ready(begin), ready(end), ready(key), ready(value), ready(bias), ready(sink),
                      ready(event_time), ready(query_time), ready(scale), radices.vec(), digit_words.vec(), scaled_digits};
  at::Tensor pooled = at::zeros_like(query, at::MemoryFormat::Contiguous), table;
  std::optional<Layout> layout;
  std::vector<int64_t> by_code;
  for (const Run& run : runs_of(shared.begin, shared.end, shared.query_time, N)) {
    if (!decoding_pays(run.stop - run.first, run.end - run.begin)) {
      for (int64_t m = run.first; m < run.stop; ++m) by_code.push_back(m);
      continue;
    }
    if (!layout) {
      layout = shared.layout();
      table = shared.decode_table(*layout);
    }
    pooled.slice(0, run.first, run.stop).copy_(shared.decode_and_attend(run, *layout, table));
  }
  if (!by_code.empty()) shared.attend_by_code(by_code, pooled.mutable_data_ptr<float>());
  return pooled;
}

} // namespace

TORCH_LIBRARY_IMPL(sidrec, CPU, m) {
  m.impl("shared_attention", shared_attention);
  m.impl("shared_code_attention", shared_code_attention);
}

} // namespace sidrec
