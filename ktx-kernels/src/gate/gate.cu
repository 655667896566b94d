// The router of a Mixture-of-Experts layer: from logits to the chosen experts and their weights.
//
// A block routes a token. An expert's place in the order is how many are before it, which a thread counts
// by reading all scores, so that all places are known after one pass however many experts are chosen.
// Bound by latency: some 4 instructions for each pair of experts. The rules, the order of the chosen and the
// choice among equals are those of the host's router: descending, the lower id first, NaN below every number.
#include "reduce.cuh"

enum Scoring { SOFTMAX = 0, SIGMOID = 1 };
enum Scaling { SCALE = 0, NORMALISE = 1, NORMALISE_THEN_SCALE = 2 };

#define NORM_EPSILON 1e-20f

__device__ __forceinline__ float rank_of(float x) { return isnan(x) ? -KTX_INFINITY : x; }

// How many of `scores` come before number `index`.
__device__ __forceinline__ unsigned place_of(const float* scores, unsigned count, unsigned index) {
    const float mine = rank_of(scores[index]);
    unsigned before = 0;
#pragma unroll 8
    for (unsigned i = 0; i < count; i++) {
        const float other = rank_of(scores[i]);
        before += other > mine || (other == mine && i < index);
    }
    return before;
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

// Gives experts outside of the best groups the masked value. Threads meet on both sides.
__device__ void mask_groups(float* choice, float* groups, unsigned experts, unsigned n_group,
                            unsigned topk_group, bool sum_of_two, float masked_value) {
    const unsigned size = experts / n_group;
    for (unsigned g = threadIdx.x; g < n_group; g += blockDim.x)
        groups[g] = group_score(choice + g * size, size, sum_of_two);
    __syncthreads();
    for (unsigned i = threadIdx.x; i < experts; i += blockDim.x)
        if (place_of(groups, n_group, i / size) >= topk_group) choice[i] = masked_value;
    __syncthreads();
}

__device__ void scores_of(const float* logits, float* scores, unsigned experts, int scoring) {
    __shared__ float partial[32];
    if (scoring == SIGMOID) {
        for (unsigned i = threadIdx.x; i < experts; i += blockDim.x) scores[i] = 1.0f / (1.0f + expf(-logits[i]));
        return;
    }
    float highest = -KTX_INFINITY, sum = 0.0f;
    for (unsigned i = threadIdx.x; i < experts; i += blockDim.x) highest = fmaxf(highest, logits[i]);
    highest = block_max(highest, partial);
    for (unsigned i = threadIdx.x; i < experts; i += blockDim.x) {
        scores[i] = expf(logits[i] - highest);
        sum += scores[i];
    }
    const float inverse = 1.0f / block_sum(sum, partial);
    for (unsigned i = threadIdx.x; i < experts; i += blockDim.x) scores[i] *= inverse;
}

// logits [tokens, experts], bias [experts] or null -> ids and weights [tokens, top_k]. n_group 0: no groups.
// Shared memory: 2 * experts + n_group + top_k floats.
extern "C" __global__ void ktx_route(const float* logits, const float* bias, unsigned* ids, float* weights,
                                     unsigned experts, unsigned top_k, int scoring, unsigned n_group,
                                     unsigned topk_group, int sum_of_two, float masked_value, int scaling,
                                     float factor) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    extern __shared__ float shared[];
    const size_t token = blockIdx.x;
    float *scores = shared, *choice = scores + experts, *groups = choice + experts, *chosen = groups + n_group;
    scores_of(logits + token * experts, scores, experts, scoring);
    for (unsigned i = threadIdx.x; i < experts; i += blockDim.x) choice[i] = bias ? scores[i] + bias[i] : scores[i];
    __syncthreads();
    if (n_group > 0) mask_groups(choice, groups, experts, n_group, topk_group, sum_of_two, masked_value);
    for (unsigned i = threadIdx.x; i < experts; i += blockDim.x) {
        const unsigned place = place_of(choice, experts, i);
        if (place < top_k) {
            ids[token * top_k + place] = i;
            chosen[place] = scores[i];
        }
    }
    __syncthreads();
    float divisor = 1.0f;
    if (scaling != SCALE) {
        divisor = 0.0f;
        for (unsigned k = 0; k < top_k; k++) divisor += chosen[k];
        divisor += NORM_EPSILON;
    }
    if (scaling == NORMALISE) factor = 1.0f;
    for (unsigned k = threadIdx.x; k < top_k; k += blockDim.x) weights[token * top_k + k] = chosen[k] / divisor * factor;
}
