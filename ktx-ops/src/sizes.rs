//! Which tensors a module reads and how large they are, checked against the shapes that the metadata
//! promise: from types and shapes alone, so that a model can be planned that is not there.

use crate::build::{OpError, TensorSize, WeightStore};
use crate::spec::{ExpertsSpec, LinearSource, LinearSpec, Spec};
use crate::tree::Module;
use crate::weights::same_shape;

/// All tensors that a module reads itself. `whole` says that the module's operator also takes what
/// its children would have read: routed experts as one operator.
///
/// # Errors
/// [`OpError`] if a tensor is missing or has another shape than the metadata say.
pub fn sizes_of(
    module: &Module,
    whole: bool,
    store: &dyn WeightStore,
) -> Result<Vec<TensorSize>, OpError> {
    let reader = Reader { module, store };
    let weight = || format!("{}.weight", module.key);
    Ok(match &module.spec {
        Spec::Linear(spec) => reader.linear(spec)?,
        Spec::Norm(spec) => vec![reader.required(&weight(), &[spec.size])?],
        Spec::Embedding(spec) => {
            vec![reader.required(&weight(), &[spec.hidden_size, spec.vocab_size])?]
        }
        Spec::Gate(spec) => {
            let shape = [spec.hidden_size, spec.config.experts];
            let mut tensors = vec![reader.required(&weight(), &shape)?];
            for bias in [&spec.logit_bias, &spec.bias].into_iter().flatten() {
                tensors.push(reader.required(bias, &[spec.config.experts])?);
            }
            tensors
        }
        Spec::Attention(spec) => match &spec.sinks {
            Some(sinks) => vec![reader.required(sinks, &[spec.num_attention_heads])?],
            None => Vec::new(),
        },
        Spec::Experts(spec) if whole => reader.experts(spec)?,
        _ => Vec::new(),
    })
}

struct Reader<'a> {
    module: &'a Module,
    store: &'a dyn WeightStore,
}

impl Reader<'_> {
    fn missing(&self, tensor: &str) -> OpError {
        OpError::MissingTensor {
            path: self.module.path.clone(),
            tensor: tensor.to_owned(),
        }
    }

    fn required(&self, name: &str, shape: &[usize]) -> Result<TensorSize, OpError> {
        self.optional(name, shape)?
            .ok_or_else(|| self.missing(name))
    }

    fn optional(&self, name: &str, shape: &[usize]) -> Result<Option<TensorSize>, OpError> {
        match self.store.size(name) {
            Some(size) if !same_shape(&size.shape, shape) => Err(OpError::Shape {
                path: self.module.path.clone(),
                tensor: size.name,
                found: size.shape,
                expected: shape.to_vec(),
            }),
            size => Ok(size),
        }
    }

    fn linear(&self, spec: &LinearSpec) -> Result<Vec<TensorSize>, OpError> {
        let shape = [spec.in_features, spec.out_features];
        let weight = format!("{}.weight", self.module.key);
        Ok(match &spec.source {
            LinearSource::Key => {
                let bias = format!("{}.bias", self.module.key);
                let mut tensors = vec![self.required(&weight, &shape)?];
                tensors.extend(self.optional(&bias, &[spec.out_features])?);
                tensors
            }
            LinearSource::KvB { prefix } if self.store.size(&weight).is_none() => {
                ["attn_k_b", "attn_v_b"]
                    .iter()
                    .map(|name| {
                        let name = format!("{prefix}{name}.weight");
                        self.store.size(&name).ok_or_else(|| self.missing(&name))
                    })
                    .collect::<Result<_, _>>()?
            }
            LinearSource::KvB { .. } => vec![self.required(&weight, &shape)?],
            LinearSource::Tensor(name) => vec![self.required(name, &shape)?],
            LinearSource::Expert {
                merged,
                separate,
                index,
            } => vec![self.expert(merged, separate, *index, &shape)?],
        })
    }

    /// One expert's matrix: an entry of the merged tensor, or a tensor of its own.
    fn expert(
        &self,
        merged: &str,
        separate: &str,
        index: usize,
        shape: &[usize; 2],
    ) -> Result<TensorSize, OpError> {
        let name = format!("{merged}.weight");
        let Some(stack) = self.store.size(&name) else {
            return self.required(&format!("{separate}.{index}.weight"), shape);
        };
        let part = format!("{name}[{index}]");
        match stack.shape.split_last() {
            Some((count, inner)) if index < *count && same_shape(inner, shape) => Ok(TensorSize {
                name: part,
                ty: stack.ty,
                shape: inner.to_vec(),
                bytes: stack.bytes / *count as u64,
            }),
            Some((count, inner)) if index < *count => Err(OpError::Shape {
                path: self.module.path.clone(),
                tensor: part,
                found: inner.to_vec(),
                expected: shape.to_vec(),
            }),
            _ => Err(self.missing(&part)),
        }
    }

    /// The three projections of all experts of a layer, merged or one by one.
    fn experts(&self, spec: &ExpertsSpec) -> Result<Vec<TensorSize>, OpError> {
        let (h, f, count) = (
            spec.hidden_size,
            spec.moe_intermediate_size,
            spec.num_experts,
        );
        let mut tensors = Vec::new();
        for (name, input, output) in [("gate", h, f), ("up", h, f), ("down", f, h)] {
            if spec.biases {
                let bias = format!("{}ffn_{name}_exps.bias", spec.prefix);
                tensors.push(self.required(&bias, &[output, count])?);
            }
            let merged = format!("{}ffn_{name}_exps.weight", spec.prefix);
            if self.store.size(&merged).is_some() {
                tensors.push(self.required(&merged, &[input, output, count])?);
                continue;
            }
            let separate = |e: usize| format!("{}ffn_{name}.{e}.weight", spec.prefix);
            if self.store.size(&separate(0)).is_none() {
                return Err(self.missing(&merged));
            }
            for expert in 0..count {
                tensors.push(self.required(&separate(expert), &[input, output])?);
            }
        }
        Ok(tensors)
    }
}

/// Bytes that the module's operator makes when it loads, beside the tensors in the file: copies of
/// norms in f32, and of a latent attention whose file holds `attn_kv_b`, its key part turned around.
pub fn made_of(module: &Module, store: &dyn WeightStore) -> u64 {
    let values = match &module.spec {
        Spec::Norm(spec) => spec.size,
        Spec::Gate(spec) if spec.bias.is_some() => spec.config.experts,
        Spec::Mla(spec) => {
            let joined = module
                .child("kv_b_proj")
                .and_then(|m| store.size(&format!("{}.weight", m.key)));
            match joined {
                Some(_) => spec.num_attention_heads * spec.qk_nope_head_dim * spec.kv_lora_rank,
                None => 0,
            }
        }
        _ => 0,
    };
    (values * size_of::<f32>()) as u64
}
