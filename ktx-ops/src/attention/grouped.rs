//! Attention with keys and values shared by groups of query heads.

use ktx_kernels::attention::cuda::{self, DeviceGqaQuery};
use ktx_kernels::attention::{AttentionShape, GqaQuery, gqa};
use ktx_kernels::cuda::DeviceBuffer;
use ktx_kernels::device::Device;
use ktx_kernels::workspace::{Act, Workspace};
use serde::{Deserialize, Serialize};

use super::write_cache;
use crate::build::{BuildArgs, OpError, Operator, Placement};
use crate::gpu::{OnGpus, gpus, refused, upload};
use crate::kwargs::{KwargDoc, KwargSet};
use crate::linear::forward_joined;
use crate::module::{
    Attention, Capacity, Forward, HeadSpan, Holding, KModule, KvLayout, KvSlot, Linear, Loader,
    Norm, Phase, Rope, largest_scratch,
};
use crate::register_operator;
use crate::spec::{AttentionSpec, Spec};
use crate::weights::{floats, required};

/// Arguments that other engines' files give to these operators.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
struct GroupedKwargs {
    chunck_size: usize,
}

impl Default for GroupedKwargs {
    fn default() -> Self {
        Self { chunck_size: 1000 }
    }
}

impl KwargSet for GroupedKwargs {
    const DOCS: &'static [KwargDoc] = &[KwargDoc {
        name: "chunck_size",
        doc: "query rows of a pass",
        ignored: Some("the kernel tiles its queries"),
    }];
}

/// `o_proj(softmax(q k^T * scale) v)` over the paged cache, causal; with a sliding window and sinks
/// where the model has them.
pub struct GroupedQueryAttention {
    path: String,
    placement: Placement,
    spec: AttentionSpec,
    q_proj: Box<dyn Linear>,
    k_proj: Box<dyn Linear>,
    v_proj: Box<dyn Linear>,
    o_proj: Box<dyn Linear>,
    head_norms: Option<(Box<dyn Norm>, Box<dyn Norm>)>,
    rotary: Box<dyn Rope>,
    sinks: Option<Vec<f32>>,
    sinks_on_gpus: OnGpus<Option<DeviceBuffer>>,
}

impl GroupedQueryAttention {
    const CLASS: &'static str = "ktx.attention.GroupedQueryAttention";

    /// The attention of a module's projections and rotation.
    pub fn new(args: &mut BuildArgs<'_>) -> Result<Self, OpError> {
        let Spec::Attention(spec) = args.spec().clone() else {
            return Err(args.unfit("an attention with grouped keys and values"));
        };
        Ok(Self {
            path: args.module.path.clone(),
            placement: args.placement,
            q_proj: args.linear("q_proj")?,
            k_proj: args.linear("k_proj")?,
            v_proj: args.linear("v_proj")?,
            o_proj: args.linear("o_proj")?,
            head_norms: match spec.head_norms {
                true => Some((args.norm("q_norm")?, args.norm("k_norm")?)),
                false => None,
            },
            rotary: args.rope("rotary_emb")?,
            sinks: None,
            sinks_on_gpus: OnGpus::default(),
            spec,
        })
    }

    fn shape(&self) -> AttentionShape {
        AttentionShape {
            heads: self.spec.num_attention_heads,
            kv_heads: self.spec.num_key_value_heads,
            k_head_dim: self.spec.head_dim,
            v_head_dim: self.spec.head_dim,
            scale: self.spec.softmax_scale,
            window: self.spec.window,
        }
    }

    fn scratch_floats(&self, threads: usize) -> usize {
        let shape = self.shape();
        match gpus(self.placement).next() {
            Some(_) => shape
                .scratch_floats(threads)
                .max(shape.device_scratch_floats()),
            None => shape.scratch_floats(threads),
        }
    }

    /// Normalises each head where the model does, then rotates.
    fn position(
        &self,
        cx: &mut Forward<'_>,
        x: Act,
        heads: usize,
        norm: Option<&dyn Norm>,
    ) -> Result<(), OpError> {
        let head_dim = self.spec.head_dim;
        if let Some(norm) = norm {
            let rows = x.reshape(x.rows() * heads, head_dim);
            norm.forward(cx, rows, rows)?;
        }
        self.rotary.forward(
            cx,
            x,
            HeadSpan {
                heads,
                stride: head_dim,
                offset: 0,
            },
        )
    }

    /// The norms of the heads, rotation and the new rows to the cache in one kernel, where all of it is on
    /// one GPU and no operator there does something of its own.
    fn positioned_on_gpu(
        &self,
        cx: &mut Forward<'_>,
        slot: KvSlot,
        projected: [Act; 3],
    ) -> Result<bool, OpError> {
        let device = projected[0].device();
        let (Some(gpu), Some(rotation)) = (cx.gpu(projected[0]), self.rotary.gpu_rotation(device))
        else {
            return Ok(false);
        };
        let norms = match &self.head_norms {
            None => None,
            Some((q, k)) => match (q.gpu_weight(device), k.gpu_weight(device)) {
                (Some(q), Some(k)) => Some([q, k]),
                _ => return Ok(false),
            },
        };
        let (step, kv) = (cx.workspace.step(device), &cx.kv[slot.0]);
        let projected = projected.map(|act| cx.workspace.matrix(act));
        cuda::gqa_inputs(&gpu, &self.shape(), kv, step, projected, norms, rotation)
            .map_err(refused)?;
        Ok(true)
    }
}

impl KModule for GroupedQueryAttention {
    fn path(&self) -> &str {
        &self.path
    }

    fn class_path(&self) -> &'static str {
        Self::CLASS
    }

    fn device(&self, phase: Phase) -> Device {
        self.placement.device(phase)
    }

    fn children(&self) -> Vec<&dyn KModule> {
        let mut all: Vec<&dyn KModule> = vec![
            self.q_proj.as_ref(),
            self.k_proj.as_ref(),
            self.v_proj.as_ref(),
            self.o_proj.as_ref(),
        ];
        if let Some((q, k)) = &self.head_norms {
            all.extend([q.as_ref() as &dyn KModule, k.as_ref()]);
        }
        all.push(self.rotary.as_ref());
        all
    }

    fn children_mut(&mut self) -> Vec<&mut dyn KModule> {
        let mut all: Vec<&mut dyn KModule> = vec![
            self.q_proj.as_mut(),
            self.k_proj.as_mut(),
            self.v_proj.as_mut(),
            self.o_proj.as_mut(),
        ];
        if let Some((q, k)) = &mut self.head_norms {
            all.extend([q.as_mut() as &mut dyn KModule, k.as_mut()]);
        }
        all.push(self.rotary.as_mut());
        all
    }

    fn load(&mut self, loader: &mut Loader<'_>) -> Result<(), OpError> {
        if let Some(name) = &self.spec.sinks {
            let heads = self.spec.num_attention_heads;
            let sinks = required(&self.path, loader.store(), name, &[heads])?;
            loader.took(&[&sinks])?;
            self.sinks = Some(floats(&self.path, &sinks)?);
        }
        self.sinks_on_gpus = OnGpus::load(&self.path, self.placement, |gpu| {
            let sinks = self.sinks.as_ref();
            sinks.map(|s| upload(&self.path, gpu, s)).transpose()
        })?;
        Ok(())
    }

    fn holding(&self) -> Vec<Holding> {
        vec![Holding {
            device: self.placement.generate,
            bytes: self.sinks.as_deref().map_or(0, size_of_val) as u64,
        }]
    }

    fn scratch(&self, capacity: Capacity) -> usize {
        let spec = &self.spec;
        let rows = |heads: usize| Workspace::values_for(capacity.tokens, heads * spec.head_dim);
        2 * rows(spec.num_attention_heads)
            + 2 * rows(spec.num_key_value_heads)
            + Workspace::values_for(1, self.scratch_floats(capacity.threads))
            + largest_scratch(self.children(), capacity)
    }
}

impl Attention for GroupedQueryAttention {
    fn kv_layout(&self) -> KvLayout {
        let width = self.spec.num_key_value_heads * self.spec.head_dim;
        KvLayout {
            device: self.placement.generate,
            k_width: width,
            v_width: width,
        }
    }

    fn forward(&self, cx: &mut Forward<'_>, slot: KvSlot, x: Act, out: Act) -> Result<(), OpError> {
        cx.scoped(|cx| {
            let (spec, rows, device) = (&self.spec, x.rows(), x.device());
            let (heads, kv_heads) = (spec.num_attention_heads, spec.num_key_value_heads);
            let q = cx.alloc(device, rows, heads * spec.head_dim)?;
            let k = cx.alloc(device, rows, kv_heads * spec.head_dim)?;
            let v = cx.alloc(device, rows, kv_heads * spec.head_dim)?;
            let projections = [
                self.q_proj.as_ref(),
                self.k_proj.as_ref(),
                self.v_proj.as_ref(),
            ];
            forward_joined(cx, projections, x, [q, k, v])?;
            if !self.positioned_on_gpu(cx, slot, [q, k, v])? {
                let norms = self.head_norms.as_ref();
                self.position(cx, q, heads, norms.map(|(q, _)| q.as_ref()))?;
                self.position(cx, k, kv_heads, norms.map(|(_, k)| k.as_ref()))?;
                write_cache(cx, slot, k, Some(v))?;
            }

            let attended = cx.alloc(device, rows, heads * spec.head_dim)?;
            if let Some(gpu) = cx.gpu(q) {
                let scratch = cx.alloc(device, 1, self.shape().device_scratch_floats())?;
                let sinks = self.sinks_on_gpus.get(&self.path, device)?.as_ref();
                let [rows, result, scratch] =
                    [q, attended, scratch].map(|act| cx.workspace.matrix(act));
                let query = DeviceGqaQuery { rows, sinks };
                let (step, kv) = (cx.workspace.step(device), &cx.kv[slot.0]);
                let sequences = cx.sequences;
                cuda::gqa(
                    &gpu,
                    &self.shape(),
                    kv,
                    step,
                    sequences,
                    &query,
                    result,
                    scratch,
                )
                .map_err(refused)?;
                return self.o_proj.forward(cx, attended, out);
            }
            let scratch = cx.alloc(device, 1, self.shape().scratch_floats(cx.pool.threads()))?;
            let ([rows], [result, scratch]) = cx.workspace.views([q], [attended, scratch]);
            let sinks = self.sinks.as_deref();
            gqa(
                cx.pool,
                &self.shape(),
                &cx.kv[slot.0],
                cx.sequences,
                &GqaQuery { rows, sinks },
                result,
                scratch,
            );
            self.o_proj.forward(cx, attended, out)
        })
    }
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    args.kwargs::<GroupedKwargs>()?;
    Ok(Operator::Attention(Box::new(GroupedQueryAttention::new(
        args,
    )?)))
}

register_operator! {
    class: GroupedQueryAttention::CLASS,
    aliases: [
        "GroupedQueryAttention",
        "ktransformers.operators.attention.KLlamaAttention",
        "KLlamaAttention",
        "ktransformers.operators.balance_serve_attention.KQwen2MoeAttention",
        "KQwen2MoeAttention",
        "ktransformers.operators.balance_serve_attention.KQwen3MoeAttention",
        "KQwen3MoeAttention",
    ],
    role: Attention,
    summary: "attention with grouped keys and values over the paged cache",
    kwargs: GroupedKwargs,
    build: build,
}
