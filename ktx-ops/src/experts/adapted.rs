//! Routed experts with adapters: expert by expert, with the low-rank updates beside each product.
//!
//! Rows of sequences without adapters keep the fused way of [`HostExperts`](super::HostExperts); these
//! take more, smaller products, in the same order of experts and with the same arithmetic.

use ktx_kernels::activation::{GatedActivation, gated};
use ktx_kernels::linear::WeightRows;
use ktx_kernels::workspace::{Act, Workspace};

use crate::build::OpError;
use crate::linear::{kernel_error, multiply};
use crate::lora::{ActiveAdapter, AdapterId, Attached, Attachment, LowRank};
use crate::module::{Forward, HostMatrix};
use crate::spec::ExpertsSpec;
use crate::weights::ExpertTensors;

/// The adapters' parts of one expert: gate, up, down.
type Parts = [Attached; 3];

/// The adapters' parts of all experts of a layer.
#[derive(Default)]
pub(super) struct AdaptedExperts {
    experts: Vec<Parts>,
    ids: Vec<AdapterId>,
}

/// What the experts compute without adapters.
#[derive(Clone, Copy)]
pub(super) struct HostWeights<'a> {
    /// Gate, up and down.
    pub tensors: &'a [ExpertTensors; 3],
    /// `[experts, out]` of gate, up and down.
    pub biases: Option<&'a [Vec<f32>; 3]>,
    /// Between gate and up.
    pub activation: GatedActivation,
}

/// One span of rows and what is done with it.
pub(super) struct Routed {
    /// `[rows, hidden]`.
    pub x: Act,
    /// `[rows, top_k]`.
    pub ids: Act,
    /// `[rows, top_k]`.
    pub weights: Act,
    /// `[rows, hidden]`.
    pub out: Act,
}

impl Routed {
    /// Some of its rows.
    pub(super) fn rows(&self, first: usize, rows: usize) -> Self {
        let part = |act: Act| act.row_range(first, rows);
        Self {
            x: part(self.x),
            ids: part(self.ids),
            weights: part(self.weights),
            out: part(self.out),
        }
    }
}

impl AdaptedExperts {
    /// Takes the parts of all experts' projections.
    pub(super) fn attach(
        &mut self,
        path: &str,
        spec: &ExpertsSpec,
        attachment: &mut Attachment<'_>,
    ) {
        let mut all: Vec<Parts> = std::mem::take(&mut self.experts);
        all.resize_with(spec.num_experts, Parts::default);
        let mut any = false;
        for (index, parts) in all.iter_mut().enumerate() {
            for (part, name) in parts.iter_mut().zip(spec.projections) {
                part.attach(&format!("{path}.{index}.{name}"), attachment);
                any |= part.of(attachment.id()).is_some();
            }
        }
        if any {
            self.ids.push(attachment.id());
        }
        if !self.ids.is_empty() {
            self.experts = all;
        }
    }

    /// Lets go of one adapter's parts.
    pub(super) fn detach(&mut self, id: AdapterId) {
        self.ids.retain(|i| *i != id);
        self.experts
            .iter_mut()
            .flatten()
            .for_each(|part| part.detach(id));
        if self.ids.is_empty() {
            self.experts = Vec::new();
        }
    }

    /// Whether no adapter adapts an expert.
    pub(super) fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Whether one of these adapters adapts an expert.
    pub(super) fn any_of(&self, adapters: &[ActiveAdapter]) -> bool {
        adapters.iter().any(|a| self.ids.contains(&a.id))
    }

    /// Values of f32 that [`Self::run`] takes of the workspace for this many rows.
    pub(super) fn scratch(&self, spec: &ExpertsSpec, rows: usize) -> usize {
        if self.is_empty() {
            return 0;
        }
        let parts = self.experts.iter().flatten();
        2 * Workspace::values_for(rows, spec.hidden_size)
            + 3 * Workspace::values_for(rows, spec.moe_intermediate_size)
            + parts.map(|p| p.scratch(rows)).max().unwrap_or(0)
    }

    /// `out = sum_k weights[k] * expert[ids[k]](x)` for rows that all have the same adapters.
    pub(super) fn run(
        &self,
        cx: &mut Forward<'_>,
        path: &str,
        weights: HostWeights<'_>,
        adapters: &[ActiveAdapter],
        routed: &Routed,
    ) -> Result<(), OpError> {
        let top_k = routed.ids.cols();
        cx.workspace.write(routed.out).fill(0.0);
        // Pairs of expert and slot in the order of the experts.
        let chosen: &[u32] = bytemuck::cast_slice(cx.workspace.read(routed.ids));
        let mut slots: Vec<(u32, usize)> = chosen.iter().copied().zip(0..).collect();
        slots.sort_unstable();
        for group in slots.chunk_by(|a, b| a.0 == b.0) {
            let index = group[0].0 as usize;
            let missing = || kernel_error(path, format_args!("there is no expert {index}"));
            let parts = self.experts.get(index).ok_or_else(missing)?;
            let expert = Expert {
                path,
                index,
                weights,
                tensors: [0, 1, 2].map(|i: usize| weights.tensors[i].expert(index)),
                parts,
                adapters,
            };
            cx.scoped(|cx| {
                let device = routed.x.device();
                let input = cx.alloc(device, group.len(), routed.x.cols())?;
                let output = cx.alloc(device, group.len(), routed.x.cols())?;
                for (i, (_, slot)) in group.iter().enumerate() {
                    let row = routed.x.row_range(slot / top_k, 1);
                    cx.workspace.copy(row, input.row_range(i, 1));
                }
                expert.forward(cx, input, output)?;
                for (i, (_, slot)) in group.iter().enumerate() {
                    let weight = cx.workspace.read(routed.weights)[*slot];
                    let ([y], [sum]) = cx.workspace.views(
                        [output.row_range(i, 1)],
                        [routed.out.row_range(slot / top_k, 1)],
                    );
                    sum.iter_mut().zip(y).for_each(|(s, y)| *s += weight * y);
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// One expert with its adapters.
struct Expert<'a> {
    path: &'a str,
    index: usize,
    weights: HostWeights<'a>,
    tensors: [Option<ktx_gguf::Tensor>; 3],
    parts: &'a Parts,
    adapters: &'a [ActiveAdapter],
}

impl Expert<'_> {
    fn matrix(&self, projection: usize) -> Result<HostMatrix<'_>, OpError> {
        let tensor = self.tensors[projection]
            .as_ref()
            .ok_or_else(|| kernel_error(self.path, "an expert's weights are missing"))?;
        let weights = WeightRows::of(tensor).map_err(|e| kernel_error(self.path, e))?;
        let rows = weights.rows();
        let biases = self.weights.biases.map(|all| &all[projection]);
        let bias = biases.and_then(|b| b.get(self.index * rows..(self.index + 1) * rows));
        Ok(HostMatrix { weights, bias })
    }

    /// What the adapters add to one projection.
    fn add(
        &self,
        cx: &mut Forward<'_>,
        projection: usize,
        x: Act,
        out: Act,
    ) -> Result<(), OpError> {
        self.adapters.iter().try_for_each(|active| {
            let part: Option<&LowRank> = self.parts[projection].of(active.id);
            part.map_or(Ok(()), |p| p.add(cx, self.path, x, out, active.scale))
        })
    }

    /// `down(activation(gate(x), up(x)))`, each with its updates.
    fn forward(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError> {
        let (gate_matrix, up_matrix) = (self.matrix(0)?, self.matrix(1)?);
        let width = gate_matrix.weights.rows();
        cx.scoped(|cx| {
            let gate = cx.alloc(x.device(), x.rows(), width)?;
            let up = cx.alloc(x.device(), x.rows(), width)?;
            multiply(cx, self.path, &[gate_matrix, up_matrix], x, [gate, up])?;
            self.add(cx, 0, x, gate)?;
            self.add(cx, 1, x, up)?;
            let h = cx.alloc(x.device(), x.rows(), width)?;
            let ([g, u], [values]) = cx.workspace.views([gate, up], [h]);
            gated(cx.pool, self.weights.activation, g, u, values);
            multiply(cx, self.path, &[self.matrix(2)?], h, [out])?;
            self.add(cx, 2, h, out)
        })
    }
}
