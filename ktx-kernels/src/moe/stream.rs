//! The routed experts of many layers on a GPU that does not hold them: they live in main memory, and each
//! layer's come over the bus while the layer before is computed.
//!
//! Two slots of a GPU's memory take uploads in the file's blocks, in turns; a third place holds what is
//! computed with, regrouped by a kernel as at any upload. What comes next is known, since layers come in
//! their order and begin anew with the next chunk of tokens: as soon as a slot has been regrouped, its next
//! upload starts, so that copies never stop, neither between layers nor between chunks. Nobody on the host
//! waits: streams wait for each other. A layer that is larger than a slot goes in parts of some experts.
//!
//! Uploads read the mapped file directly where the driver can lock its pages ([`ReadableMemory`]), else
//! through pinned memory that threads fill.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ktx_gguf::{GgmlType, Tensor};

use super::MoeWeights;
use super::cuda::{GpuExperts, GpuRouting, upload_biases};
use super::staging::Stager;
use crate::activation::GatedActivation;
use crate::cuda::{
    CudaError, DeviceBuffer, DeviceMatrix, DeviceSlice, Gpu, Moment, ReadableMemory, UploadStream,
};
use crate::linear::Precision;
use crate::linear::cuda::layout::{RowLayout, is_native};
use crate::linear::cuda::upload::DeviceRows;

/// Slots that take uploads.
pub(super) const SLOTS: usize = 2;
/// Bytes of a slot at most: a layer of most models, and no large part of a large GPU.
const MOST_SLOT_BYTES: u64 = 512 << 20;
/// Where projections begin in a slot.
pub(super) const ALIGN: usize = 256;

/// One projection of a layer's experts in main memory.
#[derive(Debug, Clone)]
pub(super) struct Projection {
    ty: GgmlType,
    /// One for all experts, or one for each.
    tensors: Vec<Tensor>,
    experts: usize,
    /// Of an expert.
    rows: usize,
    cols: usize,
}

impl Projection {
    /// None of a type that kernels do not read as it is, or of tensors that do not fit.
    fn of(tensors: Vec<Tensor>, [experts, rows, cols]: [usize; 3]) -> Option<Self> {
        let ty = tensors.first()?.ty();
        let bytes = experts
            .checked_mul(rows)?
            .checked_mul(ty.row_bytes(cols)?)?;
        let fits = tensors.len() == 1 || tensors.len() == experts;
        let known = |t: &Tensor| t.ty() == ty && t.scales().is_none();
        let all: usize = tensors.iter().map(|t| t.bytes().len()).sum();
        let is_whole =
            tensors.len() == 1 || tensors.iter().all(|t| t.bytes().len() == bytes / experts);
        (is_native(ty) && fits && is_whole && all == bytes && tensors.iter().all(known)).then_some(
            Self {
                ty,
                tensors,
                experts,
                rows,
                cols,
            },
        )
    }

    /// Bytes of an expert.
    pub(super) fn expert_bytes(&self) -> usize {
        self.rows * self.ty.row_bytes(self.cols).unwrap_or(0)
    }

    /// Bytes of an expert where it is computed with.
    fn packed_bytes(&self) -> usize {
        self.rows * RowLayout::of(self.ty, self.cols).bytes
    }

    /// The blocks of some experts, one after the other.
    pub(super) fn bytes(&self, experts: Range<usize>) -> impl Iterator<Item = &[u8]> {
        let (each, is_one) = (self.expert_bytes(), self.tensors.len() == 1);
        let of = move |tensor: usize, part: Range<usize>| &self.tensors[tensor].bytes()[part];
        let (one, separate) = match is_one {
            true => (Some(of(0, experts.start * each..experts.end * each)), 0..0),
            false => (None, experts),
        };
        one.into_iter().chain(separate.map(move |e| of(e, 0..each)))
    }
}

/// A layer's experts as they lie in main memory.
#[derive(Debug, Clone)]
pub struct StreamedWeights {
    pub(super) projections: [Projection; 3],
}

impl StreamedWeights {
    /// Gate, up and down, each one tensor for all experts or one for each; `[experts, hidden, intermediate]`.
    /// None where a GPU's kernels do not read the blocks as they are, or the tensors do not fit the sizes.
    pub fn new(
        [gate, up, down]: [Vec<Tensor>; 3],
        [experts, hidden, intermediate]: [usize; 3],
    ) -> Option<Self> {
        let inner = [experts, intermediate, hidden];
        Some(Self {
            projections: [
                Projection::of(gate, inner)?,
                Projection::of(up, inner)?,
                Projection::of(down, [experts, hidden, intermediate])?,
            ],
        })
    }

    pub(super) fn experts(&self) -> usize {
        self.projections[0].experts
    }

    /// Bytes that some of its experts take in a slot.
    pub(super) fn slot_bytes(&self, experts: usize) -> usize {
        let each = self.projections.iter().map(Projection::expert_bytes);
        each.map(|bytes| (bytes * experts).next_multiple_of(ALIGN))
            .sum()
    }

    /// Bytes that some of its experts take where they are computed with.
    pub(super) fn packed_bytes(&self, experts: usize) -> usize {
        let each = self.projections.iter().map(Projection::packed_bytes);
        each.map(|bytes| (bytes * experts).next_multiple_of(ALIGN))
            .sum()
    }

    /// Experts of a part: as many as a slot takes.
    fn part_experts(&self, slot_bytes: usize) -> usize {
        let room = slot_bytes.saturating_sub(3 * ALIGN);
        let each: usize = self.projections.iter().map(Projection::expert_bytes).sum();
        (room / each.max(1)).clamp(1, self.experts())
    }
}

/// Bytes of a GPU's memory that streaming takes for layers whose experts have these many bytes at most.
pub fn memory_for(gpu_bytes: u64, layer_bytes: u64) -> u64 {
    let slot = layer_bytes.min(slot_limit(gpu_bytes)) + 3 * ALIGN as u64;
    // Rows that are computed with have some bytes more than in the file.
    SLOTS as u64 * slot + slot + slot / 16
}

/// Bytes of a slot on a GPU of so many.
fn slot_limit(gpu_bytes: u64) -> u64 {
    MOST_SLOT_BYTES.min(gpu_bytes / 32)
}

/// Some experts of a layer.
struct Part {
    layer: usize,
    experts: Range<usize>,
    /// Where it lies for computing.
    packed: GpuExperts,
}

/// Where an upload goes.
pub(super) struct Slot {
    buffer: DeviceBuffer,
    /// When the upload is done.
    pub(super) filled: Moment,
    /// When what was uploaded before has been regrouped.
    pub(super) read: Moment,
}

/// What a slot holds, or will as soon as its upload is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    part: usize,
    /// The first experts of the part, so many.
    experts: usize,
}

/// What the slots hold, in the order of use.
#[derive(Default)]
struct Ring {
    held: [Option<Held>; SLOTS],
    /// The slot that is used next.
    next: usize,
}

/// How bytes get to the GPU.
enum Source {
    /// The GPU reads them where they are.
    Direct(ReadableMemory),
    /// Through pinned memory.
    Staged(Stager),
}

/// The experts of many layers, streamed to one GPU.
pub struct ExpertStream {
    ring: Mutex<Ring>,
    // The uploads end before their memory goes: this order.
    source: Source,
    /// Why the GPU does not read main memory directly, if that was tried.
    refusal: Option<CudaError>,
    uploads: Arc<UploadStream>,
    slots: [Arc<Slot>; SLOTS],
    parts: Vec<Part>,
    /// The parts of each layer.
    layers: Vec<Range<usize>>,
    weights: Vec<StreamedWeights>,
    gpu: Gpu,
}

/// How uploads may read main memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Uploads {
    /// Directly if the driver can, else through pinned memory.
    #[default]
    Best,
    /// Through pinned memory that threads fill.
    Staged,
}

/// Collects the layers of an [`ExpertStream`], in the order in which they are computed.
pub struct ExpertStreamBuilder {
    gpu: Gpu,
    slot_bytes: Option<usize>,
    layers: Vec<(StreamedWeights, Option<[DeviceSlice; 3]>, GatedActivation)>,
}

impl ExpertStreamBuilder {
    /// No layers yet.
    pub fn new(gpu: &Gpu) -> Self {
        Self {
            gpu: gpu.clone(),
            slot_bytes: None,
            layers: Vec::new(),
        }
    }

    /// Bytes of a slot; if not set, a part of what the GPU has. A layer that is larger goes in parts, of one
    /// expert at least.
    pub fn with_slot_bytes(self, bytes: usize) -> Self {
        Self {
            slot_bytes: Some(bytes),
            ..self
        }
    }

    /// Adds a layer and gives its number; `experts` are the same weights as the CPU's kernels take them, of
    /// which the biases are copied to the GPU.
    ///
    /// # Errors
    /// What the GPU refuses.
    pub fn push(
        &mut self,
        weights: StreamedWeights,
        experts: &MoeWeights<'_>,
    ) -> Result<usize, CudaError> {
        let biases = upload_biases(&self.gpu, experts)?;
        self.layers.push((weights, biases, experts.activation));
        Ok(self.layers.len() - 1)
    }

    /// Takes the GPU's memory, lets the GPU read the layers' main memory, and starts the first uploads.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or what the driver reports.
    pub fn start(self, uploads: Uploads) -> Result<ExpertStream, CudaError> {
        let gpu = self.gpu;
        let (_, total) = gpu.memory()?;
        let limit = self.slot_bytes.unwrap_or(slot_limit(total as u64) as usize);
        let most = |bytes: &dyn Fn(&StreamedWeights, usize) -> usize| {
            let parts = self
                .layers
                .iter()
                .map(|(w, ..)| bytes(w, w.part_experts(limit)));
            parts.max().unwrap_or(0)
        };
        let slot_bytes = most(&StreamedWeights::slot_bytes);
        let packed = Arc::new(DeviceBuffer::new(
            &gpu,
            most(&StreamedWeights::packed_bytes),
        )?);
        let slot = || -> Result<Arc<Slot>, CudaError> {
            Ok(Arc::new(Slot {
                buffer: DeviceBuffer::new(&gpu, slot_bytes)?,
                filled: Moment::new(&gpu)?,
                read: Moment::new(&gpu)?,
            }))
        };
        let slots = [slot()?, slot()?];
        let (mut parts, mut layers, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for (layer, (layer_weights, biases, activation)) in self.layers.into_iter().enumerate() {
            let first_part = parts.len();
            let step = layer_weights.part_experts(limit);
            for first in (0..layer_weights.experts()).step_by(step) {
                let experts = first..(first + step).min(layer_weights.experts());
                let rows = packed_rows(&packed, &layer_weights, experts.len());
                parts.push(Part {
                    layer,
                    packed: GpuExperts::some(
                        rows,
                        biases.clone(),
                        activation,
                        first,
                        layer_weights.experts(),
                    ),
                    experts,
                });
            }
            layers.push(first_part..parts.len());
            weights.push(layer_weights);
        }
        let uploading = Arc::new(UploadStream::new(&gpu)?);
        let (source, refusal) = source(&gpu, &uploading, &weights, uploads)?;
        let stream = ExpertStream {
            ring: Mutex::default(),
            source,
            refusal,
            uploads: uploading,
            slots,
            parts,
            layers,
            weights,
            gpu,
        };
        stream.fill_first()?;
        Ok(stream)
    }
}

/// How the layers' bytes get to the GPU, and why not directly.
fn source(
    gpu: &Gpu,
    stream: &Arc<UploadStream>,
    weights: &[StreamedWeights],
    uploads: Uploads,
) -> Result<(Source, Option<CudaError>), CudaError> {
    let projections = weights.iter().flat_map(|w| &w.projections);
    let tensors = projections.flat_map(|p| &p.tensors);
    let ranges = tensors.map(|t| {
        let addresses = t.bytes().as_ptr_range();
        addresses.start.addr()..addresses.end.addr()
    });
    let ranges = ranges.collect();
    let mut refusal = None;
    if uploads == Uploads::Best {
        // SAFETY: the tensors keep their memory, and the stream keeps them for longer than the registration.
        match unsafe { ReadableMemory::new(gpu, ranges) } {
            Ok(memory) => return Ok((Source::Direct(memory), None)),
            Err(error) => refusal = Some(error),
        }
    }
    Ok((Source::Staged(Stager::new(gpu, stream)?), refusal))
}

/// Where gate, up and down of some experts lie for computing, one behind the other.
pub(super) fn packed_rows(
    buffer: &Arc<DeviceBuffer>,
    weights: &StreamedWeights,
    experts: usize,
) -> [DeviceRows; 3] {
    let mut at = 0;
    weights.projections.each_ref().map(|p| {
        let bytes = p.packed_bytes() * experts;
        let place = DeviceSlice::of(buffer, at, bytes);
        at += bytes.next_multiple_of(ALIGN);
        DeviceRows::within(place, p.ty, experts * p.rows, p.cols)
    })
}

impl ExpertStream {
    /// Whether the GPU reads main memory directly.
    pub fn is_direct(&self) -> bool {
        matches!(self.source, Source::Direct(_))
    }

    /// Why the GPU does not read main memory directly though it was to.
    pub fn refusal(&self) -> Option<&CudaError> {
        self.refusal.as_ref()
    }

    /// As [`GpuExperts::forward`] for the first `experts` experts of a layer; choices of others add nothing.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Panics
    /// As [`GpuExperts::forward`], and if there is no such layer.
    #[allow(
        clippy::too_many_arguments,
        reason = "`GpuExperts::forward` with the layer and its share"
    )]
    pub fn forward(
        &self,
        layer: usize,
        experts: usize,
        x: DeviceMatrix,
        routing: GpuRouting,
        out: DeviceMatrix,
        precision: Precision,
        scratch: DeviceMatrix,
    ) -> Result<(), CudaError> {
        let mut ring = self.ring();
        let mut before = None;
        for part in self.layers[layer].clone() {
            let wanted = self.wanted(part, experts);
            // The first part of a layer writes the results of those that chose nothing here, too.
            if wanted == 0 && before.is_some() {
                break;
            }
            self.take(&mut ring, part, wanted, experts)?;
            let packed = &self.parts[part].packed;
            packed.forward_some(wanted, x, routing, before, out, precision, scratch)?;
            before = Some(out);
        }
        Ok(())
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many experts of a part are among the first `experts` of its layer.
    fn wanted(&self, part: usize, experts: usize) -> usize {
        let own = &self.parts[part].experts;
        experts.clamp(own.start, own.end) - own.start
    }

    /// The part behind `part` when the first `experts` of each layer are computed here.
    fn behind(&self, part: usize, experts: usize) -> usize {
        let layer = self.parts[part].layer;
        let next = part + 1;
        if self.layers[layer].contains(&next) && self.wanted(next, experts) > 0 {
            return next;
        }
        self.layers[(layer + 1) % self.layers.len()].start
    }

    /// Starts the first layers' uploads: the next prompt begins there.
    fn fill_first(&self) -> Result<(), CudaError> {
        match self.layers.is_empty() {
            true => Ok(()),
            false => self.refill(&mut self.ring(), 0, usize::MAX),
        }
    }

    /// Fills all slots, beginning with a part.
    fn refill(&self, ring: &mut Ring, part: usize, experts: usize) -> Result<(), CudaError> {
        let mut part = part;
        for slot in (ring.next..ring.next + SLOTS).map(|slot| slot % SLOTS) {
            self.fill(ring, slot, part, experts)?;
            part = self.behind(part, experts);
        }
        Ok(())
    }

    /// Brings the first `wanted` experts of a part to where kernels compute with them, and starts what comes
    /// next.
    fn take(
        &self,
        ring: &mut Ring,
        part: usize,
        wanted: usize,
        experts: usize,
    ) -> Result<(), CudaError> {
        let holds = |held: &Held| held.part == part && held.experts >= wanted;
        if !ring.held[ring.next].as_ref().is_some_and(holds) {
            self.refill(ring, part, experts)?;
        }
        let index = ring.next;
        let slot = &self.slots[index];
        if let Source::Staged(stager) = &self.source {
            stager.await_started(index)?;
        }
        slot.filled.hold_kernels()?;
        let weights = &self.weights[self.parts[part].layer];
        let held = ring.held[index].map_or(wanted, |held| held.experts);
        let mut at = 0;
        for (rows, projection) in self.parts[part]
            .packed
            .rows()
            .iter()
            .zip(&weights.projections)
        {
            let row_bytes = projection.expert_bytes() / projection.rows.max(1);
            let source = slot.buffer.address() + at as u64;
            rows.repack(source, row_bytes, 0, wanted * projection.rows)?;
            at += (held * projection.expert_bytes()).next_multiple_of(ALIGN);
        }
        slot.read.mark_kernels()?;
        ring.next = (index + 1) % SLOTS;
        // The other slot holds what comes next; this one takes what comes behind that.
        let next = ring.held[ring.next].map_or(part, |held| held.part);
        self.fill(ring, index, self.behind(next, experts), experts)
    }

    /// Starts the upload of a part's experts that are among the first `experts` of their layer.
    fn fill(
        &self,
        ring: &mut Ring,
        slot: usize,
        part: usize,
        experts: usize,
    ) -> Result<(), CudaError> {
        ring.held[slot] = None;
        // What the next chunk of tokens begins with is uploaded whole: it may share otherwise.
        let is_new_pass = self.parts[part].layer == 0;
        let count = match is_new_pass {
            true => self.parts[part].experts.len(),
            false => self.wanted(part, experts),
        };
        let first = self.parts[part].experts.start;
        let weights = &self.weights[self.parts[part].layer];
        let target = &self.slots[slot];
        let mut copies = Vec::new();
        let mut at = 0;
        for projection in &weights.projections {
            let mut to = target.buffer.address() + at as u64;
            for bytes in projection.bytes(first..first + count) {
                copies.push((to, bytes));
                to += bytes.len() as u64;
            }
            at += (count * projection.expert_bytes()).next_multiple_of(ALIGN);
        }
        match &self.source {
            Source::Direct(memory) => {
                self.uploads.wait(&target.read)?;
                for (to, bytes) in copies {
                    // SAFETY: the slot has room for its largest part; slot and tensors live until the uploads
                    // are done.
                    unsafe { memory.upload(&self.uploads, to, bytes) }?;
                }
                self.uploads.mark(&target.filled)?;
            }
            // SAFETY: as above.
            Source::Staged(stager) => unsafe { stager.start(slot, target, &copies) },
        }
        ring.held[slot] = Some(Held {
            part,
            experts: count,
        });
        Ok(())
    }
}

impl Drop for ExpertStream {
    /// Kernels may still read what is here.
    fn drop(&mut self) {
        let _ = self.gpu.synchronize();
        let _ = self.uploads.synchronize();
    }
}
