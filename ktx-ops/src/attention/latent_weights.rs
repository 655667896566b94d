//! The matrices that take latent attention's compressed rows apart, in either layout of the file.
//!
//! Files hold `attn_kv_b` `[heads * (nope + v), kv_lora_rank]`, or the newer `attn_k_b`
//! `[heads, kv_lora_rank, nope]` (transposed) and `attn_v_b` `[heads, v, kv_lora_rank]`. The absorbed
//! form needs the key part as the newer layout has it, the other form as the older one has it.

use ktx_gguf::Tensor;
use ktx_kernels::linear::{LinearError, WeightRows};

use crate::build::{OpError, WeightStore};
use crate::linear::kernel_error;
use crate::module::Loader;
use crate::spec::MlaSpec;
use crate::weights::required;

const MISSING_ROWS: &str = "its matrices have fewer rows than its heads take";

/// Key and value matrices of all heads.
pub(super) enum LatentWeights {
    /// `attn_kv_b`, and its key part transposed: `[heads, kv_lora_rank, nope]` in f32, made at load.
    Joined { kv_b: Tensor, k_b: Tensor },
    /// `attn_k_b` and `attn_v_b` as in the file.
    Split { k_b: Tensor, v_b: Tensor },
}

impl LatentWeights {
    /// Takes the file's matrices; `key` is that of `kv_b_proj`, `prefix` the layer's: `blk.3.`.
    pub(super) fn load(
        path: &str,
        spec: &MlaSpec,
        key: &str,
        prefix: &str,
        loader: &mut Loader<'_>,
    ) -> Result<Self, OpError> {
        let store: &dyn WeightStore = loader.store();
        let (heads, nope, v, lora) = (
            spec.num_attention_heads,
            spec.qk_nope_head_dim,
            spec.v_head_dim,
            spec.kv_lora_rank,
        );
        let joined = format!("{key}.weight");
        if store.tensor(&joined).is_some() {
            let kv_b = required(path, store, &joined, &[lora, heads * (nope + v)])?;
            loader.took(&[&kv_b])?;
            let k_b = transposed_keys(path, spec, &kv_b)?;
            return Ok(Self::Joined { kv_b, k_b });
        }
        let k_b = required(
            path,
            store,
            &format!("{prefix}attn_k_b.weight"),
            &[nope, lora, heads],
        )?;
        let v_b = required(
            path,
            store,
            &format!("{prefix}attn_v_b.weight"),
            &[lora, v, heads],
        )?;
        loader.took(&[&k_b, &v_b])?;
        Ok(Self::Split { k_b, v_b })
    }

    /// Bytes that were made at load.
    pub(super) fn made(&self) -> u64 {
        match self {
            Self::Joined { k_b, .. } => k_b.bytes().len() as u64,
            Self::Split { .. } => 0,
        }
    }

    /// `[kv_lora_rank, nope]` of one head: folds the head's keys into its query.
    pub(super) fn absorb_key(
        &self,
        spec: &MlaSpec,
        head: usize,
    ) -> Result<WeightRows<'_>, LinearError> {
        let (Self::Joined { k_b, .. } | Self::Split { k_b, .. }) = self;
        rows_of(k_b, head * spec.kv_lora_rank, spec.kv_lora_rank)
    }

    /// `[v, kv_lora_rank]` of one head: its values from the compressed row.
    pub(super) fn value(&self, spec: &MlaSpec, head: usize) -> Result<WeightRows<'_>, LinearError> {
        let (nope, v) = (spec.qk_nope_head_dim, spec.v_head_dim);
        match self {
            Self::Joined { kv_b, .. } => rows_of(kv_b, head * (nope + v) + nope, v),
            Self::Split { v_b, .. } => rows_of(v_b, head * v, v),
        }
    }

    /// The matrices of all heads, one behind the other, in f32.
    pub(super) fn dequantise<'a>(
        &'a self,
        path: &str,
        heads: usize,
        of_head: impl Fn(usize) -> Result<WeightRows<'a>, LinearError>,
    ) -> Result<Vec<f32>, OpError> {
        let mut all = Vec::new();
        for head in 0..heads {
            let matrix = of_head(head).map_err(|e| kernel_error(path, e))?;
            let start = all.len();
            all.resize(start + matrix.rows() * matrix.cols(), 0.0);
            let rows = all[start..].chunks_exact_mut(matrix.cols());
            for (index, row) in rows.enumerate() {
                matrix
                    .dequantize(index, row)
                    .ok_or_else(|| kernel_error(path, MISSING_ROWS))?;
            }
        }
        Ok(all)
    }

    /// Values of f32 that [`Self::keys`] needs to write to for one head.
    pub(super) fn key_scratch(&self, spec: &MlaSpec) -> usize {
        match self {
            Self::Joined { .. } => 0,
            Self::Split { .. } => spec.qk_nope_head_dim * spec.kv_lora_rank,
        }
    }

    /// `[nope, kv_lora_rank]` of one head: its keys from the compressed row. Where the file has it
    /// transposed, it is turned back into `scratch`, since a copy in memory of all heads would be large.
    pub(super) fn keys<'a>(
        &'a self,
        path: &str,
        spec: &MlaSpec,
        head: usize,
        scratch: &'a mut [f32],
    ) -> Result<WeightRows<'a>, OpError> {
        let (nope, lora) = (spec.qk_nope_head_dim, spec.kv_lora_rank);
        match self {
            Self::Joined { kv_b, .. } => rows_of(kv_b, head * (nope + spec.v_head_dim), nope)
                .map_err(|e| kernel_error(path, e)),
            Self::Split { k_b, .. } => {
                let part = rows_of(k_b, head * lora, lora).map_err(|e| kernel_error(path, e))?;
                let mut row = vec![0.0; nope];
                for l in 0..lora {
                    part.dequantize(l, &mut row)
                        .ok_or_else(|| kernel_error(path, MISSING_ROWS))?;
                    for (n, value) in row.iter().enumerate() {
                        scratch[n * lora + l] = *value;
                    }
                }
                let bytes = bytemuck::cast_slice(scratch);
                WeightRows::new(ktx_gguf::GgmlType::F32, nope, lora, bytes)
                    .map_err(|e| kernel_error(path, e))
            }
        }
    }
}

/// Some rows of a tensor of any number of dimensions.
pub(super) fn rows_of(
    tensor: &Tensor,
    first: usize,
    rows: usize,
) -> Result<WeightRows<'_>, LinearError> {
    let all = WeightRows::of(tensor)?;
    all.rows_range(first, rows)
        .ok_or_else(|| LinearError::WeightBytes {
            ty: tensor.ty(),
            rows,
            cols: tensor.row_len(),
            actual: tensor.bytes().len(),
        })
}

fn transposed_keys(path: &str, spec: &MlaSpec, kv_b: &Tensor) -> Result<Tensor, OpError> {
    let (heads, nope, lora) = (
        spec.num_attention_heads,
        spec.qk_nope_head_dim,
        spec.kv_lora_rank,
    );
    let mut keys = vec![0.0; heads * lora * nope];
    let mut row = vec![0.0; lora];
    for head in 0..heads {
        let part = rows_of(kv_b, head * (nope + spec.v_head_dim), nope)
            .map_err(|e| kernel_error(path, e))?;
        for n in 0..nope {
            part.dequantize(n, &mut row)
                .ok_or_else(|| kernel_error(path, MISSING_ROWS))?;
            for (l, value) in row.iter().enumerate() {
                keys[(head * lora + l) * nope + n] = *value;
            }
        }
    }
    Ok(Tensor::from_f32(
        &format!("{}, key part", kv_b.name()),
        &[nope, lora, heads],
        keys,
    ))
}
