//! Memory beside weights, cache and the planned workspace: what operators make, what products work
//! in, and what the program holds of a model.

use std::collections::BTreeMap;

use ktx_gguf::{Array, Gguf, Value};
use ktx_kernels::cuda;
use ktx_kernels::device::{Device, DeviceKind};
use ktx_kernels::linear::Precision;
use ktx_kernels::moe::stream;
use ktx_models::ModelDescription;
use ktx_ops::sizes::{made_of, sizes_of};
use ktx_ops::spec::Spec;
use ktx_ops::{Module, OpError, Role, WeightStore};

use super::{PROCESS_BYTES, generate_device, placement};
use crate::engine::Settings;
use crate::inject::is_whole;
use crate::plan::Plan;

/// Bytes of a module in the tree, the plan and the report: names, paths, and what they are made of.
const MODULE_BYTES: u64 = 1200;
/// Bytes of a text in memory beside its characters: pointer, length, and what the allocator adds.
const STRING_BYTES: u64 = 40;
/// Bytes of a token in the tokenizer's tables.
const TOKEN_BYTES: u64 = 72;
/// Bytes of each thread's tiles and panels.
const THREAD_BYTES: u64 = 256 << 10;
/// Columns are padded to a multiple of this in the products' form of activations.
const ROW_PAD: usize = 256;

/// What the operators of each device make at load, beside the file's tensors.
pub(crate) fn made(
    tree: &Module,
    plan: &Plan,
    store: &dyn WeightStore,
) -> Result<BTreeMap<Device, u64>, OpError> {
    let mut all = BTreeMap::new();
    let mut stack = vec![tree];
    while let Some(module) = stack.pop() {
        let bytes = made_of(module, store);
        if bytes > 0 {
            *all.entry(generate_device(plan, module)?).or_default() += bytes;
        }
        if !is_whole(module, plan.entry(&module.path)) {
            stack.extend(&module.children);
        }
    }
    Ok(all)
}

/// What each GPU takes of its memory to stream experts that live in main memory.
pub(crate) fn streams(
    tree: &Module,
    plan: &Plan,
    store: &dyn WeightStore,
) -> Result<BTreeMap<Device, u64>, OpError> {
    let mut layers: BTreeMap<Device, u64> = BTreeMap::new();
    for module in tree.walk() {
        if !matches!(module.spec, Spec::Experts(_)) || !is_whole(module, plan.entry(&module.path)) {
            continue;
        }
        let placement = placement(plan, module)?;
        if placement.generate.is_cpu() && placement.prefill.kind() == DeviceKind::Cuda {
            let tensors = sizes_of(module, true, store)?;
            let bytes: u64 = tensors.iter().map(|t| t.bytes).sum();
            let most = layers.entry(placement.prefill).or_default();
            *most = bytes.max(*most);
        }
    }
    let memory =
        |device: Device| cuda::device(device.index()).map_or(u64::MAX, |gpu| gpu.memory as u64);
    let all = layers.into_iter();
    Ok(all
        .map(|(device, bytes)| (device, stream::memory_for(memory(device), bytes)))
        .collect())
}

/// Activations as products take them, the threads' own memory, and tables of rotations.
pub(crate) fn products(
    description: &ModelDescription,
    store: &dyn WeightStore,
    settings: &Settings,
) -> Result<u64, OpError> {
    let tokens = settings.chunk_size.min(settings.context);
    let mut shared = Forms::default();
    let mut routed = 0;
    let mut tables: Vec<(String, u64)> = Vec::new();
    let mut stack = vec![&description.tree];
    while let Some(module) = stack.pop() {
        match &module.spec {
            Spec::Experts(spec) => {
                let mut x = Forms::default();
                let mut h = Forms::default();
                for size in sizes_of(module, true, store)? {
                    if size.name.ends_with(".bias") {
                        continue;
                    }
                    let is_down =
                        size.shape[0] != spec.hidden_size || size.name.contains("ffn_down");
                    let forms = if is_down { &mut h } else { &mut x };
                    forms.add(size.shape[0], size.ty.is_quantized(), settings.precision);
                }
                let slots = tokens * spec.top_k;
                // Each slot has a token and a weight.
                routed = routed.max(x.bytes(tokens) + h.bytes(slots) + 8 * slots as u64);
                continue;
            }
            Spec::Rope(rope) => {
                let positions = settings.context.next_multiple_of(64);
                let bytes = (positions * rope.config.dim * size_of::<f32>()) as u64;
                let key = format!("{:?}", rope.config);
                if !tables.iter().any(|(known, _)| *known == key) {
                    tables.push((key, bytes));
                }
            }
            Spec::Linear(_) | Spec::Gate(_) => {
                for size in sizes_of(module, false, store)? {
                    if size.shape.len() > 1 {
                        shared.add(size.shape[0], size.ty.is_quantized(), settings.precision);
                    }
                }
            }
            _ => {}
        }
        stack.extend(&module.children);
    }
    let threads = settings.threads as u64 * THREAD_BYTES;
    let tables: u64 = tables.iter().map(|(_, bytes)| bytes).sum();
    Ok(shared.bytes(tokens) + routed + threads + tables)
}

/// Widest rows of activations in each form.
#[derive(Default)]
struct Forms {
    /// In 8-bit codes with their scales and sums.
    codes: usize,
    /// In f32.
    floats: usize,
}

impl Forms {
    fn add(&mut self, cols: usize, quantized: bool, precision: Precision) {
        let widest = match quantized && precision == Precision::Int8 {
            true => &mut self.codes,
            false => &mut self.floats,
        };
        *widest = (*widest).max(cols);
    }

    fn bytes(&self, rows: usize) -> u64 {
        let padded = |cols: usize| (rows * cols.next_multiple_of(ROW_PAD)) as u64;
        // A scale and three sums for 32 codes.
        padded(self.codes) * 3 / 2 + padded(self.floats) * 4 + 4 * rows as u64
    }
}

/// What the program holds whatever is placed where: itself, the file's header, the vocabulary, the tree.
pub(crate) fn process(description: &ModelDescription, gguf: &Gguf) -> u64 {
    let tensors: u64 = gguf.tensors().map(|t| t.bytes).sum();
    let header = gguf.file_size().saturating_sub(tensors);
    let values: u64 = gguf.metadata().iter().map(|(_, v)| value_bytes(v)).sum();
    let infos = gguf.tensors().len() as u64 * 2 * (STRING_BYTES + 96);
    let modules = planned_modules(&description.tree);
    PROCESS_BYTES + header + values + infos + modules * MODULE_BYTES
}

/// Modules of the tree. The experts' own have no entry in the plan.
fn planned_modules(module: &Module) -> u64 {
    let below: u64 = module.children.iter().map(planned_modules).sum();
    match module.role() {
        Role::Experts => 1 + below / 2,
        _ => 1 + below,
    }
}

/// A value in the metadata, and what the tokenizer makes of it: texts are its tokens and merges.
fn value_bytes(value: &Value) -> u64 {
    match value {
        Value::Array(Array::String(texts)) => texts
            .iter()
            .map(|t| 2 * (t.len() as u64 + STRING_BYTES) + TOKEN_BYTES)
            .sum(),
        Value::Array(array) => array.len() as u64 * 8,
        _ => STRING_BYTES,
    }
}
