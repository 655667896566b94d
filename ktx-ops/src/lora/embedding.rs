//! An embedding that carries adapters.

use ktx_gguf::dequantize_row;
use ktx_kernels::device::Device;

use super::active::AdapterId;
use super::adapter::Attachment;
use super::low_rank::{Attached, LowRank, add_to, product};
use crate::build::OpError;
use crate::linear::kernel_error;
use crate::module::{Capacity, Embedding, Forward, KModule, Phase};
use ktx_kernels::workspace::Act;

/// Any embedding, and what adapters add: `scale * B A[id]`, A `[vocab, rank]`, B `[hidden, rank]`.
pub struct EmbeddingLora {
    inner: Box<dyn Embedding>,
    attached: Attached,
}

impl EmbeddingLora {
    /// Carries adapters around an embedding; without any it is that embedding.
    pub fn around(inner: Box<dyn Embedding>) -> Self {
        Self {
            inner,
            attached: Attached::default(),
        }
    }

    /// Adds what `part` has for the ids of the batch's rows from `first` on.
    fn add(
        &self,
        cx: &mut Forward<'_>,
        part: &LowRank,
        first: usize,
        out: Act,
        factor: f32,
    ) -> Result<(), OpError> {
        let (path, table) = (self.path(), part.a());
        let row_bytes = table.bytes().len() / table.rows().max(1);
        cx.scoped(|cx| {
            let low = cx.alloc(out.device(), out.rows(), part.rank())?;
            let ids = &cx.batch.ids[first..first + out.rows()];
            let rows = cx.workspace.write(low).chunks_exact_mut(part.rank());
            for (id, row) in ids.iter().zip(rows) {
                let start = *id as usize * row_bytes;
                let bytes = table.bytes().get(start..start + row_bytes);
                let bytes = bytes.ok_or_else(|| {
                    kernel_error(
                        path,
                        format_args!("token id {id} is outside of the vocabulary"),
                    )
                })?;
                dequantize_row(table.ty(), bytes, row).map_err(|e| kernel_error(path, e))?;
            }
            part.scale_rows(cx, low, factor);
            let delta = cx.alloc(out.device(), out.rows(), out.cols())?;
            product(cx, path, part.b(), low, delta)?;
            add_to(cx, delta, out);
            Ok(())
        })
    }
}

impl KModule for EmbeddingLora {
    fn path(&self) -> &str {
        self.inner.path()
    }

    fn class_path(&self) -> &'static str {
        self.inner.class_path()
    }

    fn device(&self, phase: Phase) -> Device {
        self.inner.device(phase)
    }

    fn children(&self) -> Vec<&dyn KModule> {
        vec![self.inner.as_ref()]
    }

    fn children_mut(&mut self) -> Vec<&mut dyn KModule> {
        vec![self.inner.as_mut()]
    }

    fn attach(&mut self, attachment: &mut Attachment<'_>) {
        self.attached.attach(self.inner.path(), attachment);
    }

    fn detach(&mut self, id: AdapterId) {
        self.attached.detach(id);
    }

    fn scratch(&self, capacity: Capacity) -> usize {
        self.inner
            .scratch(capacity)
            .max(self.attached.scratch(capacity.tokens))
    }
}

impl Embedding for EmbeddingLora {
    fn forward(&self, cx: &mut Forward<'_>, out: Act) -> Result<(), OpError> {
        self.inner.forward(cx, out)?;
        self.attached.each(
            cx,
            self.inner.path(),
            out.rows(),
            |cx, first, rows, part, factor| {
                self.add(cx, part, first, out.row_range(first, rows), factor)
            },
        )
    }
}
