//! What a stage costs wherever its parts are: the objective that the search makes as small as it can,
//! and the predicted speed.

use ktx_kernels::kv::KvType;

use super::machine::Machine;
use super::units::{Matrix, Part, Stage, Stages, Use};

/// Up to this many tokens a product reads its weights once for each of them.
const ROW_TOKENS: f64 = 4.0;

/// Tokens of one text choose alike: so many touch as many experts as one that chooses by itself. With a synthetic
/// router, which prefers some experts more than a trained one does, products of 16 tokens say 3 to 4.
const ALIKE: f64 = 2.0;

/// What the machine will be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens of an answer.
    pub generate: usize,
}

impl Default for Workload {
    /// A question with some context, and an answer of a page: 512 and 256 tokens.
    fn default() -> Self {
        Self {
            prompt: 512,
            generate: 256,
        }
    }
}

/// Seconds of one call in each phase.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Seconds {
    /// A chunk of the prompt.
    pub prefill: f64,
    /// One token.
    pub generate: f64,
}

impl Seconds {
    fn both(self, other: Self, join: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            prefill: join(self.prefill, other.prefill),
            generate: join(self.generate, other.generate),
        }
    }

    /// One after the other.
    pub fn then(self, other: Self) -> Self {
        self.both(other, |a, b| a + b)
    }

    /// At the same time.
    pub fn beside(self, other: Self) -> Self {
        self.both(other, f64::max)
    }
}

/// A part's cost on either kind of device, and what it takes there.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct PartCost {
    /// Bytes of weights and cache.
    pub bytes: u64,
    /// Those of them that the host holds already, if it is there: of a head that is the embedding, too.
    pub on_host: u64,
    pub cpu: Seconds,
    pub gpu: Seconds,
}

/// A stage's cost by parts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct StageCost {
    pub home: PartCost,
    pub ffn: Option<PartCost>,
    pub experts: Option<PartCost>,
    /// Whether the home may be on a GPU: the embedding may not.
    pub home_moves: bool,
}

/// A model's cost, ready for the search.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Chain {
    pub stages: Vec<StageCost>,
    /// Rows of the residual stream from one device to another.
    pub transfer: Seconds,
    /// Chunks of a prompt, and tokens of an answer.
    pub weight: Seconds,
}

impl Chain {
    /// The one number that the search makes small: seconds of the workload.
    pub(super) fn seconds(&self, time: Seconds) -> f64 {
        time.prefill * self.weight.prefill + time.generate * self.weight.generate
    }
}

/// What the cost depends on besides the model.
#[derive(Debug, Clone)]
pub(super) struct Conditions<'a> {
    pub machine: &'a Machine,
    pub workload: Workload,
    /// Tokens of the cache, whole pages.
    pub cache_tokens: u64,
    /// How cached values are stored.
    pub kv_type: KvType,
    /// Tokens of one prefill call.
    pub chunk: usize,
}

impl Conditions<'_> {
    pub(super) fn chain(&self, stages: &Stages) -> Chain {
        let last = stages.all.len() - 1;
        let costs = stages.all.iter().enumerate().map(|(i, stage)| {
            let mut cost = self.stage(stage);
            // The table is read by rows: a GPU would hold it for nothing.
            cost.home_moves = i > 0;
            if i == last {
                // The embedding, which stays on the host, holds the head's matrix there.
                cost.home.on_host = stages.tied_bytes;
            }
            cost
        });
        let row = 4.0 * stages.hidden_size as f64;
        let gpu = &self.machine.gpu;
        let chunk = self.chunk_tokens();
        Chain {
            stages: costs.collect(),
            transfer: Seconds {
                prefill: gpu.link_latency + chunk * row / gpu.link,
                generate: gpu.link_latency + row / gpu.link,
            },
            weight: Seconds {
                prefill: self.workload.prompt as f64 / chunk,
                generate: self.workload.generate as f64,
            },
        }
    }

    fn chunk_tokens(&self) -> f64 {
        self.chunk.min(self.workload.prompt).max(1) as f64
    }

    fn stage(&self, stage: &Stage) -> StageCost {
        StageCost {
            home: self.part(&stage.home),
            ffn: stage.ffn.as_ref().map(|(part, _)| self.part(part)),
            experts: stage.experts.as_ref().map(|(part, _)| self.part(part)),
            home_moves: true,
        }
    }

    /// Bytes that a token's entries in a part's cache take.
    pub fn cache_bytes(&self, part: &Part) -> u64 {
        self.kv_type.bytes(part.cache.width as usize) as u64
    }

    fn part(&self, part: &Part) -> PartCost {
        let cache = self.cache_bytes(part) * self.cache_tokens;
        PartCost {
            bytes: part.bytes() + cache,
            on_host: 0,
            cpu: Seconds {
                prefill: self.on_cpu(part, self.chunk_tokens(), self.workload.prompt as f64 / 2.0),
                generate: self.on_cpu(part, 1.0, self.mean_context()),
            },
            gpu: Seconds {
                prefill: self.on_gpu(part, self.chunk_tokens(), self.workload.prompt as f64 / 2.0),
                generate: self.on_gpu(part, 1.0, self.mean_context()),
            },
        }
    }

    /// Tokens that a generated token looks back on.
    fn mean_context(&self) -> f64 {
        self.workload.prompt as f64 + self.workload.generate as f64 / 2.0
    }

    pub(super) fn on_cpu(&self, part: &Part, tokens: f64, context: f64) -> f64 {
        let cpu = &self.machine.cpu;
        let matrix = |m: &Matrix| {
            let rate = cpu.rate(m.ty);
            let work = Work::of(part.usage, m, tokens);
            if matches!(part.usage, Use::Chosen { .. }) {
                return cpu.experts_of(m.ty, work.bytes, work.flops, work.rows_each);
            }
            match work.rows_each <= ROW_TOKENS {
                true => work.rows_each * work.bytes / rate.stream,
                false => {
                    (work.bytes / rate.stream).max(rate.product_of_many(work.bytes, work.flops))
                }
            }
        };
        // Attention is not a product of blocks; the f32 kernels' rate is what it comes to.
        let flops = cpu.rate(ktx_gguf::GgmlType::F32).flops;
        let cache = self.cache_time(part, tokens, context, cpu.bandwidth, flops);
        part.matrices.iter().map(matrix).sum::<f64>() + cache + part.steps as f64 * cpu.region
    }

    pub(super) fn on_gpu(&self, part: &Part, tokens: f64, context: f64) -> f64 {
        let gpu = &self.machine.gpu;
        let matrix = |m: &Matrix| {
            let work = Work::of(part.usage, m, tokens);
            (work.bytes / gpu.bandwidth).max(work.flops / gpu.flops)
        };
        let cache = self.cache_time(part, tokens, context, gpu.bandwidth, gpu.flops);
        part.matrices.iter().map(matrix).sum::<f64>() + cache + part.steps as f64 * gpu.launch
    }

    fn cache_time(
        &self,
        part: &Part,
        tokens: f64,
        context: f64,
        bandwidth: f64,
        flops: f64,
    ) -> f64 {
        let bytes = self.cache_bytes(part) as f64 * context;
        (bytes / bandwidth).max(part.cache.flops as f64 * context * tokens / flops)
    }
}

/// What a call does with a matrix.
struct Work {
    /// Bytes that it reads.
    bytes: f64,
    flops: f64,
    /// Tokens that each row which is read is multiplied with.
    rows_each: f64,
}

impl Work {
    fn of(usage: Use, m: &Matrix, tokens: f64) -> Self {
        let (bytes, elements) = (m.bytes as f64, m.elements as f64);
        match usage {
            Use::All => Self {
                bytes,
                flops: 2.0 * elements * tokens,
                rows_each: tokens,
            },
            Use::OneRow { rows } => Self {
                bytes: bytes / rows as f64 * tokens,
                flops: 0.0,
                rows_each: 1.0,
            },
            Use::Chosen { top_k, experts } => {
                let share = top_k as f64 / experts as f64;
                // Expected share of experts that at least one of the tokens chose.
                let independent = 1.0 + (tokens - 1.0).max(0.0) / ALIKE;
                let touched = 1.0 - (1.0 - share).powf(independent);
                Self {
                    bytes: bytes * touched,
                    flops: 2.0 * elements * share * tokens,
                    rows_each: tokens * share / touched,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ktx_gguf::GgmlType;

    #[test]
    fn a_token_touches_its_experts_and_a_long_prompt_touches_all() {
        let m = Matrix {
            ty: GgmlType::Q4_K,
            bytes: 1000,
            elements: 2000,
        };
        let usage = Use::Chosen {
            top_k: 8,
            experts: 256,
        };
        let one = Work::of(usage, &m, 1.0);
        assert!(
            (one.bytes - 1000.0 * 8.0 / 256.0).abs() < 1e-9 && (one.rows_each - 1.0).abs() < 1e-9
        );
        let many = Work::of(usage, &m, 4096.0);
        assert!(many.bytes > 999.9 && (many.rows_each - 128.0).abs() < 0.1);
        assert!((many.flops - 2.0 * 2000.0 * 128.0).abs() < 1e-6);
    }
}
