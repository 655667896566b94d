// The router of a Mixture-of-Experts layer: from logits to the chosen experts and their weights.
//
// A warp routes a token; its scores live in shared memory. Bound by latency: one pass over the experts
// for each one chosen, each some 5 shuffles long. The rules, the order of the chosen and the choice among
// equals are those of the host's router: descending, the lower id first, NaN below every number.
#include "reduce.cuh"

enum Scoring { SOFTMAX = 0, SIGMOID = 1 };
enum Scaling { SCALE = 0, NORMALISE = 1, NORMALISE_THEN_SCALE = 2 };

#define NORM_EPSILON 1e-20f

__device__ __forceinline__ float rank_of(float x) { return isnan(x) ? -KTX_INFINITY : x; }

struct Best {
    float score;
    unsigned index;
};

#define NOTHING 0xffffffffu

__device__ __forceinline__ Best better(Best a, Best b) {
    if (b.index == NOTHING) return a;
    if (a.index == NOTHING) return b;
    return b.score > a.score || (b.score == a.score && b.index < a.index) ? b : a;
}

// What follows `previous` in descending order of rank, the lower index first among equals.
__device__ Best next_best(const float* scores, unsigned count, Best previous) {
    Best best = {0.0f, NOTHING};
    for (unsigned i = threadIdx.x % 32; i < count; i += 32) {
        const float score = rank_of(scores[i]);
        const bool after = previous.index == NOTHING || score < previous.score ||
                           (score == previous.score && i > previous.index);
        if (after) best = better(best, Best{score, i});
    }
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        Best other = {__shfl_xor_sync(KTX_FULL_WARP, best.score, lane),
                      __shfl_xor_sync(KTX_FULL_WARP, best.index, lane)};
        best = better(best, other);
    }
    return best;
}

__device__ float group_score(const float* choice, unsigned size, bool sum_of_two) {
    float first = -KTX_INFINITY, second = -KTX_INFINITY;
    for (unsigned i = 0; i < size; i++) {
        const float x = rank_of(choice[i]);
        if (x > first) {
            second = first;
            first = x;
        } else if (x > second) {
            second = x;
        }
    }
    return sum_of_two && size > 1 ? first + second : first;
}

// Gives experts outside of the best groups the masked value.
__device__ void mask_groups(float* choice, float* groups, unsigned experts, unsigned n_group,
                            unsigned topk_group, bool sum_of_two, float masked_value) {
    const unsigned lane = threadIdx.x % 32, size = experts / n_group;
    for (unsigned g = lane; g < n_group; g += 32)
        groups[g] = group_score(choice + g * size, size, sum_of_two);
    __syncwarp();
    Best last = {0.0f, NOTHING};
    for (unsigned k = 0; k < topk_group; k++) last = next_best(groups, n_group, last);
    for (unsigned i = lane; i < experts; i += 32) {
        const unsigned g = i / size;
        const float score = rank_of(groups[g]);
        const bool kept = score > last.score || (score == last.score && g <= last.index);
        if (!kept) choice[i] = masked_value;
    }
    __syncwarp();
}

__device__ void scores_of(const float* logits, float* scores, unsigned experts, int scoring) {
    const unsigned lane = threadIdx.x % 32;
    if (scoring == SIGMOID) {
        for (unsigned i = lane; i < experts; i += 32) scores[i] = 1.0f / (1.0f + expf(-logits[i]));
        return;
    }
    float highest = -KTX_INFINITY, sum = 0.0f;
    for (unsigned i = lane; i < experts; i += 32) highest = fmaxf(highest, logits[i]);
    highest = warp_max(highest);
    for (unsigned i = lane; i < experts; i += 32) {
        scores[i] = expf(logits[i] - highest);
        sum += scores[i];
    }
    const float inverse = 1.0f / warp_sum(sum);
    for (unsigned i = lane; i < experts; i += 32) scores[i] *= inverse;
}

// logits [tokens, experts], bias [experts] or null -> ids and weights [tokens, top_k]. n_group 0: no groups.
// Shared memory: 2 * experts + n_group + top_k floats a warp.
extern "C" __global__ void ktx_route(const float* logits, const float* bias, unsigned* ids, float* weights,
                                     unsigned tokens, unsigned experts, unsigned top_k, int scoring,
                                     unsigned n_group, unsigned topk_group, int sum_of_two,
                                     float masked_value, int scaling, float factor) {
    extern __shared__ float shared[];
    const unsigned token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= tokens) return;
    float* scores = shared + threadIdx.x / 32 * (2 * experts + n_group + top_k);
    float *choice = scores + experts, *groups = choice + experts, *chosen = groups + n_group;
    scores_of(logits + (size_t)token * experts, scores, experts, scoring);
    for (unsigned i = lane; i < experts; i += 32) choice[i] = bias ? scores[i] + bias[i] : scores[i];
    __syncwarp();
    if (n_group > 0) mask_groups(choice, groups, experts, n_group, topk_group, sum_of_two, masked_value);
    Best best = {0.0f, NOTHING};
    for (unsigned k = 0; k < top_k; k++) {
        best = next_best(choice, experts, best);
        if (lane == 0) {
            ids[(size_t)token * top_k + k] = best.index;
            chosen[k] = scores[best.index];
        }
    }
    __syncwarp();
    float divisor = 1.0f;
    if (scaling != SCALE) {
        divisor = 0.0f;
        for (unsigned k = 0; k < top_k; k++) divisor += chosen[k];
        divisor += NORM_EPSILON;
    }
    if (scaling == NORMALISE) factor = 1.0f;
    for (unsigned k = lane; k < top_k; k += 32)
        weights[(size_t)token * top_k + k] = chosen[k] / divisor * factor;
}
