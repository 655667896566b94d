//! A cache of the most used experts in a GPU's memory, for layers whose experts live in main memory.
//!
//! Each layer has as many slots as the memory gives. A kernel parts the choices of a step: those of experts
//! that have a slot are computed here, the others where the experts live, at the same time. Between two steps
//! [`HotCache::maintain`] looks at the counters of the choices and gives slots to the experts that were
//! chosen most of late: they are uploaded beside the kernels of the next step, and take their slots after it. No
//! step waits for an upload.

use std::sync::Arc;

use super::cuda::{GpuExperts, GpuRouting};
use super::popularity::{Popularity, Swap};
use super::stream::{ALIGN, StreamedWeights, packed_rows};
use crate::activation::GatedActivation;
use crate::cuda::{
    Arg, CudaError, DeviceBuffer, DeviceMatrix, DeviceSlice, Gpu, Launch, Moment, PinnedBuffer,
    UploadStream, copy_async,
};
use crate::linear::Precision;
use crate::pool::ThreadPool;

const MODULE: &str = "moe/moe";
/// Experts that are on their way at a time.
const FLIGHTS: usize = 8;
/// Bytes that set out between two steps at most, but one expert always: the CPU copies them.
const STEP_BYTES: usize = 32 << 20;
/// Bytes that a thread copies at a time.
const TASK_BYTES: usize = 256 << 10;
/// Slot 0 holds zeros: it is multiplied for choices that are computed elsewhere.
const NOTHING: usize = 1;

/// The experts of one layer that are in a GPU's memory.
#[derive(Debug)]
pub struct HotExperts {
    slots: GpuExperts,
    /// The slot of each expert of the layer, u32; 0 without one.
    table: DeviceBuffer,
    layer_experts: usize,
}

impl HotExperts {
    /// Floats of scratch for up to `tokens` tokens with `top_k` experts each; `[experts, hidden, intermediate]` of the
    /// layer.
    pub fn scratch_floats_of(
        [experts, hidden, intermediate]: [usize; 3],
        tokens: usize,
        top_k: usize,
    ) -> usize {
        GpuExperts::scratch_floats_of([experts + NOTHING, hidden, intermediate], tokens, top_k)
    }

    /// Parts a step's choices: `here` gets slots and weights for [`Self::forward`], `elsewhere` the expert
    /// numbers, with [`super::ELSEWHERE`] set in those that are computed here. All are `[tokens, top_k]`.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Panics
    /// If shapes differ.
    pub fn part(
        &self,
        routing: GpuRouting,
        here: GpuRouting,
        elsewhere: DeviceMatrix,
    ) -> Result<(), CudaError> {
        let choices = routing.ids.len();
        for matrix in [routing.weights, here.ids, here.weights, elsewhere] {
            assert_eq!(matrix.len(), choices, "parted choices");
        }
        let gpu = self.table.gpu();
        let args = [
            here.ids.arg(),
            here.weights.arg(),
            elsewhere.arg(),
            routing.ids.arg(),
            routing.weights.arg(),
            Arg::Ptr(self.table.address()),
            Arg::U32(self.layer_experts as u32),
            Arg::U32(choices as u32),
        ];
        let launch = Launch::linear(choices.div_ceil(256), 256);
        // SAFETY: the kernel's arguments; the shapes are equal, and the table has an entry for each expert.
        unsafe { gpu.launch(gpu.function(MODULE, "ktx_moe_split")?, launch, &args) }
    }

    /// The weighted sum of the choices that are computed here, for `x` `[tokens, hidden]` to `out` of the same shape.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Panics
    /// As [`GpuExperts::forward`].
    pub fn forward(
        &self,
        x: DeviceMatrix,
        here: GpuRouting,
        out: DeviceMatrix,
        precision: Precision,
        scratch: DeviceMatrix,
    ) -> Result<(), CudaError> {
        self.slots.forward(x, here, None, out, precision, scratch)
    }

    /// Experts that it has room for.
    pub fn slots(&self) -> usize {
        self.slots.experts() - NOTHING
    }
}

/// A layer as it is found in main memory.
struct Source {
    weights: StreamedWeights,
    /// `[experts, out]` of gate, up and down.
    biases: Option<[Vec<f32>; 3]>,
    activation: GatedActivation,
}

impl Source {
    fn biases(&self) -> impl Iterator<Item = &Vec<f32>> {
        self.biases.iter().flatten()
    }

    /// Values of a bias for one expert.
    fn bias_len(&self, bias: &[f32]) -> usize {
        bias.len() / self.weights.experts().max(1)
    }

    /// Bytes that an expert takes on its way: its blocks, its biases, and the layer's new table.
    fn flight_bytes(&self) -> usize {
        let biases = self.biases().map(|bias| self.bias_len(bias));
        let floats = biases.sum::<usize>() + self.weights.experts();
        self.weights.slot_bytes(1) + floats * size_of::<f32>()
    }

    /// Bytes of so many slots.
    fn bytes(&self, slots: usize) -> usize {
        let biases = self
            .biases()
            .map(|bias| self.bias_len(bias) * size_of::<f32>());
        self.weights.packed_bytes(slots) + slots * biases.sum::<usize>()
    }
}

/// Collects the layers of a [`HotCache`].
pub struct HotCacheBuilder {
    gpu: Gpu,
    layers: Vec<Source>,
}

impl HotCacheBuilder {
    /// No layers yet.
    pub fn new(gpu: &Gpu) -> Self {
        Self {
            gpu: gpu.clone(),
            layers: Vec::new(),
        }
    }

    /// Adds a layer and gives its number; `biases` `[experts, out]` of gate, up and down.
    pub fn push(
        &mut self,
        weights: StreamedWeights,
        biases: Option<[Vec<f32>; 3]>,
        activation: GatedActivation,
    ) -> usize {
        self.layers.push(Source {
            weights,
            biases,
            activation,
        });
        self.layers.len() - 1
    }

    /// A cache of so many bytes; none if they do not hold an expert of each layer.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or what the driver reports.
    pub fn start(self, bytes: usize) -> Result<Option<HotCache>, CudaError> {
        let Self { gpu, layers } = self;
        let flight_bytes = layers.iter().map(Source::flight_bytes).max().unwrap_or(0);
        let Some(room) = bytes.checked_sub(FLIGHTS * flight_bytes) else {
            return Ok(None);
        };
        let most = layers
            .iter()
            .map(|l| l.weights.experts())
            .max()
            .unwrap_or(0);
        let taken = |slots: usize| {
            let each = layers.iter().map(|layer| {
                let slots = slots.min(layer.weights.experts()) + NOTHING;
                layer.bytes(slots) + layer.weights.experts() * size_of::<u32>()
            });
            each.sum::<usize>()
        };
        // The most slots that there is room for.
        let slots = (1..=most).take_while(|slots| taken(*slots) <= room).last();
        let Some(slots) = slots else {
            return Ok(None);
        };
        let layers = layers
            .into_iter()
            .map(|source| Layer::new(&gpu, source, slots))
            .collect::<Result<_, _>>()?;
        let flights = (0..FLIGHTS)
            .map(|_| Flight::new(&gpu, flight_bytes))
            .collect::<Result<_, _>>()?;
        Ok(Some(HotCache {
            uploads: UploadStream::new(&gpu)?,
            gpu,
            layers,
            flights,
            next_layer: 0,
            swaps: 0,
        }))
    }
}

struct Layer {
    source: Source,
    hot: Arc<HotExperts>,
    popularity: Popularity,
}

impl Layer {
    fn new(gpu: &Gpu, source: Source, slots: usize) -> Result<Self, CudaError> {
        let experts = source.weights.experts();
        let slots = slots.min(experts);
        let all = slots + NOTHING;
        let buffer = Arc::new(DeviceBuffer::zeroed(gpu, source.weights.packed_bytes(all))?);
        let rows = packed_rows(&buffer, &source.weights, all);
        let biases = match &source.biases {
            None => None,
            Some(biases) => {
                let zeros = |bias: &Vec<f32>| {
                    let bytes = all * source.bias_len(bias) * size_of::<f32>();
                    DeviceBuffer::zeroed(gpu, bytes).map(DeviceSlice::from)
                };
                let [gate, up, down] = biases;
                Some([zeros(gate)?, zeros(up)?, zeros(down)?])
            }
        };
        let hot = HotExperts {
            slots: GpuExperts::some(rows, biases, source.activation, 0, all),
            table: DeviceBuffer::zeroed(gpu, experts * size_of::<u32>())?,
            layer_experts: experts,
        };
        Ok(Self {
            source,
            hot: Arc::new(hot),
            popularity: Popularity::new(experts, slots),
        })
    }
}

/// Where an expert lies on its way.
struct Flight {
    pinned: PinnedBuffer,
    device: DeviceBuffer,
    /// When the upload is done.
    filled: Moment,
    /// When what was uploaded before has taken its slot.
    read: Moment,
    /// What is on its way: the layer, and the expert with its slot.
    cargo: Option<(usize, Swap)>,
}

impl Flight {
    fn new(gpu: &Gpu, bytes: usize) -> Result<Self, CudaError> {
        Ok(Self {
            pinned: PinnedBuffer::new(gpu, bytes)?,
            device: DeviceBuffer::new(gpu, bytes)?,
            filled: Moment::new(gpu)?,
            read: Moment::new(gpu)?,
            cargo: None,
        })
    }

    /// Packs an expert, and starts its upload.
    fn start(
        &mut self,
        layer: &Layer,
        swap: Swap,
        pool: &ThreadPool,
        uploads: &UploadStream,
    ) -> Result<(), CudaError> {
        // The upload before has long been done.
        self.filled.wait()?;
        let mut rest = self.pinned.as_mut_slice::<u8>();
        let source = &layer.source;
        let mut length = 0;
        for projection in &source.weights.projections {
            let bytes = projection.expert_bytes();
            let (own, behind) = rest.split_at_mut(bytes.next_multiple_of(ALIGN));
            for from in projection.bytes(swap.expert..swap.expert + 1) {
                pool.copy(from, &mut own[..bytes], TASK_BYTES);
            }
            length += own.len();
            rest = behind;
        }
        let biases = source.biases().map(|bias| {
            let len = source.bias_len(bias);
            bytemuck::cast_slice(&bias[swap.expert * len..][..len])
        });
        let table = bytemuck::cast_slice(layer.popularity.slots());
        for from in biases.chain([table]) {
            let (own, behind) = rest.split_at_mut(from.len());
            own.copy_from_slice(from);
            length += own.len();
            rest = behind;
        }
        uploads.wait(&self.read)?;
        let bytes = &self.pinned.as_slice::<u8>()[..length];
        // SAFETY: both buffers have room for every layer's expert; they live until the cache goes, which waits for the
        // uploads, and the pinned one is not written before `filled`.
        unsafe { uploads.upload(self.device.address(), bytes) }?;
        uploads.mark(&self.filled)
    }

    /// Brings what was uploaded to its slot, and tells the kernels.
    fn land(&self, layer: &Layer, swap: Swap) -> Result<(), CudaError> {
        self.filled.hold_kernels()?;
        let slots = &layer.hot.slots;
        let gpu = self.device.gpu();
        let mut from = self.device.address();
        for (rows, projection) in slots.rows().iter().zip(&layer.source.weights.projections) {
            let each = rows.rows / slots.experts();
            let row_bytes = projection.expert_bytes() / each.max(1);
            rows.repack(from, row_bytes, swap.slot * each, each)?;
            from += projection.expert_bytes().next_multiple_of(ALIGN) as u64;
        }
        let places = slots.biases().into_iter().flatten();
        for (place, bias) in places.zip(layer.source.biases()) {
            let bytes = layer.source.bias_len(bias) * size_of::<f32>();
            let to = place.address() + (swap.slot * bytes) as u64;
            // SAFETY: a slot's part of the biases; the flight's memory stays.
            unsafe { copy_async(gpu, to, from, bytes) }?;
            from += bytes as u64;
        }
        let table = &layer.hot.table;
        // SAFETY: the flight ends with the table.
        unsafe { copy_async(gpu, table.address(), from, table.bytes()) }?;
        self.read.mark_kernels()
    }
}

/// The hot experts of all layers on one GPU.
pub struct HotCache {
    // The uploads end before their memory goes: this order.
    uploads: UploadStream,
    flights: Vec<Flight>,
    layers: Vec<Layer>,
    /// Where the search for changes begins: every layer has its turn.
    next_layer: usize,
    swaps: u64,
    gpu: Gpu,
}

impl HotCache {
    /// A layer's experts on the GPU.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn layer(&self, layer: usize) -> Arc<HotExperts> {
        Arc::clone(&self.layers[layer].hot)
    }

    /// Experts that found a slot so far.
    pub fn swaps(&self) -> u64 {
        self.swaps
    }

    /// Between two steps: what was uploaded takes its slots, and what is worth it sets out. `uses` gives how often each
    /// expert of a layer was chosen so far.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn maintain<I: Iterator<Item = u64>>(
        &mut self,
        pool: &ThreadPool,
        uses: impl Fn(usize) -> I,
    ) -> Result<(), CudaError> {
        for flight in &mut self.flights {
            if let Some((layer, swap)) = flight.cargo.take() {
                flight.land(&self.layers[layer], swap)?;
            }
        }
        for (index, layer) in self.layers.iter_mut().enumerate() {
            layer.popularity.look(uses(index));
        }
        let (count, mut bytes) = (self.layers.len(), 0);
        let mut flights = self.flights.iter_mut();
        for index in (self.next_layer..self.next_layer + count).map(|index| index % count) {
            let layer = &mut self.layers[index];
            let own = layer.source.flight_bytes();
            if bytes > 0 && bytes + own > STEP_BYTES {
                break;
            }
            if flights.len() == 0 {
                break;
            }
            let Some(swap) = layer.popularity.swap() else {
                continue;
            };
            let Some(flight) = flights.next() else { break };
            flight.start(layer, swap, pool, &self.uploads)?;
            flight.cargo = Some((index, swap));
            bytes += own;
            self.swaps += 1;
            self.next_layer = (index + 1) % count;
        }
        Ok(())
    }
}

impl Drop for HotCache {
    /// Kernels may still read what is here.
    fn drop(&mut self) {
        let _ = self.gpu.synchronize();
        let _ = self.uploads.synchronize();
    }
}
