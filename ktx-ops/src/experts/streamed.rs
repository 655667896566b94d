//! Routed experts in main memory that a GPU computes prompts with: see [`ktx_kernels::moe::stream`].

use std::sync::{Mutex, MutexGuard, PoisonError};

use ktx_kernels::activation;
use ktx_kernels::cuda::{Gpu, Moment};
use ktx_kernels::device::{Device, DeviceKind};
use ktx_kernels::linear::Precision;
use ktx_kernels::moe::MoeWeights;
use ktx_kernels::moe::cuda::GpuRouting;
use ktx_kernels::moe::stream::StreamedWeights;
use ktx_kernels::workspace::Act;

use super::adapted::Routed;
use crate::build::{OpError, Placement};
use crate::gpu::refused;
use crate::linear::kernel_error;
use crate::loader::StreamedLayer;
use crate::module::{Forward, Loader, Phase};
use crate::spec::ExpertsSpec;
use crate::weights::ExpertTensors;

/// The GPU that computes prompts with experts that live in main memory, where a placement says so.
pub(super) fn streams_to(placement: Placement) -> Option<Device> {
    let prefill = placement.prefill;
    (placement.generate.is_cpu() && prefill.kind() == DeviceKind::Cuda).then_some(prefill)
}

/// A layer's experts as GPUs take them from main memory; none of types that are not read there.
pub(crate) fn streamed_weights(
    spec: &ExpertsSpec,
    tensors: &[ExpertTensors; 3],
) -> Option<StreamedWeights> {
    let sizes = [
        spec.num_experts,
        spec.hidden_size,
        spec.moe_intermediate_size,
    ];
    let tensors = tensors
        .each_ref()
        .map(|projection| projection.tensors().into_iter().cloned().collect());
    StreamedWeights::new(tensors, sizes)
}

/// A layer's experts on their way to a GPU.
pub(super) struct StreamedExperts {
    device: Device,
    layer: StreamedLayer,
    experts: usize,
    /// When the rows that the CPU computes with are in main memory.
    fetched: Moment,
    /// What the CPU still has to compute.
    rest: Mutex<Option<Rest>>,
}

/// The CPU's part of a call.
pub(super) struct Rest {
    /// The rows in main memory.
    pub rows: Routed,
    /// The first expert that is the CPU's.
    pub first_expert: usize,
}

impl StreamedExperts {
    /// Adds a layer to those that are streamed to `device`; none if its types are not read there.
    pub(super) fn load(
        path: &str,
        device: Device,
        spec: &ExpertsSpec,
        tensors: &[ExpertTensors; 3],
        weights: &MoeWeights<'_>,
        loader: &mut Loader<'_>,
    ) -> Result<Option<Self>, OpError> {
        let Some(streamed) = streamed_weights(spec, tensors) else {
            tracing::warn!(
                path,
                "experts of these types cannot be streamed to a GPU: prompts are computed on the CPU"
            );
            return Ok(None);
        };
        let gpu = Gpu::open(device.index()).map_err(|e| kernel_error(path, e))?;
        let layer = loader.stream_on(&gpu, streamed, weights).map_err(refused)?;
        Ok(Some(Self {
            device,
            layer,
            experts: spec.num_experts,
            fetched: Moment::new(&gpu).map_err(refused)?,
            rest: Mutex::default(),
        }))
    }

    /// Where a call is computed: here if it has the rows of a prompt that is worth the uploads.
    pub(super) fn takes(&self, cx: &Forward<'_>, rows: usize) -> Option<Device> {
        (cx.phase == Phase::Prefill && rows >= cx.streaming.from).then_some(self.device)
    }

    /// Starts the GPU's experts for these rows, and brings the rows to the CPU for its own.
    pub(super) fn submit(
        &self,
        cx: &mut Forward<'_>,
        path: &str,
        rows: &Routed,
        precision: Precision,
        scratch_floats: usize,
    ) -> Result<(), OpError> {
        let Some((stream, layer)) = self.layer.stream() else {
            return Err(kernel_error(path, "its experts are not streamed yet"));
        };
        let experts = cx.streaming.experts(rows.x.rows(), self.experts);
        if experts < self.experts {
            self.fetch(cx, rows, experts)?;
        }
        cx.scoped(|cx| {
            let scratch = cx.alloc(self.device, 1, scratch_floats)?;
            let [x, ids, weights, out, scratch] =
                [rows.x, rows.ids, rows.weights, rows.out, scratch]
                    .map(|act| cx.workspace.matrix(act));
            let routing = GpuRouting { ids, weights };
            stream
                .forward(layer, experts, x, routing, out, precision, scratch)
                .map_err(refused)
        })
    }

    /// Copies the rows to main memory, before the GPU's own experts: nobody waits yet.
    fn fetch(
        &self,
        cx: &mut Forward<'_>,
        rows: &Routed,
        first_expert: usize,
    ) -> Result<(), OpError> {
        // They stay until the block that asked is done.
        let there = |cx: &mut Forward<'_>, act: Act| cx.alloc(Device::CPU, act.rows(), act.cols());
        let host = Routed {
            x: there(cx, rows.x)?,
            ids: there(cx, rows.ids)?,
            weights: there(cx, rows.weights)?,
            out: there(cx, rows.out)?,
        };
        cx.workspace.fetch(rows.x, host.x)?;
        cx.workspace.fetch(rows.ids, host.ids)?;
        cx.workspace.fetch(rows.weights, host.weights)?;
        self.fetched.mark_kernels().map_err(refused)?;
        *self.rest() = Some(Rest {
            rows: host,
            first_expert,
        });
        Ok(())
    }

    fn rest(&self) -> MutexGuard<'_, Option<Rest>> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is left for the CPU, once its rows are there; none if the GPU takes all experts.
    pub(super) fn take_rest(
        &self,
        cx: &mut Forward<'_>,
        out: Act,
    ) -> Result<Option<Rest>, OpError> {
        let Some(rest) = self.rest().take() else {
            return Ok(None);
        };
        self.fetched.wait().map_err(refused)?;
        if let Some(gpu) = cx.gpu(out) {
            // What it read in main memory before, it has read.
            cx.workspace.was_read_by(&gpu);
        }
        Ok(Some(rest))
    }

    /// Adds the CPU's result to the GPU's.
    pub(super) fn add(&self, cx: &mut Forward<'_>, host: Act, out: Act) -> Result<(), OpError> {
        let Some(gpu) = cx.gpu(out) else {
            return Ok(());
        };
        let (x, y) = (cx.workspace.matrix(host), cx.workspace.matrix(out));
        activation::cuda::add(&gpu, y, x).map_err(refused)?;
        cx.workspace.is_read_by(&gpu);
        Ok(())
    }
}
