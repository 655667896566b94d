use super::{GateConfig, Scoring, WeightScaling, cases, cuda, reference};
use crate::cuda::{DeviceBuffer, Gpu};
use crate::testing::{GpuMatrix, Random, assert_close};

fn run(
    gpu: &Gpu,
    config: &GateConfig,
    logits: &[f32],
    bias: Option<&[f32]>,
) -> (Vec<u32>, Vec<f32>) {
    let tokens = logits.len() / config.experts;
    let logits = GpuMatrix::of(gpu, tokens, logits);
    let bias = bias.map(|bias| DeviceBuffer::upload(gpu, bias).unwrap());
    let [ids, weights] = [(); 2].map(|()| GpuMatrix::poisoned(gpu, tokens, config.top_k));
    cuda::route(
        gpu,
        config,
        logits.matrix,
        bias.as_ref(),
        ids.matrix,
        weights.matrix,
    )
    .unwrap();
    (ids.bits(), weights.values())
}

#[test]
fn gpu_routers_agree_with_f64_for_1_to_33_tokens() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for case in cases::cases() {
        for tokens in [1, 2, 15, 33] {
            let mut random = Random::new(tokens as u64);
            let logits = random.floats(tokens * case.config.experts, 4.0);
            let bias = case
                .has_bias
                .then(|| random.floats(case.config.experts, 0.6));
            let (ids, weights) = run(&gpu, &case.config, &logits, bias.as_deref());
            for (t, logits) in logits.chunks(case.config.experts).enumerate() {
                let (want_ids, want) = reference::route(&case.config, logits, bias.as_deref());
                let range = t * case.config.top_k..(t + 1) * case.config.top_k;
                assert_eq!(ids[range.clone()], want_ids, "{}", case.name);
                assert_close(&weights[range], &want, 1e-12, case.name);
            }
        }
    }
}

#[test]
fn gpu_routers_take_the_lower_of_equal_experts_and_rank_nan_last() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let config = GateConfig {
        experts: 70,
        top_k: 5,
        scoring: Scoring::Sigmoid,
        groups: None,
        scaling: WeightScaling::Scale(1.0),
    };
    let mut logits = vec![0.5; 70];
    (logits[3], logits[40], logits[41], logits[0]) = (2.0, 2.0, 3.0, f32::NAN);
    let (ids, _) = run(&gpu, &config, &logits, None);
    assert_eq!(ids, [41, 3, 40, 1, 2]);
    let (ids, weights) = run(&gpu, &config, &[f32::NAN; 70], None);
    assert_eq!(ids, [0, 1, 2, 3, 4]);
    assert!(weights.iter().all(|w| w.is_nan()));
}

#[test]
fn gpu_group_limited_routers_take_the_lower_of_equal_groups() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for case in cases::cases()
        .into_iter()
        .filter(|c| c.config.groups.is_some())
    {
        let config = case.config;
        let logits: Vec<f32> = (0..config.experts).map(|i| (i % 3) as f32).collect();
        let (ids, _) = run(&gpu, &config, &logits, None);
        assert_eq!(
            ids,
            reference::route(&config, &logits, None).0,
            "{}",
            case.name
        );
    }
}
