use super::cases::{self, Case};
use super::cuda::{GpuExperts, GpuRouting};
use super::reference;
use super::tests::Layer;
use crate::activation::GatedActivation;
use crate::cuda::Gpu;
use crate::linear::Precision;
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
        types: [
            ktx_gguf::GgmlType::Q4_K,
            ktx_gguf::GgmlType::Q4_K,
            ktx_gguf::GgmlType::Q6_K,
        ],
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
        let grouped = case.tokens > super::cuda::MAX_FEW_TOKENS;
        let bound = if grouped { 3e-6 } else { 3e-4 };
        assert_close(&int8, &expected, bound, &format!("{case:?} int8"));
    }
}
