//! The router of a Mixture-of-Experts layer: from logits to the chosen experts and their weights.
//!
//! Covers softmax with greedy choice (Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2-Lite), softmax
//! limited to the best groups (DeepSeek-V2: a group's score is its best expert's) and sigmoid with
//! a correction bias (DeepSeek-V3, Moonlight: a group's score is the sum of its best two).
//!
//! Chosen experts come in descending order of the score that chose them; ties go to the lower id.
//! NaN ranks below every number, so a broken activation chooses valid ids and carries its NaN on
//! in the weights. The cost is some microseconds a token (`top_k` passes over the experts), so
//! tokens are spread over the pool in tasks of 16.

#[cfg(test)]
mod cases;
pub mod cuda;
#[cfg(test)]
mod gpu_tests;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use crate::activation::softmax_row;
use crate::cpu::{self, IsaLevel};
use crate::disjoint::DisjointMut;
use crate::pool::ThreadPool;

/// Tokens of a task.
const TOKENS_PER_TASK: usize = 16;

/// Added to a sum of weights before dividing by it.
const NORM_EPSILON: f32 = 1e-20;

/// How logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts of the layer.
    Softmax,
    /// Sigmoid of each logit.
    Sigmoid,
}

/// How the score of a group of experts is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// The best expert's score (DeepSeek-V2, `group_limited_greedy`).
    Max,
    /// The sum of the two best experts' scores (DeepSeek-V3, `noaux_tc`).
    SumOfTop2,
}

/// Restricts the choice to the experts of the best groups.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertGroups {
    /// Groups of consecutive experts, all of one size.
    pub n_group: usize,
    /// Groups that stay.
    pub topk_group: usize,
    /// Score of a group.
    pub score: GroupScore,
    /// Score that experts of the other groups get: 0 in DeepSeek-V2 and some releases of V3,
    /// negative infinity in V3 (differs from 0 where biases make kept scores negative).
    pub masked_value: f32,
}

/// What happens to the chosen scores before they are used as weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum WeightScaling {
    /// Multiplied by the factor and not normalised (DeepSeek-V2 without `norm_topk_prob`, and
    /// with 1.0 Qwen2-MoE).
    Scale(f32),
    /// Divided by their sum and not scaled (Mixtral, Qwen3-MoE, DeepSeek-V2 with
    /// `norm_topk_prob`). After [`Scoring::Softmax`] it is the softmax of the chosen logits alone,
    /// as gpt-oss writes it.
    Normalise,
    /// Divided by their sum, then multiplied by the factor (DeepSeek-V3).
    NormaliseThenScale(f32),
}

impl WeightScaling {
    /// DeepSeek-V2's rule, either or: normalised without scaling if `norm_topk_prob` is
    /// [`NormTopkProb::Yes`] and more than one expert is chosen, scaled otherwise.
    pub fn either(norm: NormTopkProb, top_k: usize, routed_scaling_factor: f32) -> Self {
        match norm {
            NormTopkProb::Yes if top_k > 1 => WeightScaling::Normalise,
            _ => WeightScaling::Scale(routed_scaling_factor),
        }
    }

    /// DeepSeek-V3's rule, both: normalised if asked (and more than one expert is chosen), and
    /// scaled in any case.
    pub fn both(norm: NormTopkProb, top_k: usize, routed_scaling_factor: f32) -> Self {
        match norm {
            NormTopkProb::Yes if top_k > 1 => {
                WeightScaling::NormaliseThenScale(routed_scaling_factor)
            }
            _ => WeightScaling::Scale(routed_scaling_factor),
        }
    }
}

/// A model's `norm_topk_prob`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormTopkProb {
    /// Weights are divided by their sum.
    Yes,
    /// Weights keep their scores' scale.
    No,
}

/// A router's rule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateConfig {
    /// Experts in the layer.
    pub experts: usize,
    /// Experts chosen per token.
    pub top_k: usize,
    /// How logits become scores.
    pub scoring: Scoring,
    /// Restriction to groups, if the model has one.
    pub groups: Option<ExpertGroups>,
    /// What happens to the chosen scores.
    pub scaling: WeightScaling,
}

/// Why a router's configuration is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GateError {
    /// `top_k` is 0 or larger than the number of experts.
    #[error(
        "router chooses {top_k} of {experts} experts; expert_used_count must be 1 to expert_count"
    )]
    TopK {
        /// Experts to choose.
        top_k: usize,
        /// Experts there are.
        experts: usize,
    },
    /// The groups do not divide the experts, or more groups are kept than there are.
    #[error(
        "router keeps {topk_group} of {n_group} groups of {experts} experts; the groups must divide the experts evenly, and 1 to all of them be kept"
    )]
    Groups {
        /// Experts there are.
        experts: usize,
        /// Groups.
        n_group: usize,
        /// Groups kept.
        topk_group: usize,
    },
    /// The kept groups hold fewer experts than are to be chosen.
    #[error(
        "router chooses {top_k} experts, but the kept groups hold {kept}; raise topk_group or lower expert_used_count"
    )]
    TooFewKept {
        /// Experts to choose.
        top_k: usize,
        /// Experts in the kept groups.
        kept: usize,
    },
}

impl GateConfig {
    /// Checks that the numbers fit together.
    ///
    /// # Errors
    /// [`GateError`] naming those that do not.
    pub fn check(&self) -> Result<(), GateError> {
        let &GateConfig { experts, top_k, .. } = self;
        if top_k == 0 || top_k > experts {
            return Err(GateError::TopK { top_k, experts });
        }
        let Some(ExpertGroups {
            n_group,
            topk_group,
            ..
        }) = self.groups
        else {
            return Ok(());
        };
        let even = n_group > 0 && experts.is_multiple_of(n_group);
        if !even || topk_group == 0 || topk_group > n_group {
            return Err(GateError::Groups {
                experts,
                n_group,
                topk_group,
            });
        }
        let kept = experts / n_group * topk_group;
        if top_k > kept {
            return Err(GateError::TooFewKept { top_k, kept });
        }
        Ok(())
    }

    /// Scratch that [`route`] needs on a pool of `threads`, in floats.
    pub fn scratch_floats(&self, threads: usize) -> usize {
        threads * self.task_floats()
    }

    /// Scores, choice scores and group scores of one token.
    fn task_floats(&self) -> usize {
        2 * self.experts + self.groups.map_or(0, |groups| groups.n_group)
    }
}

/// Routes `logits` `[tokens, experts]`: the chosen experts go to `ids` and their weights to
/// `weights`, both `[tokens, top_k]`.
///
/// `bias` `[experts]` (`e_score_correction_bias`) is added to the scores for the choice only.
/// `scratch` holds [`GateConfig::scratch_floats`] of the pool's threads.
///
/// # Errors
/// [`GateError`] if the configuration does not pass [`GateConfig::check`].
///
/// # Panics
/// If a slice has another length.
pub fn route(
    pool: &ThreadPool,
    config: &GateConfig,
    logits: &[f32],
    bias: Option<&[f32]>,
    ids: &mut [u32],
    weights: &mut [f32],
    scratch: &mut [f32],
) -> Result<(), GateError> {
    config.check()?;
    let &GateConfig { experts, top_k, .. } = config;
    let tokens = logits.len() / experts;
    assert_eq!(logits.len(), tokens * experts, "route: logits");
    assert_eq!(ids.len(), tokens * top_k, "route: ids");
    assert_eq!(weights.len(), tokens * top_k, "route: weights");
    if let Some(bias) = bias {
        assert_eq!(bias.len(), experts, "route: bias");
    }
    let task_floats = config.task_floats();
    assert!(
        scratch.len() >= config.scratch_floats(pool.threads()),
        "route: {} floats of scratch, {} needed",
        scratch.len(),
        config.scratch_floats(pool.threads())
    );
    let (ids, weights) = (DisjointMut::new(ids), DisjointMut::new(weights));
    let scratch = DisjointMut::new(scratch);
    let level = cpu::level();
    pool.run_with_worker(tokens.div_ceil(TOKENS_PER_TASK), &|task, worker| {
        // SAFETY: no two tasks run at once with one worker number.
        let scratch = unsafe { scratch.part(worker * task_floats, task_floats) };
        for t in task * TOKENS_PER_TASK..tokens.min((task + 1) * TOKENS_PER_TASK) {
            // SAFETY: every token belongs to one task.
            let ids = unsafe { ids.part(t * top_k, top_k) };
            // SAFETY: as above.
            let weights = unsafe { weights.part(t * top_k, top_k) };
            let logits = &logits[t * experts..][..experts];
            route_token(level, config, logits, bias, ids, weights, scratch);
        }
    });
    Ok(())
}

fn route_token(
    level: IsaLevel,
    config: &GateConfig,
    logits: &[f32],
    bias: Option<&[f32]>,
    ids: &mut [u32],
    weights: &mut [f32],
    scratch: &mut [f32],
) {
    let (scores, rest) = scratch.split_at_mut(config.experts);
    let (choice, group_scores) = rest.split_at_mut(config.experts);
    scores.copy_from_slice(logits);
    match config.scoring {
        Scoring::Softmax => softmax_row(level, scores),
        Scoring::Sigmoid => scores
            .iter_mut()
            .for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
    }
    choice.copy_from_slice(scores);
    if let Some(bias) = bias {
        choice.iter_mut().zip(bias).for_each(|(c, b)| *c += b);
    }
    if let Some(groups) = &config.groups {
        mask_groups(groups, choice, group_scores);
    }
    let mut previous = None;
    for (id, weight) in ids.iter_mut().zip(weights.iter_mut()) {
        let best = next_best(choice, previous);
        previous = Some(best);
        *id = best as u32;
        *weight = scores[best];
    }
    scale(config.scaling, weights);
}

/// Gives experts outside the best groups the masked value.
fn mask_groups(groups: &ExpertGroups, choice: &mut [f32], group_scores: &mut [f32]) {
    let size = choice.len() / groups.n_group;
    for (score, group) in group_scores.iter_mut().zip(choice.chunks(size)) {
        *score = group_score(groups.score, group);
    }
    let mut previous = None;
    for _ in 0..groups.topk_group {
        previous = Some(next_best(group_scores, previous));
    }
    let last = previous.map_or(f32::NEG_INFINITY, |last| rank(group_scores[last]));
    for (g, group) in choice.chunks_mut(size).enumerate() {
        let score = rank(group_scores[g]);
        let kept = score > last || (score == last && previous.is_some_and(|last| g <= last));
        if !kept {
            group.fill(groups.masked_value);
        }
    }
}

fn group_score(method: GroupScore, group: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &x in group {
        if rank(x) > first {
            (first, second) = (rank(x), first);
        } else if rank(x) > second {
            second = rank(x);
        }
    }
    match method {
        GroupScore::SumOfTop2 if group.len() > 1 => first + second,
        _ => first,
    }
}

/// The number by which a score is ranked: itself, or negative infinity for NaN.
fn rank(x: f32) -> f32 {
    if x.is_nan() { f32::NEG_INFINITY } else { x }
}

/// The index that follows `previous` in descending order of score, lower index first among
/// equals. There must be one.
fn next_best(scores: &[f32], previous: Option<usize>) -> usize {
    let mut best: Option<(usize, f32)> = None;
    let limit = previous.map(|p| (rank(scores[p]), p));
    for (i, &score) in scores.iter().enumerate() {
        let score = rank(score);
        let after = limit.is_none_or(|(s, p)| score < s || (score == s && i > p));
        if after && best.is_none_or(|(_, s)| score > s) {
            best = Some((i, score));
        }
    }
    best.map_or(0, |(i, _)| i)
}

fn scale(scaling: WeightScaling, weights: &mut [f32]) {
    let sum = || weights.iter().sum::<f32>() + NORM_EPSILON;
    let (divisor, factor) = match scaling {
        WeightScaling::Scale(factor) => (1.0, factor),
        WeightScaling::Normalise => (sum(), 1.0),
        WeightScaling::NormaliseThenScale(factor) => (sum(), factor),
    };
    for w in weights {
        *w = *w / divisor * factor;
    }
}
