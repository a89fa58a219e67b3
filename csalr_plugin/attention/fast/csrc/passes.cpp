// The passes over n positions and m landmarks, forward and backward; passes.py declares and calls them.
//
// Tensors are contiguous, (channels, n) an image. Names are the paper's: C channels, D = C' channels of queries and keys,
// c and d the same a group.

#include <limits>

#include "columns.h"
#include "product.h"
#include "tiles.h"

namespace {

// A tensor of the landmarks, (B, C, groups, m) or (B, groups, c, m), as matrices (rows, marks): one for all groups where
// `value` and `fuse` act at landmarks, else one a group.
struct Heads {
    Heads(const Shape& s, const real* tensor)
        : count(s.at_landmarks ? 1 : s.groups), rows(s.C / count), marks(s.groups * s.m / count), tensor(tensor) {}

    const real* of(long image, long head) const { return tensor + (image * count + head) * rows * marks; }

    const long count, rows, marks;

  private:
    const real* tensor;
};

// Start of the sum for the gradient of queries or keys: CSA's groups share these channels and add up.
Start start_of_group(const Shape& s, long g) { return g && !s.step ? Start::target : Start::zero; }

// total (C, padded(C)) += left right^T over N columns of (C, T) each. `turned` is scratch, (T, padded(C)), zero beyond C.
void add_outer(long C, const real* left, const real* right, real* turned, real* total, long N, long T) {
    transpose(right, C, N, T, turned, padded(C));
    product<false>(C, padded(C), N, left, T, turned, padded(C), total, padded(C), Start::target);
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

// O of Eq. 17, N columns of (C, T); and U, the input of `fuse` where that acts at positions.
void attend(const Shape& s, const real* A, const Heads& heads, long image, const real* W_f, const real* b_f, real* U,
            real* O, long N, long T) {
    for (long h = 0; h < heads.count; h++)
        product<false>(heads.rows, N, heads.marks, heads.of(image, h), heads.marks, A + h * heads.marks * T, T,
                       (W_f ? U : O) + h * heads.rows * T, T);
    if (!W_f) return;
    for (long row = 0; row < s.C; row++) std::fill(O + row * T, O + row * T + N, b_f[row]);
    product<false>(s.C, N, s.C, W_f, s.C, U, T, O, T, Start::target);
}

}  // namespace

extern "C" {

// Computes Q and K, (B, D, n) each, from X (B, C, n), W_q and W_k (D, C). Of both, unless null: the largest absolute value,
// (2,), or the mean of each channel and the sum of squares about it, (2, 2, D).
void project(const Shape* shape, const real* X, const real* W_q, const real* W_k, real* Q, real* K, real* largest,
             real* moments) {
    const Shape& s = *shape;
    Shares shares(s);
    const long T = shares.T;
    real* features[] = {Q, K};
    caller_memory.reset();
    real* tops = caller_memory.zeros(s.workers * 2);
    const real* W[] = {W_q, W_k};
    std::vector<Moments> found(moments ? s.workers * 2 * s.D : 0);
    shares.each([&](long worker, const auto& tiles) {
        real *x = worker_memory.take(s.C * T), *y = worker_memory.take(s.D * T);
        tiles([&](const Tile& tile) {
            load(tile.of(X, s.C, s.n), x, T);
            for (long side = 0; side < 2; side++) {
                product<false>(s.D, tile.N, s.C, W[side], s.C, x, T, y, T);
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

// Computes the mean of each channel, and the sum of squares about it: features (B, channels, n) -> (channels,) each.
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

// Writes batch norm as an affine map. Inputs: the results of `moments` over `count` values a channel, gain, and shift or
// null. Outputs: biased variance, scale, mean, inverse of the deviation, and offset unless shift is null. All (channels,).
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

// The gradient of gain from the gradients of scale and, unless null, of offset. Through the statistics the gradient of
// each feature gains slope * feature + constant. All (channels,).
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

// Computes S_mn X^T, (B, C, groups, m), or S_mn V^T, (B, C, m), and the logarithm of the sum of each row of the softmax
// S_mn, (B, groups, m).
//
// K (B, D, n); for_keys (B, groups, d, m); V (B, C, n) is written unless null.
void gather(const Shape* shape, const real* X, const real* K, const real* for_keys, const real* W_v, real* V,
            real* gathered, real* log_sum) {
    const Shape& s = *shape;
    Shares shares(s);
    const long T = shares.T;
    long d = s.d, c = s.C / s.groups, wide = padded(s.m), all = s.groups * wide;
    long heads = s.at_landmarks ? s.groups : 1, width = heads * wide;
    caller_memory.reset();
    real* totals = shares.sums(s.C * heads, wide, s.m, gathered);
    real* tops = caller_memory.take(shares.size() * all);
    real* sums = caller_memory.zeros(shares.size() * all);
    real* factors = caller_memory.take(shares.size() * all);
    std::fill(tops, tops + shares.size() * all, -std::numeric_limits<real>::infinity());
    shares.each([&](long, const auto& tiles) {
        real *x = worker_memory.take(s.C * T), *v = worker_memory.take(s.C * T);
        real *k = worker_memory.take(s.D * T), *keys = worker_memory.zeros(s.groups * d * wide);
        real* S = worker_memory.take(T * wide);
        long keys_of = -1;
        tiles([&](const Tile& tile) {
            const Segment& part = tile.part;
            load(tile.of(X, s.C, s.n), x, T);
            load(tile.of(K, s.D, s.n), k, T);
            for (long row = 0; keys_of != part.image && row < s.groups * d; row++)
                std::memcpy(keys + row * wide, for_keys + (part.image * s.groups * d + row) * s.m, s.m * sizeof(real));
            keys_of = part.image;
            if (!s.at_landmarks) product<false>(s.C, tile.N, s.C, W_v, s.C, x, T, v, T);
            if (V) store(v, tile.of(V, s.C, s.n), T);
            for (long g = 0; g < s.groups; g++) {
                long here = part.index * all + g * wide;
                product<true>(tile.N, wide, d, k + g * s.step * T, T, keys + g * d * wide, wide, S, wide);  // T, m
                for (long j = 0; j < wide; j += LANES) {  // online softmax: rescale the sums to the new maximum
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
                const real* left = s.at_landmarks ? x : v + g * c * T;
                real* to = total + g * (s.at_landmarks ? wide : c * wide);
                product<false>(s.at_landmarks ? s.C : c, wide, tile.count, left, T, S, wide, to, width, start,
                               factors + here);
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
    Shares shares(s);
    const long T = shares.T;
    long d = s.d, deep = padded(d), marks = s.groups * s.m;
    long square = s.at_landmarks ? 0 : s.C * padded(s.C);
    caller_memory.reset();
    real* of_keys = shares.sums(marks, deep, d, d_for_keys);
    real* of_value = caller_memory.take(s.workers * square);
    // The gradient of a softmax subtracts in each row the sum of d_S_mn * S_mn. It equals that of d_gathered * gathered.
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
        Heads rows(s, d_gathered);
        tiles([&](const Tile& tile) {
            long b = tile.part.image, N = tile.N;
            load(tile.of(features, s.C, s.n), v, T);
            load(tile.of(K, s.D, s.n), k, T);
            for (long g = 0; g < s.groups; g++) {
                const real* keys = for_keys + (b * s.groups + g) * d * s.m;
                real *map = S + g * s.m * T, *d_map = d_S + g * s.m * T;
                product<true>(s.m, N, d, keys, s.m, k + g * s.step * T, T, map, T);
                if (g < rows.count)
                    product<true>(rows.marks, N, rows.rows, rows.of(b, g), rows.marks, v + g * rows.rows * T, T, d_map, T);
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
                product<false>(rows.rows, N, rows.marks, rows.of(b, h), rows.marks, S + h * rows.marks * T, T,
                               d_features + h * rows.rows * T, T);
            if (!s.at_landmarks) {
                load(tile.of(X, s.C, s.n), x, T);
                add_outer(s.C, d_v, x, x_turned, of_value + worker * square, N, T);
                product<true>(s.C, N, s.C, W_v, s.C, d_v, T, d_tile, T);
            }
            store(d_k, tile.of(d_K, s.D, s.n), T);
            add(d_tile, tile.of(d_x, s.C, s.n), T);
        });
    });
    shares.add_up(of_keys, marks, deep, d, d_for_keys);
    if (!s.at_landmarks) add_up_workers(s, of_value, s.C, padded(s.C), s.C, d_W_v);
}

// Computes x + alpha O, or O where alpha is null, (B, C, n), and the mean of x * O over positions, (B, C), unless null.
//
// Q (B, D, n); for_queries (B, groups, d, m); bias (B, groups, m); landmark_of (n,), or null where P is not added;
// source (B, C, groups, m) or (B, C, m).
void spread(const Shape* shape, const real* X, const real* Q, const real* for_queries, const real* bias,
            const int64_t* landmark_of, const real* source, const real* W_f, const real* b_f, const real* alpha,
            real* out, real* mean) {
    const Shape& s = *shape;
    Shares shares(s);
    const long T = shares.T;
    long marks = s.groups * s.m;
    caller_memory.reset();
    real* sums = caller_memory.take(shares.size() * s.C);
    shares.each([&](long, const auto& tiles) {
        real *q = worker_memory.take(s.D * T), *A = worker_memory.take(marks * T);
        real* own = worker_memory.take(s.groups * T);
        real *U = worker_memory.take(s.C * T), *O = worker_memory.take(s.C * T);
        Heads rows(s, source);
        tiles([&](const Tile& tile) {
            long b = tile.part.image;
            load(tile.of(Q, s.D, s.n), q, T);
            const real* queries = for_queries + b * s.groups * s.d * s.m;
            map_of_queries(s, q, queries, bias + b * marks, landmark_of, tile, A, own, T);
            attend(s, A, rows, b, W_f, b_f, U, O, tile.N, T);
            auto x = tile.of(X, s.C, s.n);
            auto to = tile.of(out, s.C, s.n);
            for (long row = 0; row < s.C; row++) {
                const real *from = x[row], *o = O + row * T;
                real* target = to[row];
                vec total{};
                for (long t = 0; t < tile.count; t += LANES) {
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
// grad_out (B, C, n); grad_mean (B, C) or null -> d_x
// (B, C, n), d_Q (B, D, n), d_source (B, C, groups, m) or (B, C, m), d_for_queries (B, groups, m, d), d_bias
// (B, groups, m), d_alpha (1,), d_W_f (C, C), and d_b_f (C,), the gradient of a vector added to O at every position.
void spread_backward(const Shape* shape, const real* X, const real* Q, const real* for_queries, const real* bias,
                     const int64_t* landmark_of, const real* source, const real* W_f, const real* b_f,
                     const real* alpha, const real* grad_out, const real* grad_mean, real* d_x,
                     real* d_Q, real* d_source, real* d_for_queries, real* d_bias, real* d_alpha, real* d_W_f,
                     real* d_b_f) {
    const Shape& s = *shape;
    Shares shares(s);
    const long T = shares.T;
    long d = s.d, wide = padded(s.m), deep = padded(d), marks = s.groups * s.m;
    long of_head = s.at_landmarks ? s.groups : 1, width = of_head * wide, square = W_f ? s.C * padded(s.C) : 0;
    caller_memory.reset();
    real* of_source = shares.sums(s.C * of_head, wide, s.m, d_source);
    real* of_queries = shares.sums(marks, deep, d, d_for_queries);
    real* of_bias = shares.sums(1, marks, marks, d_bias);
    real* of_fuse = caller_memory.take(s.workers * square);
    real* of_fuse_bias = caller_memory.zeros(s.workers * s.C);
    real* of_alpha = caller_memory.zeros(s.workers);
    shares.each([&](long worker, const auto& tiles) {
        real *q = worker_memory.take(s.D * T), *d_q = worker_memory.take(s.D * T);
        real *A = worker_memory.take(marks * T), *d_A = worker_memory.take(s.groups * wide * T);
        real* own = worker_memory.take(s.groups * T);
        real *U = worker_memory.take(s.C * T), *O = worker_memory.take(s.C * T);
        std::fill(of_fuse + worker * square, of_fuse + (worker + 1) * square, real(0));
        real *G = worker_memory.take(s.C * T), *U_turned = worker_memory.zeros(T * padded(s.C));
        real* q_turned = worker_memory.zeros(T * deep);
        Heads rows(s, source);
        double alpha_total = 0;  // a sum over all entries, which fp32 would round
        tiles([&](const Tile& tile) {
            long b = tile.part.image, N = tile.N;
            const real* queries = for_queries + b * s.groups * s.d * s.m;
            real* source_total = of_source + tile.part.index * s.C * width;
            load(tile.of(Q, s.D, s.n), q, T);
            map_of_queries(s, q, queries, bias + b * marks, landmark_of, tile, A, own, T);
            attend(s, A, rows, b, W_f, b_f, U, O, N, T);
            auto x = tile.of(X, s.C, s.n), given = tile.of(grad_out, s.C, s.n);
            auto to = tile.of(d_x, s.C, s.n);
            for (long row = 0; row < s.C; row++) {  // G becomes the gradient of O
                real share = grad_mean ? grad_mean[b * s.C + row] / s.n : real(0);
                const real *xs = x[row], *gradients = given[row], *outputs = O + row * T;
                real* target = to[row];
                vec total{}, of_gate{};
                for (long t = 0; t < tile.count; t += LANES) {
                    long left = tile.count - t;
                    vec one = read(xs + t, left), gradient = read(gradients + t, left), output = at(outputs + t);
                    vec d_O = (alpha ? *alpha * gradient : gradient) + share * one;
                    of_gate += gradient * output;
                    total += d_O;
                    at(G + row * T + t) = d_O;
                    write(share * output + (alpha ? gradient : vec{}), target + t, left);
                }
                of_fuse_bias[worker * s.C + row] += sum(total);
                alpha_total += sum(of_gate);
            }
            const real* d_U = G;
            if (W_f) {
                add_outer(s.C, G, U, U_turned, of_fuse + worker * square, N, T);
                product<true>(s.C, N, s.C, W_f, s.C, G, T, O, T);
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
                    product<false>(rows.rows, width, N, d_head, T, turned, width, source_total + g * rows.rows * width,
                                   width, tile.start());
                    product<true>(rows.marks, N, rows.rows, rows.of(b, g), rows.marks, d_head, T, d_map, T);
                }
                // Restore the entries without P; a subtraction would lose the digits of small entries.
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
        of_alpha[worker] = alpha_total;
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
// d_Q and d_K, (B, D, n), gain the gradient through the statistics, slope * Q + constant with (D,) each or null, and the
// gradient through the landmark of each position, `shares` (B, D, m). -> d_W_q, d_W_k (D, C).
void project_backward(const Shape* shape, const real* X, const real* W_q, const real* W_k, const real* Q,
                      const real* K, const int64_t* landmark_of, const real* d_Q, const real* d_K,
                      const real* slope_q, const real* slope_k, const real* constant_q, const real* constant_k,
                      const real* shares_q, const real* shares_k, real* d_x, real* d_W_q, real* d_W_k) {
    const Shape& s = *shape;
    Shares shares(s);
    const long T = shares.T;
    long deep = padded(s.D), width = 2 * deep;
    const real *W[] = {W_q, W_k}, *features[] = {Q, K}, *gradients[] = {d_Q, d_K};
    const real *of_landmarks[] = {shares_q, shares_k};
    const real *slopes[] = {slope_q, slope_k}, *constants[] = {constant_q, constant_k};
    caller_memory.reset();
    real* of_weights = caller_memory.take(s.workers * s.C * width);
    shares.each([&](long worker, const auto& tiles) {
        real* total = of_weights + worker * s.C * width;
        bool fresh = true;
        real *x = worker_memory.take(s.C * T), *d_tile = worker_memory.take(s.C * T);
        real *y = worker_memory.take(s.D * T), *d_y = worker_memory.take(s.D * T);
        real* turned = worker_memory.zeros(T * width);
        tiles([&](const Tile& tile) {
            long b = tile.part.image;
            for (long side = 0; side < 2; side++) {
                load(tile.of(gradients[side], s.D, s.n), d_y, T);
                if (slopes[side]) load(tile.of(features[side], s.D, s.n), y, T);
                for (long row = 0; row < s.D; row++) {
                    const real* share = of_landmarks[side] + (b * s.D + row) * s.m;
                    for (long t = 0; t < tile.count; t++) d_y[row * T + t] += share[landmark_of[tile.first + t]];
                    for (long t = row * T; slopes[side] && t < row * T + tile.N; t += LANES)
                        at(d_y + t) += slopes[side][row] * at(y + t) + constants[side][row];
                }
                transpose(d_y, s.D, tile.N, T, turned + side * deep, width);
                product<true>(s.C, tile.N, s.D, W[side], s.C, d_y, T, d_tile, T, side ? Start::target : Start::zero);
            }
            load(tile.of(X, s.C, s.n), x, T);
            product<false>(s.C, width, tile.N, x, T, turned, width, total, width, fresh ? Start::zero : Start::target);
            fresh = false;
            add(d_tile, tile.of(d_x, s.C, s.n), T);
        });
        if (fresh) std::fill(total, total + s.C * width, real(0));
    });
    each_worker(s.workers, [&](long worker) {  // (workers, C, 2, deep) -> (D, C) twice, a square of registers at a time
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
                    write(square[k - first], (side ? d_W_k : d_W_q) + k * s.C + row, count);
            }
    });
}

// Offset of a row of group g of image b in (B, groups, c, m) if narrow, else in (B, C, groups, m).
static long place_of(const Shape& s, bool narrow, long b, long g, long row) {
    return (narrow ? (b * s.groups + g) * (s.C / s.groups) + row : (b * s.C + row) * s.groups + g) * s.m;
}

// Number of rows that a worker takes at a time, of `rows` a group: whole blocks of registers, and some for every worker.
static long block_of(const Shape& s, long rows, long most) {
    return std::max(ROWS, std::min(most, rows * s.groups / s.workers / ROWS * ROWS));
}

// Multiplies a weight with the rows of the landmarks, a group at a time: `wide` is (B, C, groups, m), `narrow` is
// (B, groups, c, m).
//
// Group g's share of W (C, C) is rows g c to (g + 1) c where `of_rows`, (c, C), as in `value`; else those columns,
// (C, c), as in `fuse`. The factor is that share or its transpose, whichever takes `from` to `to`.
void times_at_landmarks(const Shape* shape, const real* W, long of_rows, long narrows, const real* from,
                        const real* bias, real* to) {
    const Shape& s = *shape;
    long c = s.C / s.groups, wide = padded(s.m), rows = narrows ? c : s.C, columns = narrows ? s.C : c;
    // A worker takes some of its rows at a time, which stay in the cache for all images.
    long block = block_of(s, rows, 128);
    long blocks = (rows + block - 1) / block;
    bool turned = bool(of_rows) != bool(narrows);  // a product reads the rows of a transpose faster than columns
    bool direct = s.m == wide;  // rows need no padded copy
    long from_stride = direct ? place_of(s, !narrows, 0, 0, 1) : wide;
    long to_stride = direct ? place_of(s, narrows, 0, 0, 1) : wide;
    each_worker(s.workers, [&](long worker) {
        real* padded_x = direct ? nullptr : worker_memory.zeros(columns * wide);
        real* padded_y = direct ? nullptr : worker_memory.take(block * wide);
        real* own_share = turned ? worker_memory.take(block * columns) : nullptr;
        for (long i = s.groups * blocks * worker / s.workers; i < s.groups * blocks * (worker + 1) / s.workers; i++) {
            long g = i / blocks, first = i % blocks * block, count = std::min(block, rows - first);
            const real* share = W + g * c * (of_rows ? s.C : 1) + first * (turned ? 1 : s.C);
            if (turned) transpose(share, columns, count, s.C, own_share, columns);
            for (long b = 0; b < s.B; b++) {
                for (long row = 0; row < columns && !direct; row++)
                    std::memcpy(padded_x + row * wide, from + place_of(s, !narrows, b, g, row), s.m * sizeof(real));
                const real* x = direct ? from + place_of(s, !narrows, b, g, 0) : padded_x;
                real* y = direct ? to + place_of(s, narrows, b, g, first) : padded_y;
                for (long row = 0; row < count && bias; row++)
                    std::fill(y + row * to_stride, y + row * to_stride + wide, bias[first + row]);
                product<false>(count, wide, columns, turned ? own_share : share, turned ? columns : s.C, x, from_stride, y,
                               to_stride, bias ? Start::target : Start::zero);
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
        for (long i = s.groups * blocks * worker / s.workers; i < s.groups * blocks * (worker + 1) / s.workers; i++) {
            long g = i / blocks, first = i % blocks * block, count = std::min(block, s.C - first);
            for (long b = 0; b < s.B; b += together) {
                long images = std::min(together, s.B - b), K = images * s.m;  // rows of `wide` side by side
                for (long row = 0; row < count; row++)
                    for (long image = 0; image < images; image++)
                        std::memcpy(rows + row * K + image * s.m,
                                    wide + place_of(s, false, b + image, g, first + row), s.m * sizeof(real));
                product<false>(count, width, K, rows, K, turned + (g * s.B + b) * s.m * width, width, total, width,
                               b ? Start::target : Start::zero);
            }
            if (of_rows) transpose(total, count, c, width, d_W + g * c * s.C + first, s.C);
            for (long row = 0; row < count && !of_rows; row++)
                std::memcpy(d_W + (first + row) * s.C + g * c, total + row * width, c * sizeof(real));
        }
    });
}

// The gradients of `times_at_landmarks`: of its input, `to`, and of the weight, d_W. `narrows` says how W takes the
// gradient of the result to that of the input; `other` is the input.
void times_at_landmarks_backward(const Shape* shape, const real* W, long of_rows, long narrows, const real* from,
                                 const real* other, real* to, real* d_W) {
    times_at_landmarks(shape, W, of_rows, narrows, from, nullptr, to);
    weight_at_landmarks(*shape, narrows ? from : other, narrows ? other : from, of_rows, d_W);
}

// A step of Gauss-Jordan elimination in place, with `LANES` pivots from `first` on, in rows (m, width). These columns
// become columns of the inverse.
static void invert_columns(long m, long first, real* rows, long width, real* factors, real* pivots) {
    long count = std::min(LANES, m - first);
    vec block[LANES];  // the square of the pivots, eliminated one by one
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
    // Multiply the rows of the pivots by the inverse of the block, which replaces the block; then update all other rows.
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

// The share of the rest of its row that a landmark with S_ii below `floor` gains.
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

// The gradients of `solve`: of scale E + offset, (B, groups, c, m), of scale and of offset, (C,) each.
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
    for (long line = 0, end; line < s.n; line = end) {  // add up the lines of the map with the same landmarks
        std::fill(band, band + width, real(0));
        for (end = line; end < s.n && landmark_of[end] == landmark_of[line]; end += width)
            for (long t = 0; t < width; t++) band[t] += from[end + t];
        for (long t = 0; t < width; t++) to[landmark_of[line + t]] += band[t];
    }
    for (long k = 0; k < s.m; k++) to[k] /= sizes[k];
}

// Computes the tensors of the landmarks from the patch means of raw Q and K, (B, D, n), and their affine maps, (D,).
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
