//! Causal attention: with grouped heads (llama, Qwen) and with latent keys and values (DeepSeek).

use super::matrix::{Matrix, Norm, add, add_scaled, dot, softmax};
use super::rope::Rope;
use super::weights::Weights;

/// The lora norms of DeepSeek's attention are built with this epsilon, whatever the configuration says.
const LORA_NORM_EPSILON: f64 = 1e-6;

/// What one head's softmax covers beside the scores: the latest `window` positions, and a sink that takes its share.
#[derive(Clone, Copy)]
struct Scope {
    window: usize,
    sink: Option<f64>,
}

const ALL: Scope = Scope {
    window: usize::MAX,
    sink: None,
};

/// One head's queries, keys and values by position: each query looks at its own and earlier positions.
fn attend(
    queries: &[Vec<f64>],
    keys: &[Vec<f64>],
    values: &[Vec<f64>],
    scale: f64,
    scope: Scope,
) -> Vec<Vec<f64>> {
    let one = |(position, query): (usize, &Vec<f64>)| {
        let first = (position + 1).saturating_sub(scope.window);
        let seen = &keys[first..=position];
        let mut scores: Vec<f64> = seen.iter().map(|key| dot(query, key) * scale).collect();
        scores.extend(scope.sink);
        let mut sum = vec![0.0; values[0].len()];
        for (weight, value) in softmax(&scores).iter().zip(&values[first..=position]) {
            add_scaled(&mut sum, value, *weight);
        }
        sum
    };
    queries.iter().enumerate().map(one).collect()
}

/// Head `index` of every position of `x`, `[position][heads * length]`.
fn head(x: &[Vec<f64>], index: usize, length: usize) -> Vec<Vec<f64>> {
    x.iter()
        .map(|x| x[index * length..(index + 1) * length].to_vec())
        .collect()
}

/// `heads[head][position][length]` side by side, `[position][heads * length]`.
fn join(heads: &[Vec<Vec<f64>>]) -> Vec<Vec<f64>> {
    (0..heads[0].len())
        .map(|position| heads.iter().flat_map(|h| h[position].clone()).collect())
        .collect()
}

struct Linear {
    weight: Matrix,
    bias: Option<Vec<f64>>,
}

impl Linear {
    fn load(weights: &Weights, name: &str) -> Self {
        Self {
            weight: weights.matrix(&format!("{name}.weight")),
            bias: weights.optional_vector(&format!("{name}.bias")),
        }
    }

    fn of_all(&self, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let one = |x: &Vec<f64>| {
            let mut y = self.weight.times(x);
            if let Some(bias) = &self.bias {
                add(&mut y, bias);
            }
            y
        };
        x.iter().map(one).collect()
    }
}

/// Several query heads share one key and value head.
pub struct GroupedAttention {
    q: Linear,
    k: Linear,
    v: Linear,
    output: Linear,
    /// Over each head, before the rotation (Qwen3).
    q_norm: Option<Norm>,
    k_norm: Option<Norm>,
    heads: usize,
    kv_heads: usize,
    rope: Rope,
    window: usize,
    sinks: Option<Vec<f64>>,
}

impl GroupedAttention {
    pub fn load(weights: &Weights, block: &str) -> Self {
        let heads = weights.count("attention.head_count");
        let k = Linear::load(weights, &format!("{block}.attn_k"));
        let kv_heads = weights.count_or("attention.head_count_kv", heads);
        let norm = |name: &str| {
            let name = format!("{block}.{name}.weight");
            weights.has(&name).then(|| weights.norm(&name))
        };
        let rotated = weights.count_or("rope.dimension_count", k.weight.rows() / kv_heads);
        Self {
            q: Linear::load(weights, &format!("{block}.attn_q")),
            k,
            v: Linear::load(weights, &format!("{block}.attn_v")),
            output: Linear::load(weights, &format!("{block}.attn_output")),
            q_norm: norm("attn_q_norm"),
            k_norm: norm("attn_k_norm"),
            heads,
            kv_heads,
            rope: Rope::load(weights, rotated),
            window: window(weights, block),
            sinks: weights.optional_vector(&format!("{block}.attn_sinks.weight")),
        }
    }

    pub fn forward(&self, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let (q, k, v) = (self.q.of_all(x), self.k.of_all(x), self.v.of_all(x));
        let length = self.q.weight.rows() / self.heads;
        let value_length = self.v.weight.rows() / self.kv_heads;
        let scale = self.rope.score_factor / (length as f64).sqrt();
        let outputs: Vec<_> = (0..self.heads)
            .map(|index| {
                let shared = index / (self.heads / self.kv_heads);
                let queries = self.place(head(&q, index, length), self.q_norm.as_ref());
                let keys = self.place(head(&k, shared, length), self.k_norm.as_ref());
                let values = head(&v, shared, value_length);
                let scope = Scope {
                    window: self.window,
                    sink: self.sinks.as_ref().map(|sinks| sinks[index]),
                };
                attend(&queries, &keys, &values, scale, scope)
            })
            .collect();
        self.output.of_all(&join(&outputs))
    }

    /// Norm and rotation of one head's queries or keys.
    fn place(&self, x: Vec<Vec<f64>>, norm: Option<&Norm>) -> Vec<Vec<f64>> {
        let one = |(position, x): (usize, Vec<f64>)| {
            let mut x = norm.map_or(x.clone(), |norm| norm.of(&x));
            self.rope.rotate(&mut x, position);
            x
        };
        x.into_iter().enumerate().map(one).collect()
    }
}

/// Positions that a layer's queries see: every other layer of gpt-oss, from the first on, has a sliding window.
fn window(weights: &Weights, block: &str) -> usize {
    let index: usize = block["blk.".len()..].parse().unwrap();
    if index % 2 == 1 {
        return usize::MAX;
    }
    weights.count_or("attention.sliding_window", usize::MAX)
}

/// Keys and values are projections of one small vector per token; a rotated part of the key is shared by all heads.
/// Computed as in the paper (arXiv 2405.04434, section 2.1), nothing absorbed.
pub struct LatentAttention {
    query: Query,
    kv_a: Matrix,
    kv_a_norm: Norm,
    /// By head: latent to the unrotated part of the key, `[nope, kv_lora]`.
    key: Vec<Matrix>,
    /// By head: latent to value, `[value, kv_lora]`.
    value: Vec<Matrix>,
    output: Matrix,
    rope: Rope,
    rotated: usize,
}

enum Query {
    Full(Matrix),
    Lora { a: Matrix, norm: Norm, b: Matrix },
}

impl Query {
    fn load(weights: &Weights, block: &str) -> Self {
        if weights.has(&format!("{block}.attn_q.weight")) {
            return Query::Full(weights.matrix(&format!("{block}.attn_q.weight")));
        }
        let norm = format!("{block}.attn_q_a_norm.weight");
        Query::Lora {
            a: weights.matrix(&format!("{block}.attn_q_a.weight")),
            norm: weights.norm_with_epsilon(&norm, LORA_NORM_EPSILON),
            b: weights.matrix(&format!("{block}.attn_q_b.weight")),
        }
    }

    fn rows(&self) -> usize {
        match self {
            Query::Full(weight) => weight.rows(),
            Query::Lora { b, .. } => b.rows(),
        }
    }

    fn of(&self, x: &[f64]) -> Vec<f64> {
        match self {
            Query::Full(weight) => weight.times(x),
            Query::Lora { a, norm, b } => b.times(&norm.of(&a.times(x))),
        }
    }
}

impl LatentAttention {
    pub fn load(weights: &Weights, block: &str) -> Self {
        let heads = weights.count("attention.head_count");
        let rotated = weights.count("rope.dimension_count");
        let query = Query::load(weights, block);
        let nope = query.rows() / heads - rotated;
        let (key, value) = if weights.has(&format!("{block}.attn_kv_b.weight")) {
            // Per head: rows of the key, then rows of the value.
            let both = weights.matrix(&format!("{block}.attn_kv_b.weight"));
            let rows = both.rows() / heads;
            let part =
                |h: usize, from: usize, to: usize| both.slice(h * rows + from, h * rows + to);
            let keys = (0..heads).map(|h| part(h, 0, nope)).collect();
            let values = (0..heads).map(|h| part(h, nope, rows)).collect();
            (keys, values)
        } else {
            // The key's part is stored transposed, `[kv_lora, nope]`.
            let stored = weights.matrices(&format!("{block}.attn_k_b.weight"));
            let keys: Vec<Matrix> = stored.iter().map(Matrix::transposed).collect();
            assert_eq!(keys[0].rows(), nope);
            let values = weights.matrices(&format!("{block}.attn_v_b.weight"));
            (keys, values)
        };
        let norm = format!("{block}.attn_kv_a_norm.weight");
        Self {
            query,
            kv_a: weights.matrix(&format!("{block}.attn_kv_a_mqa.weight")),
            kv_a_norm: weights.norm_with_epsilon(&norm, LORA_NORM_EPSILON),
            key,
            value,
            output: weights.matrix(&format!("{block}.attn_output.weight")),
            rope: Rope::load(weights, rotated),
            rotated,
        }
    }

    pub fn forward(&self, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let heads = self.key.len();
        let length = self.query.rows() / heads;
        let nope = length - self.rotated;
        let scale = self.rope.score_factor / (length as f64).sqrt();
        let queries: Vec<Vec<f64>> = x.iter().map(|x| self.query.of(x)).collect();
        let mut latents = Vec::new();
        let mut shared_keys = Vec::new();
        for (position, x) in x.iter().enumerate() {
            let both = self.kv_a.times(x);
            let (latent, shared) = both.split_at(self.kv_a.rows() - self.rotated);
            let mut shared = shared.to_vec();
            self.rope.rotate(&mut shared, position);
            latents.push(self.kv_a_norm.of(latent));
            shared_keys.push(shared);
        }
        let one = |index: usize| {
            let mut queries = head(&queries, index, length);
            for (position, query) in queries.iter_mut().enumerate() {
                self.rope.rotate(&mut query[nope..], position);
            }
            let keys: Vec<Vec<f64>> = latents
                .iter()
                .zip(&shared_keys)
                .map(|(latent, shared)| [self.key[index].times(latent), shared.clone()].concat())
                .collect();
            let values: Vec<Vec<f64>> =
                latents.iter().map(|c| self.value[index].times(c)).collect();
            attend(&queries, &keys, &values, scale, ALL)
        };
        let outputs: Vec<Vec<Vec<f64>>> = (0..heads).map(one).collect();
        join(&outputs)
            .iter()
            .map(|x| self.output.times(x))
            .collect()
    }
}
