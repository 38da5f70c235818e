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
      if (!joins) chunks_.push_back({1, digit_words[j], j, 0, 0});
      chunks_.back().radix *= radix;
      ++chunks_.back().num_digits;
      num_values_ += radix;
    }
    for (size_t f = 0; f < chunks_.size(); ++f) {
      uint64_t divisor = 1; // of the chunks behind it in its word
      for (size_t i = f + 1; i < chunks_.size() && chunks_[i].word == chunks_[f].word; ++i) divisor *= chunks_[i].radix;
      dividers_.emplace_back(divisor);
      chunks_[f].first_row = num_rows_;
      chunks_[f].first_slot = num_rows_ + static_cast<int64_t>(f);
      num_rows_ += chunks_[f].radix;
    }
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
    uint64_t before[kBlock]; // the word up to and with the chunk before
    int64_t signs = 0;       // of a block's words: negative if one is
    bool whole = true;
    for (int64_t t0 = begin; t0 < end; t0 += kBlock) {
      const int64_t n = std::min(kBlock, end - t0);
      for (int64_t f = 0; f < num_chunks(); ++f) {
        const int64_t* word = words + t0 * num_words + chunks_[f].word;
        uint16_t* out = values_CT + f * stride + (t0 - begin);
        const Divider divide = dividers_[f];
        const uint64_t radix = chunks_[f].radix;
        if (f == 0 || chunks_[f].word != chunks_[f - 1].word) {
          const Divider wrap(radix); // a word out of range must not reach past the tables
          signs = 0;
          for (int64_t t = 0; t < n; ++t) signs |= word[t * num_words];
          for (int64_t t = 0; t < n; ++t) {
            const uint64_t q = divide(static_cast<uint64_t>(word[t * num_words]) & ~(uint64_t{1} << 63));
            out[t] = static_cast<uint16_t>(q - wrap(q) * radix);
            before[t] = q;
          }
        } else {
          for (int64_t t = 0; t < n; ++t) {
            const uint64_t q = divide(static_cast<uint64_t>(word[t * num_words]) & ~(uint64_t{1} << 63));
            out[t] = static_cast<uint16_t>(q - before[t] * radix);
            before[t] = q;
          }
        }
        if (signs < 0) {
          for (int64_t t = 0; t < n; ++t) out[t] = word[t * num_words] < 0 ? radix : out[t];
          whole = false;
        }
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
  std::vector<int64_t> radices_;
  std::vector<Chunk> chunks_;
  std::vector<Divider> dividers_;
  int64_t num_values_ = 0, num_rows_ = 0;
};

} // namespace sidrec
