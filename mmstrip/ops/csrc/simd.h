// Vectors of channels, and their basic operations.
//
// Maps are (N, C, H, W) in channels_last memory: pixels x channels. A kernel processes LANES channels of an image at
// a time. Memory holds float32 or bfloat16, registers hold float32; values are rounded once, when they are stored.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace mmstrip {

using c10::BFloat16;
using c10::irange;

#ifdef __AVX512F__
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Indices __attribute__((vector_size(LANES * sizeof(float))));

inline Lanes broadcast(float value) {
  return value - Lanes{};  // minus 0, as -0 plus 0 is +0
}

// The first `count` of the lanes, 0 in the others. Always inlined, so that a constant count costs nothing.
__attribute__((always_inline)) inline Lanes load(const float* from, int64_t count = LANES) {
  Lanes lanes{};
  if (count == LANES) {
    std::memcpy(&lanes, from, sizeof(Lanes));
  } else {
#ifdef __AVX512F__
    lanes = (Lanes)_mm512_maskz_loadu_ps((1u << count) - 1, from);
#else
    std::memcpy(&lanes, from, count * sizeof(float));
#endif
  }
  return lanes;
}

__attribute__((always_inline)) inline void store(float* to, Lanes lanes, int64_t count = LANES) {
  if (count == LANES) {
    std::memcpy(to, &lanes, sizeof(Lanes));
  } else {
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)lanes);
#else
    std::memcpy(to, &lanes, count * sizeof(float));
#endif
  }
}

#ifdef __AVX512F__
__attribute__((always_inline)) inline Lanes load(const BFloat16* from, int64_t count = LANES) {
  const __m256i numbers = count == LANES ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                                         : _mm256_maskz_loadu_epi16((1u << count) - 1, from);
  return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16);
}

// Rounded to nearest even.
__attribute__((always_inline)) inline __m256i rounded(Lanes lanes) {
  return (__m256i)_mm512_cvtneps_pbh((__m512)lanes);
}

__attribute__((always_inline)) inline void store(BFloat16* to, Lanes lanes, int64_t count = LANES) {
  if (count == LANES) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded(lanes));
  } else {
    _mm256_mask_storeu_epi16(to, (1u << count) - 1, rounded(lanes));
  }
}

// LANES pairs of bfloat16: the first of each, and the second.
inline Lanes first_of(const int32_t* pairs) { return (Lanes)_mm512_slli_epi32(_mm512_loadu_si512(pairs), 16); }

inline Lanes second_of(const int32_t* pairs) {
  return (Lanes)_mm512_and_si512(_mm512_loadu_si512(pairs), _mm512_set1_epi32(0xffff0000));
}

inline void store_pairs(int32_t* to, Lanes first, Lanes second) {
  const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded(second)), 16);
  _mm512_storeu_si512(to, _mm512_or_si512(_mm512_cvtepu16_epi32(rounded(first)), upper));
}
#endif

// Compilers would otherwise read memory for every use.
inline Lanes in_register(Lanes x) {
#ifdef __AVX512F__
  asm("" : "+v"(x));
#endif
  return x;
}

inline float sum_of(Lanes x) {
  float sum = 0;
  for (int64_t i = 0; i < LANES; ++i) sum += x[i];
  return sum;
}

inline Lanes interleave(Lanes a, Lanes b, int64_t first) {
  Indices indices{};
  for (const auto i : irange(LANES)) indices[i] = first + i / 2 + (i % 2) * LANES;
#ifdef __clang__
  Lanes both{};
  for (const auto i : irange(LANES)) both[i] = i % 2 ? b[first + i / 2] : a[first + i / 2];
  return both;
#else
  return __builtin_shuffle(a, b, indices);
#endif
}

// LANES x LANES numbers transposed, by perfect shuffles.
inline void transpose(Lanes (&rows)[LANES]) {
  for (int64_t step = 1; step < LANES; step *= 2) {
    Lanes next[LANES];
    for (int i = 0; i < LANES / 2; ++i) {
      next[2 * i] = interleave(rows[i], rows[i + LANES / 2], 0);
      next[2 * i + 1] = interleave(rows[i], rows[i + LANES / 2], LANES / 2);
    }
    std::memcpy(rows, next, sizeof(next));
  }
}

// Row l of `count` numbers becomes lane l of `count` vectors.
inline void gather(const float* const (&rows)[LANES], int64_t count, Lanes* out) {
  for (int64_t first = 0; first < count; first += LANES) {
    const int64_t rest = std::min(LANES, count - first);
    Lanes block[LANES];
    for (const auto lane : irange(LANES)) block[lane] = load(rows[lane] + first, rest);
    transpose(block);
    std::copy(block, block + rest, out + first);
  }
}

// The inverse of gather, for the first `lanes` of the lanes; `row` is the distance between rows.
inline void scatter(const Lanes* in, int64_t count, float* out, int64_t row, int64_t lanes) {
  for (int64_t first = 0; first < count; first += LANES) {
    const int64_t rest = std::min(LANES, count - first);
    Lanes block[LANES]{};
    std::copy(in + first, in + first + rest, block);
    transpose(block);
    for (const auto lane : irange(lanes)) store(out + lane * row + first, block[lane], rest);
  }
}

// Copy the lanes of an image into a buffer, pixel (h, w) to h * row + w * column, through a function of (lanes, pixel).
template <typename T, typename Function>
inline void stage_pixels(const T* image, int64_t height, int64_t width, int64_t channels, int64_t count, Lanes* buffer,
                         int64_t row, int64_t column, Function function) {
  const auto copy = [&](auto lanes) __attribute__((always_inline)) {
    for (const auto h : irange(height)) {
      for (const auto w : irange(width)) {
        const int64_t pixel = h * width + w;
        __builtin_prefetch(image + (pixel + 24) * channels);
        buffer[h * row + w * column] = function(load(image + pixel * channels, lanes), pixel);
      }
    }
  };
  count == LANES ? copy(std::integral_constant<int64_t, LANES>()) : copy(count);
}

inline int64_t lanes_left(int64_t channels, int64_t first) { return std::min(LANES, channels - first); }

// function(first, lanes) for all of the channels, LANES (a constant) at a time, then the rest.
template <typename Function>
__attribute__((always_inline)) inline void for_lanes(int64_t channels, Function function) {
  int64_t first = 0;
  for (; first + LANES <= channels; first += LANES) function(first, std::integral_constant<int64_t, LANES>());
  if (first < channels) function(first, channels - first);
}

template <typename Count>
__attribute__((always_inline)) inline void add_to(float* sum, Lanes value, Count lanes) {
  store(sum, load(sum, lanes) + value, lanes);
}

}  // namespace mmstrip
