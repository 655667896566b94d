// What the attention kernels share: which queries a block has, which positions, where those lie, and the
// parts of a result that several blocks leave.
//
// An *entry* is one query head of one token. The entries that read one KV head of one sequence are
// numbered token by token, `group` heads each; a tile is M of them in a row. Everything that changes from
// token to token is read from memory, so that a launch can be replayed: its grid covers as many tiles as
// the shape can have, and those that there are not end at once.
#pragma once
#include <cuda_fp16.h>
#include "reduce.cuh"

#define PAGE_TOKENS 64
#define LOG2_E 1.4426950408889634f

struct Batch {
    // Of each sequence: its first row, its new tokens, how many were there before, its pages.
    const unsigned *first_row, *tokens, *past, *page_table;
    unsigned sequences, max_pages;
};

struct Tile {
    const unsigned* pages;  // of the sequence
    unsigned row;           // first row of the sequence
    unsigned past;          // position of that row
    unsigned entry;         // first entry of the tile
    unsigned entries;       // how many, up to M
};

// Tile `index` of all sequences' tiles in a row; false if there are fewer.
__device__ __forceinline__ bool find_tile(const Batch& batch, unsigned index, unsigned m, unsigned group, Tile& tile) {
#pragma unroll 1
    for (unsigned s = 0; s < batch.sequences; s++) {
        // All three at once, since each is a round trip.
        const unsigned tokens = batch.tokens[s], row = batch.first_row[s], past = batch.past[s];
        const unsigned entries = tokens * group, tiles = (entries + m - 1) / m;
        if (index < tiles) {
            tile.pages = batch.page_table + (size_t)s * batch.max_pages;
            tile.row = row;
            tile.past = past;
            tile.entry = index * m;
            tile.entries = min(m, entries - index * m);
            return true;
        }
        index -= tiles;
    }
    return false;
}

// 2^x; 0 for what is below the smallest normal number.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Last position that an entry sees.
__device__ __forceinline__ unsigned limit_of(const Tile& tile, unsigned entry, unsigned group) {
    return tile.past + (tile.entry + entry) / group;
}

// Positions that any entry of a tile sees, cut into `used` parts of whole pages, `least` or more of them.
struct Span {
    unsigned begin, end;  // of this part
    unsigned used;
};

__device__ __forceinline__ Span span_of(const Tile& tile, unsigned group, unsigned window, unsigned splits,
                                        unsigned split, unsigned least) {
    const unsigned end = limit_of(tile, tile.entries - 1, group) + 1, first = limit_of(tile, 0, group) + 1;
    const unsigned begin = window < first ? (first - window) / PAGE_TOKENS * PAGE_TOKENS : 0;
    const unsigned pages = (end - begin + PAGE_TOKENS - 1) / PAGE_TOKENS;
    const unsigned each = max((pages + splits - 1) / splits, least);
    const unsigned start = begin + split * each * PAGE_TOKENS;
    return Span{min(start, end), min(start + each * PAGE_TOKENS, end), (pages + each - 1) / each};
}

__device__ __forceinline__ bool sees(unsigned limit, unsigned position, unsigned window) {
    return (position <= limit) & (limit - position < window);
}

// Where row `entry` of a tile lies in [rows, heads, dim] of queries or results.
__device__ __forceinline__ size_t head_of(const Tile& tile, unsigned entry, unsigned group, unsigned heads, unsigned kv_head) {
    const unsigned at = tile.entry + entry;
    return (size_t)(tile.row + at / group) * heads + kv_head * group + at % group;
}

// The parts that the splits of a tile leave: values [M, v_dim], then maximum and sum [M, 2] of each.
struct Parts {
    float *values, *sums;
};

__device__ __forceinline__ Parts part_of(float* scratch, unsigned m, unsigned v_dim, unsigned tiles, unsigned tile,
                                         unsigned kv_heads, unsigned kv_head, unsigned splits, unsigned split) {
    const size_t part = ((size_t)tile * kv_heads + kv_head) * splits + split;
    const size_t parts = (size_t)tiles * kv_heads * splits;
    return Parts{scratch + part * m * v_dim, scratch + parts * m * v_dim + part * m * 2};
}

// exp2 with the maximum of nothing taken as 0.
__device__ __forceinline__ float base_of(float maximum) { return maximum == -KTX_INFINITY ? 0.0f : maximum; }

// Denominator and maximum with a sink, which may exceed every score.
__device__ __forceinline__ void add_sink(const float* sinks, unsigned head, float& maximum, float& sum, float& rescale) {
    rescale = 1.0f;
    if (!sinks) return;
    const float logit = sinks[head] * LOG2_E, highest = fmaxf(maximum, logit);
    rescale = exp2f(maximum - highest);
    sum = sum * rescale + exp2f(logit - highest);
    maximum = highest;
}
