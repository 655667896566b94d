//! Latent attention on a GPU: absorbed for prompts, too.

use ktx_kernels::attention::cuda::{self, DeviceMlaQuery, RotatedParts, mla_inputs};
use ktx_kernels::cuda::Gpu;
use ktx_kernels::heads::HeadRows;
use ktx_kernels::heads::cuda::DeviceHeads;
use ktx_kernels::workspace::Act;

use super::super::latent_weights::LatentWeights;
use super::KDeepseekV2Attention;
use crate::build::OpError;
use crate::gpu::refused;
use crate::module::{Forward, KvSlot};
use crate::spec::MlaSpec;

/// The matrices of all heads on a GPU.
pub(super) struct LatentOnGpu {
    /// Folds a query into the compressed space, `[heads, kv_lora_rank, nope]`.
    keys: DeviceHeads,
    /// Values from a compressed row, `[heads, v, kv_lora_rank]`.
    values: DeviceHeads,
}

impl LatentOnGpu {
    /// Takes them out of the file's layout.
    pub(super) fn load(
        path: &str,
        spec: &MlaSpec,
        weights: &LatentWeights,
        gpu: &Gpu,
    ) -> Result<Self, OpError> {
        let (heads, lora) = (spec.num_attention_heads, spec.kv_lora_rank);
        let keys = weights.dequantise(path, heads, |h| weights.absorb_key(spec, h))?;
        let values = weights.dequantise(path, heads, |h| weights.value(spec, h))?;
        let upload = |out, inner, values: &[f32]| {
            DeviceHeads::upload(gpu, heads, out, inner, values).map_err(refused)
        };
        Ok(Self {
            keys: upload(lora, spec.qk_nope_head_dim, &keys)?,
            values: upload(spec.v_head_dim, lora, &values)?,
        })
    }
}

impl KDeepseekV2Attention {
    /// The norm, the rotations and the new rows to the cache in one kernel, where all of it is on one GPU
    /// and no operator there does something of its own.
    pub(super) fn positioned_on_gpu(
        &self,
        cx: &mut Forward<'_>,
        slot: KvSlot,
        q: Act,
        cache: Act,
    ) -> Result<bool, OpError> {
        let device = q.device();
        let (Some(gpu), Some(norm), Some(rotation)) = (
            cx.gpu(q),
            self.kv_norm.gpu_weight(device),
            self.rotary.gpu_rotation(device),
        ) else {
            return Ok(false);
        };
        let parts = RotatedParts {
            stride: self.spec.q_head_dim(),
            offset: self.spec.qk_nope_head_dim,
        };
        let (step, kv) = (cx.workspace.step(device), &cx.kv[slot.0]);
        let [q, rows] = [q, cache].map(|act| cx.workspace.matrix(act));
        let shape = self.absorbed_shape();
        mla_inputs(&gpu, &shape, kv, step, q, parts, rows, norm, rotation).map_err(refused)?;
        Ok(true)
    }

    /// Attends in the compressed space on a GPU, all rows at once.
    pub(super) fn absorbed_on_gpu(
        &self,
        cx: &mut Forward<'_>,
        gpu: &Gpu,
        slot: KvSlot,
        q: Act,
        out: Act,
    ) -> Result<(), OpError> {
        let (spec, device) = (&self.spec, q.device());
        let (heads, lora) = (spec.num_attention_heads, spec.kv_lora_rank);
        let weights = self.on_gpus.get(&self.path, device)?;
        let shape = self.absorbed_shape();
        cx.scoped(|cx| {
            let latent = cx.alloc(device, q.rows(), heads * lora)?;
            let attended = cx.alloc(device, q.rows(), heads * lora)?;
            let scratch = cx.alloc(device, 1, shape.device_scratch_floats())?;
            let q_rows = HeadRows {
                width: q.cols(),
                stride: spec.q_head_dim(),
                offset: 0,
            };
            let [q, latent, attended, scratch, out] =
                [q, latent, attended, scratch, out].map(|act| cx.workspace.matrix(act));
            weights.keys.multiply(q, q_rows, latent).map_err(refused)?;
            let query = DeviceMlaQuery {
                latent,
                rope: q,
                rope_stride: spec.q_head_dim(),
                rope_offset: spec.qk_nope_head_dim,
            };
            let (step, kv) = (cx.workspace.step(device), &cx.kv[slot.0]);
            cuda::mla(
                gpu,
                &shape,
                kv,
                step,
                cx.sequences,
                &query,
                attended,
                scratch,
            )
            .map_err(refused)?;
            let packed = HeadRows::packed(heads, lora);
            weights
                .values
                .multiply(attended, packed, out)
                .map_err(refused)
        })
    }
}
