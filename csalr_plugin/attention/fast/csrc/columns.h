// Softmax and statistics over the columns of a tile.
#pragma once

#include "vector.h"

namespace {

// The largest absolute value in N columns of (rows, T).
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

// Mean of `count` numbers, and sum of squares about it.
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
    // Combines both (Chan et al., 1979), since a difference of two large sums loses digits.
    void operator+=(const Moments& other) {
        if (!other.count) return;
        count += other.count;
        real share = real(other.count) / count, difference = other.mean - mean;
        mean += difference * share;
        squares += other.squares + difference * difference * share * (count - other.count);
    }
};

// Adds `bias`, (m,), to (m, T) and takes the softmax over the rows of each of N columns.
void softmax_of_columns(real* logits, const real* bias, long m, long N, long T) {
    for (real* column = logits; column < logits + N; column += LANES) {
        vec top = at(column) + bias[0];
        for (long k = 1; k < m; k++) top = larger(top, at(column + k * T) + bias[k]);
        vec total{};
        for (long k = 0; k < m; k++)
            total += at(column + k * T) = exponential(at(column + k * T) + (bias[k] - top));
        vec share = 1 / total;  // division takes ten times as long as multiplication
        for (long k = 0; k < m; k++) at(column + k * T) *= share;
    }
}

// Turns the gradient of a softmax over rows into the gradient of its logits, in place.
void softmax_of_columns_backward(real* gradient, const real* probabilities, long m, long N, long T) {
    for (long t = 0; t < N; t += LANES) {
        vec total{};
        for (long k = 0; k < m; k++) total += at(gradient + k * T + t) * at(probabilities + k * T + t);
        for (long k = 0; k < m; k++)
            at(gradient + k * T + t) = at(probabilities + k * T + t) * (at(gradient + k * T + t) - total);
    }
}

}  // namespace
