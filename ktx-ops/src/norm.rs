//! Root mean square normalisation.

use ktx_kernels::attention::cuda::DeviceNorm;
use ktx_kernels::cuda::DeviceBuffer;
use ktx_kernels::device::Device;
use ktx_kernels::norm::{self, NormRows, rms_norm, rms_norm_in_place};
use ktx_kernels::workspace::Act;

use crate::build::{BuildArgs, OpError, Operator, Placement};
use crate::gpu::{OnGpus, refused, upload};
use crate::kwargs::NoKwargs;
use crate::linear::kernel_error;
use crate::module::{Forward, Holding, KModule, Loader, Norm, Phase};
use crate::register_operator;
use crate::spec::{NormSpec, Spec};
use crate::weights::{floats, required};

/// `x / sqrt(mean(x^2) + eps) * weight`, in f32.
pub struct RmsNorm {
    path: String,
    key: String,
    placement: Placement,
    spec: NormSpec,
    weight: Vec<f32>,
    on_gpus: OnGpus<DeviceBuffer>,
}

impl RmsNorm {
    const CLASS: &'static str = "ktransformers.operators.layernorm.RMSNorm";
}

impl KModule for RmsNorm {
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
        let tensor = required(
            &self.path,
            loader.store(),
            &format!("{}.weight", self.key),
            &[self.spec.size],
        )?;
        loader.took(&[&tensor])?;
        self.weight = floats(&self.path, &tensor)?;
        self.on_gpus = OnGpus::load(&self.path, self.placement, |gpu| {
            upload(&self.path, gpu, &self.weight)
        })?;
        Ok(())
    }

    fn holding(&self) -> Vec<Holding> {
        vec![Holding {
            device: self.placement.generate,
            bytes: size_of_val(self.weight.as_slice()) as u64,
        }]
    }
}

impl Norm for RmsNorm {
    fn gpu_weight(&self, device: Device) -> Option<DeviceNorm<'_>> {
        let weight = self.on_gpus.get(&self.path, device).ok()?;
        Some(DeviceNorm {
            weight,
            eps: self.spec.eps,
        })
    }

    fn forward(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError> {
        if x.cols() != self.weight.len() {
            let message = format!(
                "rows of {} values, and its weight has {}",
                x.cols(),
                self.weight.len()
            );
            return Err(kernel_error(&self.path, message));
        }
        if let Some(gpu) = cx.gpu(x) {
            let weight = self.on_gpus.get(&self.path, x.device())?;
            let (x, out) = (cx.workspace.matrix(x), cx.workspace.matrix(out));
            return norm::cuda::rms_norm(&gpu, x, weight, self.spec.eps, out).map_err(refused);
        }
        if x == out {
            let rows = NormRows::contiguous(x.rows(), x.cols());
            rms_norm_in_place(
                cx.pool,
                cx.workspace.write(x),
                &rows,
                &self.weight,
                self.spec.eps,
            );
        } else {
            let ([x], [out]) = cx.workspace.views([x], [out]);
            rms_norm(cx.pool, x, &self.weight, self.spec.eps, out);
        }
        Ok(())
    }

    fn add_forward(
        &self,
        cx: &mut Forward<'_>,
        hidden: Act,
        y: Act,
        out: Act,
    ) -> Result<(), OpError> {
        let Some(gpu) = cx.gpu(hidden) else {
            cx.add(hidden, y)?;
            return self.forward(cx, hidden, out);
        };
        let weight = self.on_gpus.get(&self.path, hidden.device())?;
        let [hidden, y, out] = [hidden, y, out].map(|act| cx.workspace.matrix(act));
        norm::cuda::add_rms_norm(&gpu, hidden, y, weight, self.spec.eps, out).map_err(refused)
    }
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    let Spec::Norm(spec) = args.spec().clone() else {
        return Err(args.unfit("a normalisation"));
    };
    Ok(Operator::Norm(Box::new(RmsNorm {
        path: args.module.path.clone(),
        key: args.module.key.clone(),
        placement: args.placement,
        spec,
        weight: Vec::new(),
        on_gpus: OnGpus::default(),
    })))
}

register_operator! {
    class: RmsNorm::CLASS,
    aliases: [
        "ktx.norm.RmsNorm",
        "RMSNorm",
        "ktransformers.operators.layernorm.KQwen2MoeRMSNorm",
        "KQwen2MoeRMSNorm",
        "ktransformers.operators.layernorm.KQwen3MoeRMSNorm",
        "KQwen3MoeRMSNorm",
        "ktransformers.operators.layernorm.DeepseekV3RMSNormTorch",
        "DeepseekV3RMSNormTorch",
    ],
    role: Norm,
    summary: "root mean square normalisation",
    kwargs: NoKwargs,
    build: build,
}
