//! The file of an adapter: its matrices by the module that they belong to.

use std::collections::BTreeMap;
use std::path::Path;

use ktx_gguf::Tensor;
use ktx_kernels::activation::GatedActivation;

use super::error::AdapterError;
use super::low_rank::LowRank;
use super::{gguf, peft};
use crate::key::gguf_key;
use crate::spec::{LinearSource, RowOrder, Spec};
use crate::tree::Module;

/// How a file names what it adapts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Naming {
    /// By tensor of the GGUF base: `blk.0.attn_q.weight`. Rows are in that file's order.
    Tensors,
    /// By path as in Hugging Face: `model.layers.0.self_attn.q_proj`. Rows are in the original's order.
    Paths,
}

/// A and B of one name.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) a: Tensor,
    pub(super) b: Tensor,
    /// Alpha over rank, or what the configuration makes of it.
    pub(super) scale: f32,
    /// Set where both matrices are those of all experts side by side.
    pub(super) fused: Option<Fused>,
}

/// Rank of one expert and factor, for each of the two parameters that fused experts have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fused {
    pub(super) gate_up: (usize, f32),
    pub(super) down: (usize, f32),
}

/// An adapter as its file has it: read and checked, not yet for any model.
#[derive(Debug)]
pub struct AdapterFile {
    pub(super) file: String,
    pub(super) architecture: Option<String>,
    pub(super) naming: Naming,
    pub(super) entries: BTreeMap<String, Entry>,
}

/// What a module needs of an adapter.
#[derive(Clone, Copy)]
struct Wanted {
    input: usize,
    output: usize,
    /// A is `[vocab, rank]`: rows by token id.
    embedding: bool,
    order: RowOrder,
}

impl AdapterFile {
    /// Opens a GGUF adapter, or the directory of a PEFT adapter.
    ///
    /// # Errors
    /// [`AdapterError`] if the file is no adapter, or one whose arithmetic is not implemented.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, AdapterError> {
        let path = path.as_ref();
        let is = |extension: &str| {
            path.extension()
                .is_some_and(|e| e.eq_ignore_ascii_case(extension))
        };
        let adapter = if path.is_dir() || is("safetensors") || is("json") {
            peft::open(path)?
        } else {
            gguf::open(path)?
        };
        match adapter.entries.is_empty() {
            true => Err(AdapterError::Empty { file: adapter.file }),
            false => Ok(adapter),
        }
    }

    /// What messages call the file.
    pub fn name(&self) -> &str {
        &self.file
    }

    /// The architecture that it was made for, where it says.
    pub fn architecture(&self) -> Option<&str> {
        self.architecture.as_deref()
    }

    /// The part of one module, if there is one.
    ///
    /// # Errors
    /// [`AdapterError`] if its matrices do not fit the module or hold values that are no numbers.
    pub fn part(&self, module: &Module) -> Result<Option<LowRank>, AdapterError> {
        Ok(self.named_part(module)?.map(|(_, part)| part))
    }

    /// The same, with the name of the entry that it is of.
    pub(super) fn named_part(
        &self,
        module: &Module,
    ) -> Result<Option<(String, LowRank)>, AdapterError> {
        let Some(wanted) = Wanted::of(&module.spec) else {
            return Ok(None);
        };
        for name in self.names(module) {
            let Some(entry) = self.entries.get(&name) else {
                continue;
            };
            let (a, b) = match &module.spec {
                Spec::Linear(linear) => match linear.source {
                    LinearSource::Expert { index, .. } => self.of_expert(entry, module, index)?,
                    _ => (entry.a.clone(), entry.b.clone()),
                },
                _ => (entry.a.clone(), entry.b.clone()),
            };
            let part = self.fitted(a, b, entry.scale, module, wanted)?;
            return Ok(Some((name, part)));
        }
        self.of_fused_experts(module, wanted)
    }

    /// The part of one expert's projection where the original has one parameter for gate and up of all
    /// experts and one for down: PEFT's A is `[experts * rank, in]`, its B `[out, rank * experts]` with
    /// the experts of a rank side by side. The inner of the two wraps is called `base_layer`.
    fn of_fused_experts(
        &self,
        module: &Module,
        wanted: Wanted,
    ) -> Result<Option<(String, LowRank)>, AdapterError> {
        let Spec::Linear(linear) = &module.spec else {
            return Ok(None);
        };
        let LinearSource::Expert { merged, index, .. } = &linear.source else {
            return Ok(None);
        };
        let Some(projection) = Projection::of(merged) else {
            return Ok(None);
        };
        let list = module.path.rsplitn(3, '.').last().unwrap_or_default();
        let outputs = wanted.output * projection.parts;
        for name in [list.to_owned(), format!("{list}.base_layer")] {
            let Some(entry) = self.entries.get(&name) else {
                continue;
            };
            if (entry.a.row_len(), entry.b.rows()) != (wanted.input, outputs) {
                continue;
            }
            let Some(fused) = entry.fused else {
                continue;
            };
            let (rank, scale) = match projection.parts {
                2 => fused.gate_up,
                _ => fused.down,
            };
            let first = projection.index * wanted.output;
            let matrices = one_of_fused(entry, rank, *index, first, wanted.output);
            let (a, b) = matrices.ok_or_else(|| {
                self.bad(
                    &entry.b,
                    &format!("does not hold the rank {rank} for each expert"),
                )
            })?;
            let part = self.fitted(a, b, scale, module, wanted)?;
            return Ok(Some((name, part)));
        }
        Ok(None)
    }

    /// Names under which a module's part may be.
    pub(super) fn names(&self, module: &Module) -> Vec<String> {
        if self.naming == Naming::Paths {
            let path = module.path.as_str();
            // Adapters of a model without its head leave out the first part.
            let short = path.strip_prefix("model.").map(str::to_owned);
            return [Some(path.to_owned()), short]
                .into_iter()
                .flatten()
                .collect();
        }
        let of = |key: &str| format!("{key}.weight");
        match &module.spec {
            Spec::Linear(linear) => match &linear.source {
                LinearSource::Expert {
                    merged,
                    separate,
                    index,
                } => vec![of(merged), of(&format!("{separate}.{index}"))],
                // A tied head has a name of its own all the same.
                LinearSource::Tensor(_) => vec![of(&gguf_key(&module.path))],
                LinearSource::Key | LinearSource::KvB { .. } => vec![of(&module.key)],
            },
            _ => vec![of(&module.key)],
        }
    }

    /// Refuses fused matrices of another number of experts than a list of experts has.
    pub(super) fn check_fused(&self, module: &Module) -> Result<(), AdapterError> {
        let Spec::Experts(spec) = &module.spec else {
            return Ok(());
        };
        for name in [module.path.clone(), format!("{}.base_layer", module.path)] {
            let Some(entry) = self.entries.get(&name) else {
                continue;
            };
            let Some(fused) = entry.fused else {
                continue;
            };
            if spec.activation != GatedActivation::SwiGlu {
                let reason = "is one for all experts of a family whose gate and up are interleaved, which is not \
                              supported; name each expert's projections, or convert the adapter to GGUF";
                return Err(self.bad(&entry.b, reason));
            }
            let sizes = (entry.a.row_len(), entry.b.rows());
            let gate_up = sizes == (spec.hidden_size, 2 * spec.moe_intermediate_size);
            let (rank, _) = if gate_up { fused.gate_up } else { fused.down };
            if entry.a.rows() != rank * spec.num_experts {
                return Err(AdapterError::Shape {
                    file: self.file.clone(),
                    tensor: entry.a.name().to_owned(),
                    module: module.path.clone(),
                    found: entry.a.shape().to_vec(),
                    expected: format!("[in, rank {rank} x {} experts]", spec.num_experts),
                });
            }
        }
        Ok(())
    }

    fn fitted(
        &self,
        a: Tensor,
        b: Tensor,
        scale: f32,
        module: &Module,
        wanted: Wanted,
    ) -> Result<LowRank, AdapterError> {
        let (a, b) = (two_dimensional(a), two_dimensional(b));
        let rank = b.row_len();
        let shape = |tensor: &Tensor, fits: bool, expected: String| match fits {
            true => Ok(()),
            false => Err(AdapterError::Shape {
                file: self.file.clone(),
                tensor: tensor.name().to_owned(),
                module: module.path.clone(),
                found: tensor.shape().to_vec(),
                expected,
            }),
        };
        let (a_shape, a_expected) = match wanted.embedding {
            true => ([rank, wanted.input], format!("[{rank}, {}]", wanted.input)),
            false => ([wanted.input, rank], format!("[{}, {rank}]", wanted.input)),
        };
        shape(
            &b,
            b.shape() == [rank, wanted.output],
            format!("[rank, {}]", wanted.output),
        )?;
        shape(&a, a.shape() == a_shape, a_expected)?;
        if rank == 0 {
            return Err(self.bad(&b, "has rank 0"));
        }
        for tensor in [&a, &b] {
            if !tensor.to_f32().iter().all(|v| v.is_finite()) {
                return Err(self.bad(tensor, "holds values that are no numbers"));
            }
        }
        let b = match (self.naming, wanted.order) {
            (Naming::Paths, RowOrder::RotatedPairs { heads }) => {
                paired(&b, heads).ok_or_else(|| {
                    self.bad(&b, "cannot be brought into the order of the base's rows")
                })?
            }
            _ => b,
        };
        Ok(LowRank::new(a, b, scale))
    }

    /// The matrices of one expert: those of the merged `[experts, ..]`, or its own.
    fn of_expert(
        &self,
        entry: &Entry,
        module: &Module,
        index: usize,
    ) -> Result<(Tensor, Tensor), AdapterError> {
        let of = |tensor: &Tensor| match tensor.shape().len() {
            3 => {
                // One A may serve all experts.
                let index = if tensor.shape()[2] == 1 { 0 } else { index };
                tensor.slice(index).ok_or_else(|| AdapterError::Shape {
                    file: self.file.clone(),
                    tensor: tensor.name().to_owned(),
                    module: module.path.clone(),
                    found: tensor.shape().to_vec(),
                    expected: format!("one matrix for each expert, number {index} included"),
                })
            }
            _ => Ok(tensor.clone()),
        };
        Ok((of(&entry.a)?, of(&entry.b)?))
    }

    fn bad(&self, tensor: &Tensor, reason: &str) -> AdapterError {
        AdapterError::Tensor {
            file: self.file.clone(),
            tensor: tensor.name().to_owned(),
            reason: reason.to_owned(),
        }
    }
}

/// Which part of a fused parameter's rows a projection is.
struct Projection {
    index: usize,
    parts: usize,
}

impl Projection {
    /// By the name of the merged tensor: `blk.3.ffn_gate_exps`.
    fn of(merged: &str) -> Option<Self> {
        let (index, parts) = match merged.rsplit('.').next()? {
            "ffn_gate_exps" => (0, 2),
            "ffn_up_exps" => (1, 2),
            "ffn_down_exps" => (0, 1),
            _ => return None,
        };
        Some(Self { index, parts })
    }
}

/// A `[rank, in]` and rows `first .. first + rows` of B `[out, rank]` of one expert.
fn one_of_fused(
    entry: &Entry,
    rank: usize,
    expert: usize,
    first: usize,
    rows: usize,
) -> Option<(Tensor, Tensor)> {
    let (a, b) = (&entry.a, &entry.b);
    let experts = a.rows().checked_div(rank)?;
    if experts * rank != a.rows() || b.row_len() != a.rows() || expert >= experts {
        return None;
    }
    let element = b.ty().block_bytes();
    if b.ty().block_len() != 1 {
        return None;
    }
    let mut columns = Vec::with_capacity(rows * rank * element);
    for row in b
        .bytes()
        .chunks_exact(b.row_len() * element)
        .skip(first)
        .take(rows)
    {
        for r in 0..rank {
            let at = (r * experts + expert) * element;
            columns.extend_from_slice(&row[at..at + element]);
        }
    }
    let b = Tensor::from_bytes(b.name(), b.ty(), &[rank, rows], columns).ok()?;
    Some((a.rows_range(expert * rank, (expert + 1) * rank)?, b))
}

impl Wanted {
    /// Sizes of modules that can be adapted.
    fn of(spec: &Spec) -> Option<Self> {
        let plain = |input, output| Self {
            input,
            output,
            embedding: false,
            order: RowOrder::Original,
        };
        Some(match spec {
            Spec::Linear(s) => Self {
                order: s.order,
                ..plain(s.in_features, s.out_features)
            },
            Spec::Gate(s) => plain(s.hidden_size, s.config.experts),
            Spec::Embedding(s) => Self {
                embedding: true,
                ..plain(s.vocab_size, s.hidden_size)
            },
            _ => return None,
        })
    }
}

/// Without the outer dimensions of 1 that files write or leave out.
fn two_dimensional(tensor: Tensor) -> Tensor {
    let shape = tensor.shape();
    if shape.len() > 2 && shape[2..].iter().all(|n| *n == 1) {
        let inner = [shape[0], shape[1]];
        return tensor.reshape(&inner).unwrap_or(tensor);
    }
    tensor
}

/// Rows of each head in the order in which neighbours are rotated together: row `i` of the first half,
/// row `i` of the second half, and so on.
fn paired(b: &Tensor, heads: usize) -> Option<Tensor> {
    let rows = b.rows();
    let head = rows.checked_div(heads)?;
    let half = head / 2;
    if head * heads != rows || half * 2 != head {
        return None;
    }
    let row_bytes = b.bytes().len() / rows.max(1);
    let mut bytes = Vec::with_capacity(b.bytes().len());
    for first in (0..rows).step_by(head) {
        for pair in 0..half {
            for row in [first + pair, first + half + pair] {
                bytes.extend_from_slice(&b.bytes()[row * row_bytes..(row + 1) * row_bytes]);
            }
        }
    }
    Tensor::from_bytes(b.name(), b.ty(), b.shape(), bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_head_are_paired_as_the_converter_does() {
        // Rank 1, two heads of four rows: halves (0 1 | 2 3) become pairs (0 2 1 3).
        let b = Tensor::from_f32("b", &[1, 8], (0..8).map(|v| v as f32).collect());
        assert_eq!(
            paired(&b, 2).unwrap().to_f32(),
            [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
        );
        assert!(paired(&b, 3).is_none());
    }
}
