//! Token embedding: rows of a table, dequantised as they are read.

use std::sync::Arc;

use ktx_gguf::Tensor;
use ktx_kernels::device::Device;
use ktx_kernels::linear::WeightRows;
use ktx_kernels::workspace::Act;

use crate::build::{BuildArgs, OpError, Operator, Placement};
use crate::kwargs::NoKwargs;
use crate::linear::kernel_error;
use crate::module::{Embedding, Forward, KModule, Loader, Phase};
use crate::recording::HostTask;
use crate::register_operator;
use crate::spec::{EmbeddingSpec, Spec};
use crate::weights::required;

/// Rows of `token_embd` by token id, read in place.
pub struct HostEmbedding {
    path: String,
    key: String,
    placement: Placement,
    spec: EmbeddingSpec,
    table: Option<Arc<Table>>,
}

/// The loaded table.
struct Table {
    path: String,
    tensor: Tensor,
}

impl Table {
    /// The rows of the batch's ids to `out`.
    fn read(&self, cx: &mut Forward<'_>, out: Act) -> Result<(), OpError> {
        let error = |message: String| kernel_error(&self.path, message);
        let table = WeightRows::of(&self.tensor).map_err(|e| error(e.to_string()))?;
        let width = out.cols();
        let rows = cx.workspace.write(out);
        for (id, row) in cx.batch.ids.iter().zip(rows.chunks_exact_mut(width)) {
            table.dequantize(*id as usize, row).ok_or_else(|| {
                error(format!(
                    "token id {id} is outside of the vocabulary of {}",
                    table.rows()
                ))
            })?;
        }
        Ok(())
    }
}

/// A look-up in a recorded step.
struct LookUp {
    table: Arc<Table>,
    out: Act,
}

impl HostTask for LookUp {
    fn run(&self, cx: &mut Forward<'_>) -> Result<(), OpError> {
        self.table.read(cx, self.out)
    }
}

impl HostEmbedding {
    const CLASS: &'static str = "torch.nn.Embedding";
}

impl KModule for HostEmbedding {
    fn path(&self) -> &str {
        &self.path
    }

    fn class_path(&self) -> &'static str {
        Self::CLASS
    }

    fn device(&self, phase: Phase) -> Device {
        self.placement.device(phase)
    }

    fn load(&mut self, loader: &mut Loader<'_>) -> Result<(), OpError> {
        let shape = [self.spec.hidden_size, self.spec.vocab_size];
        let table = required(
            &self.path,
            loader.store(),
            &format!("{}.weight", self.key),
            &shape,
        )?;
        loader.took(&[&table])?;
        self.table = Some(Arc::new(Table {
            path: self.path.clone(),
            tensor: table,
        }));
        Ok(())
    }
}

impl Embedding for HostEmbedding {
    fn forward(&self, cx: &mut Forward<'_>, out: Act) -> Result<(), OpError> {
        let Some(table) = &self.table else {
            return Err(kernel_error(&self.path, "its table is not loaded"));
        };
        if cx.is_recording() {
            let table = Arc::clone(table);
            return cx.host_first(Arc::new(LookUp { table, out }));
        }
        table.read(cx, out)
    }
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    let Spec::Embedding(spec) = args.spec().clone() else {
        return Err(args.unfit("a token embedding"));
    };
    Ok(Operator::Embedding(Box::new(HostEmbedding {
        path: args.module.path.clone(),
        key: args.module.key.clone(),
        placement: args.placement,
        spec,
        table: None,
    })))
}

register_operator! {
    class: HostEmbedding::CLASS,
    aliases: ["ktx.embedding.Embedding"],
    role: Embedding,
    summary: "rows of the embedding table in main memory",
    kwargs: NoKwargs,
    build: build,
}
