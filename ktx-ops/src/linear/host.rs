//! Matrix products on the file's blocks: in main memory, read where they lie, or in a GPU's.

use std::sync::Arc;

use ktx_gguf::Tensor;
use ktx_kernels::cuda::DeviceBuffer;
use ktx_kernels::device::Device;
use ktx_kernels::linear::WeightRows;
use ktx_kernels::linear::cuda::GpuMatrix;
use ktx_kernels::workspace::Act;

use super::{Arithmetic, gpu_scratch, kernel_error, multiply, multiply_on_gpu};
use crate::build::{BuildArgs, OpError, Operator, Placement, WeightStore};
use crate::gpu::{OnGpus, upload};
use crate::kwargs::{KwargDoc, KwargSet, NoKwargs};
use crate::module::{
    Capacity, DeviceWeights, Forward, Holding, HostMatrix, KModule, Linear, Loader, Phase,
};
use crate::register_operator;
use crate::spec::{LinearSource, LinearSpec, Spec};
use crate::tree::Module;
use crate::weights::{floats, matrix, optional, required};

/// A product with a matrix of the file on the blocks as they are, in main memory or on GPUs.
pub struct HostLinear {
    module: Module,
    spec: LinearSpec,
    class: &'static str,
    placement: Placement,
    arithmetic: Arithmetic,
    weight: Option<Tensor>,
    bias: Option<Vec<f32>>,
    /// Bytes of the weight that are not in the mapped file.
    made: u64,
    on_gpus: OnGpus<LinearOnGpu>,
}

/// A matrix on a GPU.
struct LinearOnGpu {
    weight: Arc<GpuMatrix>,
    bias: Option<DeviceBuffer>,
}

impl HostLinear {
    const MARLIN: &'static str = "ktransformers.operators.linear.KLinearMarlin";
    const TORCH: &'static str = "ktransformers.operators.linear.KLinearTorch";
    const CPU_INFER: &'static str = "ktransformers.operators.linear.KLinearCPUInfer";
    const DEFAULT: &'static str = "torch.nn.Linear";

    pub(super) fn build(
        args: &mut BuildArgs<'_>,
        class: &'static str,
        arithmetic: Arithmetic,
    ) -> Result<Operator, OpError> {
        let Spec::Linear(spec) = args.spec().clone() else {
            return Err(args.unfit("a linear module"));
        };
        let mut module = args.module.clone();
        module.children.clear();
        Ok(Operator::Linear(Box::new(Self {
            module,
            spec,
            class,
            placement: args.placement,
            arithmetic,
            weight: None,
            bias: None,
            made: 0,
            on_gpus: OnGpus::default(),
        })))
    }

    fn matrix(&self) -> Result<HostMatrix<'_>, OpError> {
        let path = self.path();
        let Some(weight) = &self.weight else {
            return Err(kernel_error(path, "its weights are not loaded"));
        };
        let weights = WeightRows::of(weight).map_err(|e| kernel_error(path, e))?;
        Ok(HostMatrix {
            weights,
            bias: self.bias.as_deref(),
        })
    }
}

impl KModule for HostLinear {
    fn path(&self) -> &str {
        &self.module.path
    }

    fn class_path(&self) -> &'static str {
        self.class
    }

    fn device(&self, phase: Phase) -> Device {
        self.placement.device(phase)
    }

    fn load(&mut self, loader: &mut Loader<'_>) -> Result<(), OpError> {
        let (weight, made) = weight(&self.module, &self.spec, loader.store())?;
        loader.took(&[&weight])?;
        self.made = made;
        self.bias = bias(&self.module, &self.spec, loader.store())?;
        let path = &self.module.path;
        self.on_gpus = OnGpus::load(path, self.placement, |gpu| {
            let bias = self.bias.as_ref();
            Ok(LinearOnGpu {
                weight: loader.matrix_on(path, gpu, &weight)?,
                bias: bias.map(|b| upload(path, gpu, b)).transpose()?,
            })
        })?;
        self.weight = Some(match self.placement.is_on_host() && self.made == 0 {
            true => loader.in_main_memory(path, &weight)?,
            false => weight,
        });
        Ok(())
    }

    fn unload(&mut self) {
        (self.weight, self.bias, self.made) = (None, None, 0);
        self.on_gpus = OnGpus::default();
    }

    fn scratch(&self, capacity: Capacity) -> usize {
        gpu_scratch(self.placement, capacity, self.spec.in_features)
    }

    fn holding(&self) -> Vec<Holding> {
        vec![Holding {
            device: self.placement.generate,
            bytes: self.made,
        }]
    }
}

impl Linear for HostLinear {
    fn in_features(&self) -> usize {
        self.spec.in_features
    }

    fn out_features(&self) -> usize {
        self.spec.out_features
    }

    fn forward(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError> {
        let engine = cx.precision;
        if cx.gpu(x).is_some() {
            let here = self.on_gpus.get(self.path(), x.device())?;
            let precision = self.arithmetic.precision(engine);
            return multiply_on_gpu(cx, &here.weight, here.bias.as_ref(), precision, x, out);
        }
        cx.precision = self.arithmetic.precision(engine);
        let result = self
            .matrix()
            .and_then(|m| multiply(cx, self.path(), &[m], x, [out]));
        cx.precision = engine;
        result
    }

    fn gpu_matrix(&self, device: Device, _phase: Phase) -> Option<DeviceWeights<'_>> {
        match self.arithmetic {
            Arithmetic::AsEngine => {
                let here = self.on_gpus.get(self.path(), device).ok()?;
                Some(DeviceWeights {
                    weights: &here.weight,
                    bias: here.bias.as_ref(),
                })
            }
            Arithmetic::F32 => None,
        }
    }

    fn host_matrix(&self, phase: Phase) -> Option<HostMatrix<'_>> {
        match self.arithmetic {
            Arithmetic::AsEngine if self.device(phase).is_cpu() => self.matrix().ok(),
            _ => None,
        }
    }
}

/// The matrix of a linear module, and how many bytes of it are not in the mapped file.
pub(super) fn weight(
    module: &Module,
    spec: &LinearSpec,
    store: &dyn WeightStore,
) -> Result<(Tensor, u64), OpError> {
    let is_direct = store.tensor(&format!("{}.weight", module.key)).is_some();
    match &spec.source {
        LinearSource::KvB { prefix } if !is_direct => {
            let joined = joined_kv_b(module, spec, prefix, store)?;
            let made = joined.size();
            Ok((joined, made))
        }
        _ => Ok((matrix(module, spec, store)?, 0)),
    }
}

/// What is added to each row of a linear module, if the file has it.
pub(super) fn bias(
    module: &Module,
    spec: &LinearSpec,
    store: &dyn WeightStore,
) -> Result<Option<Vec<f32>>, OpError> {
    if spec.source != LinearSource::Key {
        return Ok(None);
    }
    let name = format!("{}.bias", module.key);
    let bias = optional(&module.path, store, &name, &[spec.out_features])?;
    bias.map(|t| floats(&module.path, &t)).transpose()
}

/// `kv_b_proj` `[heads * (nope + v), kv_lora_rank]` in f32, from the split tensors: the key part is
/// stored transposed, `attn_k_b` `[heads, kv_lora_rank, nope]`; the value part as it is.
fn joined_kv_b(
    module: &Module,
    spec: &LinearSpec,
    prefix: &str,
    store: &dyn WeightStore,
) -> Result<Tensor, OpError> {
    let path = &module.path;
    let named = |name: &str| {
        let tensor = format!("{prefix}{name}.weight");
        store.tensor(&tensor).ok_or(OpError::MissingTensor {
            path: path.clone(),
            tensor,
        })
    };
    let lora = spec.in_features;
    let heads = named("attn_k_b")?.shape().get(2).copied().unwrap_or(1);
    let rows = spec.out_features / heads.max(1);
    let nope = named("attn_k_b")?.row_len();
    let v = rows.saturating_sub(nope);
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
    let (k, v_rows) = (floats(path, &k_b)?, floats(path, &v_b)?);
    let mut joined = Vec::with_capacity(spec.out_features * lora);
    for head in 0..heads {
        let k = &k[head * nope * lora..(head + 1) * nope * lora];
        for n in 0..nope {
            joined.extend((0..lora).map(|l| k[l * nope + n]));
        }
        joined.extend_from_slice(&v_rows[head * v * lora..(head + 1) * v * lora]);
    }
    Ok(Tensor::from_f32(
        &format!("{}.weight", module.key),
        &[lora, spec.out_features],
        joined,
    ))
}

/// Arguments of `KLinearMarlin`: it never requantises here, so what chose its format means nothing.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
#[serde(default)]
struct MarlinKwargs {
    num_bits: u32,
    group_size: i32,
    act_order: bool,
    is_k_full: bool,
}

impl Default for MarlinKwargs {
    fn default() -> Self {
        Self {
            num_bits: 4,
            group_size: 64,
            act_order: false,
            is_k_full: true,
        }
    }
}

const NOT_REQUANTISED: Option<&str> = Some("weights stay in the file's format");

impl KwargSet for MarlinKwargs {
    const DOCS: &'static [KwargDoc] = &[
        KwargDoc {
            name: "num_bits",
            doc: "bits of the requantised weights",
            ignored: NOT_REQUANTISED,
        },
        KwargDoc {
            name: "group_size",
            doc: "weights that share a scale",
            ignored: NOT_REQUANTISED,
        },
        KwargDoc {
            name: "act_order",
            doc: "order of the groups",
            ignored: NOT_REQUANTISED,
        },
        KwargDoc {
            name: "is_k_full",
            doc: "whether groups are whole",
            ignored: NOT_REQUANTISED,
        },
    ];
}

/// Arguments of `KLinearCPUInfer`.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
#[serde(default)]
struct CpuInferKwargs {
    out_device: Option<String>,
    stride: u32,
    group_max_len: u32,
}

impl Default for CpuInferKwargs {
    fn default() -> Self {
        Self {
            out_device: None,
            stride: 16,
            group_max_len: 1024,
        }
    }
}

impl KwargSet for CpuInferKwargs {
    const DOCS: &'static [KwargDoc] = &[
        KwargDoc {
            name: "out_device",
            doc: "where the result lands",
            ignored: Some("the result goes to the device of the module that asked"),
        },
        KwargDoc {
            name: "stride",
            doc: "rows of a task",
            ignored: Some("tasks are cut by the kernel"),
        },
        KwargDoc {
            name: "group_max_len",
            doc: "tokens of a batch",
            ignored: Some("batches are cut by the kernel"),
        },
    ];
}

fn build_default(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    HostLinear::build(args, HostLinear::DEFAULT, Arithmetic::AsEngine)
}

fn build_marlin(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    HostLinear::build(args, HostLinear::MARLIN, Arithmetic::AsEngine)
}

fn build_cpu_infer(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    HostLinear::build(args, HostLinear::CPU_INFER, Arithmetic::AsEngine)
}

fn build_torch(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    HostLinear::build(args, HostLinear::TORCH, Arithmetic::F32)
}

register_operator! {
    class: HostLinear::DEFAULT,
    aliases: ["ktx.linear.Linear"],
    role: Linear,
    summary: "product on the file's blocks in main memory; the default of linear modules",
    kwargs: NoKwargs,
    build: build_default,
}

register_operator! {
    class: HostLinear::MARLIN,
    aliases: [
        "KLinearMarlin",
        "ktx.linear.KLinearMarlin",
        "ktransformers.operators.linear.VLinearMarlin",
        "VLinearMarlin",
    ],
    role: Linear,
    summary: "product on the file's blocks, never requantised",
    kwargs: MarlinKwargs,
    build: build_marlin,
}

register_operator! {
    class: HostLinear::CPU_INFER,
    aliases: ["KLinearCPUInfer", "ktx.linear.KLinearCPUInfer"],
    role: Linear,
    summary: "product on the file's blocks in main memory",
    kwargs: CpuInferKwargs,
    build: build_cpu_infer,
}

register_operator! {
    class: HostLinear::TORCH,
    aliases: ["KLinearTorch", "ktx.linear.KLinearTorch"],
    role: Linear,
    summary: "product of dequantised weights with f32 activations: exact, slower",
    kwargs: NoKwargs,
    build: build_torch,
}
