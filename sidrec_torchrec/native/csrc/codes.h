// Packed SIDs and the chunks in them, for all operators.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sidrec {

// word / divisor for words below 2^63, by multiplication (Granlund & Montgomery 1994): with s = ceil(log2(divisor)) and
// m = ceil(2^(63 + s) / divisor), the quotient is word * m >> (63 + s), exactly.
class Divider {
 public:
  explicit Divider(uint64_t divisor) {
    while (shift_ < 63 && (uint64_t{1} << shift_) < divisor) ++shift_;
    const unsigned __int128 numerator = static_cast<unsigned __int128>(1) << (63 + shift_);
    multiplier_ = static_cast<uint64_t>((numerator + divisor - 1) / divisor);
  }
  uint64_t operator()(uint64_t word) const {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(word) * multiplier_ >> (63 + shift_));
  }

 private:
  uint64_t multiplier_ = 0;
  int shift_ = 0;
};

// One or more neighbouring digits of a word, read as one number.
struct Chunk {
  int64_t radix = 1;
  int64_t word = 0;
  int64_t first_digit = 0;
  int64_t num_digits = 0;
  uint64_t divisor = 1;   // of its part of the word: see Layout
  int64_t first_row = 0;  // where its values begin among those of all chunks
  int64_t first_slot = 0; // where they begin if each chunk has one row more, for events whose word is negative
};

// How SIDs are cut into chunks; the C++ side of layout.py.
class Layout {
 public:
  // Digits as they come, neighbours of one word joined while a chunk has at most ``limit`` values.
  Layout(at::IntArrayRef radices, at::IntArrayRef digit_words, int64_t limit) : radices_(radices.vec()) {
    TORCH_CHECK(radices.size() == digit_words.size(), "radices and words of different lengths");
    for (int64_t j = 0; j < num_digits(); ++j) {
      const int64_t radix = radices[j];
      TORCH_CHECK(radix >= 1 && radix <= 1 << 15, "radix ", radix, ", expected 1 to 32768");
      const bool joins = j && digit_words[j] == chunks_.back().word && chunks_.back().radix * radix <= limit;
      if (!joins) chunks_.push_back({.word = digit_words[j], .first_digit = j});
      chunks_.back().radix *= radix;
      ++chunks_.back().num_digits;
      num_values_ += radix;
    }
    for (int64_t f = 0; f < num_chunks(); ++f) {
      chunks_[f].first_row = num_rows_;
      chunks_[f].first_slot = num_rows_ + f;
      num_rows_ += chunks_[f].radix;
    }
    uint64_t divisor = 1; // of this chunk's word, by all behind it
    for (int64_t f = num_chunks() - 1; f >= 0; --f) {
      const bool ends_word = f + 1 == num_chunks() || chunks_[f + 1].word != chunks_[f].word;
      if (ends_word) divisor = 1;
      const uint64_t radix = chunks_[f].radix;
      if (ends_word || divisor / parts_.back().divisor > kExact / radix) parts_.emplace_back(f, divisor);
      parts_.back().first_chunk = f;
      chunks_[f].divisor = divisor / parts_.back().divisor;
      divisor = divisor > kSign / radix ? kSign : divisor * radix;
      parts_.back().limit = divisor;
    }
    std::reverse(parts_.begin(), parts_.end());
  }

  const std::vector<Chunk>& chunks() const { return chunks_; }
  int64_t radix(int64_t digit) const { return radices_[digit]; }
  int64_t num_digits() const { return radices_.size(); }
  int64_t num_chunks() const { return chunks_.size(); }
  int64_t num_values() const { return num_values_; } // sum of the digits' radices
  int64_t num_rows() const { return num_rows_; }     // sum of the chunks' radices
  int64_t num_slots() const { return num_rows_ + num_chunks(); }

  // How many chunks the first so many digits make up; -1 if one of them has others, too.
  int64_t chunks_of_first(int64_t digits) const {
    for (int64_t f = 0; f < num_chunks(); ++f) {
      if (chunks_[f].first_digit == digits) return f;
    }
    return digits == num_digits() ? num_chunks() : -1;
  }

  void check_words(const at::Tensor& words) const {
    for (const Chunk& chunk : chunks_) {
      TORCH_CHECK(chunk.word < words.size(1), "a chunk of word ", chunk.word, ", but there are ", words.size(1));
    }
  }

  // Values of events begin .. end of each chunk, chunks ``stride`` numbers apart: [C, stride]. A chunk of a negative word,
  // as a missing SID's, has the value ``radix``, which no other has; returns whether there are none such.
  bool unpack(const int64_t* words, int64_t num_words, int64_t begin, int64_t end, uint16_t* values_CT,
              int64_t stride) const {
    constexpr int64_t kBlock = 256;
    int64_t rest[kBlock];                // of the word, without the parts before
    double part[kBlock], before[kBlock]; // a part of it, and what its chunks so far make up
    bool whole = true, is_regular = true;
    for (int64_t t0 = begin; t0 < end; t0 += kBlock) {
      const int64_t n = std::min(kBlock, end - t0);
      uint16_t* out = values_CT + (t0 - begin);
      for (const Part& p : parts_) {
        const int64_t place = chunks_[p.first_chunk].word;
        if (p.first_chunk == 0 || chunks_[p.first_chunk - 1].word != place) {
          const uint64_t last = p.limit - 1;
          uint64_t signs = 0; // with the sign of a word out of range
          for (int64_t t = 0; t < n; ++t) {
            const uint64_t word = words[(t0 + t) * num_words + place], sign = word | (last - word);
            rest[t] = static_cast<int64_t>(sign) < 0 ? 0 : word;
            signs |= sign;
          }
          is_regular = static_cast<int64_t>(signs) >= 0;
        }
        if (p.divisor == 1) {
          for (int64_t t = 0; t < n; ++t) part[t] = static_cast<double>(rest[t]);
        } else {
          for (int64_t t = 0; t < n; ++t) {
            const int64_t quotient = p.divide(rest[t]);
            rest[t] -= quotient * p.divisor;
            part[t] = static_cast<double>(quotient);
          }
        }
        std::fill(before, before + n, 0.0);
        for (int64_t f = p.first_chunk; f <= p.last_chunk; ++f) {
          divide_exactly(part, n, chunks_[f].divisor, chunks_[f].radix, before, out + f * stride);
        }
        if (!is_regular) whole &= repair(words + t0 * num_words, num_words, n, p, out, stride);
      }
    }
    return whole;
  }

  // Calls f(chunk, row) for the row of each chunk's value that event t has, of values as ``unpack`` gave them.
  template <typename F>
  inline void for_rows(const uint16_t* values_CT, int64_t stride, int64_t t, bool whole, F f) const {
    for (int64_t i = 0; i < num_chunks(); ++i) {
      const int64_t value = values_CT[i * stride + t];
      if (whole || value != chunks_[i].radix) f(i, chunks_[i].first_row + value);
    }
  }

 private:
  static constexpr uint64_t kExact = uint64_t{1} << 50, kSign = uint64_t{1} << 63;

  // Neighbouring chunks of a word that make up a number below kExact: a double has it exactly, with room to divide it.
  struct Part {
    Part(int64_t chunk, uint64_t divisor) : last_chunk(chunk), divisor(divisor), divide(divisor) {}

    int64_t first_chunk = 0, last_chunk;
    uint64_t divisor; // of the word, by the parts behind it
    uint64_t limit;   // of words, if this is the first part
    Divider divide;
  };

  // values = part / divisor, less ``before`` times the radix, which then is part / divisor. Vectors of doubles divide many
  // times as fast as integers: with the halves no quotient is near where it is rounded up.
  static void divide_exactly(const double* part, int64_t n, uint64_t divisor, uint64_t radix, double* before, uint16_t* values) {
    const double inverse = 1.0 / static_cast<double>(divisor), base = static_cast<double>(radix);
    constexpr double kMagic = 6755399441055744.0; // 1.5 * 2^52: adding and taking it away rounds to an integer
    for (int64_t t = 0; t < n; ++t) {
      const double quotient = (((part[t] + 0.5) * inverse - 0.5) + kMagic) - kMagic;
      values[t] = static_cast<uint16_t>(static_cast<int32_t>(quotient - before[t] * base));
      before[t] = quotient;
    }
  }

  // Values of words out of range, that must not reach past the tables; returns whether no word is negative.
  bool repair(const int64_t* words, int64_t num_words, int64_t n, const Part& p, uint16_t* values_CT, int64_t stride) const {
    bool whole = true;
    for (int64_t t = 0; t < n; ++t) {
      const int64_t word = words[t * num_words + chunks_[p.first_chunk].word];
      if (word >= 0 && static_cast<uint64_t>(word) < p.limit) continue;
      for (int64_t f = p.first_chunk; f <= p.last_chunk; ++f) {
        const uint64_t radix = chunks_[f].radix;
        values_CT[f * stride + t] = word < 0 ? radix : static_cast<uint64_t>(word) / p.divisor / chunks_[f].divisor % radix;
      }
      whole &= word >= 0;
    }
    return whole;
  }

  std::vector<int64_t> radices_;
  std::vector<Chunk> chunks_;
  std::vector<Part> parts_;
  int64_t num_values_ = 0, num_rows_ = 0;
};

} // namespace sidrec
