// The tile product that prefill is made of, for one matrix and for many experts.
//
// A block makes 128 rows of weights times N tokens, K in steps of 64. Weights come as codes (16 bytes a thread, one step
// ahead in registers), become halves in shared memory, and meet the tokens, copied there as halves in the background,
// in the tensor cores; sums are single precision. A warp makes 64 x 32 of the tile: six loads of matrices from shared
// memory for sixteen products of 16 x 8 x 16.
// Shared memory: two stages of 128 x 64 and N x 64 halves, in rows of eight chunks of 16 bytes whose order is the row's
// number exclusive-or the chunk's, so that neither stores nor loads of matrices meet in a bank.
//
// Halves hold weights and activations because both are brought into the middle of their range by powers of two, the
// weights by that at the end of each row, a token by one of its own (`ktx_halves`): 11 bits of either are kept.
#pragma once

#include "blocks.cuh"

constexpr u32 TILE_ROWS = 128;
constexpr u32 STEP = 64;
constexpr u32 ANY_TYPE = 0xffffffffu;
// How far ahead of their use codes of a row are asked for.
constexpr u32 PREFETCH_BYTES = 512;

// Part of the tokens, for one expert.
struct TokenTile {
    u32 expert;
    u32 first;
    u32 count;
    u32 padding;
};

enum Activation : u32 { NO_ACTIVATION, SWIGLU, CLAMPED_SWIGLU };

struct Product {
    // `[experts, row_count]` rows of `row_bytes`.
    const u8* rows;
    // Rows of the same shape and type for the second factor of a gated activation; null without one.
    const u8* up_rows;
    // `[experts, row_count]` or null.
    const float* bias;
    const float* up_bias;
    // `[tokens, out_stride]` or null: added.
    const float* residual;
    float* out;
    // Halves `[*, x_stride]`, zeros beyond the columns, and what they are multiplied with.
    const __half* x;
    const float* x_factors;
    // The row of `x` of each token; null where they are in order.
    const u32* order;
    // What each column of blocks does; null for all tokens of one matrix.
    const TokenTile* tiles;
    float alpha;
    float limit;
    u32 activation;
    u32 type;
    u32 row_count;
    u32 row_bytes;
    // Byte of a row where its power of two is.
    u32 factor_at;
    // Bytes of a group of 32 columns in a row's first plane.
    u32 code_bytes;
    u32 columns;
    u32 x_stride;
    u32 out_stride;
    u32 tokens;
};

// A format's group as it was loaded, for any type.
struct alignas(16) AnyRaw {
    u32 words[12];
};

template <u32 type>
__device__ __forceinline__ constexpr bool loads_ahead() {
    return !is_float_type(type);
}

// Two halves from two codes that are bytes `byte` and `byte + 1` of `word`.
__device__ __forceinline__ __half2 code_pair(u32 word, u32 selector) {
    u32 bits = __byte_perm(word, 0x64646464u, selector);
    return *reinterpret_cast<__half2*>(&bits);
}

__device__ __forceinline__ u32 bits_of(__half2 pair) { return *reinterpret_cast<u32*>(&pair); }

// The weights of a group times `factor`, as halves in the order of columns: `store(chunk, eight halves)` four times.
template <class F, class Store>
__device__ __forceinline__ void codes_to_halves(const Codes& codes, float factor, Store store) {
    // 1024 + code is a half whose low byte is the code.
    constexpr float zero = 1024.0f + (F::SIGNED ? 128 : F::ZERO);
    const __half2 minus_zero = __float2half2_rn(-zero);
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        __half2 scale = __float2half2_rn(codes.scale[half] * factor);
        __half2 offset = __float2half2_rn(F::OFFSET ? codes.offset[half] * factor : 0.0f);
#pragma unroll
        for (u32 chunk = 2 * half; chunk < 2 * half + 2; ++chunk) {
            u32 halves[4];
#pragma unroll
            for (u32 pair = 0; pair < 4; ++pair) {
                u32 word = codes.words[2 * chunk + pair / 2];
                word = F::SIGNED ? word ^ 0x80808080u : word;
                __half2 code = __hadd2(code_pair(word, pair % 2 == 0 ? 0x4140 : 0x4342), minus_zero);
                halves[pair] = bits_of(F::OFFSET ? __hfma2(code, scale, offset) : __hmul2(code, scale));
            }
            store(chunk, uint4{halves[0], halves[1], halves[2], halves[3]});
        }
    }
}

template <u32 type, class Store>
__device__ __forceinline__ void floats_to_halves(const u8* row, u32 group, float factor, Store store) {
    constexpr u32 per_load = Format<type>::PER_LOAD;
#pragma unroll
    for (u32 chunk = 0; chunk < 4; ++chunk) {
        u32 halves[4];
#pragma unroll
        for (u32 first = 0; first < 8; first += per_load) {
            float part[per_load];
            Format<type>::unpack(load_128(row + (32 * group + 8 * chunk + first) * (16 / per_load)), part);
#pragma unroll
            for (u32 i = 0; i < per_load; i += 2) {
                halves[(first + i) / 2] = bits_of(__floats2half2_rn(part[i] * factor, part[i + 1] * factor));
            }
        }
        store(chunk, uint4{halves[0], halves[1], halves[2], halves[3]});
    }
}

template <u32 type>
__device__ __forceinline__ void load_ahead(AnyRaw& to, const u8* row, u32 groups, u32 group) {
    if constexpr (loads_ahead<type>()) {
        using Raw = typename Format<type>::Raw;
        static_assert(sizeof(Raw) <= sizeof(AnyRaw), "a group as it is loaded");
        Raw raw = Format<type>::load(row, groups, group);
        memcpy(&to, &raw, sizeof(raw));
    }
}

template <u32 type, class Store>
__device__ __forceinline__ void to_halves(const AnyRaw& from, const u8* row, u32 group, float factor, Store store) {
    if constexpr (loads_ahead<type>()) {
        typename Format<type>::Raw raw;
        memcpy(&raw, &from, sizeof(raw));
        Codes codes;
        Format<type>::unpack(raw, group, codes);
        codes_to_halves<Format<type>>(codes, factor, store);
    } else {
        floats_to_halves<type>(row, group, factor, store);
    }
}

template <u32 fixed>
__device__ __forceinline__ void load_ahead_of(u32 type, AnyRaw& to, const u8* row, u32 groups, u32 group) {
    if constexpr (fixed != ANY_TYPE) {
        return load_ahead<fixed>(to, row, groups, group);
    } else {
        switch (type) {
#define KTX_CASE(TYPE) \
    case TYPE: return load_ahead<TYPE>(to, row, groups, group);
            KTX_CODE_TYPES(KTX_CASE)
#undef KTX_CASE
        }
    }
}

template <u32 fixed, class Store>
__device__ __forceinline__ void to_halves_of(u32 type, const AnyRaw& from, const u8* row, u32 group, float factor,
                                             Store store) {
    if constexpr (fixed != ANY_TYPE) {
        return to_halves<fixed>(from, row, group, factor, store);
    } else {
        switch (type) {
#define KTX_CASE(TYPE) \
    case TYPE: return to_halves<TYPE>(from, row, group, factor, store);
            KTX_CODE_TYPES(KTX_CASE)
            KTX_FLOAT_TYPES(KTX_CASE)
#undef KTX_CASE
        }
    }
}

// Chunk `chunk` of row `row` of a stage.
__device__ __forceinline__ __half* chunk_at(__half* stage, u32 row, u32 chunk) {
    return stage + row * STEP + (chunk ^ (row & 7)) * 8;
}

#if __CUDA_ARCH__ >= 750
// One step of a warp's 64 x 32 part, of which `eights` times 8 tokens exist.
__device__ __forceinline__ void multiply_stage(__half* weights, __half* tokens, u32 lane, u32 eights,
                                               float (&sums)[4][4][4]) {
#pragma unroll
    for (u32 k = 0; k < STEP / 16; ++k) {
        unsigned b[2][4];
#pragma unroll
        for (u32 pair = 0; pair < 2; ++pair) {
            u32 row = pair * 16 + lane % 8 + lane / 16 * 8;
            load_matrix_x4(b[pair], chunk_at(tokens, row, 2 * k + lane / 8 % 2));
        }
#pragma unroll
        for (u32 m = 0; m < 4; ++m) {
            unsigned a[4];
            load_matrix_x4(a, chunk_at(weights, m * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
            for (u32 n = 0; n < 4; ++n) {
                if (n < eights) {
                    mma_16x8x16(sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
                }
            }
        }
    }
}
#else
// Volta's tensor cores have other fragments: the same sums by multiply-adds.
__device__ __forceinline__ void read_chunk(const __half* from, float (&to)[8]) {
    uint4 chunk = *reinterpret_cast<const uint4*>(from);
    u32 words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to[2 * i] = half_bits(words[i]);
        to[2 * i + 1] = half_bits(words[i] >> 16);
    }
}

__device__ __forceinline__ void multiply_stage(__half* weights, __half* tokens, u32 lane, u32 eights,
                                               float (&sums)[4][4][4]) {
#pragma unroll 1
    for (u32 chunk = 0; chunk < STEP / 8; ++chunk) {
#pragma unroll
        for (u32 n = 0; n < 4; ++n) {
            if (n >= eights) {
                break;
            }
            float b[2][8];
            read_chunk(chunk_at(tokens, n * 8 + lane % 4 * 2, chunk), b[0]);
            read_chunk(chunk_at(tokens, n * 8 + lane % 4 * 2 + 1, chunk), b[1]);
#pragma unroll
            for (u32 m = 0; m < 4; ++m) {
#pragma unroll
                for (u32 upper = 0; upper < 2; ++upper) {
                    float a[8];
                    read_chunk(chunk_at(weights, m * 16 + lane / 4 + upper * 8, chunk), a);
#pragma unroll
                    for (u32 i = 0; i < 8; ++i) {
                        sums[m][n][2 * upper] += a[i] * b[0][i];
                        sums[m][n][2 * upper + 1] += a[i] * b[1][i];
                    }
                }
            }
        }
    }
}
#endif

__device__ __forceinline__ float activated(const Product& p, float gate, float up) {
    if (p.activation == CLAMPED_SWIGLU) {
        gate = fminf(gate, p.limit);
        up = fminf(fmaxf(up, -p.limit), p.limit);
        return gate / (1.0f + expf(-p.alpha * gate)) * (up + 1.0f);
    }
    return gate / (1.0f + expf(-gate)) * up;
}

// The row of weights behind row `row` of a tile. With a gated activation 32 rows of the first factor alternate with the
// same 32 of the second, so that a thread holds both.
struct TileRow {
    u32 row;
    bool up;
};

__device__ __forceinline__ TileRow tile_row(const Product& p, u32 row_tile, u32 row) {
    if (p.up_rows) {
        return {row_tile * (TILE_ROWS / 2) + row / 64 * 32 + row % 32, (row / 32 & 1) != 0};
    }
    return {row_tile * TILE_ROWS + row, false};
}

// Blocks that are to fit an SM, which bounds registers.
constexpr __host__ __device__ u32 tile_blocks(u32 tokens) {
#if __CUDA_ARCH__ >= 800
    return tokens == 128 ? 2 : 3;
#else
    return tokens == 128 ? 1 : 2;
#endif
}

// Calls `write` for a thread's tokens: `first`, the next, and those 8, 16 and 24 further on.
template <class Write>
__device__ __forceinline__ void for_each_token(const Product& p, const TokenTile& tile, u32 first, Write write) {
#pragma unroll
    for (u32 n = 0; n < 4; ++n) {
#pragma unroll
        for (u32 next = 0; next < 2; ++next) {
            u32 token = first + n * 8 + next;
            if (token < tile.count) {
                u32 position = tile.first + token;
                u32 x_row = p.order ? p.order[position] : position;
                u64 at = static_cast<u64>(blockIdx.z * p.tokens + position) * p.out_stride;
                write(n, next, at, p.x_factors[x_row]);
            }
        }
    }
}

constexpr __host__ __device__ u32 tile_threads(u32 tokens) { return tokens * 2; }
constexpr __host__ __device__ u32 tile_shared_bytes(u32 tokens) { return 2 * (TILE_ROWS + tokens) * STEP * 2; }

// Block (column of tiles, row tile, part of K). Every part of K writes a result of its own, `tokens * out_stride` values
// after the one before, for `ktx_gemm_sum` to add up. `TOKENS` is 64 or 128; `tile_threads` threads, `tile_shared_bytes` of shared
// memory.
template <u32 TOKENS, u32 fixed>
__device__ __forceinline__ void tile_product(const Product& p, __half* shared) {
    constexpr u32 THREADS = tile_threads(TOKENS);
    constexpr u32 PER_THREAD = TILE_ROWS * STEP / 32 / THREADS;
    constexpr u32 WEIGHTS = TILE_ROWS * STEP, X = TOKENS * STEP;
    auto weights = [&](u32 step) { return shared + step % 2 * WEIGHTS; };
    auto tokens = [&](u32 step) { return shared + 2 * WEIGHTS + step % 2 * X; };

    TokenTile tile = {0, blockIdx.x * TOKENS, 0, 0};
    if (p.tiles) {
        tile = p.tiles[blockIdx.x];
        if (tile.count == 0) {
            return;
        }
    } else {
        tile.count = p.tokens - tile.first < TOKENS ? p.tokens - tile.first : TOKENS;
    }
    u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    u32 groups = (p.columns + 31) / 32, steps = (groups + 1) / 2;
    u64 expert_rows = static_cast<u64>(tile.expert) * p.row_count;

    // A thread expands groups of the same rows in every step.
    const u8* rows[PER_THREAD];
    float factors[PER_THREAD];
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; ++i) {
        TileRow at = tile_row(p, blockIdx.y, (thread + i * THREADS) / 2);
        u32 row = at.row < p.row_count ? at.row : p.row_count - 1;
        rows[i] = (at.up ? p.up_rows : p.rows) + (expert_rows + row) * p.row_bytes;
        factors[i] = __ldg(reinterpret_cast<const float*>(rows[i] + p.factor_at));
    }
    // And copies chunks of the same tokens.
    constexpr u32 COPIES = TOKENS * 8 / THREADS;
    u32 sources[COPIES];
#pragma unroll
    for (u32 i = 0; i < COPIES; ++i) {
        u32 token = (thread + i * THREADS) / 8;
        u32 position = tile.first + (token < tile.count ? token : 0);
        sources[i] = p.order ? p.order[position] : position;
    }
    auto copy_tokens = [&](u32 step) {
#pragma unroll
        for (u32 i = 0; i < COPIES; ++i) {
            u32 token = (thread + i * THREADS) / 8;
            const __half* from = p.x + static_cast<u64>(sources[i]) * p.x_stride + step * STEP + thread % 8 * 8;
            copy_async_16(chunk_at(tokens(step), token, thread % 8), from, token < tile.count);
        }
        copy_async_commit();
    };
    AnyRaw raw[PER_THREAD];
    auto load_weights = [&](u32 step) {
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; ++i) {
            u32 group = 2 * step + thread % 2;
            if (group < groups) {
                load_ahead_of<fixed>(p.type, raw[i], rows[i], groups, group);
            }
        }
    };
    auto expand_weights = [&](u32 step) {
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; ++i) {
            u32 group = 2 * step + thread % 2, row = (thread + i * THREADS) / 2;
            auto store = [&](u32 chunk, uint4 halves) {
                *reinterpret_cast<uint4*>(chunk_at(weights(step), row, thread % 2 * 4 + chunk)) = halves;
            };
            if (group < groups) {
                to_halves_of<fixed>(p.type, raw[i], rows[i], group, factors[i], store);
            } else {
                for (u32 chunk = 0; chunk < 4; ++chunk) {
                    store(chunk, uint4{0, 0, 0, 0});
                }
            }
        }
    };

    // Asks L2 for codes some steps before they are loaded: a step is shorter than DRAM takes.
    auto prefetch_codes = [&](u32 at) {
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; ++i) {
            if (at < groups * p.code_bytes) {
                prefetch_l2(rows[i] + at);
            }
        }
    };

    float sums[4][4][4] = {};
    u32 warp_row = warp % 2 * 64, warp_token = warp / 2 * 32;
    u32 step_bytes = 2 * p.code_bytes;
    u32 eights = tile.count > warp_token ? (tile.count - warp_token + 7) / 8 : 0;
    u32 begin = blockIdx.z * steps / gridDim.z, end = (blockIdx.z + 1) * steps / gridDim.z;
    for (u32 ahead = thread % 2 * 128; ahead < PREFETCH_BYTES; ahead += 256) {
        prefetch_codes(begin * step_bytes + ahead);
    }
    load_weights(begin);
    copy_tokens(begin);
    expand_weights(begin);
    if (begin + 1 < end) {
        load_weights(begin + 1);
    }
    for (u32 step = begin; step < end; ++step) {
        copy_async_wait<0>();
        __syncthreads();
        if (step + 1 < end) {
            prefetch_codes(step * step_bytes + PREFETCH_BYTES);
            copy_tokens(step + 1);
            expand_weights(step + 1);
            if (step + 2 < end) {
                load_weights(step + 2);
            }
        }
        if (eights > 0) {
            multiply_stage(weights(step) + warp_row * STEP, tokens(step) + warp_token * STEP, lane, eights, sums);
        }
    }

    // A thread holds rows `lane / 4` and 8 more, tokens `lane % 4 * 2` and the next, of each 16 x 8.
    auto row_factor = [&](const u8* base, u32 row) {
        return 1.0f / __ldg(reinterpret_cast<const float*>(base + (expert_rows + row) * p.row_bytes + p.factor_at));
    };
    if (p.up_rows) {
#pragma unroll
        for (u32 m = 0; m < 2; ++m) {
#pragma unroll
            for (u32 upper = 0; upper < 2; ++upper) {
                u32 row = blockIdx.y * (TILE_ROWS / 2) + warp_row / 2 + m * 16 + lane / 4 + upper * 8;
                if (row < p.row_count) {
                    float gate_factor = row_factor(p.rows, row), up_factor = row_factor(p.up_rows, row);
                    float gate_bias = p.bias ? p.bias[expert_rows + row] : 0.0f;
                    float up_bias = p.up_bias ? p.up_bias[expert_rows + row] : 0.0f;
                    for_each_token(p, tile, warp_token + lane % 4 * 2, [&](u32 n, u32 next, u64 at, float factor) {
                        float gate = sums[m][n][2 * upper + next] * gate_factor * factor + gate_bias;
                        float up = sums[m + 2][n][2 * upper + next] * up_factor * factor + up_bias;
                        p.out[at + row] = activated(p, gate, up);
                    });
                }
            }
        }
    } else {
#pragma unroll
        for (u32 m = 0; m < 4; ++m) {
#pragma unroll
            for (u32 upper = 0; upper < 2; ++upper) {
                u32 row = blockIdx.y * TILE_ROWS + warp_row + m * 16 + lane / 4 + upper * 8;
                if (row < p.row_count) {
                    float weight_factor = row_factor(p.rows, row);
                    float bias = p.bias ? p.bias[expert_rows + row] : 0.0f;
                    for_each_token(p, tile, warp_token + lane % 4 * 2, [&](u32 n, u32 next, u64 at, float factor) {
                        float sum = sums[m][n][2 * upper + next] * weight_factor * factor + bias;
                        p.out[at + row] = p.residual ? sum + p.residual[at + row] : sum;
                    });
                }
            }
        }
    }
}
