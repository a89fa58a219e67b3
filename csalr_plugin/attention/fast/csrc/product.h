// Matrix products whose totals stay in registers.
#pragma once

#include "vector.h"

#ifdef __AVX512F__
constexpr long ROWS = 8;  // of a product that are held in registers
#else
constexpr long ROWS = 4;
#endif
constexpr long PANEL = 2 * LANES;  // columns of a product that are held in registers

enum class Start { zero, target, scaled };  // the product is added to: nothing, C, or C times a factor a column

// `rows` rows and `columns` registers of C = start + A B.
template <long rows, long columns, bool turned, Start start>
inline void product_in_registers(long K, const real* A, long lda, const real* B, long ldb, real* C, long ldc,
                                 const real* factor) {
    vec total[rows][columns];
#pragma GCC unroll 8
    for (long r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (long j = 0; j < columns; j++) {
            total[r][j] = start == Start::zero ? vec{} : at(C + r * ldc + j * LANES);
            if (start == Start::scaled) total[r][j] *= at(factor + j * LANES);
        }
    for (long k = 0; k < K; k++) {
        vec b[columns];
#pragma GCC unroll 2
        for (long j = 0; j < columns; j++) b[j] = at(B + k * ldb + j * LANES);
#pragma GCC unroll 8
        for (long r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (long j = 0; j < columns; j++) total[r][j] += (turned ? A[k * lda + r] : A[r * lda + k]) * b[j];
    }
#pragma GCC unroll 8
    for (long r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (long j = 0; j < columns; j++) at(C + r * ldc + j * LANES) = total[r][j];
}

// Computes the rows of C that come in whole blocks of `rows`; returns how many. The inner loop reads repeatedly the
// factor that stays in the cache: rows of A, or columns of B where A has too many.
template <long rows, bool turned, Start start>
long product_of_rows(long M, long N, long K, const real* A, long lda, const real* B, long ldb, real* C, long ldc,
                     const real* factor) {
    long done = M / rows * rows;
    long step = turned ? 1 : lda;
    auto blocks = [&](long from, long to, long j) {
        bool two = N - j >= PANEL;
        for (long i = from; i < to; i += rows)
            (two ? product_in_registers<rows, 2, turned, start> : product_in_registers<rows, 1, turned, start>)(
                K, A + i * step, lda, B + j, ldb, C + i * ldc + j, ldc, factor ? factor + j : nullptr);
    };
    bool fits = done * K * long(sizeof(real)) <= 1 << 19;  // half of a core's own cache
    for (long i = 0; i < done; i += fits ? done : rows)
        for (long j = 0; j < N; j += PANEL) blocks(i, fits ? done : i + rows, j);
    return done;
}

template <bool turned, Start start>
void product_from(long M, long N, long K, const real* A, long lda, const real* B, long ldb, real* C, long ldc,
                  const real* factor) {
    long step = turned ? 1 : lda;
    long done = product_of_rows<ROWS, turned, start>(M, N, K, A, lda, B, ldb, C, ldc, factor);
    product_of_rows<1, turned, start>(M - done, N, K, A + done * step, lda, B, ldb, C + done * ldc, ldc, factor);
}

// C = start + A B for (M, K) and (K, N), where N is a multiple of LANES; `turned`: A is stored (K, M).
template <bool turned>
void product(long M, long N, long K, const real* A, long lda, const real* B, long ldb, real* C, long ldc,
             Start start = Start::zero, const real* factor = nullptr) {
    (start == Start::zero     ? product_from<turned, Start::zero>
     : start == Start::target ? product_from<turned, Start::target>
                              : product_from<turned, Start::scaled>)(M, N, K, A, lda, B, ldb, C, ldc, factor);
}
