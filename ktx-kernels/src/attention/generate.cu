// Attention of few queries over an F16 or Q8_0 cache on tensor cores (sm_80 and later): generation.
//
// Bound by reading the cache once for each KV head. A block has up to 16 entries (all query heads of a KV
// head, of one or a few tokens) and a part of the positions; the grid has enough parts to fill the GPU, and the
// last block of a tile to finish puts them together. Every warp works for itself: it takes 16 positions at a time (4 KB of
// keys and as much of values at a head size of 128), copies them to its own ring of `stages` buffers without
// waiting, and keeps a softmax of its own. The warps' results meet in shared memory at the end.
//
// Rows in shared memory are padded by 16 bytes, which makes the eight rows of a matrix fall into different
// banks for every head size that is a multiple of 16.
#include "halves.cuh"

#define ENTRIES 16
#define GROUP_TOKENS 16
#define MOST_WARPS 8
#define MOST_THREADS (32 * MOST_WARPS)
// A warp's 16 positions for each of 8 warps.
#define LEAST_PAGES 2
#define MOST_PARTS 320

// Blocks of each tile that have left their part; back at 0 when the last has.
__device__ unsigned arrived[MOST_PARTS];

#ifdef KTX_TENSOR_CORES
template <typename T, int DK, int DV>
struct Generate {
    static constexpr int KEY_ROW = DK + 8, VALUE_ROW = DV + 8;
    static constexpr int STAGE = GROUP_TOKENS * (KEY_ROW + VALUE_ROW);

    // Copies 16 positions' keys and values of one head.
    static __device__ __forceinline__ void fetch(__half* stage, T* cache, const Tile& tile,
                                                 unsigned position, unsigned end, unsigned kv_heads,
                                                 unsigned kv_head, unsigned lane) {
        const unsigned k_width = kv_heads * DK, v_width = kv_heads * DV;
        const unsigned page = tile.pages[position / PAGE_TOKENS], slot = position % PAGE_TOKENS;
        const Rows<T> keys = Rows<T>::keys(cache, page, k_width, v_width).skip((size_t)slot * k_width + kv_head * DK);
        const Rows<T> values = Rows<T>::values(cache, page, k_width, v_width).skip((size_t)slot * v_width + kv_head * DV);
        fetch_rows<DK, GROUP_TOKENS, 32>(stage, keys, k_width, end - position, lane);
        fetch_rows<DV, GROUP_TOKENS, 32>(stage + GROUP_TOKENS * KEY_ROW, values, v_width, end - position, lane);
    }

    static __device__ __forceinline__ void run(const float* q, const float* sinks, T* cache, float* out,
                                               float* scratch, const Batch& batch, unsigned heads,
                                               unsigned kv_heads, float scale, unsigned window, unsigned splits,
                                               unsigned stages) {
        wait_for_previous_kernel();
        let_next_kernel_start();
        extern __shared__ float4 shared4[];
        __shared__ float maxima[MOST_WARPS][ENTRIES], sums[MOST_WARPS][ENTRIES];
        __shared__ unsigned places[ENTRIES], last_seen[ENTRIES];
        __half* queries = reinterpret_cast<__half*>(shared4);  // [ENTRIES, KEY_ROW]
        const unsigned warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const unsigned kv_head = blockIdx.y, split = blockIdx.z, group = heads / kv_heads;
        __half* ring = queries + ENTRIES * KEY_ROW + (size_t)warp * stages * STAGE;
        Tile tile;
        if (!find_tile(batch, blockIdx.x, ENTRIES, group, tile)) return;
        const Span span = span_of(tile, group, window, splits, split, LEAST_PAGES);
        if (span.begin >= span.end) return;

        const unsigned step = warps * GROUP_TOKENS, first = span.begin + warp * GROUP_TOKENS;
        unsigned fetched = first, to_fetch = 0;
        auto fetch_next = [&]() {
            if (fetched < span.end) fetch(ring + to_fetch * STAGE, cache, tile, fetched, span.end, kv_heads, kv_head, lane);
            commit_copies();
            fetched += step;
            to_fetch = to_fetch + 1 == stages ? 0 : to_fetch + 1;
        };
        fetch_next();
        // What needs a division, once for each entry.
        if (threadIdx.x < ENTRIES) {
            const unsigned e = min(threadIdx.x, tile.entries - 1);
            places[threadIdx.x] = head_of(tile, e, group, heads, kv_head);
            last_seen[threadIdx.x] = limit_of(tile, e, group);
        }
        __syncthreads();
#pragma unroll 2
        for (unsigned i = threadIdx.x; i < ENTRIES * DK / 4; i += blockDim.x) {
            const unsigned e = i / (DK / 4), at = i % (DK / 4) * 4;
            float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (e < tile.entries) x = *reinterpret_cast<const float4*>(q + (size_t)places[e] * DK + at);
            const float f = scale * LOG2_E;
            *reinterpret_cast<uint2*>(queries + e * KEY_ROW + at) = make_uint2(pack(x.x * f, x.y * f), pack(x.z * f, x.w * f));
        }
        __syncthreads();

        // This thread's rows of the 16 x 8 results: entries `lane / 4` and 8 further.
        const unsigned limits[2] = {last_seen[lane / 4], last_seen[lane / 4 + 8]};
        float highest[2] = {-KTX_INFINITY, -KTX_INFINITY}, sum[2] = {0.0f, 0.0f};
        float acc[DV / 8][4] = {};
        unsigned stage = 0, ahead = 1;
        for (unsigned position = first; position < span.end;) {
            __syncwarp();
            fetch_next();
            // One place for the copies, so that the code is short: the first rounds only fill the ring.
            if (++ahead < stages) continue;
            if (stages == 2) await_copies<1>();
            else if (stages == 3) await_copies<2>();
            else await_copies<3>();
            __syncwarp();
            const __half *keys = ring + stage * STAGE, *values = keys + GROUP_TOKENS * KEY_ROW;
            stage = stage + 1 == stages ? 0 : stage + 1;
            const unsigned at_first = position;
            position += step;

            // Two chains of sums each, since a multiplication takes longer than its issue.
            float scores[2][4] = {}, odd[2][4] = {};
#pragma unroll
            for (int k = 0; k < DK / 16; k++) {
                unsigned a[4], b[4];
                load_matrices(a, queries + (lane % 16) * KEY_ROW + k * 16 + lane / 16 * 8);
                load_matrices(b, keys + (lane / 16 * 8 + lane % 8) * KEY_ROW + k * 16 + lane / 8 % 2 * 8);
                multiply(k % 2 ? odd[0] : scores[0], a, b[0], b[1]);
                multiply(k % 2 ? odd[1] : scores[1], a, b[2], b[3]);
            }
            float most[2] = {highest[0], highest[1]};
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    scores[n][i] += odd[n][i];
                    const unsigned at = at_first + n * 8 + lane % 4 * 2 + i % 2;
                    scores[n][i] = (at < span.end) & sees(limits[i / 2], at, window) ? scores[n][i] : -KTX_INFINITY;
                    most[i / 2] = fmaxf(most[i / 2], scores[n][i]);
                }
            float rescale[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                most[r] = fmaxf(most[r], __shfl_xor_sync(KTX_FULL_WARP, most[r], 1));
                most[r] = fmaxf(most[r], __shfl_xor_sync(KTX_FULL_WARP, most[r], 2));
                rescale[r] = fast_exp2(highest[r] - base_of(most[r]));
                highest[r] = most[r];
                sum[r] *= rescale[r];
            }
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    scores[n][i] = fast_exp2(scores[n][i] - base_of(highest[i / 2]));
                    sum[i / 2] += scores[n][i];
                }
            const unsigned p[4] = {pack(scores[0][0], scores[0][1]), pack(scores[0][2], scores[0][3]),
                                   pack(scores[1][0], scores[1][1]), pack(scores[1][2], scores[1][3])};
#pragma unroll
            for (int d = 0; d < DV / 8; d++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[d][i] *= rescale[i / 2];
#pragma unroll
            for (int d = 0; d < DV / 16; d++) {
                unsigned b[4];
                load_transposed(b, values + (lane % 16) * VALUE_ROW + d * 16 + lane / 16 * 8);
                multiply(acc[2 * d], p, b[0], b[1]);
                multiply(acc[2 * d + 1], p, b[2], b[3]);
            }
        }
        await_copies<0>();
        join_warps(acc, highest, sum, maxima, sums, places, tile, sinks, out,
                   part_of(scratch, ENTRIES, DV, gridDim.x, blockIdx.x, kv_heads, kv_head, splits, split), heads,
                   span.used == 1);
        if (span.used > 1) join_parts(tile, sinks, out, part_of(scratch, ENTRIES, DV, gridDim.x, blockIdx.x, kv_heads, kv_head, splits, 0), places, heads, span.used);
    }

    // The warps' results, through shared memory, to `out` or to this block's part.
    static __device__ __forceinline__ void join_warps(const float (&acc)[DV / 8][4], const float (&highest)[2],
                                                      float (&sum)[2], float (&maxima)[MOST_WARPS][ENTRIES],
                                                      float (&sums)[MOST_WARPS][ENTRIES],
                                                      const unsigned (&places)[ENTRIES], const Tile& tile,
                                                      const float* sinks, float* out, const Parts& parts,
                                                      unsigned heads, bool whole) {
        extern __shared__ float4 shared4[];
        constexpr int ROW = DV + 4;
        float* meeting = reinterpret_cast<float*>(shared4);  // [warps, ENTRIES, ROW]
        const unsigned warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] += __shfl_xor_sync(KTX_FULL_WARP, sum[r], 1);
            sum[r] += __shfl_xor_sync(KTX_FULL_WARP, sum[r], 2);
            if (lane % 4 == 0) {
                maxima[warp][lane / 4 + 8 * r] = highest[r];
                sums[warp][lane / 4 + 8 * r] = sum[r];
            }
        }
        __syncthreads();
        float* mine = meeting + (size_t)warp * ENTRIES * ROW;
#pragma unroll
        for (int d = 0; d < DV / 8; d++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                *reinterpret_cast<float2*>(mine + (lane / 4 + 8 * r) * ROW + d * 8 + lane % 4 * 2) =
                    make_float2(acc[d][2 * r], acc[d][2 * r + 1]);
        // A thread of the first warp has an entry: its maximum, sum, and the warps' factors, in place of theirs.
        if (threadIdx.x < ENTRIES) {
            const unsigned e = threadIdx.x;
            float most = -KTX_INFINITY, total = 0.0f;
#pragma unroll
            for (unsigned w = 0; w < MOST_WARPS; w++) most = fmaxf(most, w < warps ? maxima[w][e] : -KTX_INFINITY);
#pragma unroll
            for (unsigned w = 0; w < MOST_WARPS; w++) {
                const float f = w < warps ? fast_exp2(maxima[w][e] - base_of(most)) : 0.0f;
                total += w < warps ? sums[w][e] * f : 0.0f;
                maxima[w][e] = f;
            }
            sums[0][e] = most, sums[1][e] = total;
        }
        __syncthreads();
#pragma unroll 1
        for (unsigned i = threadIdx.x; i < tile.entries * (DV / 4); i += blockDim.x) {
            const unsigned e = i / (DV / 4), at = i % (DV / 4) * 4;
            float most = sums[0][e], total = sums[1][e];
            float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
            for (unsigned w = 0; w < warps; w++) {
                const float f = maxima[w][e];
                const float4 v = *reinterpret_cast<const float4*>(meeting + (w * ENTRIES + e) * ROW + at);
                value.x += v.x * f, value.y += v.y * f, value.z += v.z * f, value.w += v.w * f;
            }
            if (!whole) {
                *reinterpret_cast<float4*>(parts.values + (size_t)e * DV + at) = value;
                if (at == 0) parts.sums[2 * e] = most, parts.sums[2 * e + 1] = total;
                continue;
            }
            const size_t head = places[e];
            float f;
            add_sink(sinks, (unsigned)head % heads, most, total, f);
            f /= total;
            *reinterpret_cast<float4*>(out + head * DV + at) = make_float4(value.x * f, value.y * f, value.z * f, value.w * f);
        }
    }

    // The last block of a tile adds up what all have left.
    static __device__ __forceinline__ void join_parts(const Tile& tile, const float* sinks, float* out, const Parts& parts,
                                                      const unsigned (&places)[ENTRIES], unsigned heads, unsigned used) {
        extern __shared__ float4 shared4[];
        __shared__ bool last;
        float* factors = reinterpret_cast<float*>(shared4);  // [used, ENTRIES]
        const unsigned warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            const unsigned before = atomicInc(arrived + blockIdx.x * gridDim.y + blockIdx.y, used - 1);
            last = before == used - 1;
        }
        __syncthreads();
        if (!last) return;
        __threadfence();
#pragma unroll 1
        for (unsigned e = warp; e < tile.entries; e += warps) {
            const float2* left = reinterpret_cast<const float2*>(parts.sums) + e;
            float most = -KTX_INFINITY, total = 0.0f, rescale;
#pragma unroll 1
            for (unsigned p = lane; p < used; p += 32) most = fmaxf(most, __ldcg(left + p * ENTRIES).x);
            most = warp_max(most);
#pragma unroll 1
            for (unsigned p = lane; p < used; p += 32) {
                const float2 of_part = __ldcg(left + p * ENTRIES);
                const float f = fast_exp2(of_part.x - base_of(most));
                total += of_part.y * f;
                factors[p * ENTRIES + e] = f;
            }
            total = warp_sum(total);
            add_sink(sinks, places[e] % heads, most, total, rescale);
            rescale /= total;
#pragma unroll 1
            for (unsigned p = lane; p < used; p += 32) factors[p * ENTRIES + e] *= rescale;
        }
        __syncthreads();
#pragma unroll 1
        for (unsigned i = threadIdx.x; i < tile.entries * (DV / 4); i += blockDim.x) {
            const unsigned e = i / (DV / 4), at = i % (DV / 4) * 4;
            const float4* left = reinterpret_cast<const float4*>(parts.values + (size_t)e * DV + at);
            float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
            for (unsigned first = 0; first < used; first += 8) {
                float4 v[8];
#pragma unroll
                for (int p = 0; p < 8; p++)
                    v[p] = __ldcg(left + min(first + p, used - 1) * (ENTRIES * DV / 4));
#pragma unroll
                for (int p = 0; p < 8; p++) {
                    const float f = first + p < used ? factors[(first + p) * ENTRIES + e] : 0.0f;
                    value.x += v[p].x * f, value.y += v[p].y * f, value.z += v[p].z * f, value.w += v[p].w * f;
                }
            }
            *reinterpret_cast<float4*>(out + (size_t)places[e] * DV + at) = value;
        }
    }
};
#define KTX_GENERATE_BODY(type, dk, dv)                                                                                \
    Generate<type, dk, dv>::run(q, sinks, cache, out, scratch,                                                         \
                          Batch{first_row, tokens, past, page_table, sequences, max_pages}, heads, kv_heads,    \
                          scale, window, splits, stages);
#else
#define KTX_GENERATE_BODY(type, dk, dv)
#endif

#define KTX_GENERATE(suffix, type, dk, dv, ...)                                                                                      \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__)                                                             \
        ktx_generate_##suffix##_##dk##_##dv(const float* q, const float* sinks, type* cache, float* out,             \
                                 float* scratch, const unsigned* first_row, const unsigned* tokens, const unsigned* past,        \
                                 const unsigned* page_table, unsigned sequences, unsigned max_pages,              \
                                 unsigned heads, unsigned kv_heads, float scale, unsigned window,                 \
                                 unsigned splits, unsigned stages) {                                              \
        KTX_GENERATE_BODY(type, dk, dv)                                                                           \
    }

KTX_GENERATE(f16, __half, 64, 64, MOST_THREADS)
KTX_GENERATE(f16, __half, 80, 80, MOST_THREADS)
KTX_GENERATE(f16, __half, 96, 96, MOST_THREADS)
KTX_GENERATE(f16, __half, 128, 128, MOST_THREADS)
KTX_GENERATE(f16, __half, 192, 128, MOST_THREADS)
KTX_GENERATE(f16, __half, 256, 256, MOST_THREADS)
// One block a multiprocessor, for the registers that bytes go through.
KTX_GENERATE(q8_0, Q8, 64, 64, MOST_THREADS, 1)
KTX_GENERATE(q8_0, Q8, 96, 96, MOST_THREADS, 1)
KTX_GENERATE(q8_0, Q8, 128, 128, MOST_THREADS, 1)
KTX_GENERATE(q8_0, Q8, 192, 128, MOST_THREADS, 1)
KTX_GENERATE(q8_0, Q8, 256, 256, MOST_THREADS, 1)
