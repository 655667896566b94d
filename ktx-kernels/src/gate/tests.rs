use super::cases::Case;
use super::*;
use crate::testing::{Random, assert_close, pools};

fn run(
    pool: &ThreadPool,
    config: &GateConfig,
    logits: &[f32],
    bias: Option<&[f32]>,
) -> (Vec<u32>, Vec<f32>) {
    let tokens = logits.len() / config.experts;
    let mut ids = vec![u32::MAX; tokens * config.top_k];
    let mut weights = vec![f32::NAN; tokens * config.top_k];
    let mut scratch = vec![f32::NAN; config.scratch_floats(pool.threads())];
    route(
        pool,
        config,
        logits,
        bias,
        &mut ids,
        &mut weights,
        &mut scratch,
    )
    .unwrap();
    (ids, weights)
}

fn input(case: &Case, tokens: usize) -> (Vec<f32>, Option<Vec<f32>>) {
    let mut random = Random::new(tokens as u64);
    let logits = random.floats(tokens * case.config.experts, 4.0);
    let bias = case
        .has_bias
        .then(|| random.floats(case.config.experts, 0.6));
    (logits, bias)
}

#[test]
fn every_router_agrees_with_f64_for_1_to_33_tokens() {
    let pool = &pools()[1];
    for case in cases::cases() {
        for tokens in [1, 2, 15, 16, 17, 33] {
            let (logits, bias) = input(&case, tokens);
            let (ids, weights) = run(pool, &case.config, &logits, bias.as_deref());
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
fn normalised_softmax_is_the_softmax_of_the_chosen_logits() {
    let config = cases::cases()[2].config;
    let logits = Random::new(12).floats(20 * config.experts, 30.0);
    let (ids, weights) = run(&pools()[0], &config, &logits, None);
    let rows = ids.chunks(config.top_k).zip(logits.chunks(config.experts));
    let expected: Vec<f64> = rows
        .flat_map(|(ids, logits)| {
            let chosen = ids.iter().map(|id| f64::from(logits[*id as usize]).exp());
            let sum: f64 = chosen.clone().sum();
            chosen.map(move |e| e / sum).collect::<Vec<_>>()
        })
        .collect();
    assert_close(&weights, &expected, 1e-12, "softmax of the chosen");
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    for case in cases::cases() {
        let (logits, bias) = input(&case, 100);
        let expected = run(&pools()[0], &case.config, &logits, bias.as_deref());
        for pool in pools() {
            assert_eq!(run(&pool, &case.config, &logits, bias.as_deref()), expected);
        }
    }
}

#[test]
fn ties_go_to_the_lower_id() {
    let pool = &pools()[0];
    for case in cases::cases() {
        let logits = vec![0.25; case.config.experts];
        let (ids, _) = run(pool, &case.config, &logits, None);
        let expected: Vec<u32> = (0..case.config.top_k as u32).collect();
        assert_eq!(ids, expected, "{}", case.name);
    }
}

#[test]
fn nan_logits_choose_valid_and_distinct_experts() {
    let pool = &pools()[0];
    for case in cases::cases() {
        for pattern in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (mut logits, bias) = input(&case, 3);
            logits.iter_mut().step_by(3).for_each(|x| *x = pattern);
            logits[..case.config.experts].fill(pattern);
            let (ids, _) = run(pool, &case.config, &logits, bias.as_deref());
            for ids in ids.chunks(case.config.top_k) {
                let mut sorted = ids.to_vec();
                sorted.sort_unstable();
                sorted.dedup();
                assert_eq!(sorted.len(), case.config.top_k, "{}", case.name);
                assert!(sorted.iter().all(|&i| (i as usize) < case.config.experts));
            }
        }
    }
}

#[test]
fn the_masked_value_decides_where_kept_scores_are_negative() {
    let groups = |masked_value| ExpertGroups {
        n_group: 2,
        topk_group: 1,
        score: GroupScore::SumOfTop2,
        masked_value,
    };
    let config = |masked_value| GateConfig {
        experts: 4,
        top_k: 2,
        scoring: Scoring::Sigmoid,
        groups: Some(groups(masked_value)),
        scaling: WeightScaling::Scale(1.0),
    };
    let (logits, bias) = ([0.0; 4], [-1.0, -2.0, -3.0, -3.0]);
    let pool = &pools()[0];
    let ids = |masked| run(pool, &config(masked), &logits, Some(&bias)).0;
    assert_eq!(ids(f32::NEG_INFINITY), [0, 1]);
    assert_eq!(ids(0.0), [2, 3]);
}

#[test]
fn v2_either_normalises_or_scales_and_v3_does_both() {
    use NormTopkProb::{No, Yes};
    use WeightScaling::{Normalise, NormaliseThenScale, Scale};
    assert_eq!(WeightScaling::either(Yes, 6, 16.0), Normalise);
    assert_eq!(WeightScaling::either(No, 6, 16.0), Scale(16.0));
    assert_eq!(WeightScaling::either(Yes, 1, 16.0), Scale(16.0));
    assert_eq!(WeightScaling::both(Yes, 8, 2.5), NormaliseThenScale(2.5));
    assert_eq!(WeightScaling::both(No, 8, 2.5), Scale(2.5));
    assert_eq!(WeightScaling::both(Yes, 1, 2.5), Scale(2.5));
}

#[test]
fn configurations_that_cannot_be_are_refused_by_name() {
    let good = cases::cases()[4].config;
    let groups = good.groups.unwrap();
    let with = |n_group, topk_group| GateConfig {
        groups: Some(ExpertGroups {
            n_group,
            topk_group,
            ..groups
        }),
        ..good
    };
    assert_eq!(good.check(), Ok(()));
    assert!(matches!(
        GateConfig { top_k: 0, ..good }.check(),
        Err(GateError::TopK { .. })
    ));
    assert!(matches!(
        GateConfig { top_k: 161, ..good }.check(),
        Err(GateError::TopK { .. })
    ));
    for (n_group, topk_group) in [(0, 1), (7, 1), (8, 9), (8, 0)] {
        let refused = with(n_group, topk_group).check();
        assert!(
            matches!(refused, Err(GateError::Groups { .. })),
            "{n_group} {topk_group}"
        );
    }
    assert!(matches!(
        with(160, 5).check(),
        Err(GateError::TooFewKept { kept: 5, .. })
    ));
}
