// GELU and its derivative, within 4e-7.
#pragma once

#include "simd.h"

namespace mmstrip {

#ifdef __AVX512F__

// Both are odd functions plus a half (GELU also times x): polynomials in |x| on 16 segments, centered at i / scale and
// fitted at Chebyshev nodes, with coefficients looked up in registers. The last segment is constant, so GELU is exactly
// 0 there. One formula for all x would be much slower, as each operation depends on the one before.
constexpr float CDF_SCALE = 2.7f, SLOPE_SCALE = 2.5f;

// CDF of the normal distribution minus 1/2; row k holds the coefficients of power k.
alignas(64) constexpr float CDF[5][LANES] = {
    {-4.54997892e-18f, 0.144446716f, 0.270574659f, 0.36673975f, 0.430760831f, 0.467976451f, 0.486865848f, 0.495237231f,
     0.498476535f, 0.499570936f, 0.499893755f, 0.499976903f, 0.499995589f, 0.499999255f, 0.499999881f, 0.5f},
    {0.147755057f, 0.137961015f, 0.112304792f, 0.0797016099f, 0.0493129939f, 0.0265998375f, 0.0125088468f,
     0.00512829423f, 0.00183291326f, 0.00057110982f, 0.000155131784f, 3.67349385e-05f, 7.58312899e-06f, 1.36458505e-06f,
     2.1405603e-07f, 0.0f},
    {1.38864686e-16f, -0.00946217496f, -0.0154050449f, -0.0163992383f, -0.0135287736f, -0.00912199263f, -0.00514773186f,
     -0.00246223435f, -0.00100579008f, -0.000352583884f, -0.000106423118f, -2.7723916e-05f, -6.24417316e-06f,
     -1.21750361e-06f, -2.05723893e-07f, 0.0f},
    {-0.00335643301f, -0.00270667882f, -0.0011586711f, 0.000416223047f, 0.00133410946f, 0.00146977382f, 0.00112487155f,
     0.000672791211f, 0.000328463851f, 0.00013371784f, 4.59498951e-05f, 1.34312832e-05f, 3.35697996e-06f,
     7.20086973e-07f, 1.32926914e-07f, 0.0f},
    {-3.98449513e-16f, 0.00030714288f, 0.000428725209f, 0.000329613365f, 0.000125084014f, -4.34297763e-05f,
     -0.000113047856f, -0.000104404848f, -6.65281987e-05f, -3.28812785e-05f, -1.31774004e-05f, -4.37829749e-06f,
     -1.22182053e-06f, -2.88771872e-07f, -5.81344501e-08f, 0.0f}};

// The derivative of GELU minus 1/2.
alignas(64) constexpr float SLOPE[6][LANES] = {
    {-4.5310982e-17f, 0.302729756f, 0.519897819f, 0.617953598f, 0.622674048f, 0.585231841f, 0.545549333f, 0.51960814f,
     0.506941915f, 0.502043724f, 0.500503659f, 0.500104308f, 0.500018239f, 0.500002682f, 0.500000358f, 0.5f},
    {0.319153786f, 0.271046817f, 0.157592222f, 0.0434976928f, -0.0248462651f, -0.0431927815f, -0.0336813778f,
     -0.0184904952f, -0.0078579532f, -0.00268257712f, -0.000749449013f, -0.000173200591f, -3.33383723e-05f,
     -5.36964671e-06f, -7.26096687e-07f, 0.0f},
    {1.08994601e-15f, -0.0452500507f, -0.0622927323f, -0.0477232933f, -0.0204465799f, -1.11968063e-06f, 0.0075675156f,
     0.00680894405f, 0.00380870537f, 0.00157906685f, 0.000513888896f, 0.000134832531f, 2.89507207e-05f, 5.13460145e-06f,
     7.56928614e-07f, 0.0f},
    {-0.017020693f, -0.0114134876f, 0.000217065768f, 0.00829796121f, 0.00871551782f, 0.00460747629f, 0.000750825449f,
     -0.000893742021f, -0.000945486594f, -0.000530293153f, -0.000211280494f, -6.47255511e-05f, -1.57818922e-05f,
     -3.12050497e-06f, -5.06123399e-07f, 0.0f},
    {-3.7317468e-15f, 0.00252390606f, 0.00278347405f, 0.00105369068f, -0.000665043248f, -0.00113985513f,
     -0.000697961426f, -0.000164316414f, 8.02933719e-05f, 0.000101277888f, 5.6164572e-05f, 2.1314534e-05f,
     6.11665291e-06f, 1.38322116e-06f, 2.51930459e-07f, 0.0f},
    {0.000606009096f, 0.000319300045f, -0.000202582611f, -0.000413836242f, -0.000231075435f, 2.56625935e-05f,
     0.000120784374f, 8.07392207e-05f, 2.06924014e-05f, -6.64744721e-06f, -9.05613706e-06f, -4.76284276e-06f,
     -1.674597e-06f, -4.40208368e-07f, -9.05159823e-08f, 0.0f}};

template <size_t N>
inline Lanes on_segments(const float (&table)[N][LANES], float scale, Lanes x) {
  constexpr float magic = 1 << 23;  // the last bits of the sum are the rounded number
  const Lanes at = (Lanes)_mm512_min_ps(_mm512_set1_ps(LANES - 0.51f), (__m512)(x * scale));
  const Lanes rounded = at + magic, rest = at - (rounded - magic);
  const auto coefficient = [&](size_t k) {
    return (Lanes)_mm512_permutexvar_ps((__m512i)rounded, _mm512_load_ps(table[k]));
  };
  Lanes sum = coefficient(N - 1);
  for (int k = N - 2; k >= 0; --k) sum = sum * rest + coefficient(k);
  return sum;
}

inline Lanes absolute(Lanes x) { return (Lanes)_mm512_abs_ps((__m512)x); }

inline Lanes gelu(Lanes x) {
  const Lanes size = absolute(x);
  return size * on_segments(CDF, CDF_SCALE, size) + x * 0.5f;
}

inline Lanes gelu_slope(Lanes x) {
  const Lanes value = on_segments(SLOPE, SLOPE_SCALE, absolute(x));
  const __m512 sign = _mm512_and_ps((__m512)x, _mm512_set1_ps(-0.0f));
  return (Lanes)_mm512_or_ps((__m512)value, sign) + 0.5f;
}

#else

// NaN stays NaN.
inline Lanes clamp(Lanes x, float bound) {
  x = x > bound ? broadcast(bound) : x;
  return x < -bound ? broadcast(-bound) : x;
}

template <size_t N>
inline Lanes polynomial(const float (&coefficients)[N], Lanes x) {
  Lanes sum = broadcast(coefficients[N - 1]);
  for (int i = N - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

// CDF of the normal distribution minus 1/2: a minimax rational function, within 3e-7.
inline Lanes normal_cdf(Lanes x) {
  constexpr float numerator[] = {3.989419607e-01f, 3.584738309e-02f, 4.805432745e-03f,
                                 1.901574762e-04f, 6.590612831e-06f, 2.171054180e-08f};
  constexpr float denominator[] = {
      1.0f, 2.565187936e-01f, 2.980407201e-02f, 2.003366151e-03f, 8.101179527e-05f, 1.185154637e-06f};
  x = clamp(x, 5.6f);
  const Lanes square = x * x;
  return clamp(x * polynomial(numerator, square) / polynomial(denominator, square), 0.5f);
}

inline Lanes gelu(Lanes x) { return x * (normal_cdf(x) + 0.5f); }

// Derivative of gelu, fitted the same way.
inline Lanes gelu_slope(Lanes x) {
  constexpr float numerator[] = {7.978854500e-01f, -4.511877051e-02f, 1.478385649e-02f, -2.326017770e-04f,
                                 3.566242163e-05f, -4.300291545e-07f, -3.313754097e-09f};
  constexpr float denominator[] = {1.0f,
                                   2.767944308e-01f,
                                   3.577226092e-02f,
                                   2.800846161e-03f,
                                   1.296302397e-04f,
                                   5.636676596e-06f,
                                   -1.546238337e-07f};
  x = clamp(x, 5.8f);
  const Lanes square = x * x;
  return x * polynomial(numerator, square) / polynomial(denominator, square) + 0.5f;
}

#endif

}  // namespace mmstrip
