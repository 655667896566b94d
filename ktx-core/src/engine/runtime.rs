//! What runs: the model's operators, the memory they work in, and one step of the loop.

use std::collections::BTreeSet;

use ktx_gguf::Gguf;
use ktx_kernels::device::Device;
use ktx_kernels::kv::{KvType, LayerKv, PAGE_TOKENS, PageId, SequenceKv};
use ktx_kernels::linear::Precision;
use ktx_kernels::moe::MoeScratch;
use ktx_kernels::pool::ThreadPool;
use ktx_kernels::workspace::Workspace;
use ktx_models::ModelDescription;
use ktx_ops::module::KvLayout;
use ktx_ops::{
    Batch, Capacity, Children, Forward, KModule, Linear, LoadProgress, Loader, Model, Observer,
    OpError, Operator, Phase, load_all,
};

use super::Settings;
use crate::error::EngineError;
use crate::inject::InjectReport;

/// Rows whose logits are computed at once: the vocabulary is wide.
const LOGIT_ROWS: usize = 16;

/// A model's operators, without weights, and the sizes of what they work in.
pub(crate) struct Parts {
    model: Box<dyn Model>,
    head: Box<dyn Linear>,
    layouts: Vec<KvLayout>,
    devices: Vec<Device>,
    workspace_values: usize,
    hidden_size: usize,
}

impl Parts {
    pub(crate) fn new(
        mut children: Children,
        report: &InjectReport,
        settings: &Settings,
        description: &ModelDescription,
    ) -> Result<Self, EngineError> {
        let missing = |child: &str, role| OpError::Child {
            path: String::new(),
            child: child.to_owned(),
            role,
        };
        let devices = devices(report);
        if devices.len() > Workspace::MAX_DEVICES {
            let range = "rules may name 16 devices at most";
            return Err(EngineError::Setting {
                name: "the number of devices",
                value: devices.len(),
                range,
            });
        }
        let Some(Operator::Model(model)) = children.take("model") else {
            return Err(missing("model", ktx_ops::Role::Model).into());
        };
        let Some(Operator::Linear(head)) = children.take("lm_head") else {
            return Err(missing("lm_head", ktx_ops::Role::Linear).into());
        };
        let capacity = Capacity {
            tokens: settings.chunk_size.min(settings.context),
            context: settings.context,
            threads: settings.threads,
        };
        let values = Workspace::values_for;
        let workspace_values = values(capacity.tokens, description.hidden_size)
            + values(LOGIT_ROWS, head.out_features())
            + model.scratch(capacity).max(head.scratch(capacity));
        Ok(Self {
            layouts: model.kv_layouts(),
            devices,
            model,
            head,
            workspace_values,
            hidden_size: description.hidden_size,
        })
    }

    /// Bytes of the cache of one session.
    pub(crate) fn kv_bytes(&self, settings: &Settings) -> u64 {
        let element = match settings.kv_type {
            KvType::F32 => 4,
            _ => 2,
        };
        let row = self.layouts.iter().fold(0u64, |sum, l| {
            sum.saturating_add((l.k_width + l.v_width) as u64)
        });
        row.saturating_mul(element)
            .saturating_mul((pages_for(settings.context) * PAGE_TOKENS) as u64)
    }

    /// Bytes of the workspace.
    pub(crate) fn scratch_bytes(&self) -> u64 {
        (self.workspace_values as u64)
            .saturating_mul((self.devices.len() * size_of::<f32>()) as u64)
    }
}

/// All devices that a module runs on, in either phase; the host's is one of them always.
fn devices(report: &InjectReport) -> Vec<Device> {
    let placed = report
        .modules
        .iter()
        .flat_map(|m| [m.placement.prefill, m.placement.generate]);
    let all: BTreeSet<Device> = placed.chain([Device::CPU]).collect();
    all.into_iter().collect()
}

/// Pages that this many tokens take.
pub(crate) fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_TOKENS)
}

/// A loaded model with its memory; one step at a time.
pub(crate) struct Runtime {
    model: Box<dyn Model>,
    head: Box<dyn Linear>,
    hidden_size: usize,
    precision: Precision,
    workspace: Workspace,
    kv: Vec<LayerKv>,
    free_pages: Vec<PageId>,
    moe: MoeScratch,
    pool: ThreadPool,
}

impl Runtime {
    pub(crate) fn load(
        mut parts: Parts,
        settings: &Settings,
        pool: ThreadPool,
        gguf: &Gguf,
        progress: &mut dyn FnMut(LoadProgress) -> bool,
    ) -> Result<Self, EngineError> {
        let mut loader = Loader::new(gguf, progress);
        let (model, head): (&mut dyn KModule, &mut dyn KModule) =
            (parts.model.as_mut(), parts.head.as_mut());
        load_all(model, &mut loader)?;
        load_all(head, &mut loader)?;
        let pages = pages_for(settings.context) * settings.sessions;
        let kv = parts
            .layouts
            .iter()
            .map(|layout| LayerKv::new(settings.kv_type, layout.k_width, layout.v_width, pages))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            hidden_size: parts.hidden_size,
            precision: settings.precision,
            workspace: Workspace::new(&parts.devices, parts.workspace_values)
                .map_err(OpError::from)?,
            kv,
            free_pages: (0..pages as u32).rev().map(PageId).collect(),
            moe: MoeScratch::default(),
            pool,
            model: parts.model,
            head: parts.head,
        })
    }

    /// Takes a page of the cache.
    pub(crate) fn take_page(&mut self) -> Option<PageId> {
        self.free_pages.pop()
    }

    /// Gives pages back.
    pub(crate) fn give_pages(&mut self, pages: impl IntoIterator<Item = PageId>) {
        self.free_pages.extend(pages);
    }

    /// One forward call: writes the batch's tokens to the cache and hands the logits `[vocab]` of
    /// each of its output rows to `on_logits`, in order.
    pub(crate) fn step(
        &mut self,
        batch: &Batch,
        phase: Phase,
        observer: Option<&mut dyn Observer>,
        on_logits: &mut dyn FnMut(&mut [f32]),
    ) -> Result<(), EngineError> {
        let sequences: Vec<SequenceKv<'_>> = batch
            .sequences
            .iter()
            .map(|s| SequenceKv {
                pages: &s.pages,
                past: s.past,
                tokens: s.tokens,
            })
            .collect();
        self.workspace.reset();
        let mut cx = Forward {
            phase,
            precision: self.precision,
            batch,
            sequences: &sequences,
            workspace: &mut self.workspace,
            kv: &mut self.kv,
            pool: &self.pool,
            moe: &mut self.moe,
            // Matched, not moved, so that the trait object's lifetime can shrink.
            observer: match observer {
                Some(observer) => Some(observer),
                None => None,
            },
        };
        let outputs = batch.outputs.len();
        let hidden = cx.alloc(self.head.device(phase), outputs, self.hidden_size)?;
        self.model.forward(&mut cx, hidden)?;
        let vocab = self.head.out_features();
        for first in (0..outputs).step_by(LOGIT_ROWS) {
            let rows = LOGIT_ROWS.min(outputs - first);
            let mark = cx.workspace.mark();
            let logits = cx.alloc(hidden.device(), rows, vocab)?;
            self.head
                .forward(&mut cx, hidden.row_range(first, rows), logits)?;
            cx.workspace
                .write(logits)
                .chunks_exact_mut(vocab)
                .for_each(&mut *on_logits);
            cx.workspace.release(&mark);
        }
        Ok(())
    }
}
