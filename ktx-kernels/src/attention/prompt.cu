// Attention of many queries over an F16 or Q8_0 cache on tensor cores (sm_80 and later): prompts.
//
// Bound by arithmetic. A block of 4 warps has 64 entries (tokens x the query heads of a KV head) and walks the
// positions a page at a time; a warp has 16 entries and keeps their softmax and result in registers
// (FlashAttention-2). Keys and values have one buffer each: the next keys are copied while the second
// product runs, the next values during the first; three blocks a multiprocessor hide the rest. Queries stay
// in registers up to a head size of 128 and in shared memory above. Blocks with the most positions start
// first. Measured on an H100: 244 TFLOP/s of scores that are seen at 8,192 positions, 190 at 2,048.
//
// Rows in shared memory are padded by 16 bytes; see generate.cu.
#include "halves.cuh"

#define ENTRIES 64
#define THREADS 128
#define LEAST_PAGES 2

// Blocks of a multiprocessor at a head size of 128; more would spill registers.
#if __CUDA_ARCH__ >= 1000
#define KTX_BLOCKS 2
#else
#define KTX_BLOCKS 3
#endif

#ifdef KTX_TENSOR_CORES
template <typename T, int DK, int DV>
struct Prompt {
    static constexpr int KEY_ROW = DK + 8, VALUE_ROW = DV + 8;
    static constexpr bool QUERIES_IN_REGISTERS = DK <= 128;

    static __device__ __forceinline__ void run(const float* q, const float* sinks, T* cache, float* out,
                                               float* scratch, const Batch& batch, unsigned heads,
                                               unsigned kv_heads, float scale, unsigned window, unsigned splits) {
        wait_for_previous_kernel();
        let_next_kernel_start();
        extern __shared__ float4 shared4[];
        __half* keys = reinterpret_cast<__half*>(shared4);  // [PAGE_TOKENS, KEY_ROW]
        __half* values = keys + PAGE_TOKENS * KEY_ROW;      // [PAGE_TOKENS, VALUE_ROW]
        // [ENTRIES, KEY_ROW]; where they move on to registers, their place is the keys'.
        __half* queries = QUERIES_IN_REGISTERS ? keys : values + PAGE_TOKENS * VALUE_ROW;
        const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const unsigned kv_head = blockIdx.y, split = blockIdx.z, group = heads / kv_heads;
        const unsigned tile_index = gridDim.x - 1 - blockIdx.x;
        Tile tile;
        if (!find_tile(batch, tile_index, ENTRIES, group, tile)) return;
        const Span span = span_of(tile, group, window, splits, split, LEAST_PAGES);
        if (span.begin >= span.end) return;

        for (unsigned i = threadIdx.x; i < ENTRIES * DK / 4; i += THREADS) {
            const unsigned e = i / (DK / 4), at = i % (DK / 4) * 4;
            float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (e < tile.entries)
                x = *reinterpret_cast<const float4*>(q + head_of(tile, e, group, heads, kv_head) * DK + at);
            const float f = scale * LOG2_E;
            *reinterpret_cast<uint2*>(queries + e * KEY_ROW + at) = make_uint2(pack(x.x * f, x.y * f), pack(x.z * f, x.w * f));
        }
        __syncthreads();
        const __half* my_queries = queries + (warp * 16 + lane % 16) * KEY_ROW + lane / 16 * 8;
        unsigned held[QUERIES_IN_REGISTERS ? DK / 16 : 1][4];
        if (QUERIES_IN_REGISTERS) {
#pragma unroll
            for (int k = 0; k < DK / 16; k++) load_matrices(held[QUERIES_IN_REGISTERS ? k : 0], my_queries + k * 16);
            __syncthreads();
        }

        const unsigned k_width = kv_heads * DK, v_width = kv_heads * DV;
        auto fetch_keys = [&](unsigned position) {
            if (position >= span.end) return commit_copies();
            const Rows<T> rows = Rows<T>::keys(cache, tile.pages[position / PAGE_TOKENS], k_width, v_width);
            fetch_rows<DK, PAGE_TOKENS, THREADS>(keys, rows.skip(kv_head * DK), k_width, span.end - position, threadIdx.x);
            commit_copies();
        };
        auto fetch_values = [&](unsigned position) {
            if (position >= span.end) return commit_copies();
            const Rows<T> rows = Rows<T>::values(cache, tile.pages[position / PAGE_TOKENS], k_width, v_width);
            fetch_rows<DV, PAGE_TOKENS, THREADS>(values, rows.skip(kv_head * DV), v_width, span.end - position, threadIdx.x);
            commit_copies();
        };

        // This thread's rows of the 16 x 8 results.
        const unsigned rows[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
        const unsigned limits[2] = {limit_of(tile, min(rows[0], tile.entries - 1), group),
                                    limit_of(tile, min(rows[1], tile.entries - 1), group)};
        // Pages between these need no mask.
        const unsigned all_see = limit_of(tile, 0, group), latest = limit_of(tile, tile.entries - 1, group);
        const unsigned all_from = window <= latest ? latest - window + 1 : 0;
        float highest[2] = {-KTX_INFINITY, -KTX_INFINITY}, sum[2] = {0.0f, 0.0f};
        float acc[DV / 8][4] = {};

        fetch_keys(span.begin);
        fetch_values(span.begin);
        for (unsigned position = span.begin; position < span.end; position += PAGE_TOKENS) {
            await_copies<1>();
            __syncthreads();
            float scores[PAGE_TOKENS / 8][4] = {};
#pragma unroll(QUERIES_IN_REGISTERS ? DK / 16 : 2)
            for (int k = 0; k < DK / 16; k++) {
                unsigned a[4];
                if (QUERIES_IN_REGISTERS) {
#pragma unroll
                    for (int i = 0; i < 4; i++) a[i] = held[QUERIES_IN_REGISTERS ? k : 0][i];
                } else {
                    load_matrices(a, my_queries + k * 16);
                }
#pragma unroll
                for (int n = 0; n < PAGE_TOKENS / 16; n++) {
                    unsigned b[4];
                    load_matrices(b, keys + (n * 16 + lane / 16 * 8 + lane % 8) * KEY_ROW + k * 16 + lane / 8 % 2 * 8);
                    multiply(scores[2 * n], a, b[0], b[1]);
                    multiply(scores[2 * n + 1], a, b[2], b[3]);
                }
            }
            if (position + PAGE_TOKENS - 1 > all_see || position < all_from || position + PAGE_TOKENS > span.end) {
#pragma unroll
                for (int n = 0; n < PAGE_TOKENS / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const unsigned at = position + n * 8 + lane % 4 * 2 + i % 2;
                        scores[n][i] = (at < span.end) & sees(limits[i / 2], at, window) ? scores[n][i] : -KTX_INFINITY;
                    }
            }
            float rescale[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float most = highest[r];
#pragma unroll
                for (int n = 0; n < PAGE_TOKENS / 8; n++) most = fmaxf(most, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
                most = fmaxf(most, __shfl_xor_sync(KTX_FULL_WARP, most, 1));
                most = fmaxf(most, __shfl_xor_sync(KTX_FULL_WARP, most, 2));
                const float base = base_of(most);
                rescale[r] = fast_exp2(highest[r] - base);
                highest[r] = most;
                sum[r] *= rescale[r];
#pragma unroll
                for (int n = 0; n < PAGE_TOKENS / 8; n++) {
                    scores[n][2 * r] = fast_exp2(scores[n][2 * r] - base);
                    scores[n][2 * r + 1] = fast_exp2(scores[n][2 * r + 1] - base);
                    sum[r] += scores[n][2 * r] + scores[n][2 * r + 1];
                }
            }
            unsigned weights[PAGE_TOKENS / 16][4];
#pragma unroll
            for (int k = 0; k < PAGE_TOKENS / 16; k++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    weights[k][i] = pack(scores[2 * k + i / 2][i % 2 * 2], scores[2 * k + i / 2][i % 2 * 2 + 1]);
            __syncthreads();
            fetch_keys(position + PAGE_TOKENS);
#pragma unroll
            for (int d = 0; d < DV / 8; d++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[d][i] *= rescale[i / 2];
            await_copies<1>();
            __syncthreads();
#pragma unroll
            for (int k = 0; k < PAGE_TOKENS / 16; k++) {
#pragma unroll
                for (int d = 0; d < DV / 16; d++) {
                    unsigned b[4];
                    load_transposed(b, values + (k * 16 + lane % 16) * VALUE_ROW + d * 16 + lane / 16 * 8);
                    multiply(acc[2 * d], weights[k], b[0], b[1]);
                    multiply(acc[2 * d + 1], weights[k], b[2], b[3]);
                }
            }
            __syncthreads();
            fetch_values(position + PAGE_TOKENS);
        }
        await_copies<0>();

        // Found again rather than kept in registers through the loop.
        find_tile(batch, tile_index, ENTRIES, group, tile);
        const bool whole = span_of(tile, group, window, splits, split, LEAST_PAGES).used == 1;
        const Parts parts = part_of(scratch, ENTRIES, DV, gridDim.x, tile_index, kv_heads, kv_head, splits, split);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] += __shfl_xor_sync(KTX_FULL_WARP, sum[r], 1);
            sum[r] += __shfl_xor_sync(KTX_FULL_WARP, sum[r], 2);
            if (rows[r] >= tile.entries) continue;
            const size_t head = head_of(tile, rows[r], group, heads, kv_head);
            float factor = 1.0f;
            if (whole) {
                add_sink(sinks, (unsigned)head % heads, highest[r], sum[r], factor);
                factor /= sum[r];
            } else if (lane % 4 == 0) {
                parts.sums[2 * rows[r]] = highest[r];
                parts.sums[2 * rows[r] + 1] = sum[r];
            }
            float* to = (whole ? out + head * DV : parts.values + (size_t)rows[r] * DV) + lane % 4 * 2;
#pragma unroll
            for (int d = 0; d < DV / 8; d++)
                *reinterpret_cast<float2*>(to + d * 8) = make_float2(acc[d][2 * r] * factor, acc[d][2 * r + 1] * factor);
        }
    }
};
#define KTX_PROMPT_BODY(type, dk, dv)                                                                                  \
    Prompt<type, dk, dv>::run(q, sinks, cache, out, scratch,                                                           \
                        Batch{first_row, tokens, past, page_table, sequences, max_pages}, heads, kv_heads,      \
                        scale, window, splits);
#else
#define KTX_PROMPT_BODY(type, dk, dv)
#endif

#define KTX_PROMPT(suffix, type, dk, dv)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, dk == 128 ? KTX_BLOCKS : 1)                                                     \
        ktx_prompt_##suffix##_##dk##_##dv(const float* q, const float* sinks, type* cache, float* out,               \
                               float* scratch, const unsigned* first_row, const unsigned* tokens, const unsigned* past,          \
                               const unsigned* page_table, unsigned sequences, unsigned max_pages,                \
                               unsigned heads, unsigned kv_heads, float scale, unsigned window,                   \
                               unsigned splits) {                                                                 \
        KTX_PROMPT_BODY(type, dk, dv)                                                                             \
    }

KTX_PROMPT(f16, __half, 64, 64)
KTX_PROMPT(f16, __half, 80, 80)
KTX_PROMPT(f16, __half, 96, 96)
KTX_PROMPT(f16, __half, 128, 128)
KTX_PROMPT(f16, __half, 192, 128)
KTX_PROMPT(f16, __half, 256, 256)
KTX_PROMPT(q8_0, Q8, 64, 64)
KTX_PROMPT(q8_0, Q8, 96, 96)
KTX_PROMPT(q8_0, Q8, 128, 128)
KTX_PROMPT(q8_0, Q8, 192, 128)
KTX_PROMPT(q8_0, Q8, 256, 256)
