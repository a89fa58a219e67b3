// Vectors of numbers in one register, and the operations on them.
//
// One compilation serves one type of number, REAL.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

using real = REAL;

#ifdef __AVX512F__
constexpr long BYTES = 64;  // of a vector register
#else
constexpr long BYTES = 32;
#endif
constexpr long LANES = BYTES / sizeof(real);

typedef real vec __attribute__((vector_size(BYTES), aligned(alignof(real)), may_alias));
typedef std::conditional_t<sizeof(real) == 4, int32_t, int64_t> whole;
typedef whole wholes __attribute__((vector_size(BYTES)));

inline vec& at(real* place) { return *reinterpret_cast<vec*>(place); }
inline const vec& at(const real* place) { return *reinterpret_cast<const vec*>(place); }
inline vec larger(vec a, vec b) { return a > b ? a : b; }

inline real sum(const vec& v) {
    real total = 0;
    for (long lane = 0; lane < LANES; lane++) total += v[lane];
    return total;
}

constexpr long padded(long count) { return (count + LANES - 1) / LANES * LANES; }

// Reads `count` numbers, at most a register; the other lanes are zero.
inline vec read(const real* place, long count) {
    if (count >= LANES) return at(place);
    vec part{};
    for (long lane = 0; lane < count; lane++) part[lane] = place[lane];
    return part;
}

inline void write(const vec& value, real* place, long count) {
    if (count >= LANES) at(place) = value;
    for (long lane = 0; lane < count && count < LANES; lane++) place[lane] = value[lane];
}

struct Taylor {
    static constexpr long degree = sizeof(real) == 8 ? 13 : 7;
    real coefficient[degree + 1];  // 1 / k!
    constexpr Taylor() : coefficient{} {
        double power = 1;
        for (long k = 0; k <= degree; k++, power /= k) coefficient[k] = power;
    }
};
constexpr Taylor TAYLOR;

// e^x for x <= 0: 2^k e^r with |r| <= ln(2) / 2 and the Taylor series of e^r. A result below the smallest normal number
// becomes about that number; NaN stays NaN.
inline vec exponential(vec x) {
    constexpr bool wide = sizeof(real) == 8;
    constexpr long fraction = wide ? 52 : 23, bias = wide ? 1023 : 127;
    constexpr real lowest = wide ? -708 : -87, log2_e = 1.4426950408889634;
    constexpr real ln2_high = wide ? 0x1.62e42feep-1 : 0x1.62e4p-1, ln2_low = 0.6931471805599453 - double(ln2_high);
    constexpr real shift = wide ? 0x1.8p52 : 0x1.8p23;  // adding it rounds to a whole number, in the low bits
    x = x < lowest ? lowest - vec{} : x;
    vec shifted = x * log2_e + shift, k = shifted - shift, r = (x - k * ln2_high) - k * ln2_low;
    vec series = vec{} + TAYLOR.coefficient[Taylor::degree];
    for (long k = Taylor::degree - 1; k >= 0; k--) series = series * r + TAYLOR.coefficient[k];
    wholes power = ((wholes)shifted << fraction) + (whole(bias) << fraction);  // the cast keeps the bits
    return series * (vec)power;
}

// Transposes a square of LANES registers: swaps its off-diagonal blocks, then does the same within each block.
template <long half = LANES / 2>
inline void transpose(vec* square) {
    wholes upper, lower;
    for (long lane = 0; lane < LANES; lane++) {
        upper[lane] = lane & half ? lane - half + LANES : lane;
        lower[lane] = lane & half ? lane + LANES : lane + half;
    }
    for (long row = 0; row < LANES; row++) {
        if (row & half) continue;
        vec one = square[row], other = square[row + half];
        square[row] = __builtin_shuffle(one, other, upper);
        square[row + half] = __builtin_shuffle(one, other, lower);
    }
    if constexpr (half > 1) transpose<half / 2>(square);
}

// (rows, columns) -> (columns, width), where columns from `rows` on stay as they are; `stride` between rows.
inline void transpose(const real* from, long rows, long columns, long stride, real* to, long width) {
    for (long first = 0; first < rows; first += LANES)
        for (long t = 0; t < columns; t += LANES) {
            long count = std::min(LANES, rows - first);
            vec square[LANES]{};
            for (long row = 0; row < count; row++) square[row] = read(from + (first + row) * stride + t, columns - t);
            transpose(square);
            for (long i = 0; i < std::min(LANES, columns - t); i++)
                write(square[i], to + (t + i) * width + first, count);
        }
}
