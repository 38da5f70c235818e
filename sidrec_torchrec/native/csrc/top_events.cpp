// The events with the highest scores on CPU; top_events.py says which, and in which order scores are added.
//
// Scores are made as code_attention.cpp makes them, a block of events at a time for up to 8 heads, or queries that read the
// same. Few events of a block beat the K-th best so far: those are gathered until there are 2K, of which K stay.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "attention_events.h"
#include "attention_tables.h"
#include "vec.h"

namespace sidrec {
namespace {

constexpr int64_t kBlock = 128;       // events whose scores are held at a time
constexpr int64_t kChunkLimit = 256;  // as layout.py has it: other chunks would round otherwise
constexpr int64_t kMostEvents = std::numeric_limits<uint32_t>::max(); // of a query: places have 32 bits of a key
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A number per event that orders them: by score, NaN last, then by place, the first highest. No two events have the same.
int64_t key_of(float score, int64_t place) {
  score = score == 0 ? 0 : score; // no -0.0
  int32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  bits = score != score ? std::numeric_limits<int32_t>::min() : bits < 0 ? bits ^ 0x7fffffff : bits;
  return static_cast<int64_t>(static_cast<uint64_t>(bits) << 32) | (kMostEvents - place);
}

int64_t place_of(int64_t key) { return kMostEvents - (key & kMostEvents); }

float score_of(int64_t key) {
  int32_t bits = static_cast<int32_t>(key >> 32);
  bits = bits < 0 ? bits ^ 0x7fffffff : bits; // the least of all becomes a NaN
  float score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

// The k highest of some keys.
class Best {
 public:
  void clear(int64_t k) {
    k_ = k;
    keys_.clear();
  }

  // Whether only the k highest are left: ``bound`` has risen.
  bool add(int64_t key) {
    keys_.push_back(key);
    if (static_cast<int64_t>(keys_.size()) < 2 * k_) return false;
    keep(k_);
    return true;
  }

  // The least score of those left, just after ``add`` returned true.
  float bound() const { return score_of(keys_.back()); }

  const std::vector<int64_t>& sorted() {
    keep(std::min<int64_t>(k_, keys_.size()));
    std::sort(keys_.begin(), keys_.end(), std::greater<int64_t>());
    return keys_;
  }

 private:
  void keep(int64_t n) {
    if (n < static_cast<int64_t>(keys_.size())) {
      std::nth_element(keys_.begin(), keys_.begin() + n - 1, keys_.end(), std::greater<int64_t>());
      keys_.resize(n);
    }
  }

  int64_t k_ = 1;
  std::vector<int64_t> keys_;
};

// What a call computes besides what Events has.
struct Call {
  const float* scores;
  int64_t k;
  int64_t* event_MKH;
  float* score_MKH;
};

// Not inlined: the compiler would round each product and the sum it goes into at once, which the reference does not.
template <typename Float>
__attribute__((noinline)) void multiply(Float* block, const float* scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) block[i] *= scale[i];
}

template <typename Float>
void score(const Events& e, const Window& window, const Float* table, int64_t t, int64_t n, Float* block) {
  std::fill(block, block + n, Float{});
  int64_t f = 0;
  window.columns(t, [&](int64_t first, int64_t, const uint16_t* value, bool) {
    const Float* rows = table + first;
    for (int64_t i = 0; i < n; ++i) block[i] += rows[value[i]];
    if (++f == e.scaled_chunks) multiply(block, e.scale + t, n);
  });
}

// A mask as a byte per lane, 255 or 0.
template <typename Int>
uint64_t bytes_of(Int mask) {
  typedef int8_t Bytes __attribute__((vector_size(sizeof(Int) / 4)));
  const Bytes bytes = __builtin_convertvector(mask, Bytes);
  uint64_t number = 0;
  std::memcpy(&number, &bytes, sizeof(bytes));
  return number;
}

template <int HP>
void choose(const Events& e, const Lanes& lanes, const Window& window, const Call& call) {
  using Float = typename Vec<HP>::Float;
  using Int = typename Vec<HP>::Int;
  static thread_local std::vector<Float> table;
  static thread_local Best best[HP];
  table.resize(e.rows());
  expand(e, call.scores, lanes, table.data(), 1);
  for (Best& lane : best) lane.clear(call.k);
  const uint64_t used = ~uint64_t{0} >> (64 - 8 * lanes.count()); // lanes, as bytes
  uint64_t takers[kBlock];
  int64_t taken[kBlock];
  Float block[kBlock], bound = Float{} + kNaN; // nothing is at most NaN, so all events are taken
  const int64_t begin = e.begin[lanes.query], end = e.end[lanes.query];
  for (int64_t t = begin; t < end; t += kBlock) {
    const int64_t n = std::min(kBlock, end - t);
    score(e, window, table.data(), t, n, block);
    // all comparisons first, then the few events that some lane takes: a branch for each event would be guessed wrong often
    for (int64_t i = 0; i < n; ++i) takers[i] = used & bytes_of(~(block[i] <= bound));
    int64_t num_taken = 0;
    for (int64_t i = 0; i < n; ++i) {
      taken[num_taken] = i;
      num_taken += takers[i] != 0;
    }
    for (int64_t j = 0; j < num_taken; ++j) {
      const int64_t i = taken[j];
      for (uint64_t lanes_left = takers[i]; lanes_left != 0;) {
        const int64_t lane = __builtin_ctzll(lanes_left) / 8;
        lanes_left ^= uint64_t{0xff} << 8 * lane;
        if (best[lane].add(key_of(block[i][lane], t - begin + i))) bound[lane] = best[lane].bound();
      }
    }
  }
  for (int64_t lane = 0; lane < lanes.count(); ++lane) {
    const int64_t query = lanes.query + lane / lanes.heads, head = lanes.first_head + lane % lanes.heads;
    int64_t out = query * call.k * e.heads + head;
    for (int64_t key : best[lane].sorted()) {
      call.event_MKH[out] = begin + place_of(key);
      call.score_MKH[out] = score_of(key);
      out += e.heads;
    }
  }
}

std::tuple<at::Tensor, at::Tensor> top_events(const at::Tensor& words, const at::Tensor& begin, const at::Tensor& end,
                                              const at::Tensor& scores, const OptionalTensor& event_time,
                                              const OptionalTensor& query_time, const OptionalTensor& scale,
                                              at::IntArrayRef radices, at::IntArrayRef digit_words, int64_t scaled_digits,
                                              int64_t k) {
  Inputs given{words, begin, end, scores, event_time, query_time, scale, radices, digit_words, scaled_digits};
  if (k < 1 || !given.taken() || (scale && (!scale->is_floating_point() ||
                                            Layout(radices, digit_words, kChunkLimit).chunks_of_first(scaled_digits) < 0))) {
    const auto results = reference("top_events", words, begin, end, scores, event_time, query_time, scale, radices,
                                   digit_words, scaled_digits, k);
    return {results[0].toTensor(), results[1].toTensor()};
  }
  if (scale) given.scale = scale->to(at::kFloat);
  given = given.ready();
  const Events e = given.events(kChunkLimit, false);
  for (int64_t m = 0; m < e.queries; ++m) {
    TORCH_CHECK(e.end[m] - e.begin[m] < kMostEvents, "query ", m, " reads ", e.end[m] - e.begin[m], " events");
  }
  at::Tensor event = at::full({e.queries, k, e.heads}, -1, given.begin.options());
  at::Tensor score = at::full({e.queries, k, e.heads}, -kInfinity, scores.options());
  const Call call{given.scores.const_data_ptr<float>(), k, event.mutable_data_ptr<int64_t>(), score.mutable_data_ptr<float>()};
  const std::vector<Lanes> cuts = cut(e, 8, true);
  at::parallel_for(0, cuts.size(), 1, [&](int64_t first, int64_t last) {
    Window window(e);
    for (int64_t i = first; i < last; ++i) {
      window.show(cuts[i].query, cuts[last - 1].query + 1);
      cuts[i].count() <= 4 ? choose<4>(e, cuts[i], window, call) : choose<8>(e, cuts[i], window, call);
    }
  });
  return {event, score};
}

} // namespace

TORCH_LIBRARY_IMPL(sidrec, CPU, m) { m.impl("top_events", top_events); }

} // namespace sidrec
