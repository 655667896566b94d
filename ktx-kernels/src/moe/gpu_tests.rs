use super::cases::{self, Case};
use ktx_gguf::GgmlType::{self, IQ4_XS, MXFP4, Q4_K, Q6_K, Q8_0};
use ktx_gguf::Tensor;

use super::cuda::{GpuExperts, GpuRouting};
use super::hot::{HotCacheBuilder, HotExperts};
use super::stream::{ExpertStream, ExpertStreamBuilder, StreamedWeights, Uploads};
use super::tests::Layer;
use super::{ELSEWHERE, MoeScratch, Routing, forward, reference};
use crate::activation::GatedActivation;
use crate::cuda::Gpu;
use crate::linear::Precision;
use crate::pool::ThreadPool;
use crate::testing::{GpuMatrix, assert_close};

fn run(gpu: &Gpu, experts: &GpuExperts, layer: &Layer, precision: Precision) -> Vec<f32> {
    let (tokens, top_k) = (layer.x.len() / experts.hidden_size(), layer.routing().top_k);
    let x = GpuMatrix::of(gpu, tokens, &layer.x);
    let ids: Vec<f32> = layer.ids.iter().map(|id| f32::from_bits(*id)).collect();
    let ids = GpuMatrix::of(gpu, tokens, &ids);
    let weights = GpuMatrix::of(gpu, tokens, &layer.weights);
    let routing = GpuRouting {
        ids: ids.matrix,
        weights: weights.matrix,
    };
    let out = GpuMatrix::poisoned(gpu, tokens, experts.hidden_size());
    let scratch = GpuMatrix::poisoned(gpu, 1, experts.scratch_floats(tokens, top_k));
    experts
        .forward(
            x.matrix,
            routing,
            None,
            out.matrix,
            precision,
            scratch.matrix,
        )
        .unwrap();
    // Added to what is there, which is the result itself: twice that.
    let once = out.values();
    experts
        .forward(
            x.matrix,
            routing,
            Some(out.matrix),
            out.matrix,
            precision,
            scratch.matrix,
        )
        .unwrap();
    let twice: Vec<f32> = once.iter().map(|v| v + v).collect();
    assert_eq!(out.values(), twice, "equal inputs give equal bits");
    once
}

#[test]
fn gpu_experts_agree_with_the_reference() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let mut cases = cases::all();
    // Groups of more than a tile of each size, and experts without a token.
    cases.push(Case {
        types: [Q4_K, Q4_K, Q6_K],
        experts: 40,
        hidden: 256,
        intermediate: 256,
        top_k: 4,
        tokens: 700,
        biases: false,
        activation: GatedActivation::SwiGlu,
    });
    for case in cases {
        let layer = Layer::new(case);
        let experts = GpuExperts::upload(&gpu, &layer.experts()).unwrap();
        let expected = reference::forward(&layer.experts(), &layer.x, &layer.routing());
        let exact = run(&gpu, &experts, &layer, Precision::F32);
        assert_close(&exact, &expected, 1e-10, &format!("{case:?} f32"));
        let int8 = run(&gpu, &experts, &layer, Precision::Int8);
        assert_close(
            &int8,
            &expected,
            int8_bound(&case),
            &format!("{case:?} int8"),
        );
    }
}

/// A layer's weights, one tensor for all experts or one for each.
fn streamed(layer: &Layer, is_merged: bool) -> StreamedWeights {
    let case = layer.case;
    let shapes = [
        [case.hidden, case.intermediate],
        [case.hidden, case.intermediate],
        [case.intermediate, case.hidden],
    ];
    let tensors = [0, 1, 2].map(|i: usize| {
        let ([cols, rows], bytes) = (shapes[i], &layer.bytes[i]);
        let tensor = |shape: &[usize], bytes: &[u8]| {
            Tensor::from_bytes("experts", case.types[i], shape, bytes.to_vec()).unwrap()
        };
        match is_merged {
            true => vec![tensor(&[cols, rows, case.experts], bytes)],
            false => {
                let each = bytes.chunks(bytes.len() / case.experts);
                each.map(|bytes| tensor(&[cols, rows], bytes)).collect()
            }
        }
    });
    StreamedWeights::new(tensors, [case.experts, case.hidden, case.intermediate]).unwrap()
}

/// What the first `experts` experts of a layer of a stream give.
fn run_streamed(
    gpu: &Gpu,
    stream: &ExpertStream,
    index: usize,
    experts: usize,
    layer: &Layer,
    precision: Precision,
) -> Vec<f32> {
    let case = layer.case;
    let x = GpuMatrix::of(gpu, case.tokens, &layer.x);
    let ids: Vec<f32> = layer.ids.iter().map(|id| f32::from_bits(*id)).collect();
    let ids = GpuMatrix::of(gpu, case.tokens, &ids);
    let weights = GpuMatrix::of(gpu, case.tokens, &layer.weights);
    let routing = GpuRouting {
        ids: ids.matrix,
        weights: weights.matrix,
    };
    let out = GpuMatrix::poisoned(gpu, case.tokens, case.hidden);
    let sizes = [case.experts, case.hidden, case.intermediate];
    let floats = GpuExperts::scratch_floats_of(sizes, case.tokens, case.top_k);
    let scratch = GpuMatrix::poisoned(gpu, 1, floats);
    stream
        .forward(
            index,
            experts,
            x.matrix,
            routing,
            out.matrix,
            precision,
            scratch.matrix,
        )
        .unwrap();
    out.values()
}

/// Few tokens are multiplied with activations in 8 bits, more with halves.
fn int8_bound(case: &Case) -> f64 {
    match case.tokens > super::cuda::MAX_FEW_TOKENS {
        true => 3e-6,
        false => 3e-4,
    }
}

/// Layers of several types in one stream, each larger than a slot or not, in their order twice over, then
/// in another one, and with a share of the experts.
#[test]
fn gpu_streamed_experts_agree_with_the_reference() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let case = |types: [GgmlType; 3], experts, tokens| Case {
        types,
        experts,
        hidden: 256,
        intermediate: 256,
        top_k: 4,
        tokens,
        biases: types[0] == MXFP4,
        activation: GatedActivation::SwiGlu,
    };
    let layers = [
        case([Q4_K, Q4_K, Q6_K], 40, 300),
        case([MXFP4; 3], 12, 90),
        case([Q8_0, Q8_0, Q8_0], 40, 90),
        case([IQ4_XS, Q6_K, Q4_K], 7, 30),
    ]
    .map(Layer::new);
    for (uploads, slot_bytes) in [
        (Uploads::Best, 64 << 20),
        (Uploads::Best, 600_000),
        (Uploads::Staged, 64 << 20),
        (Uploads::Staged, 1),
    ] {
        let mut builder = ExpertStreamBuilder::new(&gpu).with_slot_bytes(slot_bytes);
        for (index, layer) in layers.iter().enumerate() {
            let weights = streamed(layer, index % 2 == 0);
            assert_eq!(builder.push(weights, &layer.experts()).unwrap(), index);
        }
        let stream = builder.start(uploads).unwrap();
        assert_eq!(stream.is_direct(), uploads == Uploads::Best);
        for (index, part) in [0, 1, 2, 3, 0, 1, 2, 3, 2, 0, 3]
            .into_iter()
            .zip([1, 1, 1, 1, 2, 2, 2, 2, 1, 1, 3])
        {
            let layer = &layers[index];
            let experts = layer.case.experts.div_ceil(part);
            let mut routing = layer.routing();
            let weights: Vec<f32> = layer
                .ids
                .iter()
                .zip(&layer.weights)
                .map(|(id, weight)| {
                    if (*id as usize) < experts {
                        *weight
                    } else {
                        0.0
                    }
                })
                .collect();
            routing.weights = &weights;
            let expected = reference::forward(&layer.experts(), &layer.x, &routing);
            let int8 = int8_bound(&layer.case);
            for (precision, bound) in [(Precision::F32, 1e-10), (Precision::Int8, int8)] {
                let found = run_streamed(&gpu, &stream, index, experts, layer, precision);
                let what = format!("{:?}, {slot_bytes}, {uploads:?} {precision:?}", layer.case);
                assert_close(&found, &expected, bound, &what);
            }
        }
    }
}

/// What the experts with a slot give, and what the CPU's give of the other choices.
fn run_hot(gpu: &Gpu, hot: &HotExperts, layer: &Layer, pool: &ThreadPool) -> (Vec<f32>, usize) {
    let case = layer.case;
    let x = GpuMatrix::of(gpu, case.tokens, &layer.x);
    let ids: Vec<f32> = layer.ids.iter().map(|id| f32::from_bits(*id)).collect();
    let ids = GpuMatrix::of(gpu, case.tokens, &ids);
    let weights = GpuMatrix::of(gpu, case.tokens, &layer.weights);
    let routing = GpuRouting {
        ids: ids.matrix,
        weights: weights.matrix,
    };
    let poisoned = || GpuMatrix::poisoned(gpu, case.tokens, case.top_k);
    let [slots, slot_weights, elsewhere] = [poisoned(), poisoned(), poisoned()];
    let here = GpuRouting {
        ids: slots.matrix,
        weights: slot_weights.matrix,
    };
    hot.part(routing, here, elsewhere.matrix).unwrap();
    let sizes = [case.experts, case.hidden, case.intermediate];
    let floats = HotExperts::scratch_floats_of(sizes, case.tokens, case.top_k);
    let scratch = GpuMatrix::poisoned(gpu, 1, floats);
    let out = GpuMatrix::poisoned(gpu, case.tokens, case.hidden);
    hot.forward(x.matrix, here, out.matrix, Precision::F32, scratch.matrix)
        .unwrap();
    let left: Vec<u32> = elsewhere.values().iter().map(|v| v.to_bits()).collect();
    let mut rest = vec![f32::NAN; layer.x.len()];
    let routing = Routing {
        ids: &left,
        ..layer.routing()
    };
    let (mut moe, experts) = (MoeScratch::default(), layer.experts());
    let exact = Precision::F32;
    forward(
        pool, &experts, &layer.x, routing, &mut rest, &mut moe, exact,
    )
    .unwrap();
    let sum = out.values().iter().zip(&rest).map(|(a, b)| a + b).collect();
    let hits = left.iter().filter(|id| **id & ELSEWHERE != 0).count();
    (sum, hits)
}

/// Whatever is in the slots, on its way or thrown out: both devices' parts are the whole.
#[test]
fn gpu_hot_experts_and_those_of_the_cpu_are_the_layer() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let pool = ThreadPool::new(std::num::NonZeroUsize::new(2).unwrap());
    let case = |types: [GgmlType; 3], experts, tokens| Case {
        types,
        experts,
        hidden: 256,
        intermediate: 96,
        top_k: 4,
        tokens,
        biases: types[0] == MXFP4,
        activation: GatedActivation::SwiGlu,
    };
    let layers = [
        case([Q4_K, Q4_K, Q8_0], 40, 3),
        case([MXFP4; 3], 12, 1),
        case([Q8_0, Q8_0, Q8_0], 24, 70),
    ]
    .map(Layer::new);
    let sources = || {
        let mut builder = HotCacheBuilder::new(&gpu);
        for (index, layer) in layers.iter().enumerate() {
            let biases = layer.case.biases.then(|| {
                let all = layer.biases();
                [all.gate, all.up, all.down].map(<[f32]>::to_vec)
            });
            let weights = streamed(layer, index % 2 == 0);
            builder.push(weights, biases, layer.case.activation);
        }
        builder
    };
    assert!(sources().start(100_000).unwrap().is_none(), "no room");
    let mut cache = sources().start(4 << 20).unwrap().unwrap();
    let slots = cache.layer(0).slots();
    assert!((1..40).contains(&slots), "{slots} slots");
    let mut most = 0;
    for round in 0..60_u64 {
        // A third of the experts is chosen most for twenty rounds, then another.
        let uses = |layer: usize| {
            let experts = layers[layer].case.experts as u64;
            (0..experts).map(move |e| {
                let rounds_before = 20 * (e % 3);
                3 * round + 40 * round.saturating_sub(rounds_before).min(20)
            })
        };
        cache.maintain(&pool, uses).unwrap();
        for (index, layer) in layers.iter().enumerate() {
            let expected = reference::forward(&layer.experts(), &layer.x, &layer.routing());
            let (found, hits) = run_hot(&gpu, &cache.layer(index), layer, &pool);
            let what = format!("round {round}, {:?}", layer.case);
            assert_close(&found, &expected, 1e-10, &what);
            most = most.max(hits);
        }
    }
    assert!(most > 0, "no choice was computed on the GPU");
    let slots = (0..layers.len()).map(|layer| cache.layer(layer).slots() as u64);
    let (slots, swaps) = (slots.sum::<u64>(), cache.swaps());
    assert!(swaps > slots, "{swaps} uploads to {slots} slots");
}
