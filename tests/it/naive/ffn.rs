//! Feed-forward blocks: dense, and mixtures of experts with their routers.

use super::matrix::{Matrix, add, add_scaled, dot, sigmoid, silu, softmax};
use super::weights::Weights;

/// What a layer does after attention.
pub enum Ffn {
    Dense(Mlp),
    Mixture(Mixture),
}

/// `down(silu(gate x) * up x)`.
pub struct Mlp {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    /// Added behind the three products (gpt-oss, which also joins gate and up otherwise).
    biases: Option<[Vec<f64>; 3]>,
}

/// Routed experts, and an MLP that every token passes.
pub struct Mixture {
    router: Router,
    experts: Vec<Mlp>,
    shared: Option<Mlp>,
    /// Qwen2-MoE weighs the shared expert with the sigmoid of this vector's product with the token.
    shared_gate: Option<Vec<f64>>,
}

/// A router's decision for one token.
#[derive(Clone, Debug)]
pub struct Routing {
    /// The chosen experts, in ascending order.
    pub experts: Vec<usize>,
    /// Their weights, in the same order.
    pub weights: Vec<f64>,
    /// By how much the last chosen expert (and, with groups, the last chosen group) beat the first one left out.
    pub margin: f64,
}

impl Ffn {
    pub fn load(weights: &Weights, block: &str) -> Self {
        if !weights.has(&format!("{block}.ffn_gate_inp.weight")) {
            return Ffn::Dense(Mlp::load(weights, block, ""));
        }
        let has_shared = weights.has(&format!("{block}.ffn_gate_shexp.weight"));
        Ffn::Mixture(Mixture {
            router: Router::load(weights, block),
            experts: load_experts(weights, block),
            shared: has_shared.then(|| Mlp::load(weights, block, "_shexp")),
            shared_gate: weights.optional_vector(&format!("{block}.ffn_gate_inp_shexp.weight")),
        })
    }

    /// The sum without the `put_off` experts of the smallest weights, the sum of these, and the choice.
    pub fn forward(
        &self,
        x: &[f64],
        put_off: usize,
    ) -> (Vec<f64>, Option<Vec<f64>>, Option<Routing>) {
        match self {
            Ffn::Dense(mlp) => (mlp.of(x), None, None),
            Ffn::Mixture(mixture) => {
                let (y, later, routing) = mixture.of(x, put_off);
                (y, Some(later), Some(routing))
            }
        }
    }
}

impl Mlp {
    fn load(weights: &Weights, block: &str, suffix: &str) -> Self {
        let part = |name: &str| weights.matrix(&format!("{block}.ffn_{name}{suffix}.weight"));
        Self {
            gate: part("gate"),
            up: part("up"),
            down: part("down"),
            biases: None,
        }
    }

    fn of(&self, x: &[f64]) -> Vec<f64> {
        let (mut gate, mut up) = (self.gate.times(x), self.up.times(x));
        if let Some([gate_bias, up_bias, down_bias]) = &self.biases {
            add(&mut gate, gate_bias);
            add(&mut up, up_bias);
            let inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| clamped(*g, u)).collect();
            let mut y = self.down.times(&inner);
            add(&mut y, down_bias);
            return y;
        }
        let inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| silu(*g) * u).collect();
        self.down.times(&inner)
    }
}

/// gpt-oss between the projections: gate up to 7, `up` from -7 to 7.
fn clamped(gate: f64, up: f64) -> f64 {
    let gate = gate.min(7.0);
    gate * sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1.0)
}

/// Experts in one tensor with three dimensions, or (old Mixtral files) in a tensor each.
fn load_experts(weights: &Weights, block: &str) -> Vec<Mlp> {
    if !weights.has(&format!("{block}.ffn_gate_exps.weight")) {
        let one = |e: usize| Mlp::load(weights, block, &format!(".{e}"));
        return (0..weights.count("expert_count")).map(one).collect();
    }
    let part = |name: &str| weights.matrices(&format!("{block}.ffn_{name}_exps.weight"));
    let bias = |name: &str, e: usize, rows: usize| {
        let all = weights.optional_vector(&format!("{block}.ffn_{name}_exps.bias"))?;
        Some(all[e * rows..(e + 1) * rows].to_vec())
    };
    let halves = part("gate").into_iter().zip(part("up"));
    halves
        .zip(part("down"))
        .enumerate()
        .map(|(e, ((gate, up), down))| {
            let biases = bias("gate", e, gate.rows()).map(|gate_bias| {
                let (up, down) = (bias("up", e, up.rows()), bias("down", e, down.rows()));
                [gate_bias, up.unwrap(), down.unwrap()]
            });
            Mlp {
                gate,
                up,
                down,
                biases,
            }
        })
        .collect()
}

impl Mixture {
    fn of(&self, x: &[f64], put_off: usize) -> (Vec<f64>, Vec<f64>, Routing) {
        let routing = self.router.route(x);
        let (mut sum, mut later) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        let (now, _) = largest(&routing.weights, routing.weights.len() - put_off);
        for (k, (&expert, &weight)) in routing.experts.iter().zip(&routing.weights).enumerate() {
            let to = match now.contains(&k) {
                true => &mut sum,
                false => &mut later,
            };
            add_scaled(to, &self.experts[expert].of(x), weight);
        }
        if let Some(shared) = &self.shared {
            let factor = self
                .shared_gate
                .as_ref()
                .map_or(1.0, |gate| sigmoid(dot(gate, x)));
            add_scaled(&mut sum, &shared.of(x), factor);
        }
        (sum, later, routing)
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Score {
    Softmax,
    Sigmoid,
}

struct Router {
    weight: Matrix,
    /// Added to the logits.
    logit_bias: Option<Vec<f64>>,
    /// Added to the scores for the choice only.
    bias: Option<Vec<f64>>,
    score: Score,
    top_k: usize,
    groups: usize,
    groups_used: usize,
    normalise: bool,
    scale: f64,
}

impl Router {
    fn load(weights: &Weights, block: &str) -> Self {
        let score = match weights.count_or("expert_gating_func", 1) {
            1 => Score::Softmax,
            2 => Score::Sigmoid,
            other => panic!("no reference for gating function {other}"),
        };
        // Mixtral, Qwen3-MoE and gpt-oss divide by the sum of the chosen weights though their files do not say so.
        let normalise = matches!(weights.architecture(), "gpt-oss" | "llama" | "qwen3moe");
        let scale = weights.number("expert_weights_scale").unwrap_or(0.0);
        Self {
            weight: weights.matrix(&format!("{block}.ffn_gate_inp.weight")),
            logit_bias: weights.optional_vector(&format!("{block}.ffn_gate_inp.bias")),
            bias: weights.optional_vector(&format!("{block}.exp_probs_b.bias")),
            score,
            top_k: weights.count("expert_used_count"),
            groups: weights.count_or("expert_group_count", 0).max(1),
            groups_used: weights.count_or("expert_group_used_count", 0).max(1),
            normalise: weights.flag_or("expert_weights_norm", normalise),
            // As llama.cpp reads it: absent and 0 both mean no scaling.
            scale: if scale == 0.0 { 1.0 } else { scale },
        }
    }

    fn route(&self, x: &[f64]) -> Routing {
        let mut logits = self.weight.times(x);
        if let Some(bias) = &self.logit_bias {
            add(&mut logits, bias);
        }
        let scores = match self.score {
            Score::Softmax => softmax(&logits),
            Score::Sigmoid => logits.iter().map(|&z| sigmoid(z)).collect(),
        };
        let mut chances = scores.clone();
        if let Some(bias) = &self.bias {
            add(&mut chances, bias);
        }
        let mut margin = f64::INFINITY;
        if self.groups > 1 {
            margin = self.mask_groups(&mut chances);
        }
        let (mut experts, expert_margin) = largest(&chances, self.top_k);
        experts.sort_unstable();
        let weights = self.weigh(experts.iter().map(|&e| scores[e]).collect());
        Routing {
            experts,
            weights,
            margin: margin.min(expert_margin),
        }
    }

    /// Takes experts outside the best groups out of the race; the margin between groups.
    ///
    /// DeepSeek-V2 (softmax) ranks groups by their best expert, V3 (sigmoid) by the sum of their best two.
    /// llama.cpp does the latter for both; published V2 files carry no groups, so it never shows.
    fn mask_groups(&self, chances: &mut [f64]) -> f64 {
        let size = chances.len() / self.groups;
        let best_of_group = match self.score {
            Score::Softmax => 1,
            Score::Sigmoid => 2.min(size),
        };
        let group_scores: Vec<f64> = chances
            .chunks(size)
            .map(|group| {
                largest(group, best_of_group)
                    .0
                    .iter()
                    .map(|&i| group[i])
                    .sum()
            })
            .collect();
        let (kept, margin) = largest(&group_scores, self.groups_used);
        for (index, group) in chances.chunks_mut(size).enumerate() {
            if !kept.contains(&index) {
                group.fill(f64::NEG_INFINITY);
            }
        }
        margin
    }

    /// Weights from the chosen experts' scores.
    ///
    /// As llama.cpp reads a file: divide by the sum if `expert_weights_norm`, then multiply by
    /// `expert_weights_scale` in either case. That is DeepSeek-V3's rule. V2's code scales only when it does not
    /// normalise; its files say norm = false, so both rules agree on them.
    fn weigh(&self, mut weights: Vec<f64>) -> Vec<f64> {
        let sum: f64 = weights.iter().sum();
        for weight in &mut weights {
            if self.normalise {
                *weight /= sum + 1e-20;
            }
            *weight *= self.scale;
        }
        weights
    }
}

/// Positions of the `count` largest values, the lower position first among equals, and the distance from the last
/// of them to the next value.
fn largest(values: &[f64], count: usize) -> (Vec<usize>, f64) {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    let margin = match order.get(count) {
        Some(&next) => values[order[count - 1]] - values[next],
        None => f64::INFINITY,
    };
    order.truncate(count);
    (order, margin)
}
