//! The weights of a model: those of its GGUF file, and in front of them those of safetensors files beside it.
//!
//! Operators ask by GGUF names. A safetensors file has a tensor under its Hugging Face name, which is translated, or
//! under the GGUF name itself, as KTransformers' merging script writes them. Tensors that the converter to GGUF
//! writes otherwise than the checkpoint has them are read as the checkpoint has them where operators can (DeepSeek's
//! `kv_b_proj`), and refused where they cannot (the rows of llama's `q_proj`).

use std::collections::{HashMap, HashSet};

use ktx_gguf::{Gguf, Safetensors, Tensor};
use ktx_ops::key::gguf_tensor;
use ktx_ops::spec::{ExpertsSpec, LinearSource, LinearSpec};
use ktx_ops::{Module, Spec, TensorSize, WeightStore};

use crate::error::EngineError;

/// A GGUF file and the safetensors files that go before it.
#[derive(Debug, Clone)]
pub struct Weights {
    gguf: Gguf,
    beside: Vec<Safetensors>,
    /// GGUF name to the file and the name there.
    names: HashMap<String, (usize, String)>,
    /// What the tree's modules read from the safetensors files, by GGUF name.
    taken: HashMap<String, Tensor>,
    /// The names there of what is taken.
    origins: HashSet<String>,
}

impl WeightStore for Weights {
    fn tensor(&self, name: &str) -> Option<Tensor> {
        self.taken
            .get(name)
            .cloned()
            .or_else(|| self.gguf.tensor(name))
    }

    fn size(&self, name: &str) -> Option<TensorSize> {
        match self.taken.get(name) {
            Some(tensor) => Some(TensorSize::of(tensor)),
            None => WeightStore::size(&self.gguf, name),
        }
    }
}

impl Weights {
    /// The tensors of all files, by their names.
    ///
    /// # Errors
    /// [`EngineError::Beside`] if two safetensors files have the same tensor.
    pub fn new(gguf: Gguf, beside: Vec<Safetensors>) -> Result<Self, EngineError> {
        let mut names: HashMap<String, (usize, String)> = HashMap::new();
        for (file, set) in beside.iter().enumerate() {
            for entry in set.tensors() {
                let place = (file, entry.name.clone());
                if let Some((first, name)) = names.insert(gguf_tensor(&entry.name), place) {
                    return Err(EngineError::Beside {
                        file: set.name().to_owned(),
                        reason: format!(
                            "tensor `{}` is the same as `{name}` of {}; name only one of the two",
                            entry.name.escape_debug(),
                            beside[first].name()
                        ),
                    });
                }
            }
        }
        Ok(Self {
            gguf,
            beside,
            names,
            taken: HashMap::new(),
            origins: HashSet::new(),
        })
    }

    /// The GGUF file.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// The safetensors files.
    pub fn beside(&self) -> &[Safetensors] {
        &self.beside
    }

    /// Bytes of all files.
    pub fn file_size(&self) -> u64 {
        let beside: u64 = self.beside.iter().map(Safetensors::file_size).sum();
        self.gguf.file_size() + beside
    }

    /// Shows `see` every tensor of all files: its name, its type and shape, and its bytes, which are read only where
    /// they are looked at.
    pub(crate) fn each(&self, see: &mut dyn FnMut(&str, &str, &[u8])) {
        for info in self.gguf.tensors() {
            if let Some(tensor) = self.gguf.tensor(&info.name) {
                let kind = format!("{:?} {:?}", info.ty, info.shape);
                see(&info.name, &kind, tensor.bytes());
            }
        }
        for set in &self.beside {
            for entry in set.tensors() {
                let kind = format!("{:?} {:?}", entry.dtype, entry.shape);
                see(&entry.name, &kind, set.bytes(entry));
            }
        }
    }

    /// The shape of a tensor by its GGUF name, row length first.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let beside = self.names.get(name).and_then(|(file, name)| {
            let entry = self.beside[*file].entry(name)?;
            Some(entry.shape.iter().rev().copied().collect())
        });
        beside.or_else(|| self.gguf.tensor_info(name).map(|t| t.shape.clone()))
    }

    /// Whether a tensor, by the name in its file, comes from a safetensors file.
    pub fn is_beside(&self, name: &str) -> bool {
        self.origins.contains(name)
    }

    /// Takes what the tree's modules read from the safetensors files, so that an unfit tensor is an error before
    /// anything is loaded.
    ///
    /// # Errors
    /// [`EngineError::Gguf`] for a tensor that operators cannot read, [`EngineError::Beside`] for one that is not laid
    /// out as operators read it, and for files of which nothing is read.
    pub fn take(&mut self, tree: &Module, architecture: &str) -> Result<(), EngineError> {
        if self.beside.is_empty() {
            return Ok(());
        }
        let mut used = vec![false; self.beside.len()];
        for module in tree.walk() {
            for (name, shape) in wanted(module) {
                let Some((file, origin)) = self.names.get(&name).filter(|_| self.is_first(&name))
                else {
                    continue;
                };
                let set = &self.beside[*file];
                if is_permuted(module, architecture) && *origin != name {
                    return Err(permuted(set, origin));
                }
                let tensor = match set.ggml_tensor(origin, &shape)? {
                    Some(blocks) => Some(blocks),
                    None => set.tensor(origin)?,
                };
                used[*file] = true;
                if let Some(tensor) = tensor {
                    self.origins.insert(tensor.name().to_owned());
                    self.taken.insert(name, tensor);
                }
            }
        }
        match used.iter().position(|used| !used) {
            Some(file) => Err(EngineError::Beside {
                file: self.beside[file].name().to_owned(),
                reason: format!(
                    "none of its {} tensors is one of this model's; name the checkpoint that the GGUF file was made from",
                    self.beside[file].tensors().len()
                ),
            }),
            None => Ok(()),
        }
    }

    /// Safetensors go before the GGUF file, but for single experts where that has them all in one tensor.
    fn is_first(&self, name: &str) -> bool {
        let Some((layer, rest)) = name
            .strip_prefix("blk.")
            .and_then(|rest| rest.split_once('.'))
        else {
            return true;
        };
        let projection = ["gate", "up", "down"]
            .into_iter()
            .find(|p| is_single_expert(rest, p));
        projection.is_none_or(|p| {
            self.gguf
                .tensor_info(&format!("blk.{layer}.ffn_{p}_exps.weight"))
                .is_none()
        })
    }
}

/// Whether this is `ffn_gate.5.weight`.
fn is_single_expert(name: &str, projection: &str) -> bool {
    let expert = name
        .strip_prefix("ffn_")
        .and_then(|rest| rest.strip_prefix(projection))
        .and_then(|rest| rest.strip_prefix('.')?.strip_suffix(".weight"));
    expert.is_some_and(|number| number.parse::<usize>().is_ok())
}

/// Files of the architecture `llama` hold the rows of these in the order of another rotation.
fn is_permuted(module: &Module, architecture: &str) -> bool {
    architecture == "llama" && matches!(module.name.as_str(), "q_proj" | "k_proj")
}

fn permuted(set: &Safetensors, name: &str) -> EngineError {
    EngineError::Beside {
        file: set.name().to_owned(),
        reason: format!(
            "tensor `{name}`: GGUF files of the architecture llama have these rows in another order, and they cannot \
             be taken from a checkpoint; remove `q_proj` and `k_proj` from it, or convert it to GGUF"
        ),
    }
}

/// The GGUF names of what a module may read, with the shapes that they should have, row length first.
fn wanted(module: &Module) -> Vec<(String, Vec<usize>)> {
    let weight = |shape: &[usize]| (format!("{}.weight", module.key), shape.to_vec());
    match &module.spec {
        Spec::Linear(spec) => of_linear(module, spec),
        Spec::Norm(spec) => vec![weight(&[spec.size])],
        Spec::Embedding(spec) => vec![weight(&[spec.hidden_size, spec.vocab_size])],
        Spec::Gate(spec) => {
            let mut names = vec![weight(&[spec.hidden_size, spec.config.experts])];
            let biases = [&spec.logit_bias, &spec.bias].into_iter().flatten();
            names.extend(biases.map(|name| (name.clone(), vec![spec.config.experts])));
            names
        }
        Spec::Attention(spec) => {
            let sinks = spec.sinks.iter();
            sinks
                .map(|name| (name.clone(), vec![spec.num_attention_heads]))
                .collect()
        }
        Spec::Experts(spec) => of_experts(spec),
        _ => Vec::new(),
    }
}

fn of_linear(module: &Module, spec: &LinearSpec) -> Vec<(String, Vec<usize>)> {
    let shape = vec![spec.in_features, spec.out_features];
    match &spec.source {
        LinearSource::Key => vec![
            (format!("{}.weight", module.key), shape),
            (format!("{}.bias", module.key), vec![spec.out_features]),
        ],
        LinearSource::KvB { .. } => vec![(format!("{}.weight", module.key), shape)],
        LinearSource::Tensor(name) => vec![(name.clone(), shape)],
        LinearSource::Expert { .. } => Vec::new(),
    }
}

fn of_experts(spec: &ExpertsSpec) -> Vec<(String, Vec<usize>)> {
    let (hidden, width) = (spec.hidden_size, spec.moe_intermediate_size);
    let projections = [
        ("gate", hidden, width),
        ("up", hidden, width),
        ("down", width, hidden),
    ];
    let mut names = Vec::new();
    for (name, input, output) in projections {
        let stem = format!("{}ffn_{name}", spec.prefix);
        names.push((
            format!("{stem}_exps.weight"),
            vec![input, output, spec.num_experts],
        ));
        let one = |expert| (format!("{stem}.{expert}.weight"), vec![input, output]);
        names.extend((0..spec.num_experts).map(one));
    }
    names
}
