// What the kernels for few tokens share: quantised activations and dot products of rows with them.
#pragma once

#include "blocks.cuh"

constexpr u32 FULL_WARP = 0xffffffffu;

// One token's activations, 32 columns ("a group") quantised to signed bytes with one scale: columns 0-15 of all
// groups, columns 16-31 of all groups (so that a warp reads 16 bytes a lane without bank conflicts), and per group
// the scale, and the scale times the sums of codes 0-15, 16-31 and 0-31.
struct Quantized {
    const uint4* first;
    const uint4* second;
    const float4* scales;
};

// Bytes of a token with `groups` groups.
constexpr __host__ __device__ u32 quantized_bytes(u32 groups) { return 48 * groups; }

__device__ __forceinline__ Quantized quantized_at(const void* base, u32 groups) {
    const uint4* first = static_cast<const uint4*>(base);
    return {first, first + groups, reinterpret_cast<const float4*>(first + 2 * groups)};
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(FULL_WARP, value, distance);
    }
    return value;
}

// Four values of a group, by eight lanes that follow one another, rounded as the CPU rounds them: the scale is the
// largest magnitude over 127, codes go to the nearest, ties to even. All lanes of the warp take part; `group` must be
// below `groups` where something is to be written.
__device__ __forceinline__ void quantize_quarter(void* base, u32 groups, u32 group, u32 part, const float4& x) {
    float most = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) {
        most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, distance));
    }
    float scale = __fdiv_rn(most, 127.0f);
    float inverse = most > 0 ? __fdiv_rn(127.0f, most) : 0.0f;
    inverse = inverse <= 3.4028235e38f ? inverse : 0.0f;
    int q[4] = {__float2int_rn(x.x * inverse), __float2int_rn(x.y * inverse), __float2int_rn(x.z * inverse),
                __float2int_rn(x.w * inverse)};
    u32 word = (q[0] & 255) | (q[1] & 255) << 8 | (q[2] & 255) << 16 | static_cast<u32>(q[3]) << 24;
    int sum = q[0] + q[1] + q[2] + q[3];
    sum += __shfl_xor_sync(FULL_WARP, sum, 1);
    sum += __shfl_xor_sync(FULL_WARP, sum, 2);
    int other = __shfl_xor_sync(FULL_WARP, sum, 4);
    if (group < groups) {
        u32* words = static_cast<u32*>(base);
        words[(part / 4 * groups + group) * 4 + part % 4] = word;
        if (part == 0) {
            float4* scales = reinterpret_cast<float4*>(words + 8 * groups);
            scales[group] = {scale, scale * static_cast<float>(sum), scale * static_cast<float>(other),
                             scale * static_cast<float>(sum + other)};
        }
    }
}

// Values `column..column + 4` of a row that starts at a multiple of 16 bytes, zeros beyond its end.
__device__ __forceinline__ float4 four_of(const float* x, u32 columns, u32 column) {
    if (column + 4 <= columns) {
        return *reinterpret_cast<const float4*>(x + column);
    }
    return {column < columns ? x[column] : 0.0f, column + 1 < columns ? x[column + 1] : 0.0f,
            column + 2 < columns ? x[column + 2] : 0.0f, 0.0f};
}

// The product of a group's weights with its activations.
template <class F>
__device__ __forceinline__ float group_product(const Codes& codes, const uint4& first, const uint4& second,
                                               const float4& scales) {
    u32 x[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
    int dot[2] = {0, 0};
#pragma unroll
    for (int t = 0; t < 8; ++t) {
        int& sum = dot[F::PER_16 ? t / 4 : 0];
        sum = F::SIGNED ? dot4_signed(codes.words[t], x[t], sum) : dot4_unsigned(codes.words[t], x[t], sum);
    }
    constexpr float zero = static_cast<float>(F::ZERO);
    float product;
    if constexpr (F::PER_16) {
        float low = scales.x * static_cast<float>(dot[0]) - zero * scales.y;
        float high = scales.x * static_cast<float>(dot[1]) - zero * scales.z;
        product = codes.scale[0] * low + codes.scale[1] * high;
        if constexpr (F::OFFSET) {
            product += codes.offset[0] * scales.y + codes.offset[1] * scales.z;
        }
    } else {
        product = codes.scale[0] * (scales.x * static_cast<float>(dot[0]) - zero * scales.w);
        if constexpr (F::OFFSET) {
            product += codes.offset[0] * scales.w;
        }
    }
    return product;
}

// Adds to `sums[r][t]` this lane's part of row `r` times token `t`: groups `first`, `first + step` and so on. Token
// `t` is `quantized_bytes` after token `t - 1`. With few tokens two steps are loaded ahead of their use.
template <u32 type, int ROWS, int TOKENS>
__device__ __forceinline__ void dot_codes(const u8* const (&rows)[ROWS], u32 groups, u32 first, u32 step,
                                          const u8* x, float (&sums)[ROWS][TOKENS]) {
    using F = Format<type>;
    constexpr int AHEAD = TOKENS > 1 || sizeof(typename F::Raw) > 32 ? 1 : 2;
    auto take = [&](const typename F::Raw(&raw)[ROWS], u32 group) {
        Codes codes[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            F::unpack(raw[r], group, codes[r]);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            if (t % 4 == 0) {
                // Keeps the loads of four tokens behind the products of the four before, for want of registers.
                asm volatile("" ::: "memory");
            }
            Quantized token = quantized_at(x + t * quantized_bytes(groups), groups);
            uint4 low = token.first[group], high = token.second[group];
            float4 scales = token.scales[group];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                sums[r][t] += group_product<F>(codes[r], low, high, scales);
            }
        }
    };
    u32 group = first;
    for (; group + (AHEAD - 1) * step < groups; group += AHEAD * step) {
        typename F::Raw raw[AHEAD][ROWS];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                raw[a][r] = F::load(rows[r], groups, group + a * step);
            }
        }
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            take(raw[a], group + a * step);
        }
    }
    if (AHEAD > 1 && group < groups) {
        typename F::Raw raw[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            raw[r] = F::load(rows[r], groups, group);
        }
        take(raw, group);
    }
}

// Activations `[count, columns]` in single precision; tokens beyond the last are the last.
struct Values {
    const float* x;
    u32 columns;
    u32 last;
    __device__ __forceinline__ const float* token(u32 t) const { return x + (t < last ? t : last) * columns; }
};

// The same for plain floats with activations in single precision.
template <u32 type, int ROWS, int TOKENS>
__device__ __forceinline__ void dot_floats(const u8* const (&rows)[ROWS], u32 first, u32 step, const Values& x,
                                           float (&sums)[ROWS][TOKENS]) {
    using F = Format<type>;
    constexpr u32 per_load = F::PER_LOAD;
    // Rows of activations are aligned where `columns` is a multiple of 4.
    u32 loads = x.columns % 4 == 0 ? x.columns / per_load : 0;
#pragma unroll(TOKENS == 1 ? 2 : 1)
    for (u32 load = first; load < loads; load += step) {
        float weights[ROWS][per_load];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            F::unpack(load_128(rows[r] + 16 * load), weights[r]);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
            for (u32 quarter = 0; quarter < per_load; quarter += 4) {
                float4 values = *reinterpret_cast<const float4*>(x.token(t) + load * per_load + quarter);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const float* w = weights[r] + quarter;
                    sums[r][t] += w[0] * values.x + w[1] * values.y + w[2] * values.z + w[3] * values.w;
                }
            }
        }
    }
#pragma unroll 1
    for (u32 column = loads * per_load + first; column < x.columns; column += step) {
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            float value = x.token(t)[column];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                sums[r][t] += F::weight(rows[r], column) * value;
            }
        }
    }
}

// The same for codes, each weight made a float: the exact product.
template <u32 type, int ROWS, int TOKENS>
__device__ __forceinline__ void dot_exact(const u8* const (&rows)[ROWS], u32 first, u32 step, const Values& x,
                                          float (&sums)[ROWS][TOKENS]) {
    u32 groups = x.columns / 32;
    for (u32 group = first; group < groups; group += step) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float weights[32];
            group_weights<type>(rows[r], groups, group, weights);
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                const float4* values = reinterpret_cast<const float4*>(x.token(t) + 32 * group);
                float sum = 0;
#pragma unroll
                for (u32 i = 0; i < 8; ++i) {
                    float4 value = values[i];
                    sum += weights[4 * i] * value.x + weights[4 * i + 1] * value.y + weights[4 * i + 2] * value.z +
                           weights[4 * i + 3] * value.w;
                }
                sums[r][t] += sum;
            }
        }
    }
}
