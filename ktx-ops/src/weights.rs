//! Which tensors a module reads, checked against the shapes that the metadata promise.

use ktx_gguf::{GgmlType, Tensor};

use crate::build::{OpError, WeightStore};
use crate::spec::{ExpertsSpec, LinearSource, LinearSpec};
use crate::tree::Module;

/// The tensor of this name with this shape (row length first).
pub fn required(
    path: &str,
    store: &dyn WeightStore,
    name: &str,
    shape: &[usize],
) -> Result<Tensor, OpError> {
    let tensor = store.tensor(name).ok_or_else(|| OpError::MissingTensor {
        path: path.to_owned(),
        tensor: name.to_owned(),
    })?;
    checked(path, tensor, shape)
}

/// The tensor of this name with this shape, if the file has it.
pub fn optional(
    path: &str,
    store: &dyn WeightStore,
    name: &str,
    shape: &[usize],
) -> Result<Option<Tensor>, OpError> {
    store
        .tensor(name)
        .map(|t| checked(path, t, shape))
        .transpose()
}

/// A shape fits if it is the same but for outer dimensions of 1, which files write or leave out.
pub(crate) fn same_shape(found: &[usize], expected: &[usize]) -> bool {
    let trimmed = |s: &[usize]| s.iter().rposition(|n| *n != 1).map_or(1, |i| i + 1);
    let whole = |s: &[usize]| s.get(..trimmed(s)).map(<[usize]>::to_vec);
    whole(found) == whole(expected)
}

fn checked(path: &str, tensor: Tensor, shape: &[usize]) -> Result<Tensor, OpError> {
    if same_shape(tensor.shape(), shape) {
        return Ok(tensor);
    }
    Err(OpError::Shape {
        path: path.to_owned(),
        tensor: tensor.name().to_owned(),
        found: tensor.shape().to_vec(),
        expected: shape.to_vec(),
    })
}

/// A tensor of one value type whatever the file holds: norms, biases and routers are small.
pub fn floats(path: &str, tensor: &Tensor) -> Result<Vec<f32>, OpError> {
    match tensor.ty() {
        GgmlType::I8 | GgmlType::I16 | GgmlType::I32 | GgmlType::I64 => Err(OpError::Kernel {
            path: path.to_owned(),
            message: format!(
                "tensor `{}` holds integers ({}), and weights are expected",
                tensor.name(),
                tensor.ty().name()
            ),
        }),
        _ => Ok(tensor.to_f32()),
    }
}

/// The matrix `[out, in]` of a linear module. `kv_b_proj` of a file that holds it split has none.
pub fn matrix(
    module: &Module,
    spec: &LinearSpec,
    store: &dyn WeightStore,
) -> Result<Tensor, OpError> {
    let shape = [spec.in_features, spec.out_features];
    match &spec.source {
        LinearSource::Key | LinearSource::KvB { .. } => required(
            &module.path,
            store,
            &format!("{}.weight", module.key),
            &shape,
        ),
        LinearSource::Tensor(name) => required(&module.path, store, name, &shape),
        LinearSource::Expert {
            merged,
            separate,
            index,
        } => expert(module, store, merged, separate, *index, &shape),
    }
}

fn expert(
    module: &Module,
    store: &dyn WeightStore,
    merged: &str,
    separate: &str,
    index: usize,
    shape: &[usize; 2],
) -> Result<Tensor, OpError> {
    let name = format!("{merged}.weight");
    let Some(stack) = store.tensor(&name) else {
        return required(
            &module.path,
            store,
            &format!("{separate}.{index}.weight"),
            shape,
        );
    };
    let missing = || OpError::MissingTensor {
        path: module.path.clone(),
        tensor: format!("{name}[{index}]"),
    };
    checked(&module.path, stack.slice(index).ok_or_else(missing)?, shape)
}

/// One projection of all experts: a merged tensor, or one for each expert.
#[derive(Debug, Clone)]
pub enum ExpertTensors {
    /// `[experts, out, in]`.
    Merged(Tensor),
    /// One `[out, in]` for each expert.
    Separate(Vec<Tensor>),
}

impl ExpertTensors {
    /// The matrix of one expert.
    pub fn expert(&self, index: usize) -> Option<Tensor> {
        match self {
            Self::Merged(stack) => stack.slice(index),
            Self::Separate(tensors) => tensors.get(index).cloned(),
        }
    }

    /// Puts another in the place of each tensor.
    pub(crate) fn replace(
        &mut self,
        mut by: impl FnMut(&Tensor) -> Result<Tensor, OpError>,
    ) -> Result<(), OpError> {
        let tensors = match self {
            Self::Merged(stack) => std::slice::from_mut(stack),
            Self::Separate(tensors) => tensors,
        };
        tensors.iter_mut().try_for_each(|tensor| {
            *tensor = by(tensor)?;
            Ok(())
        })
    }

    /// All tensors.
    pub fn tensors(&self) -> Vec<&Tensor> {
        match self {
            Self::Merged(stack) => vec![stack],
            Self::Separate(tensors) => tensors.iter().collect(),
        }
    }
}

/// The three projections of a layer's routed experts: gate, up, down.
pub fn experts(
    path: &str,
    spec: &ExpertsSpec,
    store: &dyn WeightStore,
) -> Result<[ExpertTensors; 3], OpError> {
    let (h, f) = (spec.hidden_size, spec.moe_intermediate_size);
    let one = |name: &str, input: usize, output: usize| {
        let merged = format!("{}ffn_{name}_exps.weight", spec.prefix);
        if store.tensor(&merged).is_some() {
            return required(path, store, &merged, &[input, output, spec.num_experts])
                .map(ExpertTensors::Merged);
        }
        let separate = format!("{}ffn_{name}.0.weight", spec.prefix);
        if store.tensor(&separate).is_none() {
            return Err(OpError::MissingTensor {
                path: path.to_owned(),
                tensor: merged,
            });
        }
        (0..spec.num_experts)
            .map(|e| {
                required(
                    path,
                    store,
                    &format!("{}ffn_{name}.{e}.weight", spec.prefix),
                    &[input, output],
                )
            })
            .collect::<Result<_, _>>()
            .map(ExpertTensors::Separate)
    };
    Ok([one("gate", h, f)?, one("up", h, f)?, one("down", f, h)?])
}

/// The biases of a layer's routed experts, if they have any: gate, up, down, each `[experts, out]`.
pub fn expert_biases(
    path: &str,
    spec: &ExpertsSpec,
    store: &dyn WeightStore,
) -> Result<Option<[Tensor; 3]>, OpError> {
    if !spec.biases {
        return Ok(None);
    }
    let one = |name: &str, output: usize| {
        let tensor = format!("{}ffn_{name}_exps.bias", spec.prefix);
        required(path, store, &tensor, &[output, spec.num_experts])
    };
    let width = spec.moe_intermediate_size;
    Ok(Some([
        one("gate", width)?,
        one("up", width)?,
        one("down", spec.hidden_size)?,
    ]))
}
