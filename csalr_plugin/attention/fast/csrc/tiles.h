// Tiles of positions, and their shares among threads.
//
// A tile is some 100 to 200 neighbouring positions of one image. A pass does everything at them, the products with the m
// landmarks, softmax, gate and residual, before it reads the next tile. So no map is written to memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "product.h"

struct Shape {
    long B, C, D, d, step, n, m, groups, at_landmarks, workers;  // group g reads d channels of D from g * step on
};

namespace {

// The part of a tensor (rows, n) that belongs to a tile: `count` positions from `first` on.
template <class Number>
struct Window {
    Number* image;
    long rows, n, first, count;

    Number* operator[](long row) const { return image + row * n + first; }
};

// Loads the window into (rows, T) by whole registers; zero beyond the end of the image.
void load(const Window<const real>& from, real* tile, long T) {
    for (long r = 0; r < from.rows; r++) {
        const real* row = from[r];
        for (long t = 0; t < from.count; t += LANES) at(tile + r * T + t) = read(row + t, from.count - t);
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
        for (long t = 0; t < to.count; t += LANES)
            write(read(row + t, to.count - t) + at(tile + r * T + t), row + t, to.count - t);
    }
}

// Scratch memory of one thread, reused by every call: touching fresh pages would cost as much as the computation.
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

struct Segment {  // neighbouring tiles of one image that one worker computes
    long index, image, begin, end;
};

struct Tile {
    const Segment& part;
    long first, count;  // positions
    bool fresh;         // the first of its segment
    long N = padded(count);  // positions that are computed: whole registers

    // The part of a tensor (B, rows, n) that belongs to the tile.
    template <class Number>
    Window<Number> of(Number* images, long rows, long n) const {
        return {images + part.image * rows * n, rows, n, first, count};
    }
    Start start() const { return fresh ? Start::zero : Start::target; }  // of the sums of a segment
};

// Positions of a tile: long runs of memory, and few enough that the results of a pass stay in a core's cache. Half as many
// where the workers would get unequal numbers of tiles.
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

// An even share of all tiles for each worker. The order of every sum depends on the shape alone, never on the timing of
// threads, so the same call gives the same digits.
class Shares {
  public:
    explicit Shares(const Shape& s) : T(tile_of(s)), n(s.n), images(s.B), workers(s.workers), first_of(s.workers + 1) {
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
                for (long i = first_of[worker]; i < first_of[worker + 1]; i++)
                    for (long j = segments[i].begin; j < segments[i].end; j++)
                        visit(Tile{segments[i], j * T, std::min(T, n - j * T), j == segments[i].begin});
            });
        });
    }

    // Memory for the sums of each segment, (segments, rows, width): the target itself where the shapes agree.
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

// target (columns,): the sum over images of `parts`, (B, columns).
void add_up_images(long images, long columns, const real* parts, real* target) {
    std::memcpy(target, parts, columns * sizeof(real));
    for (long b = 1; b < images; b++)
        for (long j = 0; j < columns; j++) target[j] += parts[b * columns + j];
}

}  // namespace
