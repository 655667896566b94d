// The routed experts on the GPU: `out[t] = residual[t] + sum over k of weight[t, k] * down_e(act(gate_e x[t], up_e x[t]))`
// with `e = ids[t, k]`, read on the device.
//
// Few tokens (generation), bound by reading the chosen experts once, two launches: `ktx_moe_gate_up` gives a block rows
// of gate and up of one chosen expert, `ktx_moe_down` gives a warp an output and all chosen experts of its token, so
// that the weighted sum needs no second pass.
// Many tokens (prefill): `ktx_moe_sort` and `ktx_moe_tiles` group the tokens by expert, the tile product of `gemm.cuh`
// runs over the groups, and `ktx_moe_combine` adds each token's results in the order of its choices. Everything is
// counted by scans, not by atomic operations: equal inputs give equal bits.

#include "../linear/gemm.cuh"
#include "../linear/products.cuh"

namespace {

constexpr u32 MAX_WARPS = 32;

// One of the three projections: `[experts, row_count]` rows.
struct Stack {
    const u8* rows;
    // `[experts, row_count]` or null.
    const float* bias;
    u32 type;
    u32 row_count;
    u32 row_bytes;
};

struct Experts {
    Stack gate;
    Stack up;
    Stack down;
    // `[tokens, hidden]`.
    const float* x;
    // `[tokens, top_k]`.
    const u32* ids;
    const float* weights;
    // `[tokens, hidden]` or null: added; may be `out`.
    const float* residual;
    // `[tokens * top_k, intermediate]`.
    float* h;
    float* out;
    float alpha;
    float limit;
    u32 activation;
    u32 top_k;
    // The number of the first expert that `gate`, `up` and `down` hold, and how many they hold: those of a layer that is
    // computed part by part. Choices of others add nothing. Heeded by the kernels for single precision and for many tokens.
    u32 first;
    u32 experts;
};

__device__ __forceinline__ float activated(const Experts& p, float gate, float up) {
    Product product;
    product.activation = p.activation;
    product.alpha = p.alpha;
    product.limit = p.limit;
    return activated(product, gate, up);
}

// Quantises `columns` values to shared memory, by all threads.
__device__ __forceinline__ void quantize_row(void* shared, const float* x, u32 columns) {
    u32 groups = (columns + 31) / 32;
    // Whole warps, because eight lanes work together.
    for (u32 at = threadIdx.x; at < (groups * 8 + 31) / 32 * 32; at += blockDim.x) {
        quantize_quarter(shared, groups, at / 8, at % 8, four_of(x, columns, 4 * at));
    }
    __syncthreads();
}

// Asks for a row, by a warp.
__device__ __forceinline__ void prefetch_row(const u8* row, u32 bytes) {
    for (u32 at = threadIdx.x % 32 * 128; at < bytes; at += 4096) {
        prefetch_l2(row + at);
    }
}

// This lane's part of two rows of one type times one token; with `exact` every weight is made a float.
template <bool exact>
__device__ __forceinline__ void dot_two(u32 type, const u8* const (&rows)[2], const Values& x, const void* quantized,
                                        float (&sums)[2][1]) {
    u32 groups = (x.columns + 31) / 32, lane = threadIdx.x % 32;
    switch (type) {
#define KTX_CASE(TYPE)                                                                              \
    case TYPE:                                                                                      \
        if constexpr (exact) {                                                                      \
            return dot_exact<TYPE, 2, 1>(rows, lane, 32, x, sums);                                  \
        } else {                                                                                    \
            return dot_codes<TYPE, 2, 1>(rows, groups, lane, 32, static_cast<const u8*>(quantized), sums); \
        }
        KTX_CODE_TYPES(KTX_CASE)
#undef KTX_CASE
#define KTX_CASE(TYPE) \
    case TYPE: return dot_floats<TYPE, 2, 1>(rows, lane, 32, x, sums);
        KTX_FLOAT_TYPES(KTX_CASE)
#undef KTX_CASE
    }
}

template <bool exact>
__device__ __forceinline__ void gate_up(const Experts& p, u32 columns) {
    extern __shared__ uint4 shared[];
    wait_for_previous_kernel();
    let_next_kernel_start();
    u32 slot = blockIdx.y, expert = p.ids[slot], lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if constexpr (exact) {
        expert -= p.first;
        if (expert >= p.experts) {
            return;
        }
    }
    const float* x = p.x + static_cast<u64>(slot / p.top_k) * columns;
    u32 intermediate = p.gate.row_count;
    u64 first_row = static_cast<u64>(expert) * intermediate;
    u64 first = first_row + blockIdx.x * warps + threadIdx.x / 32;
    if (first < first_row + intermediate) {
        prefetch_row(p.gate.rows + first * p.gate.row_bytes, p.gate.row_bytes);
        prefetch_row(p.up.rows + first * p.up.row_bytes, p.up.row_bytes);
    }
    if (!exact && !(is_float_type(p.gate.type) && is_float_type(p.up.type))) {
        quantize_row(shared, x, columns);
    }
    Values values = {x, columns, 0};
    for (u32 row = blockIdx.x * warps + threadIdx.x / 32; row < intermediate; row += gridDim.x * warps) {
        const u8* gate = p.gate.rows + (first_row + row) * p.gate.row_bytes;
        const u8* up = p.up.rows + (first_row + row) * p.up.row_bytes;
        float sums[2][1] = {};
        // Both at once where they are of one type, else each twice: such files are rare.
        bool same = p.gate.type == p.up.type;
        const u8* rows[2] = {gate, same ? up : gate};
        dot_two<exact>(p.gate.type, rows, values, shared, sums);
        if (!same) {
            float up_sums[2][1] = {};
            const u8* up_rows[2] = {up, up};
            dot_two<exact>(p.up.type, up_rows, values, shared, up_sums);
            sums[1][0] = up_sums[0][0];
        }
        float g = warp_sum(sums[0][0]), u = warp_sum(sums[1][0]);
        if (lane == 0) {
            g += p.gate.bias ? p.gate.bias[first_row + row] : 0.0f;
            u += p.up.bias ? p.up.bias[first_row + row] : 0.0f;
            p.h[static_cast<u64>(slot) * intermediate + row] = activated(p, g, u);
        }
    }
}

// What a token chose.
struct Chosen {
    const u32* ids;
    const float* weights;
    u32 count;
    u32 first;
    u32 experts;

    // The place of a choice's expert among those that are here; none of an expert that is not.
    __device__ __forceinline__ u32 place(u32 choice) const { return ids[choice] - first; }
    __device__ __forceinline__ bool is_here(u32 choice) const { return place(choice) < experts; }
};

// This lane's part of an output: row `row` of every chosen expert times its part of `x`, weighted. The chosen experts'
// parts lie one after the other in `x`, as one long row.
template <u32 type>
__device__ __forceinline__ float down_codes(const Stack& down, const Chosen& chosen, u32 row, u32 groups, u32 lane,
                                            const void* x) {
    using F = Format<type>;
    constexpr int AHEAD = sizeof(typename F::Raw) > 32 ? 1 : 2;
    u32 all = chosen.count * groups;
    Quantized part = quantized_at(x, all);
    float sum = 0;
    u32 choice = 0, group = lane;
    auto settle = [&] {
        while (group >= groups) {
            group -= groups;
            ++choice;
        }
    };
    settle();
    for (u32 place = lane; place < all; place += AHEAD * 32) {
        typename F::Raw raw[AHEAD];
        u32 group_of[AHEAD];
        float weights[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            // Past the last choice: the first once more, for nothing.
            bool valid = choice < chosen.count;
            u32 known = valid ? choice : 0;
            group_of[a] = group;
            weights[a] = valid ? chosen.weights[known] : 0.0f;
            u64 at = static_cast<u64>(chosen.ids[known]) * down.row_count + row;
            raw[a] = F::load(down.rows + at * down.row_bytes, groups, group);
            group += 32;
            settle();
        }
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            Codes codes;
            F::unpack(raw[a], group_of[a], codes);
            u32 at = place + a * 32 < all ? place + a * 32 : 0;
            sum += weights[a] * group_product<F>(codes, part.first[at], part.second[at], part.scales[at]);
        }
    }
    return sum;
}

template <u32 type>
__device__ __forceinline__ float down_floats(const Stack& down, const Chosen& chosen, u32 row, u32 columns, u32 lane,
                                             const float* h) {
    float sum = 0;
    for (u32 choice = 0; choice < chosen.count; ++choice) {
        if (!chosen.is_here(choice)) {
            continue;
        }
        u64 at = static_cast<u64>(chosen.place(choice)) * down.row_count + row;
        const u8* rows[1] = {down.rows + at * down.row_bytes};
        float sums[1][1] = {};
        Values values = {h + static_cast<u64>(choice) * columns, columns, 0};
        if constexpr (is_float_type(type)) {
            dot_floats<type, 1, 1>(rows, lane, 32, values, sums);
        } else {
            dot_exact<type, 1, 1>(rows, lane, 32, values, sums);
        }
        sum += chosen.weights[choice] * sums[0][0];
    }
    return sum;
}

template <bool exact>
__device__ __forceinline__ void down(const Experts& p, u32 columns) {
    extern __shared__ uint4 shared[];
    wait_for_previous_kernel();
    let_next_kernel_start();
    u32 token = blockIdx.y, lane = threadIdx.x % 32, warps = blockDim.x / 32, groups = (columns + 31) / 32;
    u64 first = static_cast<u64>(token) * p.top_k;
    const float* h = p.h + first * columns;
    Chosen chosen = {p.ids + first, p.weights + first, p.top_k, p.first, p.experts};
    u32 hidden = p.down.row_count, first_row = blockIdx.x * warps + threadIdx.x / 32;
    if (first_row < hidden) {
        for (u32 choice = 0; choice < p.top_k; ++choice) {
            if (exact && !chosen.is_here(choice)) {
                continue;
            }
            u64 at = static_cast<u64>(exact ? chosen.place(choice) : chosen.ids[choice]) * hidden + first_row;
            prefetch_row(p.down.rows + at * p.down.row_bytes, p.down.row_bytes);
        }
    }
    if (!exact && !is_float_type(p.down.type)) {
        // Codes come in whole groups, so that the rows of all choices are one.
        quantize_row(shared, h, columns * p.top_k);
    }
    for (u32 row = first_row; row < hidden; row += gridDim.x * warps) {
        float sum = 0;
        switch (p.down.type) {
#define KTX_CASE(TYPE)                                                                      \
    case TYPE:                                                                              \
        sum = exact ? down_floats<TYPE>(p.down, chosen, row, columns, lane, h)              \
                    : down_codes<TYPE>(p.down, chosen, row, groups, lane, shared);          \
        break;
            KTX_CODE_TYPES(KTX_CASE)
#undef KTX_CASE
#define KTX_CASE(TYPE) \
    case TYPE: sum = down_floats<TYPE>(p.down, chosen, row, columns, lane, h); break;
            KTX_FLOAT_TYPES(KTX_CASE)
#undef KTX_CASE
        }
        if (p.down.bias) {
            for (u32 choice = lane; choice < p.top_k; choice += 32) {
                if (chosen.is_here(choice)) {
                    sum += chosen.weights[choice] * p.down.bias[static_cast<u64>(chosen.place(choice)) * hidden + row];
                }
            }
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            u64 at = static_cast<u64>(token) * hidden + row;
            p.out[at] = p.residual ? p.residual[at] + sum : sum;
        }
    }
}

}  // namespace

// Grid: (blocks per choice, tokens * top_k); shared memory: `quantized_bytes` of one token. The 64 registers of blocks of
// 1,024 threads leave 20 bytes to memory on Volta, 44 on the newest.
extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, 1)
    ktx_moe_gate_up(const __grid_constant__ Experts experts, u32 hidden) {
    gate_up<false>(experts, hidden);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    ktx_moe_gate_up_f32(const __grid_constant__ Experts experts, u32 hidden) {
    gate_up<true>(experts, hidden);
}

// Grid: (blocks per token, tokens); shared memory: `quantized_bytes` of `top_k` rows.
extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, 1)
    ktx_moe_down(const __grid_constant__ Experts experts, u32 intermediate) {
    down<false>(experts, intermediate);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    ktx_moe_down_f32(const __grid_constant__ Experts experts, u32 intermediate) {
    down<true>(experts, intermediate);
}

// Groups `slots` choices by expert, keeping their order: `starts[e]` is where expert `first + e`'s group starts (and
// one more where the last ends), `order` the token at each position, `positions` where each choice went.
// A block per expert, 256 threads: each reads all ids, 4 bytes a choice from L2.
extern "C" __global__ void __launch_bounds__(256)
    ktx_moe_sort(u32* starts, u32* order, u32* positions, const u32* ids, u32 slots, u32 top_k, u32 first) {
    __shared__ u32 warp_counts[8];
    __shared__ u32 lower[8];
    u32 expert = first + blockIdx.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    u32 below = 0;
    for (u32 slot = thread; slot < slots; slot += 256) {
        below += ids[slot] < expert ? 1 : 0;
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        below += __shfl_xor_sync(FULL_WARP, below, distance);
    }
    if (lane == 0) {
        lower[warp] = below;
    }
    __syncthreads();
    u32 next = 0;
    for (u32 w = 0; w < 8; ++w) {
        next += lower[w];
    }
    if (thread == 0) {
        starts[blockIdx.x] = next;
    }
    for (u32 base = 0; base < slots; base += 256) {
        u32 slot = base + thread;
        bool mine = slot < slots && ids[slot] == expert;
        u32 votes = __ballot_sync(FULL_WARP, mine);
        if (lane == 0) {
            warp_counts[warp] = __popc(votes);
        }
        __syncthreads();
        u32 position = next;
        for (u32 w = 0; w < 8; ++w) {
            position += w < warp ? warp_counts[w] : 0;
            next += warp_counts[w];
        }
        if (mine) {
            position += __popc(votes & ((1u << lane) - 1));
            order[position] = slot / top_k;
            positions[slot] = position;
        }
        __syncthreads();
    }
    if (thread == 0 && blockIdx.x + 1 == gridDim.x) {
        starts[gridDim.x] = next;
    }
}

// Cuts the groups into tiles of up to `tile_tokens`; the rest of `tiles` gets a count of zero. One block of 1,024.
extern "C" __global__ void __launch_bounds__(1024)
    ktx_moe_tiles(TokenTile* tiles, const u32* starts, u32 experts, u32 tile_tokens, u32 max_tiles) {
    __shared__ u32 totals[32];
    u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    u32 before = 0;
    for (u32 base = 0; base < experts; base += 1024) {
        u32 expert = base + thread;
        u32 first = expert < experts ? starts[expert] : 0;
        u32 count = expert < experts ? starts[expert + 1] - first : 0;
        u32 own = (count + tile_tokens - 1) / tile_tokens, sum = own;
        for (u32 distance = 1; distance < 32; distance *= 2) {
            u32 other = __shfl_up_sync(FULL_WARP, sum, distance);
            sum += lane >= distance ? other : 0;
        }
        if (lane == 31) {
            totals[warp] = sum;
        }
        __syncthreads();
        u32 at = before + sum - own;
        for (u32 w = 0; w < 32; ++w) {
            at += w < warp ? totals[w] : 0;
            before += totals[w];
        }
        for (u32 tile = 0; tile < own; ++tile) {
            u32 done = tile * tile_tokens;
            tiles[at + tile] = {expert, first + done, count - done < tile_tokens ? count - done : tile_tokens, 0};
        }
        __syncthreads();
    }
    for (u32 tile = before + thread; tile < max_tiles; tile += 1024) {
        tiles[tile] = {0, 0, 0, 0};
    }
}

// `out[t] = residual[t] + sum over k of weights[t, k] * y[positions[t, k]]`, four columns a thread, over the choices of
// experts `first` up to `first + experts`.
// Grid: (columns / 1024 rounded up, tokens), 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    ktx_moe_combine(float* out, const float* y, const float* weights, const u32* ids, const u32* positions,
                    const float* residual, u32 columns, u32 top_k, u32 first, u32 experts) {
    u32 column = (blockIdx.x * 256 + threadIdx.x) * 4, token = blockIdx.y;
    if (column >= columns) {
        return;
    }
    u64 at = static_cast<u64>(token) * columns + column;
    u32 width = columns - column < 4 ? columns - column : 4;
    float sums[4] = {};
    for (u32 choice = 0; choice < top_k; ++choice) {
        u32 slot = token * top_k + choice;
        if (ids[slot] - first >= experts) {
            continue;
        }
        float weight = weights[slot];
        const float* from = y + static_cast<u64>(positions[slot]) * columns + column;
        if (columns % 4 == 0) {
            float4 four = *reinterpret_cast<const float4*>(from);
            sums[0] += weight * four.x;
            sums[1] += weight * four.y;
            sums[2] += weight * four.z;
            sums[3] += weight * four.w;
        } else {
            for (u32 i = 0; i < 4; ++i) {
                sums[i] += i < width ? weight * from[i] : 0.0f;
            }
        }
    }
    for (u32 i = 0; i < 4; ++i) {
        if (i < width) {
            out[at + i] = residual ? residual[at + i] + sums[i] : sums[i];
        }
    }
}

// Parts choices between the experts in the GPU's slots and those in main memory. `slots[e]` is the slot of expert `e`, 0
// if it has none: slot 0 holds nothing, and is taken with weight 0. Choices of experts with a slot are marked with the
// highest bit for the CPU, which then leaves them out.
extern "C" __global__ void __launch_bounds__(256)
    ktx_moe_split(u32* here, float* here_weights, u32* elsewhere, const u32* ids, const float* weights, const u32* slots,
                  u32 experts, u32 choices) {
    u32 choice = blockIdx.x * 256 + threadIdx.x;
    if (choice >= choices) {
        return;
    }
    u32 expert = ids[choice], slot = expert < experts ? slots[expert] : 0;
    here[choice] = slot;
    here_weights[choice] = slot ? weights[choice] : 0.0f;
    elsewhere[choice] = slot ? expert | 0x80000000u : expert;
}
