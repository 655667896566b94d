// Weights as the GPU keeps them, and how they are read.
//
// A GGUF block mixes codes, scales and odd sizes (18, 34, 210 bytes), which no aligned 16-byte load can read. At
// upload `repack.cu` regroups every row, without loss, into planes: first the low bits of the codes, 32 columns
// ("a group") after another, then their high bits, then the scales. In every plane of low bits byte `i` of a group
// holds column `i` in its low half and column `16 + i` in its high half, so that word `t` unpacks to columns
// `4t..4t+3` and `16+4t..16+4t+3`, which is the order of the quantised activations.
// A row ends with one `f32`, a power of two that brings its weights into the middle of the range of halves, and is
// padded to a multiple of 16 bytes.
//
// Every format is `weight = scale * (code - ZERO) + offset` with a scale per 32 or 16 columns, or plain floats.
#pragma once

#include "ptx.cuh"
#include <cuda_fp16.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// The numbers of the types in GGUF files.
enum Type : u32 {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ4_NL = 20,
    IQ4_XS = 23,
    BF16 = 30,
    MXFP4 = 39,
};

// Calls `CASE(type)` of the one type that `type` is, for the types whose weights are codes.
#define KTX_CODE_TYPES(CASE) \
    CASE(Q4_0) CASE(Q4_1) CASE(Q5_0) CASE(Q5_1) CASE(Q8_0) CASE(Q2_K) CASE(Q3_K) CASE(Q4_K) CASE(Q5_K) CASE(Q6_K) \
    CASE(IQ4_NL) CASE(IQ4_XS) CASE(MXFP4)
#define KTX_FLOAT_TYPES(CASE) CASE(F32) CASE(F16) CASE(BF16)

__device__ __forceinline__ float half_bits(u32 bits) { return __half2float(__ushort_as_half(static_cast<u16>(bits))); }

__device__ __forceinline__ float bf16_bits(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ u32 load_u32(const u8* at) { return __ldg(reinterpret_cast<const u32*>(at)); }
__device__ __forceinline__ u32 load_u16(const u8* at) { return __ldg(reinterpret_cast<const u16*>(at)); }
__device__ __forceinline__ u32 load_u8(const u8* at) { return __ldg(at); }
__device__ __forceinline__ uint2 load_64(const u8* at) { return __ldg(reinterpret_cast<const uint2*>(at)); }
__device__ __forceinline__ uint4 load_128(const u8* at) { return __ldg(reinterpret_cast<const uint4*>(at)); }

// 32 weights: `scale[h] * (code - ZERO) + offset[h]` in columns `16 h..16 h + 15`.
struct Codes {
    // Words 0-3: columns 0-15, words 4-7: columns 16-31, a byte each.
    u32 words[8];
    float scale[2];
    float offset[2];
};

// What the kernels ask of a format. `Raw` is what is loaded for a group, kept packed so that loads can be ahead of
// their use without holding many registers.
//   SIGNED: codes are signed bytes.   ZERO: what is subtracted from codes.
//   PER_16: two scales in a group.    OFFSET: weights have offsets.
template <u32 type>
struct Format;

struct CodeFormat {
    static constexpr bool SIGNED = false;
    static constexpr int ZERO = 0;
    static constexpr bool PER_16 = false;
    static constexpr bool OFFSET = false;
};

// Codes from 4 bits each.
__device__ __forceinline__ void unpack_4(const uint4& low, u32 (&words)[8]) {
    u32 packed[4] = {low.x, low.y, low.z, low.w};
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        words[t] = packed[t] & 0x0f0f0f0fu;
        words[4 + t] = packed[t] >> 4 & 0x0f0f0f0fu;
    }
}

// `bits` moved left, or right where `by` is negative.
template <int by>
__device__ __forceinline__ u32 moved(u32 bits) {
    if constexpr (by >= 0) {
        return bits << by;
    } else {
        return bits >> -by;
    }
}

// Adds bit `position` of the codes: bit `8 b + t` of `high` is that of column `4 t + b`, bit `8 b + 4 + t` that of
// column `16 + 4 t + b`.
template <int position, int t = 0>
__device__ __forceinline__ void add_high_bit(u32 high, u32 (&words)[8]) {
    if constexpr (t < 8) {
        words[t] |= moved<position - t>(high) & (0x01010101u << position);
        add_high_bit<position, t + 1>(high, words);
    }
}

// Adds two bits from `position` on: bits `8 b + 2 t` and up of `high.x` are those of column `4 t + b`, `high.y` holds
// columns 16-31.
template <int position, int t = 0>
__device__ __forceinline__ void add_two_bits(const uint2& high, u32 (&words)[8]) {
    if constexpr (t < 4) {
        words[t] |= moved<position - 2 * t>(high.x) & (0x03030303u << position);
        words[4 + t] |= moved<position - 2 * t>(high.y) & (0x03030303u << position);
        add_two_bits<position, t + 1>(high, words);
    }
}

// Signed levels that the eight halves of bytes in `indices` name, in `low` and `high`.
__device__ __forceinline__ void look_up(u32 indices, const u32 (&levels)[4], u32& low, u32& high) {
    u32 upper = 0x32103210u | (indices & 0x88888888u) >> 1;
    u32 index = indices & 0x77777777u;
    u32 first = __byte_perm(__byte_perm(levels[0], levels[1], index), __byte_perm(levels[2], levels[3], index), upper);
    index >>= 16;
    upper >>= 16;
    u32 second = __byte_perm(__byte_perm(levels[0], levels[1], index), __byte_perm(levels[2], levels[3], index), upper);
    low = __byte_perm(first, second, 0x6420);
    high = __byte_perm(first, second, 0x7531);
}

__device__ __forceinline__ void unpack_levels(const uint4& low, const u32 (&levels)[4], u32 (&words)[8]) {
    look_up(low.x, levels, words[0], words[4]);
    look_up(low.y, levels, words[1], words[5]);
    look_up(low.z, levels, words[2], words[6]);
    look_up(low.w, levels, words[3], words[7]);
}

// -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113
#define KTX_IQ4_LEVELS {0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u}
// 0, 1, 2, 3, 4, 6, 8, 12 and the same negated
#define KTX_MXFP4_LEVELS {0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu}

__device__ __forceinline__ void one_scale(Codes& codes, float scale) { codes.scale[0] = codes.scale[1] = scale; }
__device__ __forceinline__ void one_offset(Codes& codes, float offset) {
    codes.offset[0] = codes.offset[1] = offset;
}

template <>
struct Format<Q4_0> : CodeFormat {
    static constexpr int ZERO = 8;
    struct Raw {
        uint4 low;
        u32 d;
    };
    static __device__ __forceinline__ u32 bytes(u32 groups) { return 18 * groups; }
    static __device__ __forceinline__ Raw load(const u8* row, u32 groups, u32 group) {
        return {load_128(row + 16 * group), load_u16(row + 16 * groups + 2 * group)};
    }
    static __device__ __forceinline__ void unpack(const Raw& raw, u32, Codes& codes) {
        unpack_4(raw.low, codes.words);
        one_scale(codes, half_bits(raw.d));
    }
};

template <>
struct Format<Q4_1> : CodeFormat {
    static constexpr bool OFFSET = true;
    struct Raw {
        uint4 low;
        u32 dm;
    };
    static __device__ __forceinline__ u32 bytes(u32 groups) { return 20 * groups; }
    static __device__ __forceinline__ Raw load(const u8* row, u32 groups, u32 group) {
        return {load_128(row + 16 * group), load_u32(row + 16 * groups + 4 * group)};
    }
    static __device__ __forceinline__ void unpack(const Raw& raw, u32, Codes& codes) {
        unpack_4(raw.low, codes.words);
        one_scale(codes, half_bits(raw.dm));
        one_offset(codes, half_bits(raw.dm >> 16));
    }
};

template <>
struct Format<Q5_0> : CodeFormat {
    static constexpr int ZERO = 16;
    struct Raw {
        uint4 low;
        u32 high;
        u32 d;
    };
    static __device__ __forceinline__ u32 bytes(u32 groups) { return 22 * groups; }
    static __device__ __forceinline__ Raw load(const u8* row, u32 groups, u32 group) {
        return {load_128(row + 16 * group), load_u32(row + 16 * groups + 4 * group),
                load_u16(row + 20 * groups + 2 * group)};
    }
    static __device__ __forceinline__ void unpack(const Raw& raw, u32, Codes& codes) {
        unpack_4(raw.low, codes.words);
        add_high_bit<4>(raw.high, codes.words);
        one_scale(codes, half_bits(raw.d));
    }
};

template <>
struct Format<Q5_1> : CodeFormat {
    static constexpr bool OFFSET = true;
    struct Raw {
        uint4 low;
        u32 high;
        u32 dm;
    };
    static __device__ __forceinline__ u32 bytes(u32 groups) { return 24 * groups; }
    static __device__ __forceinline__ Raw load(const u8* row, u32 groups, u32 group) {
        return {load_128(row + 16 * group), load_u32(row + 16 * groups + 4 * group),
                load_u32(row + 20 * groups + 4 * group)};
    }
    static __device__ __forceinline__ void unpack(const Raw& raw, u32, Codes& codes) {
        unpack_4(raw.low, codes.words);
        add_high_bit<4>(raw.high, codes.words);
        one_scale(codes, half_bits(raw.dm));
        one_offset(codes, half_bits(raw.dm >> 16));
    }
};

template <>
struct Format<Q8_0> : CodeFormat {
    static constexpr bool SIGNED = true;
    struct Raw {
        uint4 first;
        uint4 second;
        u32 d;
    };
    static __device__ __forceinline__ u32 bytes(u32 groups) { return 34 * groups; }
    static __device__ __forceinline__ Raw load(const u8* row, u32 groups, u32 group) {
        return {load_128(row + 32 * group), load_128(row + 32 * group + 16), load_u16(row + 32 * groups + 2 * group)};
    }
    static __device__ __forceinline__ void unpack(const Raw& raw, u32, Codes& codes) {
        u32 words[8] = {raw.first.x,  raw.first.y,  raw.first.z,  raw.first.w,
                        raw.second.x, raw.second.y, raw.second.z, raw.second.w};
#pragma unroll
        for (int t = 0; t < 8; ++t) {
            codes.words[t] = words[t];
        }
        one_scale(codes, half_bits(raw.d));
    }
};

// Planes: low bits, (d, dmin) per 256, a byte per 16 with the scale in its low half.
template <>
struct Format<Q2_K> : CodeFormat {
    static constexpr bool PER_16 = true;
    static constexpr bool OFFSET = true;
    struct Raw {
        uint2 low;
        u32 d_min;
        u32 scales;
    };
    static __device__ __forceinline__ u32 bytes(u32 groups) { return 8 * groups + groups / 2 + 2 * groups; }
    static __device__ __forceinline__ Raw load(const u8* row, u32 groups, u32 group) {
        return {load_64(row + 8 * group), load_u32(row + 8 * groups + group / 8 * 4),
                load_u16(row + 8 * groups + groups / 2 + 2 * group)};
    }
    static __device__ __forceinline__ void unpack(const Raw& raw, u32, Codes& codes) {
#pragma unroll
        for (int t = 0; t < 8; ++t) {
            codes.words[t] = 0;
        }
        add_two_bits<0>(raw.low, codes.words);
        float d = half_bits(raw.d_min), min = half_bits(raw.d_min >> 16);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            codes.scale[half] = d * static_cast<float>(raw.scales >> 8 * half & 15);
            codes.offset[half] = -min * static_cast<float>(raw.scales >> (8 * half + 4) & 15);
        }
    }
};

// Planes: low bits, high bits, upper bits of the scales (4 per group), lower bits (8 per group), d per 256.
template <>
struct Format<Q3_K> : CodeFormat {
    static constexpr int ZERO = 4;
    static constexpr bool PER_16 = true;
    struct Raw {
        uint2 low;
        u32 high;
        u32 scales;
        u32 d;
    };
    static __device__ __forceinline__ u32 bytes(u32 groups) { return 12 * groups + groups / 8 * 14; }
    static __device__ __forceinline__ Raw load(const u8* row, u32 groups, u32 group) {
        const u8* scales = row + 12 * groups;
        u32 upper = load_u8(scales + group / 2) >> group % 2 * 4 & 15;
        u32 lower = load_u8(scales + groups / 2 + group);
        return {load_64(row + 8 * group), load_u32(row + 8 * groups + 4 * group), upper << 8 | lower,
                load_u16(scales + groups / 2 + groups + group / 8 * 2)};
    }
    static __device__ __forceinline__ void unpack(const Raw& raw, u32, Codes& codes) {
#pragma unroll
        for (int t = 0; t < 8; ++t) {
            codes.words[t] = 0;
        }
        add_two_bits<0>(raw.low, codes.words);
        add_high_bit<2>(raw.high, codes.words);
        float d = half_bits(raw.d);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int scale = raw.scales >> 4 * half & 15 | (raw.scales >> (8 + 2 * half) & 3) << 4;
            codes.scale[half] = d * static_cast<float>(scale - 32);
        }
    }
};

// Scale and minimum number `group % 8` of Q4_K and Q5_K; `header` is d, dmin and the packed scales.
__device__ __forceinline__ void k_scales(const uint4& header, u32 group, Codes& codes) {
    u32 shift = group % 4 * 8;
    u32 a = header.y >> shift, b = header.z >> shift, c = header.w >> shift;
    bool lower = (group & 4) == 0;
    u32 scale = lower ? a & 63 : (c & 15) | (a >> 2 & 48);
    u32 min = lower ? b & 63 : (c >> 4 & 15) | (b >> 2 & 48);
    one_scale(codes, half_bits(header.x) * static_cast<float>(scale));
    one_offset(codes, -half_bits(header.x >> 16) * static_cast<float>(min));
}

template <>
struct Format<Q4_K> : CodeFormat {
    static constexpr bool OFFSET = true;
    struct Raw {
        uint4 low;
        uint4 header;
    };
    static __device__ __forceinline__ u32 bytes(u32 groups) { return 18 * groups; }
    static __device__ __forceinline__ Raw load(const u8* row, u32 groups, u32 group) {
        return {load_128(row + 16 * group), load_128(row + 16 * groups + group / 8 * 16)};
    }
    static __device__ __forceinline__ void unpack(const Raw& raw, u32 group, Codes& codes) {
        unpack_4(raw.low, codes.words);
        k_scales(raw.header, group, codes);
    }
};

template <>
struct Format<Q5_K> : CodeFormat {
    static constexpr bool OFFSET = true;
    struct Raw {
        uint4 low;
        uint4 header;
        u32 high;
    };
    static __device__ __forceinline__ u32 bytes(u32 groups) { return 22 * groups; }
    static __device__ __forceinline__ Raw load(const u8* row, u32 groups, u32 group) {
        return {load_128(row + 16 * group), load_128(row + 16 * groups + group / 8 * 16),
                load_u32(row + 18 * groups + 4 * group)};
    }
    static __device__ __forceinline__ void unpack(const Raw& raw, u32 group, Codes& codes) {
        unpack_4(raw.low, codes.words);
        add_high_bit<4>(raw.high, codes.words);
        k_scales(raw.header, group, codes);
    }
};

// Planes: low bits, high bits, a signed scale per 16, d per 256.
template <>
struct Format<Q6_K> : CodeFormat {
    static constexpr int ZERO = 32;
    static constexpr bool PER_16 = true;
    struct Raw {
        uint4 low;
        uint2 high;
        u32 scales;
        u32 d;
    };
    static __device__ __forceinline__ u32 bytes(u32 groups) { return 26 * groups + groups / 8 * 2; }
    static __device__ __forceinline__ Raw load(const u8* row, u32 groups, u32 group) {
        return {load_128(row + 16 * group), load_64(row + 16 * groups + 8 * group),
                load_u16(row + 24 * groups + 2 * group), load_u16(row + 26 * groups + group / 8 * 2)};
    }
    static __device__ __forceinline__ void unpack(const Raw& raw, u32, Codes& codes) {
        unpack_4(raw.low, codes.words);
        add_two_bits<4>(raw.high, codes.words);
        float d = half_bits(raw.d);
        codes.scale[0] = d * static_cast<float>(static_cast<signed char>(raw.scales));
        codes.scale[1] = d * static_cast<float>(static_cast<signed char>(raw.scales >> 8));
    }
};

template <>
struct Format<IQ4_NL> : CodeFormat {
    static constexpr bool SIGNED = true;
    struct Raw {
        uint4 low;
        u32 d;
    };
    static __device__ __forceinline__ u32 bytes(u32 groups) { return 18 * groups; }
    static __device__ __forceinline__ Raw load(const u8* row, u32 groups, u32 group) {
        return {load_128(row + 16 * group), load_u16(row + 16 * groups + 2 * group)};
    }
    static __device__ __forceinline__ void unpack(const Raw& raw, u32, Codes& codes) {
        const u32 levels[4] = KTX_IQ4_LEVELS;
        unpack_levels(raw.low, levels, codes.words);
        one_scale(codes, half_bits(raw.d));
    }
};

template <>
struct Format<IQ4_XS> : CodeFormat {
    static constexpr bool SIGNED = true;
    struct Raw {
        uint4 low;
        uint2 header;
    };
    static __device__ __forceinline__ u32 bytes(u32 groups) { return 17 * groups; }
    static __device__ __forceinline__ Raw load(const u8* row, u32 groups, u32 group) {
        return {load_128(row + 16 * group), load_64(row + 16 * groups + group / 8 * 8)};
    }
    static __device__ __forceinline__ void unpack(const Raw& raw, u32 group, Codes& codes) {
        const u32 levels[4] = KTX_IQ4_LEVELS;
        unpack_levels(raw.low, levels, codes.words);
        u32 index = group % 8;
        int scale = (raw.header.y >> 4 * index & 15) | (raw.header.x >> (16 + 2 * index) & 3) << 4;
        one_scale(codes, half_bits(raw.header.x) * static_cast<float>(scale - 32));
    }
};

template <>
struct Format<MXFP4> : CodeFormat {
    static constexpr bool SIGNED = true;
    struct Raw {
        uint4 low;
        u32 exponent;
    };
    static __device__ __forceinline__ u32 bytes(u32 groups) { return 17 * groups; }
    static __device__ __forceinline__ Raw load(const u8* row, u32 groups, u32 group) {
        return {load_128(row + 16 * group), load_u8(row + 16 * groups + group)};
    }
    static __device__ __forceinline__ void unpack(const Raw& raw, u32, Codes& codes) {
        const u32 levels[4] = KTX_MXFP4_LEVELS;
        unpack_levels(raw.low, levels, codes.words);
        // Half of the block's scale, because the levels are doubled; the two smallest are subnormal.
        u32 e = raw.exponent;
        one_scale(codes, __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23));
    }
};

// Plain floats: `PER_LOAD` columns in 16 bytes.
template <>
struct Format<F32> {
    static constexpr u32 PER_LOAD = 4;
    static __device__ __forceinline__ u32 bytes(u32 groups) { return 128 * groups; }
    static __device__ __forceinline__ float weight(const u8* row, u32 column) { return __uint_as_float(load_u32(row + 4 * column)); }
    static __device__ __forceinline__ void unpack(const uint4& raw, float (&weights)[PER_LOAD]) {
        weights[0] = __uint_as_float(raw.x);
        weights[1] = __uint_as_float(raw.y);
        weights[2] = __uint_as_float(raw.z);
        weights[3] = __uint_as_float(raw.w);
    }
};

template <>
struct Format<F16> {
    static constexpr u32 PER_LOAD = 8;
    static __device__ __forceinline__ u32 bytes(u32 groups) { return 64 * groups; }
    static __device__ __forceinline__ float weight(const u8* row, u32 column) { return half_bits(load_u16(row + 2 * column)); }
    static __device__ __forceinline__ void unpack(const uint4& raw, float (&weights)[PER_LOAD]) {
        u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            weights[2 * t] = half_bits(words[t]);
            weights[2 * t + 1] = half_bits(words[t] >> 16);
        }
    }
};

template <>
struct Format<BF16> {
    static constexpr u32 PER_LOAD = 8;
    static __device__ __forceinline__ u32 bytes(u32 groups) { return 64 * groups; }
    static __device__ __forceinline__ float weight(const u8* row, u32 column) { return bf16_bits(load_u16(row + 2 * column)); }
    static __device__ __forceinline__ void unpack(const uint4& raw, float (&weights)[PER_LOAD]) {
        u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            weights[2 * t] = bf16_bits(words[t]);
            weights[2 * t + 1] = __uint_as_float(words[t] & 0xffff0000u);
        }
    }
};

constexpr __host__ __device__ bool is_float_type(u32 type) { return type == F32 || type == F16 || type == BF16; }

// The byte of a row where its power of two lies, and the bytes of a row.
template <u32 type>
__device__ __forceinline__ u32 factor_at(u32 groups) {
    return (Format<type>::bytes(groups) + 3) / 4 * 4;
}

// The weights of a group as floats.
template <u32 type>
__device__ __forceinline__ void group_weights(const u8* row, u32 groups, u32 group, float (&weights)[32]) {
    if constexpr (is_float_type(type)) {
        constexpr u32 per_load = Format<type>::PER_LOAD;
#pragma unroll
        for (u32 first = 0; first < 32; first += per_load) {
            float part[per_load];
            Format<type>::unpack(load_128(row + (32 * group + first) * (16 / per_load)), part);
#pragma unroll
            for (u32 i = 0; i < per_load; ++i) {
                weights[first + i] = part[i];
            }
        }
    } else {
        using F = Format<type>;
        Codes codes;
        F::unpack(F::load(row, groups, group), group, codes);
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            u32 byte = codes.words[i / 4] >> i % 4 * 8 & 255;
            int code = F::SIGNED ? static_cast<signed char>(byte) : static_cast<int>(byte) - F::ZERO;
            float weight = codes.scale[i / 16] * static_cast<float>(code);
            weights[i] = F::OFFSET ? weight + codes.offset[i / 16] : weight;
        }
    }
}
