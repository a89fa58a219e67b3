// What CSALR does at n positions and m landmarks, on a CPU: positions.py as loops over tiles that stay in the cache.
//
// A tile is some 100 to 200 neighbouring positions of one image. All that a pass does at them, products with the m
// landmarks, softmax, gate and residual, is done before the next tile is read; so no map is ever written to memory, and
// the products run at the speed of the arithmetic. Tensors are contiguous, (channels, n) an image; positions.py says
// what each function computes. Names are the paper's: C channels, D = C' channels of queries and keys, c and d the same
// a group.
//
// One compilation serves one type of number, REAL.

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#define INLINED __attribute__((always_inline))

namespace {

using real = REAL;

#ifdef __AVX512F__
constexpr long BYTES = 64, ROWS = 8;  // of a vector register; rows of a product that are held in registers
#else
constexpr long BYTES = 32, ROWS = 4;
#endif
constexpr long LANES = BYTES / sizeof(real);
constexpr long PANEL = 2 * LANES;  // columns of a product that are held in registers

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

struct Taylor {
    static constexpr long degree = sizeof(real) == 8 ? 13 : 7;
    real coefficient[degree + 1];  // 1 / k!
    constexpr Taylor() : coefficient{} {
        double power = 1;
        for (long k = 0; k <= degree; k++, power /= k) coefficient[k] = power;
    }
};
constexpr Taylor TAYLOR;

// e^x of x <= 0: 2^k e^r with |r| <= ln(2) / 2 and the Taylor series of e^r. What is below the smallest normal
// number becomes about that number; NaN stays NaN.
inline vec exponential(vec x) {
    constexpr bool wide = sizeof(real) == 8;
    constexpr long fraction = wide ? 52 : 23, bias = wide ? 1023 : 127;
    constexpr real lowest = wide ? -708 : -87, log2_e = 1.4426950408889634;
    constexpr real ln2_high = wide ? 0x1.62e42feep-1 : 0x1.62e4p-1, ln2_low = 0.6931471805599453 - double(ln2_high);
    constexpr real shift = wide ? 0x1.8p52 : 0x1.8p23;  // a sum with it rounds to whole numbers, in its low bits
    x = x < lowest ? lowest - vec{} : x;
    vec shifted = x * log2_e + shift, k = shifted - shift, r = (x - k * ln2_high) - k * ln2_low;
    vec series = vec{} + TAYLOR.coefficient[Taylor::degree];
    for (long k = Taylor::degree - 1; k >= 0; k--) series = series * r + TAYLOR.coefficient[k];
    wholes power = ((wholes)shifted << fraction) + (whole(bias) << fraction);  // a cast keeps the bits
    return series * (vec)power;
}

// From here on O = (out - x) / alpha, and is not computed again; with a smaller gate that would lose digits.
constexpr real LEAST_ALPHA = 1. / 64;

// Products

enum class Start { zero, target, scaled };  // what a product is added to: nothing, C, or C times a factor a column

// Calls visit(row, column) for each register of a block, and writes every call out: an array that loops go through, or
// that is handed on, would be kept in memory.
template <long columns, class Visit, long... i>
INLINED inline void each_register_of(std::integer_sequence<long, i...>, const Visit& visit) {
    (visit(i / columns, i % columns), ...);
}

template <long rows, long columns, class Visit>
INLINED inline void each_register(const Visit& visit) {
    each_register_of<columns>(std::make_integer_sequence<long, rows * columns>(), visit);
}

// total += A (B + sign * other) for `rows` rows and `columns` registers, with A(r, k) at A[r * lda + k], or
// A[k * lda + r] if turned.
template <bool turned, int sign = 0, long rows, long columns>
INLINED inline void multiply(long K, const real* A, long lda, const real* B, const real* other, long ldb,
                     vec (&total)[rows][columns]) {
    for (long k = 0; k < K; k++) {
        vec b[columns];
        each_register<1, columns>([&](long, long j) INLINED {
            b[j] = at(B + k * ldb + j * LANES);
            if (sign > 0) b[j] += at(other + k * ldb + j * LANES);
            if (sign < 0) b[j] -= at(other + k * ldb + j * LANES);
        });
        each_register<rows, columns>([&](long r, long j) INLINED {
            total[r][j] += (turned ? A[k * lda + r] : A[r * lda + k]) * b[j];
        });
    }
}

// `rows` rows and `columns` registers of C = start + A B.
template <long rows, long columns, bool turned, Start start>
inline void product_in_registers(long K, const real* A, long lda, const real* B, long ldb, real* C, long ldc,
                                 const real* factor) {
    vec total[rows][columns];
    each_register<rows, columns>([&](long r, long j) INLINED {
        total[r][j] = start == Start::zero ? vec{} : at(C + r * ldc + j * LANES);
        if (start == Start::scaled) total[r][j] *= at(factor + j * LANES);
    });
    multiply<turned>(K, A, lda, B, nullptr, ldb, total);
    each_register<rows, columns>([&](long r, long j) INLINED { at(C + r * ldc + j * LANES) = total[r][j]; });
}

// Whether so many numbers take half of a core's own cache at most.
bool fits_cache(long count) { return count * long(sizeof(real)) <= 1 << 19; }

// The rows of C that come in whole blocks of `rows`; returns how many. The inner loop reads again and again what stays
// in the cache: rows of A, unless they are too many; then columns of B.
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
    bool fits = fits_cache(done * K);
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

// Tiles

// `count` numbers, at most a register of them, and zero after them.
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

// The same for what the next pass finds in memory anyhow: a whole register goes there past the cache, whose lines
// would have to be read before they are written.
inline void write_past_cache(const vec& value, real* place, long count) {
    bool aligned = reinterpret_cast<uintptr_t>(place) % BYTES == 0;
#if defined(__AVX512F__)
    if (aligned && count >= LANES) return _mm512_stream_si512(reinterpret_cast<__m512i*>(place), (__m512i)value);
#elif defined(__AVX2__)
    if (aligned && count >= LANES) return _mm256_stream_si256(reinterpret_cast<__m256i*>(place), (__m256i)value);
#endif
    (void)aligned;
    write(value, place, count);
}

// What other threads must see of it is there after this.
inline void written_past_cache() {
#ifdef __AVX2__
    _mm_sfence();
#endif
}

// A tile's place in a tensor (rows, n): `count` positions from `first` on.
template <class Number>
struct Window {
    Number* image;
    long rows, n, first, count;

    Number* operator[](long row) const { return image + row * n + first; }

    // Position t of the row some rows further starts on its way to the cache: each row lies on a page of its own, and
    // no processor foresees the next page.
    void ahead(long row, long t) const {
        constexpr long further = 3;
        if (row + further < rows) __builtin_prefetch((*this)[row + further] + t);
    }
};

// (rows, T) of it, whole registers of the positions that there are: zero beyond the end of the image.
void load(const Window<const real>& from, real* tile, long T) {
    for (long r = 0; r < from.rows; r++) {
        const real* row = from[r];
        for (long t = 0; t < from.count; t += LANES) {
            from.ahead(r, t);
            at(tile + r * T + t) = read(row + t, from.count - t);
        }
    }
}

void store(const real* tile, const Window<real>& to, long T) {
    for (long r = 0; r < to.rows; r++) {
        real* row = to[r];
        for (long t = 0; t < to.count; t += LANES) write(at(tile + r * T + t), row + t, to.count - t);
    }
}

void add(const real* tile, const Window<real>& to, long T) {
    for (long r = 0; r < to.rows; r++) {
        real* row = to[r];
        for (long t = 0; t < to.count; t += LANES) {
            to.ahead(r, t);
            write(read(row + t, to.count - t) + at(tile + r * T + t), row + t, to.count - t);
        }
    }
}

// The largest size of a number in N columns of (rows, T).
real largest_of(const real* tile, long rows, long N, long T) {
    vec high{}, low{};
    for (long r = 0; r < rows; r++)
        for (long t = r * T; t < r * T + N; t += LANES) {
            high = larger(at(tile + t), high);
            low = larger(-at(tile + t), low);
        }
    high = larger(high, low);
    return *std::max_element(&high[0], &high[0] + LANES);
}

// A square of LANES registers, by halves: what stands right of the diagonal's blocks changes with what is left of them.
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
void transpose(const real* from, long rows, long columns, long stride, real* to, long width) {
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

// What m landmarks have, at a register of positions. Neighbours' landmarks mostly stand together, and are shuffled.
class Lookup {
  public:
    Lookup() = default;
    Lookup(const int64_t* landmark_of, long count, long m) : landmark_of(landmark_of), count(count) {
        first = std::max(0L, std::min(*std::min_element(landmark_of, landmark_of + count), m - LANES));
        together = m >= LANES && *std::max_element(landmark_of, landmark_of + count) < first + LANES;
        for (long lane = 0; lane < count; lane++) lanes[lane] = landmark_of[lane] - first;
    }
    vec operator()(const real* of_landmarks) const {
        if (together) return __builtin_shuffle(at(of_landmarks + first), lanes);
        vec found{};
        for (long lane = 0; lane < count; lane++) found[lane] = of_landmarks[landmark_of[lane]];
        return found;
    }

  private:
    const int64_t* landmark_of;
    long count, first;
    bool together;
    wholes lanes{};
};

// Mean and sum of squares about it of `count` numbers.
struct Moments {
    real mean = 0, squares = 0;
    long count = 0;

    Moments() = default;
    Moments(const real* from, long count) : count(count) {
        long whole_registers = count / LANES * LANES;
        vec total{}, square{};
        for (long t = 0; t < whole_registers; t += LANES) total += at(from + t);
        mean = sum(total);
        for (long t = whole_registers; t < count; t++) mean += from[t];
        mean /= count;
        for (long t = 0; t < whole_registers; t += LANES) square += (at(from + t) - mean) * (at(from + t) - mean);
        squares = sum(square);
        for (long t = whole_registers; t < count; t++) squares += (from[t] - mean) * (from[t] - mean);
    }
    // Of both together (Chan et al., 1979): the difference of two large sums would lose digits.
    void operator+=(const Moments& other) {
        if (!other.count) return;
        count += other.count;
        real share = real(other.count) / count, difference = other.mean - mean;
        mean += difference * share;
        squares += other.squares + difference * difference * share * (count - other.count);
    }
};

// Softmax over the rows of each of N columns of (m, T), to which `bias`, (m,), is added before.
void softmax_of_columns(real* logits, const real* bias, long m, long N, long T) {
    for (real* column = logits; column < logits + N; column += LANES) {
        vec top = at(column) + bias[0];
        for (long k = 1; k < m; k++) top = larger(top, at(column + k * T) + bias[k]);
        vec total{};
        for (long k = 0; k < m; k++)
            total += at(column + k * T) = exponential(at(column + k * T) + (bias[k] - top));
        vec share = 1 / total;  // a division takes ten times as long as a product
        for (long k = 0; k < m; k++) at(column + k * T) *= share;
    }
}

// The gradient of the logits from that of their softmax over rows, in place.
void softmax_of_columns_backward(real* gradient, const real* probabilities, long m, long N, long T) {
    for (long t = 0; t < N; t += LANES) {
        vec total{};
        for (long k = 0; k < m; k++) total += at(gradient + k * T + t) * at(probabilities + k * T + t);
        for (long k = 0; k < m; k++)
            at(gradient + k * T + t) = at(probabilities + k * T + t) * (at(gradient + k * T + t) - total);
    }
}

// Memory and threads

// A thread's own memory, used again by every call: fresh pages would cost as much as what is computed in them.
class Memory {
  public:
    real* take(long count) {
        if (used == blocks.size()) blocks.emplace_back();
        blocks[used].resize(std::max<size_t>(blocks[used].size(), count + LANES));
        auto address = reinterpret_cast<uintptr_t>(blocks[used++].data());
        return reinterpret_cast<real*>((address + BYTES - 1) / BYTES * BYTES);
    }
    real* zeros(long count) {
        real* block = take(count);
        std::fill(block, block + count, real(0));
        return block;
    }
    void reset() { used = 0; }

  private:
    std::vector<std::vector<real>> blocks;
    size_t used = 0;
};

thread_local Memory caller_memory, worker_memory;

struct Segment {  // neighbouring tiles of one image, which one worker computes
    long index, image, begin, end;
};

struct Tile {
    const Segment& part;
    long first, count;  // positions
    bool fresh;         // the first of its segment
    long N = padded(count);  // of what is computed: whole registers

    // Its place in a tensor (B, rows, n).
    template <class Number>
    Window<Number> of(Number* images, long rows, long n) const {
        return {images + part.image * rows * n, rows, n, first, count};
    }
    Start start() const { return fresh ? Start::zero : Start::target; }  // of what a segment adds up
};

}  // namespace

extern "C" {
struct Shape {
    long B, C, D, d, step, n, m, groups, at_landmarks, workers;  // group g sees d channels of D from g * step on
};
}

namespace {

// Positions of a tile: long runs of memory, yet what a pass computes at them stays in a core's cache or close to it.
// Half as many where workers would not share them out evenly.
long tile_of(const Shape& s) {
    constexpr long T = 192;
    bool even = s.B * ((s.n + T - 1) / T) % s.workers == 0;
    return std::min(padded(s.n), even ? T : T / 2);
}

// Calls work(worker) for each worker, on a thread of its own and with fresh worker_memory.
template <class Work>
void each_worker(long workers, const Work& work) {
#pragma omp parallel for schedule(static, 1) num_threads(workers)
    for (long worker = 0; worker < workers; worker++) {
        worker_memory.reset();
        work(worker);
    }
}

// The left factor of large products, A of (M, K), or stored (K, M) if turned, and what makes them faster.
//
// Cut into quarters, C = A B takes seven products of quarters in place of eight (Strassen, 1969). Sums of quarters of A
// are made once for all that it is multiplied with, those of B as it is read: sums wait in units of their own, while
// products are what a processor is busy with. All entries of B count, also those of columns that nobody reads. An
// entry's error is bounded by the largest entries of A and B, not of its own row and column alone; for normally
// distributed ones it is 1.5 times that of a plain product.
template <bool turned>
class Factor {
  public:
    static constexpr bool by_quarters_is_faster = BYTES == 64;  // it needs many registers

    // Numbers of scratch that it needs as long as it lives.
    static long scratch(long M, long K) { return 5 * M * K / 4 + LANES; }

    Factor() = default;
    Factor(const real* A, long M, long K, long lda, real* scratch) : Factor(A, M, K, lda, scratch, nullptr) {
        if (sums) add_quarters(0, 1);
    }
    // The same for all workers, who make the sums together, in the caller's memory.
    Factor(const Shape& s, const real* A, long M, long K, long lda)
        : Factor(A, M, K, lda, caller_memory.take(scratch(M, K)), nullptr) {
        if (sums) each_worker(s.workers, [&](long worker) { add_quarters(worker, s.workers); });
    }

    // C = start + A B for (K, N).
    void times(long N, const real* B, long ldb, real* C, long ldc, Start start = Start::zero,
               const real* factor = nullptr) const {
        if (!sums || !halves(N)) return product<turned>(M, N, K, A, lda, B, ldb, C, ldc, start, factor);
        (this->*(start == Start::zero     ? &Factor::by_quarters<Start::zero>
                 : start == Start::target ? &Factor::by_quarters<Start::target>
                                          : &Factor::by_quarters<Start::scaled>))(N, B, ldb, C, ldc, factor);
    }

  private:
    Factor(const real* A, long M, long K, long lda, real* scratch, std::nullptr_t)
        : A(A), M(M), K(K), lda(lda), sums(by_quarters_is_faster && halves(M) && halves(K) ? scratch : nullptr) {}

    static bool halves(long count) { return count % (2 * LANES) == 0 && count >= 4 * LANES; }

    void add_quarters(long worker, long workers) {
        long rows = (turned ? K : M) / 2, columns = (turned ? M : K) / 2, size = rows * columns;
        for (long row = rows * worker / workers; row < rows * (worker + 1) / workers; row++)
            for (long j = 0; j < columns; j += LANES) {
                const real *upper = A + row * lda + j, *lower = upper + rows * lda;
                vec A11 = at(upper), right = at(upper + columns), below = at(lower), A22 = at(lower + columns);
                vec A12 = turned ? below : right, A21 = turned ? right : below;
                real* to = sums + row * columns + j;
                at(to) = A11 + A22;
                at(to + size) = A12 - A22;
                at(to + 2 * size) = A21 - A11;
                at(to + 3 * size) = A21 + A22;
                at(to + 4 * size) = A11 + A12;
            }
    }

    template <Start start>
    void by_quarters(long N, const real* B, long ldb, real* C, long ldc, const real* factor) const {
        long m = M / 2, n = N / 2;
        bool fits = fits_cache(7 * M * K / 4);
        for (long i = 0; i < m; i += fits ? m : ROWS)  // as in `product_of_rows`
            for (long j = 0, columns; j < n; j += columns * LANES) {
                long left = (n - j) / LANES;
                columns = left == 2 || left == 4 ? 2 : std::min(3L, left);
                auto block = columns == 3   ? &Factor::block<3, start>
                             : columns == 2 ? &Factor::block<2, start>
                                            : &Factor::block<1, start>;
                for (long row = i; row < (fits ? m : i + ROWS); row += ROWS)
                    (this->*block)(row, n, B + j, ldb, C + row * ldc + j, ldc, factor ? factor + j : nullptr);
            }
    }

    // Row `i` and the ROWS - 1 after it of each quarter of C, `columns` registers of each.
    template <long columns, Start start>
    void block(long i, long n, const real* B11, long ldb, real* C11, long ldc, const real* factor) const {
        long k = K / 2, m = M / 2, size = m * k, width = turned ? m : k;  // of a sum
        const real *A11 = A + i * (turned ? 1 : lda), *A22 = A11 + (turned ? k * lda + m : m * lda + k);
        const real* sum = sums + i * (turned ? 1 : width);
        const real *B12 = B11 + n, *B21 = B11 + k * ldb, *B22 = B21 + n;
        real *C12 = C11 + n, *C21 = C11 + m * ldc, *C22 = C21 + n;
        const real* right = factor ? factor + n : nullptr;
        constexpr Start more = Start::target;
        vec total[ROWS][columns];
        zero(total);
        multiply<turned, 1>(k, sum, width, B11, B22, ldb, total);
        give<start>(total, C22, ldc, right);
        multiply<turned, 1>(k, sum + size, width, B21, B22, ldb, total);
        give<start>(total, C11, ldc, factor);
        zero(total);
        multiply<turned, -1>(k, A11, lda, B12, B22, ldb, total);
        give<start>(total, C12, ldc, right);
        multiply<turned, 1>(k, sum + 2 * size, width, B11, B12, ldb, total);
        give<more>(total, C22, ldc);
        zero(total);
        multiply<turned, -1>(k, A22, lda, B21, B11, ldb, total);
        give<start>(total, C21, ldc, factor);
        give<more>(total, C11, ldc);
        zero(total);
        multiply<turned>(k, sum + 3 * size, width, B11, nullptr, ldb, total);
        give<more>(total, C21, ldc);
        give<more, -1>(total, C22, ldc);
        zero(total);
        multiply<turned>(k, sum + 4 * size, width, B22, nullptr, ldb, total);
        give<more>(total, C12, ldc);
        give<more, -1>(total, C11, ldc);
    }

    template <long columns>
    static INLINED inline void zero(vec (&total)[ROWS][columns]) {
        each_register<ROWS, columns>([&](long r, long j) INLINED { total[r][j] = vec{}; });
    }

    // C = start + sign * total
    template <Start start, int sign = 1, long columns>
    static INLINED inline void give(const vec (&total)[ROWS][columns], real* C, long ldc,
                                    const real* factor = nullptr) {
        each_register<ROWS, columns>([&](long r, long j) INLINED {
            vec& to = at(C + r * ldc + j * LANES);
            vec before = start == Start::zero ? vec{} : to;
            if (start == Start::scaled) before *= at(factor + j * LANES);
            to = start == Start::zero ? total[r][j] : sign > 0 ? before + total[r][j] : before - total[r][j];
        });
    }

    const real* A = nullptr;
    long M = 0, K = 0, lda = 0;
    real* sums = nullptr;  // of quarters of A, five of (M / 2, K / 2), stored as A is
};

// An even share of all tiles for each worker. What is summed by whom depends on the shape alone, never on which thread
// was free: the same call gives the same digits. A pass goes `backwards` after one that went forwards, as it finds in
// the cache what that one used last.
class Shares {
  public:
    Shares(const Shape& s, bool backwards)
        : T(tile_of(s)), n(s.n), images(s.B), workers(s.workers), backwards(backwards), first_of(s.workers + 1) {
        long tiles = (s.n + T - 1) / T;
        for (long worker = 0; worker < workers; worker++) {
            long begin = s.B * tiles * worker / workers, end = s.B * tiles * (worker + 1) / workers;
            first_of[worker] = segments.size();
            while (begin < end) {
                long image = begin / tiles, stop = std::min(end, (image + 1) * tiles);
                segments.push_back({long(segments.size()), image, begin - image * tiles, stop - image * tiles});
                begin = stop;
            }
        }
        first_of[workers] = segments.size();
    }

    // Calls work(worker, tiles) for each worker; tiles(visit) calls visit(tile) for each tile.
    template <class Work>
    void each(const Work& work) const {
        each_worker(workers, [&](long worker) {
            work(worker, [&](const auto& visit) {
                long begin = first_of[worker], end = first_of[worker + 1];
                for (long i = begin; i < end; i++) {
                    const Segment& part = segments[backwards ? begin + end - 1 - i : i];
                    for (long j = part.begin; j < part.end; j++) {
                        long first = (backwards ? part.begin + part.end - 1 - j : j) * T;
                        visit(Tile{part, first, std::min(T, n - first), j == part.begin});
                    }
                }
            });
        });
    }

    // Memory for what segments add up, (segments, rows, width): the target itself where that is the same.
    real* sums(long rows, long width, long columns, real* target) const {
        bool same = size() == images && width == columns;
        return same ? target : caller_memory.take(size() * rows * width);
    }

    // target (B, rows, columns): for each image the sum over its segments of `parts`, (segments, rows, width).
    void add_up(const real* parts, long rows, long width, long columns, real* target) const {
        if (parts == target) return;
        each_worker(workers, [&](long worker) {
            for (long i = 0; i < size(); i++)
                for (long row = rows * worker / workers; row < rows * (worker + 1) / workers; row++) {
                    bool first = i == 0 || segments[i].image != segments[i - 1].image;
                    const real* from = parts + (i * rows + row) * width;
                    real* to = target + (segments[i].image * rows + row) * columns;
                    for (long j = 0; j < columns; j++) to[j] = first ? from[j] : to[j] + from[j];
                }
        });
    }

    long size() const { return segments.size(); }

    const long T;  // positions of a tile
    std::vector<Segment> segments;

  private:
    long n, images, workers;
    bool backwards;
    std::vector<long> first_of;
};

// target (rows, columns): the sum over workers of `parts`, (workers, rows, width).
void add_up_workers(const Shape& s, const real* parts, long rows, long width, long columns, real* target) {
    each_worker(s.workers, [&](long worker) {
        for (long row = rows * worker / s.workers; row < rows * (worker + 1) / s.workers; row++)
            for (long part = 0; part < s.workers; part++)
                for (long j = 0; j < columns; j++) {
                    real one = parts[(part * rows + row) * width + j];
                    target[row * columns + j] = part ? target[row * columns + j] + one : one;
                }
    });
}

// (rows, columns) -> (columns, width), as `transpose`, by all workers.
real* turned_weight(const Shape& s, const real* W, long rows, long columns, real* turned, long width) {
    each_worker(s.workers, [&](long worker) {
        long first = columns * worker / s.workers, count = columns * (worker + 1) / s.workers - first;
        transpose(W + first, rows, count, columns, turned + first * width, width);
    });
    return turned;
}

// target (columns,): the sum over images of `parts`, (B, columns).
void add_up_images(long images, long columns, const real* parts, real* target) {
    std::memcpy(target, parts, columns * sizeof(real));
    for (long b = 1; b < images; b++)
        for (long j = 0; j < columns; j++) target[j] += parts[b * columns + j];
}

// A weight (C, C), or its transpose, for all workers; nothing where it is null.
template <bool turned>
std::optional<Factor<turned>> of_all(const Shape& s, const real* W) {
    if (!W) return {};
    return Factor<turned>(s, W, s.C, s.C, s.C);
}

// What the landmarks of one image have, (C, groups, m) or (groups, c, m), as left factors of what its positions have:
// one of all groups where `value` and `fuse` act at landmarks, else one a group.
template <bool turned>
class Heads {
  public:
    Heads(const Shape& s, const real* tensor)
        : count(s.at_landmarks ? 1 : s.groups), rows(s.C / count), marks(s.groups * s.m / count), tensor(tensor) {
        long size = Factor<turned>::scratch(rows, marks);
        for (long head = 0; head < count; head++) scratch.push_back(worker_memory.take(size));
    }
    void take(long image) {
        factors.clear();
        for (long head = 0; head < count; head++) {
            const real* from = tensor + (image * count + head) * rows * marks;
            factors.push_back({from, turned ? marks : rows, turned ? rows : marks, marks, scratch[head]});
        }
    }
    const Factor<turned>& operator[](long head) const { return factors[head]; }

    const long count, rows, marks;  // heads; rows and landmarks of each, whatever is turned

  private:
    const real* tensor;
    std::vector<real*> scratch;
    std::vector<Factor<turned>> factors;
};

// What group g adds its gradient of queries or keys to: nothing, or what the groups before it wrote to these channels.
Start start_of_group(const Shape& s, long g) { return g && !s.step ? Start::target : Start::zero; }

// total (C, C) += left right^T over N columns of (C, T) each; `turned`, (T, padded(C)), zero beyond C, and `scratch` of
// the left factor are for its use.
void add_outer(long C, const real* left, const real* right, real* turned, real* scratch, real* total, long N, long T) {
    transpose(right, C, N, T, turned, padded(C));
    Factor<false>(left, C, N, T, scratch).times(padded(C), turned, padded(C), total, padded(C), Start::target);
}

// A_nm = S_nm + P of Eq. 15, transposed: (groups m, T). `own`: the entries of S_nm to which P adds 1,
// (groups, T).
void map_of_queries(const Shape& s, const real* q, const real* for_queries, const real* bias,
                    const int64_t* landmark_of, const Tile& tile, real* A, real* own, long T) {
    long d = s.d;
    for (long g = 0; g < s.groups; g++) {
        real* map = A + g * s.m * T;
        product<true>(s.m, tile.N, d, for_queries + g * d * s.m, s.m, q + g * s.step * T, T, map, T);
        softmax_of_columns(map, bias + g * s.m, s.m, tile.N, T);
        if (!landmark_of) continue;
        for (long t = 0; t < tile.count; t++) {
            real& entry = map[landmark_of[tile.first + t] * T + t];
            own[g * T + t] = entry;
            entry += 1;
        }
    }
}

// O of Eq. 17, N columns of (C, T), unless null, and U, what `fuse` acts on where that is at positions.
void attend(const Shape& s, const real* A, const Heads<false>& heads, const std::optional<Factor<false>>& fuse,
            const real* b_f, real* U, real* O, long N, long T) {
    real* target = fuse ? U : O;
    for (long h = 0; target && h < heads.count; h++)
        heads[h].times(N, A + h * heads.marks * T, T, target + h * heads.rows * T, T);
    if (!fuse || !O) return;
    for (long row = 0; row < s.C; row++) std::fill(O + row * T, O + row * T + N, b_f[row]);
    fuse->times(N, U, T, O, T, Start::target);
}

}  // namespace

extern "C" {

// Q and K: X (B, C, n), W_q and W_k (D, C) -> (B, D, n) each; and of both, unless null, the largest size of a number,
// (2,), or the mean of each channel and the sum of squares about it, (2, 2, D).
void project(const Shape* shape, const real* X, const real* W_q, const real* W_k, real* Q, real* K, real* largest,
             real* moments) {
    const Shape& s = *shape;
    Shares shares(s, false);
    const long T = shares.T;
    real* features[] = {Q, K};
    caller_memory.reset();
    real* tops = caller_memory.zeros(s.workers * 2);
    const Factor<false> W[] = {{s, W_q, s.D, s.C, s.C}, {s, W_k, s.D, s.C, s.C}};
    std::vector<Moments> found(moments ? s.workers * 2 * s.D : 0);
    shares.each([&](long worker, const auto& tiles) {
        real *x = worker_memory.take(s.C * T), *y = worker_memory.take(s.D * T);
        tiles([&](const Tile& tile) {
            load(tile.of(X, s.C, s.n), x, T);
            for (long side = 0; side < 2; side++) {
                W[side].times(tile.N, x, T, y, T);
                store(y, tile.of(features[side], s.D, s.n), T);
                if (largest) tops[worker * 2 + side] = std::max(tops[worker * 2 + side], largest_of(y, s.D, tile.N, T));
                Moments* own = found.data() + (worker * 2 + side) * s.D;
                for (long row = 0; row < s.D && moments; row++) own[row] += Moments(y + row * T, tile.count);
            }
        });
    });
    for (long side = 0; side < 2 && largest; side++) {
        largest[side] = 0;
        for (long worker = 0; worker < s.workers; worker++)
            largest[side] = std::max(largest[side], tops[worker * 2 + side]);
    }
    for (long row = 0; row < 2 * s.D && moments; row++) {
        for (long worker = 1; worker < s.workers; worker++) found[row] += found[worker * 2 * s.D + row];
        real* to = moments + row / s.D * 2 * s.D + row % s.D;
        to[0] = found[row].mean;
        to[s.D] = found[row].squares;
    }
}

// The mean of each channel, and the sum of squares about it: features (B, channels, n) -> (channels,) each.
void moments(const Shape* shape, const real* features, long channels, long n, real* means, real* deviations) {
    const Shape& s = *shape;
    each_worker(s.workers, [&](long worker) {
        for (long row = channels * worker / s.workers; row < channels * (worker + 1) / s.workers; row++) {
            Moments all;
            for (long b = 0; b < s.B; b++) all += Moments(features + (b * channels + row) * n, n);
            means[row] = all.mean;
            deviations[row] = all.squares;
        }
    });
}

// Batch norm as an affine map, from what `moments` finds in `count` values a channel: gain and, unless null, shift
// (channels,) -> biased variance; scale; mean; inverse of the deviation; offset unless null.
void affine(const Shape*, long channels, long count, double eps, const real* means, const real* deviations,
            const real* gain, const real* shift, real* variance, real* scale, real* mean, real* inverse_deviation,
            real* offset) {
    for (long row = 0; row < channels; row++) {
        variance[row] = deviations[row] / count;
        mean[row] = means[row];
        inverse_deviation[row] = 1 / std::sqrt(variance[row] + real(eps));
        scale[row] = gain[row] * inverse_deviation[row];
        if (shift) offset[row] = shift[row] - scale[row] * means[row];
    }
}

// From the gradients of scale and, unless null, of offset that of gain, and what each feature's gradient gets through
// the statistics: slope * feature + constant. (channels,) each.
void affine_backward(const Shape*, long channels, long count, const real* scale, const real* means,
                     const real* inverse_deviation, const real* d_scale, const real* d_offset, real* d_gain,
                     real* slope, real* constant) {
    for (long row = 0; row < channels; row++) {
        real d_shift = d_offset ? d_offset[row] : 0, inverse = inverse_deviation[row];
        real d = d_scale[row] - d_shift * means[row];  // offset = shift - scale * mean
        d_gain[row] = d * inverse;
        // From the gradients of the variance, -1/2 d scale / (variance + eps), and of the mean, -d_shift scale.
        real per_value = scale[row] / -count;
        slope[row] = per_value * d * inverse * inverse;
        constant[row] = per_value * d_shift - slope[row] * means[row];
    }
}

// S_mn X^T, (B, C, groups, m), or S_mn V^T, (B, C, m), and the logarithm of each row's sum in the softmax of S_mn,
// (B, groups, m).
//
// K (B, D, n); for_keys (B, groups, d, m); V (B, C, n) is written unless null.
void gather(const Shape* shape, const real* X, const real* K, const real* for_keys, const real* W_v, real* V,
            real* gathered, real* log_sum) {
    const Shape& s = *shape;
    Shares shares(s, true);
    const long T = shares.T;
    long d = s.d, c = s.C / s.groups, wide = padded(s.m), all = s.groups * wide;
    long heads = s.at_landmarks ? s.groups : 1, width = heads * wide;
    caller_memory.reset();
    real* totals = shares.sums(s.C * heads, wide, s.m, gathered);
    real* tops = caller_memory.take(shares.size() * all);
    real* sums = caller_memory.zeros(shares.size() * all);
    real* factors = caller_memory.take(shares.size() * all);
    std::fill(tops, tops + shares.size() * all, -std::numeric_limits<real>::infinity());
    const auto value = of_all<false>(s, s.at_landmarks ? nullptr : W_v);
    shares.each([&](long, const auto& tiles) {
        real *x = worker_memory.take(s.C * T), *v = worker_memory.take(s.C * T);
        real *k = worker_memory.take(s.D * T), *keys = worker_memory.zeros(s.groups * d * wide);
        real *S = worker_memory.take(T * wide), *scratch = worker_memory.take(Factor<false>::scratch(s.C, T));
        long keys_of = -1;
        tiles([&](const Tile& tile) {
            const Segment& part = tile.part;
            load(tile.of(X, s.C, s.n), x, T);
            load(tile.of(K, s.D, s.n), k, T);
            for (long row = 0; keys_of != part.image && row < s.groups * d; row++)
                std::memcpy(keys + row * wide, for_keys + (part.image * s.groups * d + row) * s.m, s.m * sizeof(real));
            keys_of = part.image;
            if (value) value->times(tile.N, x, T, v, T);
            if (V) store(v, tile.of(V, s.C, s.n), T);
            Factor<false> left;
            if (s.at_landmarks) left = {x, s.C, tile.count, T, scratch};
            for (long g = 0; g < s.groups; g++) {
                long here = part.index * all + g * wide;
                product<true>(tile.N, wide, d, k + g * s.step * T, T, keys + g * d * wide, wide, S, wide);  // T, m
                for (long j = 0; j < wide; j += LANES) {  // a maximum so far, and all before it scaled to that
                    vec top = at(tops + here + j), total{};
                    for (long t = 0; t < tile.count; t++) top = larger(top, at(S + t * wide + j));
                    for (long t = 0; t < tile.count; t++)
                        total += at(S + t * wide + j) = exponential(at(S + t * wide + j) - top);
                    at(factors + here + j) = exponential(at(tops + here + j) - top);
                    at(sums + here + j) = at(sums + here + j) * at(factors + here + j) + total;
                    at(tops + here + j) = top;
                }
                Start start = tile.fresh ? Start::zero : Start::scaled;
                real* total = totals + part.index * s.C * width;
                if (!s.at_landmarks) left = {v + g * c * T, c, tile.count, T, scratch};
                real* to = total + g * (s.at_landmarks ? wide : c * wide);
                left.times(wide, S, wide, to, width, start, factors + here);
            }
        });
    });
    // The segments of an image have maxima of their own.
    for (long begin = 0, end; begin < shares.size(); begin = end) {
        long image = shares.segments[begin].image;
        for (end = begin; end < shares.size() && shares.segments[end].image == image;) end++;
        for (long j = 0; j < all; j += LANES) {
            vec top = at(tops + begin * all + j), total{};
            for (long i = begin; i < end; i++) top = larger(top, at(tops + i * all + j));
            for (long i = begin; i < end; i++) {
                at(factors + i * all + j) = exponential(at(tops + i * all + j) - top);
                total += at(sums + i * all + j) * at(factors + i * all + j);
            }
            for (long i = begin; i < end; i++) at(factors + i * all + j) /= total;
            for (long k = j % wide; k < std::min(s.m, j % wide + LANES); k++)
                log_sum[(image * s.groups + j / wide) * s.m + k] = top[k % LANES] + std::log(total[k % LANES]);
        }
        each_worker(s.workers, [&](long worker) {
            for (long row = s.C * worker / s.workers; row < s.C * (worker + 1) / s.workers; row++)
                for (long i = begin; i < end; i++)
                    for (long head = 0; head < heads; head++) {
                        const real* from = totals + (i * s.C + row) * width + head * wide;
                        const real* factor = factors + i * all + (s.at_landmarks ? head : row / c) * wide;
                        real* to = gathered + ((image * s.C + row) * heads + head) * s.m;
                        for (long k = 0; k < s.m; k++) to[k] = (i == begin ? 0 : to[k]) + from[k] * factor[k];
                    }
        });
    }
}

// The gradients of `gather`, that of x added to d_x.
//
// V or, at landmarks, X: `features` (B, C, n); gathered, d_gathered (B, C, groups, m) or (B, C, m) -> d_K (B, D, n);
// d_for_keys (B, groups, m, d); d_W_v (C, C).
void gather_backward(const Shape* shape, const real* X, const real* features, const real* K, const real* for_keys,
                     const real* log_sum, const real* W_v, const real* gathered, const real* d_gathered, real* d_x,
                     real* d_K, real* d_for_keys, real* d_W_v) {
    const Shape& s = *shape;
    Shares shares(s, false);
    const long T = shares.T;
    long d = s.d, deep = padded(d), marks = s.groups * s.m;
    long square = s.at_landmarks ? 0 : s.C * padded(s.C);
    caller_memory.reset();
    real* of_keys = shares.sums(marks, deep, d, d_for_keys);
    real* of_value = caller_memory.take(s.workers * square);
    const auto value_turned = of_all<true>(s, s.at_landmarks ? nullptr : W_v);
    // What a softmax's gradient takes away in each row, sum of d_S_mn * S_mn, is that of d_gathered * gathered.
    real* dots = caller_memory.zeros(s.B * marks);
    long heads = s.at_landmarks ? 1 : s.groups, width = marks / heads;
    each_worker(s.workers, [&](long worker) {
        for (long i = s.B * heads * worker / s.workers; i < s.B * heads * (worker + 1) / s.workers; i++)
            for (long row = i * s.C / heads; row < (i + 1) * s.C / heads; row++)
                for (long k = 0; k < width; k++)
                    dots[i * width + k] += gathered[row * width + k] * d_gathered[row * width + k];
    });
    shares.each([&](long worker, const auto& tiles) {
        real *x = worker_memory.take(s.C * T), *v = worker_memory.take(s.C * T);
        real *d_tile = worker_memory.take(s.C * T), *d_v = worker_memory.take(s.C * T);
        std::fill(of_value + worker * square, of_value + (worker + 1) * square, real(0));
        real *k = worker_memory.take(s.D * T), *d_k = worker_memory.take(s.D * T);
        real *S = worker_memory.take(marks * T), *d_S = worker_memory.take(marks * T);
        real *k_turned = worker_memory.zeros(T * deep), *x_turned = worker_memory.zeros(T * padded(s.C));
        real* scratch = worker_memory.take(Factor<false>::scratch(s.C, T));
        Heads<false> rows(s, d_gathered);
        Heads<true> rows_turned(s, d_gathered);
        tiles([&](const Tile& tile) {
            long b = tile.part.image, N = tile.N;
            if (tile.fresh) {
                rows.take(b);
                rows_turned.take(b);
            }
            load(tile.of(features, s.C, s.n), v, T);
            load(tile.of(K, s.D, s.n), k, T);
            for (long g = 0; g < s.groups; g++) {
                const real* keys = for_keys + (b * s.groups + g) * d * s.m;
                real *map = S + g * s.m * T, *d_map = d_S + g * s.m * T;
                product<true>(s.m, N, d, keys, s.m, k + g * s.step * T, T, map, T);
                if (g < rows.count) rows_turned[g].times(N, v + g * rows.rows * T, T, d_map, T);
                for (long row = 0; row < s.m; row++) {
                    long here = b * marks + g * s.m + row;
                    for (long t = row * T; t < row * T + N; t += LANES) {
                        vec power = at(map + t) - log_sum[here];
                        at(map + t) = exponential(power > 0 ? vec{} : power);  // above 0 beyond the image's end
                        at(d_map + t) = at(map + t) * (at(d_map + t) - dots[here]);
                    }
                }
                product<false>(d, N, s.m, keys, s.m, d_map, T, d_k + g * s.step * T, T, start_of_group(s, g));
                transpose(k + g * s.step * T, d, N, T, k_turned, deep);
                product<false>(s.m, deep, N, d_map, T, k_turned, deep,
                               of_keys + (tile.part.index * marks + g * s.m) * deep, deep, tile.start());
            }
            real* d_features = s.at_landmarks ? d_tile : d_v;
            for (long h = 0; h < rows.count; h++)
                rows[h].times(N, S + h * rows.marks * T, T, d_features + h * rows.rows * T, T);
            if (!s.at_landmarks) {
                load(tile.of(X, s.C, s.n), x, T);
                add_outer(s.C, d_v, x, x_turned, scratch, of_value + worker * square, N, T);
                value_turned->times(N, d_v, T, d_tile, T);
            }
            store(d_k, tile.of(d_K, s.D, s.n), T);
            add(d_tile, tile.of(d_x, s.C, s.n), T);
        });
    });
    shares.add_up(of_keys, marks, deep, d, d_for_keys);
    if (!s.at_landmarks) add_up_workers(s, of_value, s.C, padded(s.C), s.C, d_W_v);
}

// x + alpha O, or O where alpha is null, (B, C, n), and the mean of x * O over positions, (B, C), unless null.
//
// Q (B, D, n); for_queries (B, groups, d, m); bias (B, groups, m); landmark_of (n,), or null where P is not added;
// source (B, C, groups, m) or (B, C, m).
void spread(const Shape* shape, const real* X, const real* Q, const real* for_queries, const real* bias,
            const int64_t* landmark_of, const real* source, const real* W_f, const real* b_f, const real* alpha,
            real* out, real* mean) {
    const Shape& s = *shape;
    Shares shares(s, false);
    const long T = shares.T;
    long marks = s.groups * s.m;
    caller_memory.reset();
    real* sums = caller_memory.take(shares.size() * s.C);
    const auto fuse = of_all<false>(s, W_f);
    shares.each([&](long, const auto& tiles) {
        real *q = worker_memory.take(s.D * T), *A = worker_memory.take(marks * T);
        real* own = worker_memory.take(s.groups * T);
        real *U = worker_memory.take(s.C * T), *O = worker_memory.take(s.C * T);
        Heads<false> rows(s, source);
        tiles([&](const Tile& tile) {
            long b = tile.part.image;
            if (tile.fresh) rows.take(b);
            load(tile.of(Q, s.D, s.n), q, T);
            const real* queries = for_queries + b * s.groups * s.d * s.m;
            map_of_queries(s, q, queries, bias + b * marks, landmark_of, tile, A, own, T);
            attend(s, A, rows, fuse, b_f, U, O, tile.N, T);
            auto x = tile.of(X, s.C, s.n);
            auto to = tile.of(out, s.C, s.n);
            for (long row = 0; row < s.C; row++) {
                const real *from = x[row], *o = O + row * T;
                real* target = to[row];
                vec total{};
                for (long t = 0; t < tile.count; t += LANES) {
                    x.ahead(row, t);
                    vec one = read(from + t, tile.count - t), other = at(o + t);
                    total += one * other;
                    write(alpha ? one + *alpha * other : other, target + t, tile.count - t);
                }
                real& so_far = sums[tile.part.index * s.C + row];
                so_far = (tile.fresh ? 0 : so_far) + sum(total);
            }
        });
    });
    if (!mean) return;
    shares.add_up(sums, 1, s.C, s.C, mean);
    for (long i = 0; i < s.B * s.C; i++) mean[i] /= s.n;
}

// The gradients of `spread`.
//
// out (B, C, n), from which O = (out - x) / alpha, or null; grad_out (B, C, n); grad_mean (B, C) or null -> d_x
// (B, C, n), d_Q (B, D, n), d_source (B, C, groups, m) or (B, C, m), d_for_queries (B, groups, m, d), d_bias
// (B, groups, m), d_alpha (1,), d_W_f (C, C), d_b_f (C,), of what is added to O at every position.
void spread_backward(const Shape* shape, const real* X, const real* Q, const real* for_queries, const real* bias,
                     const int64_t* landmark_of, const real* source, const real* W_f, const real* b_f,
                     const real* alpha, const real* out, const real* grad_out, const real* grad_mean, real* d_x,
                     real* d_Q, real* d_source, real* d_for_queries, real* d_bias, real* d_alpha, real* d_W_f,
                     real* d_b_f) {
    const Shape& s = *shape;
    Shares shares(s, true);
    const long T = shares.T;
    long d = s.d, wide = padded(s.m), deep = padded(d), marks = s.groups * s.m;
    long of_head = s.at_landmarks ? s.groups : 1, width = of_head * wide, square = W_f ? s.C * padded(s.C) : 0;
    if (!alpha || std::abs(*alpha) < LEAST_ALPHA) out = nullptr;
    real per_alpha = out ? 1 / *alpha : 0;
    caller_memory.reset();
    real* of_source = shares.sums(s.C * of_head, wide, s.m, d_source);
    real* of_queries = shares.sums(marks, deep, d, d_for_queries);
    real* of_bias = shares.sums(1, marks, marks, d_bias);
    real* of_fuse = caller_memory.take(s.workers * square);
    real* of_fuse_bias = caller_memory.zeros(s.workers * s.C);
    real* of_alpha = caller_memory.zeros(s.workers);
    const auto fuse = of_all<false>(s, W_f);
    const auto fuse_turned = of_all<true>(s, W_f);
    shares.each([&](long worker, const auto& tiles) {
        real *q = worker_memory.take(s.D * T), *d_q = worker_memory.take(s.D * T);
        real *A = worker_memory.take(marks * T), *d_A = worker_memory.take(s.groups * wide * T);
        real* own = worker_memory.take(s.groups * T);
        real *U = worker_memory.take(s.C * T), *O = worker_memory.take(s.C * T);
        std::fill(of_fuse + worker * square, of_fuse + (worker + 1) * square, real(0));
        real *G = worker_memory.take(s.C * T), *U_turned = worker_memory.zeros(T * padded(s.C));
        real* q_turned = worker_memory.zeros(T * deep);
        real* scratch = worker_memory.take(Factor<false>::scratch(s.C, T));
        Heads<false> rows(s, source);
        Heads<true> rows_turned(s, source);
        vec alpha_total{};
        tiles([&](const Tile& tile) {
            long b = tile.part.image, N = tile.N;
            if (tile.fresh) {
                if (W_f || !out) rows.take(b);  // else O is taken from the output
                rows_turned.take(b);
            }
            const real* queries = for_queries + b * s.groups * s.d * s.m;
            real* source_total = of_source + tile.part.index * s.C * width;
            load(tile.of(Q, s.D, s.n), q, T);
            map_of_queries(s, q, queries, bias + b * marks, landmark_of, tile, A, own, T);
            attend(s, A, rows, fuse, b_f, U, out ? nullptr : O, N, T);
            auto x = tile.of(X, s.C, s.n), given = tile.of(grad_out, s.C, s.n);
            auto result = tile.of(out ? out : X, s.C, s.n);
            auto to = tile.of(d_x, s.C, s.n);
            for (long row = 0; row < s.C; row++) {  // G becomes the gradient of O
                real share = grad_mean ? grad_mean[b * s.C + row] / s.n : real(0);
                const real *xs = x[row], *gradients = given[row], *results = out ? result[row] : nullptr;
                real* target = to[row];
                vec total{};
                for (long t = 0; t < tile.count; t += LANES) {
                    long left = tile.count - t;
                    x.ahead(row, t);
                    given.ahead(row, t);
                    if (results) result.ahead(row, t);
                    vec one = read(xs + t, left), gradient = read(gradients + t, left);
                    vec output = results ? (read(results + t, left) - one) * per_alpha : at(O + row * T + t);
                    vec d_O = (alpha ? *alpha * gradient : gradient) + share * one;
                    alpha_total += gradient * output;
                    total += d_O;
                    at(G + row * T + t) = d_O;
                    write_past_cache(share * output + (alpha ? gradient : vec{}), target + t, left);
                }
                of_fuse_bias[worker * s.C + row] += sum(total);
            }
            const real* d_U = G;
            if (W_f) {
                add_outer(s.C, G, U, U_turned, scratch, of_fuse + worker * square, N, T);
                fuse_turned->times(N, G, T, O, T);
                d_U = O;
            }
            for (long g = 0; g < s.groups; g++) {
                real *map = A + g * s.m * T, *d_map = d_A + g * s.m * T;
                if (g < rows.count) {  // for all groups of a head
                    const real* d_head = d_U + g * rows.rows * T;
                    real* turned = d_map;  // until that is computed
                    for (long i = 0; i < of_head; i++) {
                        transpose(map + i * s.m * T, s.m, N, T, turned + i * wide, width);
                        real* beyond = turned + i * wide + s.m;
                        for (long t = 0; t < N && s.m < wide; t++)
                            std::fill(beyond + t * width, beyond + t * width + wide - s.m, real(0));
                    }
                    Factor<false>(d_head, rows.rows, N, T, scratch)
                        .times(width, turned, width, source_total + g * rows.rows * width, width, tile.start());
                    rows_turned[g].times(N, d_head, T, d_map, T);
                }
                // P away again; a subtraction would lose the digits of small entries.
                for (long t = 0; landmark_of && t < tile.count; t++)
                    map[landmark_of[tile.first + t] * T + t] = own[g * T + t];
                softmax_of_columns_backward(d_map, map, s.m, N, T);
                product<false>(d, N, s.m, queries + g * d * s.m, s.m, d_map, T, d_q + g * s.step * T, T,
                               start_of_group(s, g));
                transpose(q + g * s.step * T, d, N, T, q_turned, deep);
                long here = tile.part.index * marks + g * s.m;
                product<false>(s.m, deep, N, d_map, T, q_turned, deep, of_queries + here * deep, deep, tile.start());
                for (long k = 0; k < s.m; k++) {
                    vec total{};
                    for (long t = 0; t < N; t += LANES) total += at(d_map + k * T + t);
                    of_bias[here + k] = (tile.fresh ? 0 : of_bias[here + k]) + sum(total);
                }
            }
            store(d_q, tile.of(d_Q, s.D, s.n), T);
        });
        written_past_cache();
        of_alpha[worker] = sum(alpha_total);
    });
    shares.add_up(of_source, s.C * of_head, wide, s.m, d_source);
    shares.add_up(of_queries, marks, deep, d, d_for_queries);
    shares.add_up(of_bias, 1, marks, marks, d_bias);
    add_up_workers(s, of_alpha, 1, 1, 1, d_alpha);
    if (d_b_f) add_up_workers(s, of_fuse_bias, 1, s.C, s.C, d_b_f);
    if (W_f) add_up_workers(s, of_fuse, s.C, padded(s.C), s.C, d_W_f);
}

// The gradients of `project`, that of x added to d_x.
//
// To d_Q and d_K, (B, D, n), is added what reaches them through statistics, slope * Q + constant with (D,) each or
// null, and through landmarks: `shares`, (B, D, m), at their positions. -> d_W (2, D, C), of query and key.
void project_backward(const Shape* shape, const real* X, const real* W_q, const real* W_k, const real* Q,
                      const real* K, const int64_t* landmark_of, const real* d_Q, const real* d_K,
                      const real* slope_q, const real* slope_k, const real* constant_q, const real* constant_k,
                      const real* shares_q, const real* shares_k, real* d_x, real* d_W) {
    const Shape& s = *shape;
    Shares shares(s, true);
    const long T = shares.T;
    long deep = padded(s.D), width = 2 * deep;
    const real *W[] = {W_q, W_k}, *features[] = {Q, K}, *gradients[] = {d_Q, d_K};
    const real *of_landmarks[] = {shares_q, shares_k};
    const real *slopes[] = {slope_q, slope_k}, *constants[] = {constant_q, constant_k};
    caller_memory.reset();
    real* of_weights = caller_memory.take(s.workers * s.C * width);
    real* W_turned = caller_memory.take(s.C * 2 * s.D);  // of both, whose rows a product reads faster than columns
    for (long side = 0; side < 2; side++) turned_weight(s, W[side], s.D, s.C, W_turned + side * s.D, 2 * s.D);
    const Factor<false> weight(s, W_turned, s.C, 2 * s.D, 2 * s.D);
    shares.each([&](long worker, const auto& tiles) {
        real* total = of_weights + worker * s.C * width;
        bool fresh = true;
        real *x = worker_memory.take(s.C * T), *d_tile = worker_memory.take(s.C * T);
        real *y = worker_memory.take(s.D * T), *d_both = worker_memory.take(2 * s.D * T);
        real *turned = worker_memory.zeros(T * width), *scratch = worker_memory.take(Factor<false>::scratch(s.C, T));
        std::vector<Lookup> lookup(T / LANES);
        tiles([&](const Tile& tile) {
            long b = tile.part.image;
            for (long t = 0; t < tile.count; t += LANES)
                lookup[t / LANES] = Lookup(landmark_of + tile.first + t, std::min(LANES, tile.count - t), s.m);
            for (long side = 0; side < 2; side++) {
                real* d_y = d_both + side * s.D * T;
                load(tile.of(gradients[side], s.D, s.n), d_y, T);
                if (slopes[side]) load(tile.of(features[side], s.D, s.n), y, T);
                for (long row = 0; row < s.D; row++) {
                    const real* share = of_landmarks[side] + (b * s.D + row) * s.m;
                    for (long t = 0; t < tile.count; t += LANES) at(d_y + row * T + t) += lookup[t / LANES](share);
                    for (long t = row * T; slopes[side] && t < row * T + tile.N; t += LANES)
                        at(d_y + t) += slopes[side][row] * at(y + t) + constants[side][row];
                }
                transpose(d_y, s.D, tile.N, T, turned + side * deep, width);
            }
            weight.times(tile.N, d_both, T, d_tile, T);
            load(tile.of(X, s.C, s.n), x, T);
            Factor<false>(x, s.C, tile.N, T, scratch)
                .times(width, turned, width, total, width, fresh ? Start::zero : Start::target);
            fresh = false;
            add(d_tile, tile.of(d_x, s.C, s.n), T);
        });
        if (fresh) std::fill(total, total + s.C * width, real(0));
    });
    each_worker(s.workers, [&](long worker) {  // (workers, C, 2, deep) -> (2, D, C), a square of registers at a time
        long blocks = (s.C + LANES - 1) / LANES;
        for (long i = blocks * worker / s.workers; i < blocks * (worker + 1) / s.workers; i++)
            for (long column = 0; column < width; column += LANES) {
                long row = i * LANES, count = std::min(LANES, s.C - row), side = column / deep, first = column % deep;
                vec square[LANES]{};
                for (long part = 0; part < s.workers; part++)
                    for (long r = 0; r < count; r++)
                        square[r] += at(of_weights + (part * s.C + row + r) * width + column);
                transpose(square);
                for (long k = first; k < std::min(s.D, first + LANES); k++)
                    write(square[k - first], d_W + (side * s.D + k) * s.C + row, count);
            }
    });
}

// Where a row of group g of image b begins, in (B, groups, c, m) if narrow, else in (B, C, groups, m).
static long place_of(const Shape& s, bool narrow, long b, long g, long row) {
    return (narrow ? (b * s.groups + g) * (s.C / s.groups) + row : (b * s.C + row) * s.groups + g) * s.m;
}

// Of `rows` a group, how many a worker takes at a time: whole blocks of quarters, and some for every worker.
static long block_of(const Shape& s, long rows, long most) {
    constexpr long unit = 4 * ROWS;
    return std::max(unit, std::min(most, rows * s.groups / s.workers / unit * unit));
}

// A weight at the landmarks, a group at a time: `wide` (B, C, groups, m) and `narrow` (B, groups, c, m).
//
// Group g's share of W (C, C) is rows g c to (g + 1) c where `of_rows`, (c, C), as in `value`; else those columns,
// (C, c), as in `fuse`. What is multiplied is that share or its transpose, whichever takes `from` to `to`.
void times_at_landmarks(const Shape* shape, const real* W, long of_rows, long narrows, const real* from,
                        const real* bias, real* to) {
    const Shape& s = *shape;
    long c = s.C / s.groups, wide = padded(s.m), rows = narrows ? c : s.C, columns = narrows ? s.C : c;
    // A worker takes some of its rows at a time, which stay in the cache for all images.
    long block = block_of(s, rows, 128);
    long blocks = (rows + block - 1) / block;
    bool turned = bool(of_rows) != bool(narrows);  // a product reads the rows of a transpose faster than columns
    bool direct = s.m == wide;  // without a copy whose rows are padded
    long from_stride = direct ? place_of(s, !narrows, 0, 0, 1) : wide;
    long to_stride = direct ? place_of(s, narrows, 0, 0, 1) : wide;
    each_worker(s.workers, [&](long worker) {
        real* padded_x = direct ? nullptr : worker_memory.zeros(columns * wide);
        real* padded_y = direct ? nullptr : worker_memory.take(block * wide);
        real* own_share = turned ? worker_memory.take(block * columns) : nullptr;
        real* scratch = worker_memory.take(Factor<false>::scratch(block, columns));
        for (long i = s.groups * blocks * worker / s.workers; i < s.groups * blocks * (worker + 1) / s.workers; i++) {
            long g = i / blocks, first = i % blocks * block, count = std::min(block, rows - first);
            const real* share = W + g * c * (of_rows ? s.C : 1) + first * (turned ? 1 : s.C);
            if (turned) transpose(share, columns, count, s.C, own_share, columns);
            Factor<false> factor(turned ? own_share : share, count, columns, turned ? columns : s.C, scratch);
            for (long b = 0; b < s.B; b++) {
                for (long row = 0; row < columns && !direct; row++)
                    std::memcpy(padded_x + row * wide, from + place_of(s, !narrows, b, g, row), s.m * sizeof(real));
                const real* x = direct ? from + place_of(s, !narrows, b, g, 0) : padded_x;
                real* y = direct ? to + place_of(s, narrows, b, g, first) : padded_y;
                for (long row = 0; row < count && bias; row++)
                    std::fill(y + row * to_stride, y + row * to_stride + wide, bias[first + row]);
                factor.times(wide, x, from_stride, y, to_stride, bias ? Start::target : Start::zero);
                for (long row = 0; row < count && !direct; row++)
                    std::memcpy(to + place_of(s, narrows, b, g, first + row), y + row * wide, s.m * sizeof(real));
            }
        }
    });
}

// The gradient of such a weight, (C, C), from that of one side and the other side.
static void weight_at_landmarks(const Shape& s, const real* wide, const real* narrow, long of_rows, real* d_W) {
    long c = s.C / s.groups, width = padded(c), together = std::min(s.B, std::max(1L, 768 / s.m));  // images
    long block = block_of(s, s.C, 64);
    long blocks = (s.C + block - 1) / block, units = s.B * s.groups;
    caller_memory.reset();
    long size = units * s.m * width;
    real* turned = width == c ? caller_memory.take(size) : caller_memory.zeros(size);  // groups, B, m, c
    each_worker(s.workers, [&](long worker) {
        for (long i = units * worker / s.workers; i < units * (worker + 1) / s.workers; i++)
            transpose(narrow + (i % s.B * s.groups + i / s.B) * c * s.m, c, s.m, s.m, turned + i * s.m * width, width);
    });
    each_worker(s.workers, [&](long worker) {
        long deep = together * s.m;
        real *total = worker_memory.take(block * width), *rows = worker_memory.take(block * deep);
        real* scratch = worker_memory.take(Factor<false>::scratch(block, deep));
        for (long i = s.groups * blocks * worker / s.workers; i < s.groups * blocks * (worker + 1) / s.workers; i++) {
            long g = i / blocks, first = i % blocks * block, count = std::min(block, s.C - first);
            for (long b = 0; b < s.B; b += together) {
                long images = std::min(together, s.B - b), K = images * s.m;  // rows of `wide` side by side
                for (long row = 0; row < count; row++)
                    for (long image = 0; image < images; image++)
                        std::memcpy(rows + row * K + image * s.m,
                                    wide + place_of(s, false, b + image, g, first + row), s.m * sizeof(real));
                Factor<false>(rows, count, K, K, scratch)
                    .times(width, turned + (g * s.B + b) * s.m * width, width, total, width,
                           b ? Start::target : Start::zero);
            }
            if (of_rows) transpose(total, count, c, width, d_W + g * c * s.C + first, s.C);
            for (long row = 0; row < count && !of_rows; row++)
                std::memcpy(d_W + (first + row) * s.C + g * c, total + row * width, c * sizeof(real));
        }
    });
}

// The gradients of `times_at_landmarks` from that of its result: of the other side, `to`, and of the weight, d_W.
// `narrows` says how W takes the one gradient to the other; `other` is what W was multiplied with.
void times_at_landmarks_backward(const Shape* shape, const real* W, long of_rows, long narrows, const real* from,
                                 const real* other, real* to, real* d_W) {
    times_at_landmarks(shape, W, of_rows, narrows, from, nullptr, to);
    weight_at_landmarks(*shape, narrows ? from : other, narrows ? other : from, of_rows, d_W);
}

// A step of Gauss and Jordan's elimination, in place, with `LANES` pivots from `first` on, in rows (m, width):
// these columns become those of the inverse.
static void invert_columns(long m, long first, real* rows, long width, real* factors, real* pivots) {
    long count = std::min(LANES, m - first);
    vec block[LANES];  // of the pivots, alone: elimination one by one
    for (long i = 0; i < count; i++) block[i] = at(rows + (first + i) * width + first);
    for (long k = 0; k < count; k++) {
        real scale = 1 / block[k][k];
        block[k][k] = 1;
        block[k] *= scale;
        for (long i = 0; i < count; i++) {
            if (i == k) continue;
            real factor = block[i][k];
            block[i][k] = 0;
            block[i] -= factor * block[k];
        }
    }
    // The rows of the pivots, times the block's inverse, which stands in the block's place; then all other rows.
    real* own = rows + first * width;
    for (long i = 0; i < count; i++) at(factors + i * LANES) = block[i];
    product<false>(count, width, count, factors, LANES, own, width, pivots, width);
    std::memcpy(own, pivots, count * width * sizeof(real));
    for (long i = 0; i < count; i++) at(own + i * width + first) = block[i];
    for (long row = 0; row < m; row++) {
        bool pivot = row >= first && row < first + count;
        vec& entries = at(rows + row * width + first);
        at(factors + row * LANES) = pivot ? vec{} : -entries;
        if (!pivot) entries = vec{};
    }
    product<false>(m, width, count, factors, LANES, own, width, rows, width, Start::target);
}

// The share of the rest of its row that a landmark below `floor` is given.
static real raised_share(real own, real floor) {
    return std::max(real(0), floor - own) / (1 - std::min(own, floor));
}

// The inverse of A_mm of Eq. 16 for B * groups maps S_mm (m, m). It is diagonally dominant by rows: elimination needs
// no pivots there.
void inverse(const Shape* shape, const real* S_mm, double floor, real* inverses) {
    const Shape& s = *shape;
    long wide = padded(s.m), count = s.B * s.groups;
    each_worker(s.workers, [&](long worker) {
        real *rows = worker_memory.zeros(s.m * wide), *factors = worker_memory.take(s.m * LANES);
        real* pivots = worker_memory.take(LANES * wide);
        for (long i = count * worker / s.workers; i < count * (worker + 1) / s.workers; i++) {
            for (long row = 0; row < s.m; row++) {
                const real* entries = S_mm + (i * s.m + row) * s.m;
                real raised = raised_share(entries[row], floor);
                for (long k = 0; k < s.m; k++) rows[row * wide + k] = entries[k] * (1 - raised);
                rows[row * wide + row] += 1 + raised;
            }
            for (long first = 0; first < s.m; first += LANES) invert_columns(s.m, first, rows, wide, factors, pivots);
            for (long row = 0; row < s.m; row++)
                std::memcpy(inverses + (i * s.m + row) * s.m, rows + row * wide, s.m * sizeof(real));
        }
    });
}

// Z = A^-1 (scale E + offset) for `inverses` A^-1 (B, groups, m, m), E and Z (B, groups, c, m), scale and offset (C,).
void solve(const Shape* shape, const real* inverses, const real* E, const real* scale, const real* offset, real* Z) {
    const Shape& s = *shape;
    long wide = padded(s.m), count = s.B * s.groups, c = s.C / s.groups;
    each_worker(s.workers, [&](long worker) {
        real* turned = worker_memory.zeros(s.m * wide);
        real *normal = worker_memory.take(c * wide), *z = worker_memory.take(c * wide);
        for (long i = count * worker / s.workers; i < count * (worker + 1) / s.workers; i++) {
            transpose(inverses + i * s.m * s.m, s.m, s.m, s.m, turned, wide);
            for (long row = 0; row < c; row++) {
                real by = scale[i % s.groups * c + row], plus = offset[i % s.groups * c + row];
                for (long k = 0; k < s.m; k += LANES)
                    at(normal + row * wide + k) = read(E + (i * c + row) * s.m + k, s.m - k) * by + plus;
            }
            product<false>(c, wide, s.m, normal, wide, turned, wide, z, wide);
            for (long row = 0; row < c; row++) std::memcpy(Z + (i * c + row) * s.m, z + row * wide, s.m * sizeof(real));
        }
    });
}

// Of that the gradients of scale E + offset, (B, groups, c, m), of scale and of offset, (C,) each.
void solve_backward(const Shape* shape, const real* inverses, const real* E, const real* d_Z, real* d_E, real* d_scale,
                    real* d_offset) {
    const Shape& s = *shape;
    long wide = padded(s.m), count = s.B * s.groups, c = s.C / s.groups;
    caller_memory.reset();
    real* sums = caller_memory.take(2 * s.B * s.C);
    each_worker(s.workers, [&](long worker) {
        real *square = worker_memory.zeros(s.m * wide), *d = worker_memory.take(c * wide);
        for (long i = count * worker / s.workers; i < count * (worker + 1) / s.workers; i++) {
            for (long row = 0; row < s.m; row++)
                std::memcpy(square + row * wide, inverses + (i * s.m + row) * s.m, s.m * sizeof(real));
            product<false>(c, wide, s.m, d_Z + i * c * s.m, s.m, square, wide, d, wide);
            for (long row = 0; row < c; row++) {
                vec of_scale{}, of_offset{};
                for (long k = 0; k < s.m; k += LANES) {
                    vec one = at(d + row * wide + k);
                    of_scale += one * read(E + (i * c + row) * s.m + k, s.m - k);
                    of_offset += one;
                    write(one, d_E + (i * c + row) * s.m + k, s.m - k);
                }
                sums[i * c + row] = sum(of_scale);
                sums[s.B * s.C + i * c + row] = sum(of_offset);
            }
        }
    });
    add_up_images(s.B, s.C, sums, d_scale);
    add_up_images(s.B, s.C, sums + s.B * s.C, d_offset);
}

// The gradient of E from that of scale E + offset, d, where both may depend on E through statistics:
// d_E = scale d + slope E + constant, with (C,) each; slope and constant may be null. (B, groups, c, m).
void normalise_backward(const Shape* shape, const real* d, const real* E, const real* scale, const real* slope,
                        const real* constant, real* d_E) {
    const Shape& s = *shape;
    each_worker(s.workers, [&](long worker) {
        for (long row = s.B * s.C * worker / s.workers; row < s.B * s.C * (worker + 1) / s.workers; row++) {
            long channel = row % s.C;
            real by = scale[channel], by_E = slope ? slope[channel] : 0, plus = slope ? constant[channel] : 0;
            for (long k = row * s.m; k < (row + 1) * s.m; k++) d_E[k] = d[k] * by + (E[k] * by_E + plus);
        }
    });
}

// The mean of each landmark's positions of one channel, (n,) -> (m,). `band`: scratch, (width,).
static void pool(const Shape& s, const real* from, const int64_t* landmark_of, long width, const int64_t* sizes,
                 real* band, real* to) {
    std::fill(to, to + s.m, real(0));
    for (long line = 0, end; line < s.n; line = end) {  // lines of the map whose landmarks are the same, added up
        std::fill(band, band + width, real(0));
        for (end = line; end < s.n && landmark_of[end] == landmark_of[line]; end += width)
            for (long t = 0; t < width; t++) band[t] += from[end + t];
        for (long t = 0; t < width; t++) to[landmark_of[line + t]] += band[t];
    }
    for (long k = 0; k < s.m; k++) to[k] /= sizes[k];
}

// What follows from the landmarks' means of raw Q and K, (B, D, n), and from their affine maps, (D,).
//
// landmark_of (n,) of maps as wide as `width`, sizes (m,) -> pooled_q, pooled_k, Q, K, for_keys, for_queries
// (B, D, m); bias (B, groups, m); S_mm (B, groups, m, m).
void landmarks(const Shape* shape, const real* raw_q, const real* raw_k, const int64_t* landmark_of, long width,
               const int64_t* sizes, const real* scale_q, const real* offset_q, const real* scale_k, real* pooled_q,
               real* pooled_k, real* Q, real* K, real* for_keys, real* for_queries, real* bias, real* S_mm) {
    const Shape& s = *shape;
    long d = s.d, wide = padded(s.m), count = s.B * s.groups;
    each_worker(s.workers, [&](long worker) {
        real *keys = worker_memory.take(d * wide), *map = worker_memory.take(s.m * wide);
        real *shift = worker_memory.take(wide), *band = worker_memory.take(padded(width));
        for (long i = count * worker / s.workers; i < count * (worker + 1) / s.workers; i++) {
            std::fill(shift, shift + wide, real(0));
            for (long row = 0; row < d; row++) {
                long channel = i % s.groups * d + row;
                pool(s, raw_q + (i * d + row) * s.n, landmark_of, width, sizes, band, pooled_q + (i * d + row) * s.m);
                pool(s, raw_k + (i * d + row) * s.n, landmark_of, width, sizes, band, pooled_k + (i * d + row) * s.m);
                for (long k = 0; k < s.m; k += LANES) {
                    long here = (i * d + row) * s.m + k, left = s.m - k;
                    vec query = read(pooled_q + here, left) * scale_q[channel] + offset_q[channel];
                    vec key = read(pooled_k + here, left) * scale_k[channel];
                    write(query, Q + here, left);
                    write(key, K + here, left);
                    write(query * scale_k[channel], for_keys + here, left);
                    write(key * scale_q[channel], for_queries + here, left);
                    at(keys + row * wide + k) = key;
                    at(shift + k) += key * offset_q[channel];
                }
            }
            std::memcpy(bias + i * s.m, shift, s.m * sizeof(real));
            product<true>(s.m, wide, d, Q + i * d * s.m, s.m, keys, wide, map, wide);
            for (long row = 0; row < s.m; row++) {  // softmax
                real* logits = map + row * wide;
                std::fill(logits + s.m, logits + wide, -std::numeric_limits<real>::infinity());
                real top = *std::max_element(logits, logits + s.m);
                vec total{};
                for (long k = 0; k < wide; k += LANES) total += at(logits + k) = exponential(at(logits + k) - top);
                real share = 1 / sum(total);
                for (long k = 0; k < s.m; k += LANES)
                    write(at(logits + k) * share, S_mm + (i * s.m + row) * s.m + k, s.m - k);
            }
        }
    });
}

// The gradients of `landmarks`, where that of S_mm comes through `inverse`: -d_E^T Z, (B, groups, c, m) each, is that
// of A_mm.
//
// d_for_keys, d_for_queries (B, groups, m, d); d_bias (B, groups, m) -> shares (B, D, m), the gradients of raw Q and K
// at each of a landmark's `sizes` (m,) positions; d_scale_q, d_offset_q, d_scale_k (D,).
void landmarks_backward(const Shape* shape, const real* pooled_q, const real* pooled_k, const real* Q, const real* K,
                        const real* S_mm, const real* scale_q, const real* offset_q, const real* scale_k,
                        const int64_t* sizes, double floor, const real* Z, const real* d_E, const real* d_for_keys,
                        const real* d_for_queries, const real* d_bias, real* shares_q, real* shares_k,
                        real* d_scale_q, real* d_offset_q, real* d_scale_k) {
    const Shape& s = *shape;
    long d = s.d, c = s.C / s.groups, wide = padded(s.m), count = s.B * s.groups;
    caller_memory.reset();
    real *of_scale_q = caller_memory.take(s.B * s.D), *of_offset_q = caller_memory.take(s.B * s.D);
    real *of_scale_k = caller_memory.take(s.B * s.D), *per_size = caller_memory.zeros(wide);
    for (long k = 0; k < s.m; k++) per_size[k] = real(1) / sizes[k];
    each_worker(s.workers, [&](long worker) {
        real *values = worker_memory.take(c * wide), *d_map = worker_memory.take(s.m * wide);
        real *turned = worker_memory.zeros(s.m * wide), *d_q = worker_memory.take(d * wide);
        real *d_k = worker_memory.take(d * wide), *keys = worker_memory.zeros(d * wide);
        real* queries = worker_memory.zeros(d * wide);
        for (long i = count * worker / s.workers; i < count * (worker + 1) / s.workers; i++) {
            for (long row = 0; row < c; row++)
                for (long k = 0; k < s.m; k += LANES)
                    at(values + row * wide + k) = read(Z + (i * c + row) * s.m + k, s.m - k);
            product<true>(s.m, wide, c, d_E + i * c * s.m, s.m, values, wide, d_map, wide);
            for (long row = 0; row < s.m; row++) {  // minus the gradient of A_mm becomes that of the logits
                const real* map = S_mm + (i * s.m + row) * s.m;
                real *gradient = d_map + row * wide, own = map[row], raised = raised_share(own, floor);
                vec dots{};
                for (long k = 0; k < s.m; k += LANES) dots += at(gradient + k) * read(map + k, s.m - k);
                real dot = sum(dots), rest = 1 - std::min(own, real(floor));
                // raised = (floor - own) / (1 - own) below the floor.
                real d_own = own < floor ? (dot - gradient[row]) * (real(floor) - 1) / (rest * rest) : real(0);
                real total = d_own * own - (1 - raised) * dot;
                for (long k = 0; k < s.m; k += LANES)
                    at(gradient + k) = read(map + k, s.m - k) * ((raised - 1) * at(gradient + k) - total);
                gradient[row] += own * d_own;
            }
            transpose(d_map, s.m, s.m, wide, turned, wide);
            product<false>(d, wide, s.m, K + i * d * s.m, s.m, turned, wide, d_q, wide);
            product<false>(d, wide, s.m, Q + i * d * s.m, s.m, d_map, wide, d_k, wide);
            transpose(d_for_keys + i * s.m * d, s.m, d, d, keys, wide);
            transpose(d_for_queries + i * s.m * d, s.m, d, d, queries, wide);
            for (long row = 0; row < d; row++) {
                long channel = i % s.groups * d + row;
                vec of_scale{}, of_offset{}, of_key_scale{};
                for (long k = 0; k < s.m; k += LANES) {
                    long here = (i * d + row) * s.m + k, tile = row * wide + k, left = s.m - k;
                    vec key = read(K + here, left), d_shift = read(d_bias + i * s.m + k, left);
                    vec of_query = at(d_q + tile) + at(keys + tile) * scale_k[channel];
                    vec of_key = at(d_k + tile) + at(queries + tile) * scale_q[channel] + d_shift * offset_q[channel];
                    of_scale += at(queries + tile) * key + of_query * read(pooled_q + here, left);
                    of_offset += d_shift * key + of_query;
                    of_key_scale += at(keys + tile) * read(Q + here, left) + of_key * read(pooled_k + here, left);
                    write(of_query * scale_q[channel] * at(per_size + k), shares_q + here, left);
                    write(of_key * scale_k[channel] * at(per_size + k), shares_k + here, left);
                }
                of_scale_q[i * d + row] = sum(of_scale);
                of_offset_q[i * d + row] = sum(of_offset);
                of_scale_k[i * d + row] = sum(of_key_scale);
            }
        }
    });
    add_up_images(s.B, s.D, of_scale_q, d_scale_q);
    add_up_images(s.B, s.D, of_offset_q, d_offset_q);
    add_up_images(s.B, s.D, of_scale_k, d_scale_k);
}

}  // extern "C"
