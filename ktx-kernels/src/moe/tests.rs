use std::num::NonZeroUsize;

use ktx_gguf::{GgmlType, random_blocks};

use super::cases::{self, Case};
use super::{
    ELSEWHERE, ExpertBiases, ExpertStack, MoeError, MoeScratch, MoeWeights, Routing, forward,
    forward_at, reference,
};
use crate::cpu::IsaLevel;
use crate::linear::reference::nmse;
use crate::linear::{Precision, ProductOrder, WeightRows};
use crate::pool::ThreadPool;

fn pool(threads: usize) -> ThreadPool {
    ThreadPool::new(NonZeroUsize::new(threads).unwrap())
}

/// The data of a case.
pub(super) struct Layer {
    pub(super) case: Case,
    pub(super) bytes: [Vec<u8>; 3],
    biases: [Vec<f32>; 3],
    pub(super) x: Vec<f32>,
    pub(super) ids: Vec<u32>,
    pub(super) weights: Vec<f32>,
}

impl Layer {
    pub(super) fn new(case: Case) -> Self {
        let len = case.experts * case.hidden * case.intermediate;
        let blocks = |index: usize| {
            let ty: GgmlType = case.types[index];
            random_blocks(ty, len / ty.block_len(), index as u64)
        };
        let x = crate::linear::tests::normal(case.tokens * case.hidden, 3);
        // Small enough for SiLU not to be almost linear everywhere.
        let x = x.into_iter().map(|value| value * 0.1).collect();
        let slots = case.tokens * case.top_k;
        let pick = |slot: usize| (slot * slot * 7 + slot / 3 + slot * 5) % case.experts;
        Self {
            case,
            bytes: [blocks(0), blocks(1), blocks(2)],
            biases: [case.intermediate, case.intermediate, case.hidden]
                .map(|rows| crate::linear::tests::normal(case.experts * rows, rows as u64)),
            x,
            ids: (0..slots).map(|slot| pick(slot) as u32).collect(),
            weights: (0..slots)
                .map(|slot| 0.1 + (slot % 7) as f32 * 0.15)
                .collect(),
        }
    }

    pub(super) fn experts(&self) -> MoeWeights<'_> {
        let Case {
            types,
            experts,
            hidden,
            intermediate,
            ..
        } = self.case;
        let stack = |index: usize, rows, cols| {
            ExpertStack::stacked(types[index], [experts, rows, cols], &self.bytes[index]).unwrap()
        };
        let weights = MoeWeights::new(
            stack(0, intermediate, hidden),
            stack(1, intermediate, hidden),
            stack(2, hidden, intermediate),
        );
        let weights = weights.unwrap().with_activation(self.case.activation);
        match self.case.biases {
            true => weights.with_biases(self.biases()).unwrap(),
            false => weights,
        }
    }

    pub(super) fn biases(&self) -> ExpertBiases<'_> {
        let [gate, up, down] = &self.biases;
        ExpertBiases { gate, up, down }
    }

    pub(super) fn routing(&self) -> Routing<'_> {
        Routing {
            ids: &self.ids,
            weights: &self.weights,
            top_k: self.case.top_k,
            first_expert: 0,
        }
    }

    fn run(&self, level: IsaLevel, pool: &ThreadPool, precision: Precision) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.x.len()];
        let mut scratch = MoeScratch::default();
        let (experts, routing) = (self.experts(), self.routing());
        forward_at(
            level,
            pool,
            &experts,
            &self.x,
            routing,
            &mut out,
            &mut scratch,
            precision,
        )
        .unwrap();
        out
    }
}

#[test]
fn experts_agree_with_the_reference() {
    let pool = pool(2);
    for case in cases::all() {
        let layer = Layer::new(case);
        let expected = reference::forward(&layer.experts(), &layer.x, &layer.routing());
        for level in IsaLevel::supported() {
            let exact = nmse(&layer.run(level, &pool, Precision::F32), &expected);
            assert!(exact <= 1e-10, "{case:?} {level}: {exact:e}");
            let int8 = nmse(&layer.run(level, &pool, Precision::Int8), &expected);
            assert!(int8 <= 3e-4, "{case:?} {level}: {int8:e}");
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let pools = [1, 2, 3, 5].map(pool);
    for case in cases::all() {
        let layer = Layer::new(case);
        for level in IsaLevel::supported() {
            let [one, more @ ..] = &pools;
            let expected = layer.run(level, one, Precision::Int8);
            for pool in more {
                let out = layer.run(level, pool, Precision::Int8);
                assert_eq!(out, expected, "{case:?} {level} {}", pool.threads());
            }
        }
    }
}

/// In orders other than by tokens, a token gets what it gets alone, to the bit.
#[test]
fn a_fixed_order_gives_a_token_what_it_gets_alone() {
    let pool = pool(2);
    for order in [ProductOrder::Rows, ProductOrder::Panels] {
        pool.set_product_order(order);
        for case in cases::all() {
            let layer = Layer::new(case);
            let (hidden, top_k) = (case.hidden, case.top_k);
            for level in IsaLevel::supported() {
                let together = layer.run(level, &pool, Precision::Int8);
                for token in [0, case.tokens / 2, case.tokens - 1] {
                    let alone = Layer {
                        x: layer.x[token * hidden..][..hidden].to_vec(),
                        ids: layer.ids[token * top_k..][..top_k].to_vec(),
                        weights: layer.weights[token * top_k..][..top_k].to_vec(),
                        ..Layer::new(case)
                    };
                    let alone = alone.run(level, &pool, Precision::Int8);
                    let of_token = &together[token * hidden..][..hidden];
                    assert_eq!(alone, of_token, "{order:?} {case:?} {level} {token}");
                }
            }
        }
    }
}

#[test]
fn scratch_can_be_used_again_for_other_sizes() {
    let pool = pool(2);
    let mut scratch = MoeScratch::new(4, 256, 512, 8, 2);
    for case in cases::all().into_iter().rev() {
        let layer = Layer::new(case);
        let mut out = vec![f32::NAN; layer.x.len()];
        let (experts, routing) = (layer.experts(), layer.routing());
        let precision = Precision::Int8;
        forward(
            &pool,
            &experts,
            &layer.x,
            routing,
            &mut out,
            &mut scratch,
            precision,
        )
        .unwrap();
        assert_eq!(
            out,
            layer.run(crate::cpu::level(), &pool, precision),
            "{case:?}"
        );
    }
}

#[test]
fn a_tensor_per_expert_gives_what_a_stack_gives() {
    let pool = pool(2);
    let layer = Layer::new(cases::all()[2]);
    let experts = layer.experts();
    fn split<'a>(stack: &ExpertStack<'a>) -> Vec<WeightRows<'a>> {
        (0..stack.experts())
            .map(|expert| stack.expert(expert).unwrap())
            .collect()
    }
    let stacks = [
        split(&experts.gate),
        split(&experts.up),
        split(&experts.down),
    ];
    let [gate, up, down] = stacks
        .each_ref()
        .map(|stack| ExpertStack::separate(stack).unwrap());
    let separate = MoeWeights::new(gate, up, down).unwrap();
    let mut out = vec![0.0; layer.x.len()];
    let mut scratch = MoeScratch::default();
    let precision = Precision::Int8;
    forward(
        &pool,
        &separate,
        &layer.x,
        layer.routing(),
        &mut out,
        &mut scratch,
        precision,
    )
    .unwrap();
    assert_eq!(out, layer.run(crate::cpu::level(), &pool, precision));
}

#[test]
fn what_does_not_fit_together_is_an_error() {
    let pool = pool(1);
    let layer = Layer::new(cases::all()[0]);
    let experts = layer.experts();
    let mut scratch = MoeScratch::default();
    let mut out = vec![5.0; layer.x.len()];
    let mut run = |x: &[f32], ids: &[u32], weights: &[f32], out: &mut [f32]| {
        let routing = Routing {
            ids,
            weights,
            top_k: 2,
            first_expert: 0,
        };
        forward(
            &pool,
            &experts,
            x,
            routing,
            out,
            &mut scratch,
            Precision::Int8,
        )
        .unwrap_err()
    };
    let (x, ids, weights) = (&layer.x, &layer.ids, &layer.weights);
    assert!(matches!(
        run(&x[1..], ids, weights, &mut out),
        MoeError::InputLength { .. }
    ));
    assert!(matches!(
        run(x, &ids[1..], weights, &mut out),
        MoeError::RoutingLength { .. }
    ));
    assert!(matches!(
        run(x, ids, &weights[1..], &mut out),
        MoeError::RoutingLength { .. }
    ));
    assert!(matches!(
        run(x, ids, weights, &mut out[1..]),
        MoeError::OutputLength { .. }
    ));
    let bad = [0, 8];
    let error = run(x, &bad, weights, &mut out);
    assert_eq!(
        error,
        MoeError::ExpertOutOfRange {
            token: 0,
            id: 8,
            experts: 8
        }
    );
    assert!(out.iter().all(|value| *value == 5.0));
    let biases = ExpertBiases {
        up: &layer.biases[1][1..],
        ..layer.biases()
    };
    assert!(matches!(
        experts.with_biases(biases),
        Err(MoeError::BiasLength { stack: "up", .. })
    ));
    assert!(matches!(
        MoeWeights::new(experts.gate, experts.down, experts.down),
        Err(MoeError::Shape { stack: "up", .. })
    ));
}

#[test]
fn no_tokens_are_no_work() {
    let layer = Layer::new(cases::all()[0]);
    let routing = Routing {
        ids: &[],
        weights: &[],
        top_k: 2,
        first_expert: 0,
    };
    let mut scratch = MoeScratch::default();
    forward(
        &pool(2),
        &layer.experts(),
        &[],
        routing,
        &mut [],
        &mut scratch,
        Precision::Int8,
    )
    .unwrap();
}

#[test]
fn choices_that_are_computed_elsewhere_add_nothing() {
    let pool = pool(2);
    for case in cases::all() {
        let mut layer = Layer::new(case);
        let is_elsewhere = |id: u32| id.is_multiple_of(3);
        let mut without = layer.weights.clone();
        for (id, weight) in layer.ids.iter().zip(&mut without) {
            *weight *= f32::from(u8::from(!is_elsewhere(*id)));
        }
        let routing = Routing {
            weights: &without,
            ..layer.routing()
        };
        let expected = reference::forward(&layer.experts(), &layer.x, &routing);
        for id in &mut layer.ids {
            *id |= if is_elsewhere(*id) { ELSEWHERE } else { 0 };
        }
        for level in IsaLevel::supported() {
            let error = nmse(&layer.run(level, &pool, Precision::F32), &expected);
            assert!(error <= 1e-10, "{case:?} {level}: {error:e}");
        }
    }
}
