//! Attention over the paged cache: grouped keys and values, and latent attention.

mod grouped;
mod latent;
mod latent_adapters;
mod latent_weights;

pub use grouped::GroupedQueryAttention;
pub use latent::KDeepseekV2Attention;

use ktx_kernels::attention;
use ktx_kernels::kv::SequenceKv;
use ktx_kernels::workspace::Act;

use crate::build::OpError;
use crate::gpu::refused;
use crate::module::{Forward, KvSlot};

/// Writes the batch's new key and value rows to the cache.
fn write_cache(cx: &mut Forward<'_>, slot: KvSlot, k: Act, v: Option<Act>) -> Result<(), OpError> {
    if let Some(gpu) = cx.gpu(k) {
        let step = cx.workspace.step(k.device());
        let v = v.map(|v| cx.workspace.matrix(v));
        let k = cx.workspace.matrix(k);
        return attention::cuda::append(&gpu, &cx.kv[slot.0], step, k, v).map_err(refused);
    }
    for (rows, sequence) in cx.batch.sequences.iter().zip(cx.sequences) {
        let part = |act: Act| act.row_range(rows.first_row, rows.tokens);
        let v = v.map_or(&[][..], |v| cx.workspace.read(part(v)));
        cx.kv[slot.0].write_sequence(sequence, cx.workspace.read(part(k)), v);
    }
    Ok(())
}

/// Some of a sequence's new rows: what comes before them is past.
fn part_of<'a>(sequence: &SequenceKv<'a>, start: usize, tokens: usize) -> SequenceKv<'a> {
    SequenceKv {
        past: sequence.past + start,
        tokens,
        ..*sequence
    }
}
