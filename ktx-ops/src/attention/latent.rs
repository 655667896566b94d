//! Multi-head latent attention (DeepSeek-V2, section 2.1) over a cache of compressed rows.
//!
//! The cache holds `[c | k_pe]` of each token: the normalised compressed key and value, and one
//! rotated key for all heads. *Absorbed*, a head's query is folded into the compressed space and all
//! heads attend over the rows as they are; *not absorbed*, each head's keys and values are computed
//! from the rows first. Both give the same result up to rounding. For few queries the first reads
//! less, for a long prompt the second computes less.

mod gpu;

use ktx_gguf::GgmlType;
use ktx_kernels::attention::{AttentionShape, MlaQuery, MlaShape, dense, mla};
use ktx_kernels::device::Device;
use ktx_kernels::heads::{HeadRows, matmul_heads};
use ktx_kernels::kv::{PAGE_TOKENS, SequenceKv};
use ktx_kernels::linear::matmul_many;
use ktx_kernels::workspace::{Act, Workspace};
use serde::{Deserialize, Serialize};

use gpu::LatentOnGpu;

use super::latent_adapters::LatentAdapters;
use super::latent_weights::LatentWeights;
use super::{part_of, write_cache};
use crate::build::{BuildArgs, OpError, Operator, Placement};
use crate::gpu::{OnGpus, gpus};
use crate::kwargs::{KwargDoc, KwargSet};
use crate::linear::{forward_joined, kernel_error};
use crate::lora::{ActiveAdapter, AdapterId, Attachment, RowAdapters};
use crate::module::{
    Attention, Capacity, Forward, HeadSpan, Holding, KModule, KvLayout, KvSlot, Linear, Loader,
    Norm, Phase, Rope, largest_scratch,
};
use crate::register_operator;
use crate::spec::{LinearSource, MlaSpec, Spec};

/// Arguments of `KDeepseekV2Attention`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
struct LatentKwargs {
    absorb_for_prefill: bool,
    chunck_size: usize,
}

impl Default for LatentKwargs {
    fn default() -> Self {
        Self {
            absorb_for_prefill: false,
            chunck_size: 1000,
        }
    }
}

impl KwargSet for LatentKwargs {
    const DOCS: &'static [KwargDoc] = &[
        KwargDoc {
            name: "absorb_for_prefill",
            doc: "whether prompts too use the absorbed form",
            ignored: None,
        },
        KwargDoc {
            name: "chunck_size",
            doc: "query rows of one pass of the absorbed form",
            ignored: None,
        },
    ];
}

/// How the query is made from the residual stream.
enum Query {
    Direct(Box<dyn Linear>),
    Compressed {
        a: Box<dyn Linear>,
        norm: Box<dyn Norm>,
        b: Box<dyn Linear>,
    },
}

/// Latent attention, absorbed in generation, and in prefill if asked.
pub struct KDeepseekV2Attention {
    path: String,
    placement: Placement,
    spec: MlaSpec,
    absorb_for_prefill: bool,
    chunk_rows: usize,
    query: Query,
    kv_a: Box<dyn Linear>,
    kv_norm: Box<dyn Norm>,
    /// Key of `kv_b_proj`, and prefix of the split tensors.
    kv_b: (String, String),
    weights: Option<LatentWeights>,
    /// Parts of adapters for `kv_b_proj`.
    adapters: LatentAdapters,
    o_proj: Box<dyn Linear>,
    rotary: Box<dyn Rope>,
    on_gpus: OnGpus<LatentOnGpu>,
}

impl KDeepseekV2Attention {
    const CLASS: &'static str = "ktransformers.operators.attention.KDeepseekV2Attention";
    /// Query rows of one absorbed pass at most: more would only take more memory.
    const MAX_CHUNK_ROWS: usize = 256;

    /// The attention of a module's projections and rotation.
    ///
    /// `kv_b_proj` itself is not used: its matrices are taken apart by head, so an operator that a
    /// rule puts there is not called.
    pub fn new(args: &mut BuildArgs<'_>) -> Result<Self, OpError> {
        let Spec::Mla(spec) = args.spec().clone() else {
            return Err(args.unfit("a latent attention"));
        };
        let kwargs = args.kwargs::<LatentKwargs>()?;
        if kwargs.chunck_size == 0 {
            return Err(args.error("`chunck_size` is 0; it counts query rows, from 1"));
        }
        let kv_b = match args.module.child("kv_b_proj").map(|m| (&m.key, &m.spec)) {
            Some((key, Spec::Linear(linear))) => match &linear.source {
                LinearSource::KvB { prefix } => (key.clone(), prefix.clone()),
                _ => return Err(args.error("its `kv_b_proj` is not that of a latent attention")),
            },
            _ => return Err(args.error("it has no `kv_b_proj`")),
        };
        let query = match spec.q_lora_rank {
            None => Query::Direct(args.linear("q_proj")?),
            Some(_) => Query::Compressed {
                a: args.linear("q_a_proj")?,
                norm: args.norm("q_a_layernorm")?,
                b: args.linear("q_b_proj")?,
            },
        };
        Ok(Self {
            path: args.module.path.clone(),
            placement: args.placement,
            absorb_for_prefill: kwargs.absorb_for_prefill,
            chunk_rows: kwargs.chunck_size.min(Self::MAX_CHUNK_ROWS),
            query,
            kv_a: args.linear("kv_a_proj_with_mqa")?,
            kv_norm: args.norm("kv_a_layernorm")?,
            kv_b,
            weights: None,
            adapters: LatentAdapters::default(),
            o_proj: args.linear("o_proj")?,
            rotary: args.rope("rotary_emb")?,
            on_gpus: OnGpus::default(),
            spec,
        })
    }

    fn weights(&self) -> Result<&LatentWeights, OpError> {
        self.weights
            .as_ref()
            .ok_or_else(|| kernel_error(&self.path, "its weights are not loaded"))
    }

    fn absorbed_shape(&self) -> MlaShape {
        MlaShape {
            heads: self.spec.num_attention_heads,
            kv_lora: self.spec.kv_lora_rank,
            rope: self.spec.qk_rope_head_dim,
            scale: self.spec.softmax_scale,
        }
    }

    fn head_shape(&self) -> AttentionShape {
        AttentionShape {
            heads: 1,
            kv_heads: 1,
            k_head_dim: self.spec.q_head_dim(),
            v_head_dim: self.spec.v_head_dim,
            scale: self.spec.softmax_scale,
            window: None,
        }
    }

    /// Queries `[rows, heads, nope + rope]` and the new cache rows `[rows, c + k_pe]`, rotated, and
    /// the latter written to the cache.
    fn project(&self, cx: &mut Forward<'_>, slot: KvSlot, x: Act, q: Act) -> Result<(), OpError> {
        let spec = &self.spec;
        cx.scoped(|cx| {
            let cache = cx.alloc(x.device(), x.rows(), spec.cache_width())?;
            match &self.query {
                Query::Direct(proj) => {
                    forward_joined(cx, [proj.as_ref(), self.kv_a.as_ref()], x, [q, cache])?
                }
                Query::Compressed { a, norm, b } => {
                    let low = cx.alloc(x.device(), x.rows(), a.out_features())?;
                    forward_joined(cx, [a.as_ref(), self.kv_a.as_ref()], x, [low, cache])?;
                    norm.forward(cx, low, low)?;
                    b.forward(cx, low, q)?;
                }
            }
            if self.positioned_on_gpu(cx, slot, q, cache)? {
                return Ok(());
            }
            self.normalise_compressed(cx, cache)?;
            let offset = spec.qk_nope_head_dim;
            let heads = HeadSpan {
                heads: spec.num_attention_heads,
                stride: spec.q_head_dim(),
                offset,
            };
            self.rotary.forward(cx, q, heads)?;
            let shared = HeadSpan {
                heads: 1,
                stride: cache.cols(),
                offset: spec.kv_lora_rank,
            };
            self.rotary.forward(cx, cache, shared)?;
            write_cache(cx, slot, cache, None)
        })
    }

    /// Normalises the compressed part of each row, in place.
    fn normalise_compressed(&self, cx: &mut Forward<'_>, cache: Act) -> Result<(), OpError> {
        let lora = self.spec.kv_lora_rank;
        cx.scoped(|cx| {
            let c = cx.alloc(cache.device(), cache.rows(), lora)?;
            cx.copy_columns((cache, 0), (c, 0), lora)?;
            self.kv_norm.forward(cx, c, c)?;
            cx.copy_columns((c, 0), (cache, 0), lora)
        })
    }

    /// Attends in the compressed space, some rows at a time.
    fn absorbed(
        &self,
        cx: &mut Forward<'_>,
        slot: KvSlot,
        q: Act,
        out: Act,
    ) -> Result<(), OpError> {
        if q.rows() <= self.chunk_rows {
            let sequences = cx.sequences;
            return self.absorbed_rows(cx, slot, q, out, sequences);
        }
        let batch = cx.batch;
        for (rows, sequence) in batch.sequences.iter().zip(cx.sequences) {
            for start in (0..rows.tokens).step_by(self.chunk_rows) {
                let tokens = self.chunk_rows.min(rows.tokens - start);
                let part = |act: Act| act.row_range(rows.first_row + start, tokens);
                cx.with_adapters(RowAdapters::uniform(tokens, &rows.adapters), |cx| {
                    self.absorbed_rows(
                        cx,
                        slot,
                        part(q),
                        part(out),
                        &[part_of(sequence, start, tokens)],
                    )
                })?;
            }
        }
        Ok(())
    }

    fn absorbed_rows(
        &self,
        cx: &mut Forward<'_>,
        slot: KvSlot,
        q: Act,
        out: Act,
        sequences: &[SequenceKv<'_>],
    ) -> Result<(), OpError> {
        let (spec, weights) = (&self.spec, self.weights()?);
        let (heads, lora) = (spec.num_attention_heads, spec.kv_lora_rank);
        let error = |e| kernel_error(&self.path, e);
        cx.scoped(|cx| {
            let latent = cx.alloc(q.device(), q.rows(), heads * lora)?;
            let attended = cx.alloc(q.device(), q.rows(), heads * lora)?;
            let scratch = cx.alloc(
                q.device(),
                1,
                self.absorbed_shape().scratch_floats(cx.pool.threads()),
            )?;
            let q_rows = HeadRows {
                width: q.cols(),
                stride: spec.q_head_dim(),
                offset: 0,
            };
            let ([q_values], [folded]) = cx.workspace.views([q], [latent]);
            matmul_heads(
                cx.pool,
                heads,
                &|h| weights.absorb_key(spec, h),
                q_values,
                q_rows,
                folded,
                cx.precision,
            )
            .map_err(error)?;
            self.adapters.fold(cx, &self.path, spec, q, latent)?;
            let ([q, folded], [result, scratch]) =
                cx.workspace.views([q, latent], [attended, scratch]);
            let query = MlaQuery {
                latent: folded,
                rope: q,
                rope_stride: spec.q_head_dim(),
                rope_offset: spec.qk_nope_head_dim,
            };
            mla(
                cx.pool,
                &self.absorbed_shape(),
                &cx.kv[slot.0],
                sequences,
                &query,
                result,
                scratch,
            );
            let ([rows], [results]) = cx.workspace.views([attended], [out]);
            matmul_heads(
                cx.pool,
                heads,
                &|h| weights.value(spec, h),
                rows,
                HeadRows::packed(heads, lora),
                results,
                cx.precision,
            )
            .map_err(error)?;
            self.adapters.unfold(cx, &self.path, spec, attended, out)
        })
    }

    /// Attends with each head's own keys and values, computed from all cached rows.
    fn unabsorbed(
        &self,
        cx: &mut Forward<'_>,
        slot: KvSlot,
        q: Act,
        out: Act,
    ) -> Result<(), OpError> {
        let batch = cx.batch;
        for (rows, sequence) in batch.sequences.iter().zip(cx.sequences) {
            let part = |act: Act| act.row_range(rows.first_row, rows.tokens);
            let adapters = &rows.adapters;
            self.unabsorbed_sequence(cx, slot, part(q), part(out), sequence, adapters)?;
        }
        Ok(())
    }

    fn unabsorbed_sequence(
        &self,
        cx: &mut Forward<'_>,
        slot: KvSlot,
        q: Act,
        out: Act,
        sequence: &SequenceKv<'_>,
        adapters: &[ActiveAdapter],
    ) -> Result<(), OpError> {
        let (spec, weights, device, length) =
            (&self.spec, self.weights()?, q.device(), sequence.len());
        let (nope, rope, v_dim) = (
            spec.qk_nope_head_dim,
            spec.qk_rope_head_dim,
            spec.v_head_dim,
        );
        cx.scoped(|cx| {
            let c = cx.alloc(device, length, spec.kv_lora_rank)?;
            let k_pe = cx.alloc(device, length, rope)?;
            self.read_cache(cx, slot, sequence, c, k_pe);
            let (k_nope, k) = (
                cx.alloc(device, length, nope)?,
                cx.alloc(device, length, spec.q_head_dim())?,
            );
            let v = cx.alloc(device, length, v_dim)?;
            let (q_head, out_head) = (
                cx.alloc(device, q.rows(), k.cols())?,
                cx.alloc(device, q.rows(), v_dim)?,
            );
            let turned = cx.alloc(device, 1, weights.key_scratch(spec))?;
            let scratch = cx.alloc(
                device,
                1,
                self.head_shape().scratch_floats(cx.pool.threads()),
            )?;
            let reduced = self.adapters.reduce(cx, &self.path, adapters, c)?;
            for head in 0..spec.num_attention_heads {
                self.expand(cx, head, c, turned, k_nope, v)?;
                for part in &reduced {
                    part.expand(cx, &self.path, spec, head, k_nope, v)?;
                }
                let width = spec.q_head_dim();
                let ([nope_rows, pe_rows, queries], [k_rows, q_rows]) =
                    cx.workspace.views([k_nope, k_pe, q], [k, q_head]);
                copy_columns(nope_rows, nope, k_rows, width, nope);
                copy_columns(pe_rows, rope, &mut k_rows[nope..], width, rope);
                copy_columns(&queries[head * width..], q.cols(), q_rows, width, width);
                let ([q_rows, k_rows, v_rows], [result, scratch]) =
                    cx.workspace.views([q_head, k, v], [out_head, scratch]);
                dense(
                    cx.pool,
                    &self.head_shape(),
                    sequence.past,
                    q_rows,
                    k_rows,
                    v_rows,
                    result,
                    scratch,
                );
                let ([result], [all]) = cx.workspace.views([out_head], [out]);
                copy_columns(result, v_dim, &mut all[head * v_dim..], out.cols(), v_dim);
            }
            Ok(())
        })
    }

    /// One head's keys (the part that is not rotated) and values of all rows.
    fn expand(
        &self,
        cx: &mut Forward<'_>,
        head: usize,
        c: Act,
        turned: Act,
        k_nope: Act,
        v: Act,
    ) -> Result<(), OpError> {
        let (spec, weights) = (&self.spec, self.weights()?);
        let error = |e| kernel_error(&self.path, e);
        let value = weights.value(spec, head).map_err(error)?;
        let key_type = match weights {
            LatentWeights::Joined { kv_b, .. } => kv_b.ty(),
            LatentWeights::Split { .. } => GgmlType::F32,
        };
        let types = [key_type, value.ty()];
        let outs = [turned, k_nope, v];
        let (rows, [turned, k_nope, v]) = cx
            .workspace
            .prepare(cx.pool, c, cx.precision, &types, outs)
            .map_err(error)?;
        let key = weights.keys(&self.path, spec, head, turned)?;
        matmul_many(cx.pool, &[key, value], rows, &mut [k_nope, v]).map_err(error)
    }

    /// The cached rows of a sequence, old and new: `c` `[length, kv_lora_rank]`, `k_pe` `[length, rope]`.
    fn read_cache(
        &self,
        cx: &mut Forward<'_>,
        slot: KvSlot,
        sequence: &SequenceKv<'_>,
        c: Act,
        k_pe: Act,
    ) {
        let (lora, rope) = (c.cols(), k_pe.cols());
        let ([], [c, k_pe]) = cx.workspace.views([], [c, k_pe]);
        let cache = &cx.kv[slot.0];
        for (at, (c, k_pe)) in c
            .chunks_exact_mut(lora)
            .zip(k_pe.chunks_exact_mut(rope))
            .enumerate()
        {
            let row = cache
                .k_page(sequence.pages[at / PAGE_TOKENS])
                .skip(at % PAGE_TOKENS * (lora + rope));
            row.take(lora).to_f32(c);
            row.skip(lora).take(rope).to_f32(k_pe);
        }
    }
}

/// Copies the first `columns` values of each row; rows are as wide as given, the last may end early.
fn copy_columns(from: &[f32], from_width: usize, to: &mut [f32], to_width: usize, columns: usize) {
    for (from, to) in from.chunks(from_width).zip(to.chunks_mut(to_width)) {
        to[..columns].copy_from_slice(&from[..columns]);
    }
}

impl KModule for KDeepseekV2Attention {
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
        let mut all: Vec<&dyn KModule> = match &self.query {
            Query::Direct(proj) => vec![proj.as_ref()],
            Query::Compressed { a, norm, b } => vec![a.as_ref(), norm.as_ref(), b.as_ref()],
        };
        all.extend([self.kv_a.as_ref() as &dyn KModule, self.kv_norm.as_ref()]);
        all.extend([self.o_proj.as_ref() as &dyn KModule, self.rotary.as_ref()]);
        all
    }

    fn same_in_both_phases(&self) -> bool {
        self.absorb_for_prefill && self.children().iter().all(|c| c.same_in_both_phases())
    }

    fn children_mut(&mut self) -> Vec<&mut dyn KModule> {
        let mut all: Vec<&mut dyn KModule> = match &mut self.query {
            Query::Direct(proj) => vec![proj.as_mut()],
            Query::Compressed { a, norm, b } => vec![a.as_mut(), norm.as_mut(), b.as_mut()],
        };
        all.extend([
            self.kv_a.as_mut() as &mut dyn KModule,
            self.kv_norm.as_mut(),
        ]);
        all.extend([
            self.o_proj.as_mut() as &mut dyn KModule,
            self.rotary.as_mut(),
        ]);
        all
    }

    fn load(&mut self, loader: &mut Loader<'_>) -> Result<(), OpError> {
        let (key, prefix) = &self.kv_b;
        let weights = LatentWeights::load(&self.path, &self.spec, key, prefix, loader)?;
        let spec = &self.spec;
        self.on_gpus = OnGpus::load(&self.path, self.placement, |gpu| {
            LatentOnGpu::load(&self.path, spec, &weights, gpu)
        })?;
        self.weights = Some(weights);
        Ok(())
    }

    fn attach(&mut self, attachment: &mut Attachment<'_>) {
        let path = format!("{}.kv_b_proj", self.path);
        self.adapters.attach(&path, &self.spec, attachment);
    }

    fn detach(&mut self, id: AdapterId) {
        self.adapters.detach(id);
    }

    fn holding(&self) -> Vec<Holding> {
        let weights = self.weights.as_ref().map_or(0, LatentWeights::made);
        let bytes = weights + self.adapters.made();
        vec![Holding {
            device: self.placement.generate,
            bytes,
        }]
    }

    fn scratch(&self, capacity: Capacity) -> usize {
        let spec = &self.spec;
        let (tokens, heads) = (capacity.tokens, spec.num_attention_heads);
        let values = Workspace::values_for;
        let projecting = values(tokens, spec.cache_width())
            + values(tokens, spec.q_lora_rank.unwrap_or(0))
            + values(tokens, spec.kv_lora_rank);
        let absorbed = 2 * values(tokens.min(self.chunk_rows), heads * spec.kv_lora_rank)
            + values(1, self.absorbed_shape().scratch_floats(capacity.threads))
            + self
                .adapters
                .absorbed_scratch(spec, tokens.min(self.chunk_rows));
        let on_gpu = match gpus(self.placement).next() {
            Some(_) => {
                2 * values(tokens, heads * spec.kv_lora_rank)
                    + values(1, self.absorbed_shape().device_scratch_floats())
            }
            None => 0,
        };
        let context = capacity.context.max(tokens);
        let unabsorbed = [
            spec.kv_lora_rank,
            spec.qk_rope_head_dim,
            spec.qk_nope_head_dim,
            spec.q_head_dim(),
            spec.v_head_dim,
        ]
        .map(|width| values(context, width))
        .iter()
        .sum::<usize>()
            + values(tokens, spec.q_head_dim())
            + values(tokens, spec.v_head_dim)
            + values(1, spec.qk_nope_head_dim * spec.kv_lora_rank)
            + values(1, self.head_shape().scratch_floats(capacity.threads))
            + self.adapters.expanded_scratch(spec, context);
        let attending = if self.absorb_for_prefill {
            absorbed
        } else {
            absorbed.max(unabsorbed)
        };
        let attending = attending.max(on_gpu);
        values(tokens, heads * spec.q_head_dim())
            + values(tokens, heads * spec.v_head_dim)
            + projecting.max(attending)
            + largest_scratch(self.children(), capacity)
    }
}

impl Attention for KDeepseekV2Attention {
    fn kv_layout(&self) -> KvLayout {
        KvLayout {
            device: self.placement.generate,
            k_width: self.spec.cache_width(),
            v_width: 0,
        }
    }

    fn forward(&self, cx: &mut Forward<'_>, slot: KvSlot, x: Act, out: Act) -> Result<(), OpError> {
        cx.scoped(|cx| {
            let spec = &self.spec;
            let q = cx.alloc(
                x.device(),
                x.rows(),
                spec.num_attention_heads * spec.q_head_dim(),
            )?;
            let attended = cx.alloc(
                x.device(),
                x.rows(),
                spec.num_attention_heads * spec.v_head_dim,
            )?;
            self.project(cx, slot, x, q)?;
            if let Some(gpu) = cx.gpu(q) {
                self.absorbed_on_gpu(cx, &gpu, slot, q, attended)?;
            } else if cx.prompt && !self.absorb_for_prefill {
                self.unabsorbed(cx, slot, q, attended)?;
            } else {
                self.absorbed(cx, slot, q, attended)?;
            }
            self.o_proj.forward(cx, attended, out)
        })
    }
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    Ok(Operator::Attention(Box::new(KDeepseekV2Attention::new(
        args,
    )?)))
}

register_operator! {
    class: KDeepseekV2Attention::CLASS,
    aliases: [
        "KDeepseekV2Attention",
        "ktx.attention.KDeepseekV2Attention",
        "ktransformers.operators.balance_serve_attention.flashinfer_attn",
        "flashinfer_attn",
        "ktransformers.operators.balance_serve_attention.deepseek_torch_attn",
        "deepseek_torch_attn",
    ],
    role: Attention,
    summary: "latent attention over compressed rows; absorbed in generation, and in prefill if asked",
    kwargs: LatentKwargs,
    build: build,
}
