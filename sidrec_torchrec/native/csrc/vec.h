// A few floats at a time, one per attention head, in the compiler's own vector types (GCC and Clang).
#pragma once

#include <cstdint>
#include <cstring>

namespace sidrec {

// How many floats the processor adds at once. Of wider vectors compilers make single floats.
#ifdef __AVX512F__
constexpr int kWidest = 16;
#else
constexpr int kWidest = 8;
#endif

// HP floats; HP is 4, 8 or 16.
template <int HP>
struct Vec {
  typedef float Float __attribute__((vector_size(HP * 4)));
  typedef int32_t Int __attribute__((vector_size(HP * 4)));
  typedef int16_t Short __attribute__((vector_size(HP * 2)));
};

template <typename Float>
inline Float max(Float a, Float b) {
  return a > b ? a : b;
}

using Wide = Vec<kWidest>::Float;

// Few floats again and again, and one of the parts of many.
template <int HP>
inline Wide repeat(typename Vec<HP>::Float x) {
  Wide wide;
  for (int i = 0; i < kWidest / HP; ++i) std::memcpy(reinterpret_cast<float*>(&wide) + i * HP, &x, sizeof(x));
  return wide;
}

template <int HP>
inline typename Vec<HP>::Float part(Wide wide, int i) {
  typename Vec<HP>::Float x;
  std::memcpy(&x, reinterpret_cast<float*>(&wide) + i * HP, sizeof(x));
  return x;
}

// e^x to 2 ulp for x <= 88; below -87 it gives e^-87, about 1e-38. NaN stays NaN.
template <int HP>
inline typename Vec<HP>::Float exp(typename Vec<HP>::Float x) {
  using Float = typename Vec<HP>::Float;
  using Int = typename Vec<HP>::Int;
  const Float low = Float{} - 87.0f, high = Float{} + 88.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  // x = n ln 2 + r, |r| <= ln 2 / 2; adding and taking away 1.5 * 2^23 rounds to an integer
  const Float magic = Float{} + 12582912.0f;
  const Float n = (x * 1.44269504f + magic) - magic;
  const Float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; // ln 2 in two parts
  Float p = Float{} + 1.9875691500e-4f; // minimax polynomial of Cephes' expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Int bits = (__builtin_convertvector(n, Int) + 127) << 23;
  Float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

} // namespace sidrec
