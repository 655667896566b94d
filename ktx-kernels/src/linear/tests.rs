use std::num::NonZeroUsize;

use half::bf16;
use ktx_gguf::{GgmlType, random_blocks};

use super::activations::Forms;
use super::cases::{self, Case};
use super::{
    Activations, LinearError, Operand, Precision, ProductOrder, WeightRows, matmul, matmul_at,
    matmul_many_at, reference,
};
use crate::cpu::IsaLevel;
use crate::pool::ThreadPool;

fn pool(threads: usize) -> ThreadPool {
    ThreadPool::new(NonZeroUsize::new(threads).unwrap())
}

/// Values with a normal distribution (sum of twelve uniform ones).
pub(crate) fn normal(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..len)
        .map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0)
        .collect()
}

fn blocks(case: Case) -> Vec<u8> {
    random_blocks(case.ty, case.rows * case.cols / case.ty.block_len(), 7)
}

fn prepared(
    level: IsaLevel,
    pool: &ThreadPool,
    x: &[f32],
    case: Case,
    precision: Precision,
) -> Activations {
    let mut activations = Activations::default();
    let forms = Forms::of(precision);
    activations
        .fill(level, pool, x, [case.tokens, case.cols], forms)
        .unwrap();
    activations
}

fn product(
    level: IsaLevel,
    pool: &ThreadPool,
    w: WeightRows<'_>,
    x: &Activations,
    case: Case,
) -> Vec<f32> {
    let mut out = vec![f32::NAN; case.tokens * case.rows];
    matmul_at(level, pool, w, x, &mut out, case.rows).unwrap();
    out
}

/// Walks all cases with `precision` and calls `check` with the result and the activations.
fn walk(
    precision: Precision,
    mut check: impl FnMut(&str, WeightRows<'_>, &[f32], &Activations, &[f32]),
) {
    let pool = pool(2);
    for case in cases::correctness() {
        let bytes = blocks(case);
        let w = WeightRows::new(case.ty, case.rows, case.cols, &bytes).unwrap();
        let x = normal(case.tokens * case.cols, case.tokens as u64);
        for level in IsaLevel::supported() {
            let activations = prepared(level, &pool, &x, case, precision);
            let out = product(level, &pool, w, &activations, case);
            check(&format!("{case:?} {level}"), w, &x, &activations, &out);
        }
    }
}

#[test]
fn int8_products_are_exact_for_the_values_that_they_see() {
    walk(Precision::Int8, |case, w, x, activations, out| {
        let operand = activations.operand(w.ty).unwrap();
        let seen: Vec<f32> = match operand {
            Operand::Floats | Operand::SplitTiles => x.to_vec(),
            _ => (0..activations.tokens())
                .flat_map(|token| activations.values(token).unwrap())
                .collect(),
        };
        let mut weights = reference::dequantize(w);
        if operand == Operand::Tiles {
            weights
                .iter_mut()
                .for_each(|weight| *weight = bf16::from_f32(*weight).to_f32());
        }
        // A sum that is rounded before it becomes BF16 now and then becomes its neighbour.
        let bound = match operand {
            Operand::Tiles => 1e-7,
            Operand::SplitTiles => 1e-10,
            _ => 1e-9,
        };
        let nmse = reference::nmse(out, &reference::product(&weights, w.cols, &seen));
        assert!(nmse <= bound, "{case}: {nmse:e}");
    });
}

#[test]
fn f32_products_are_exact() {
    walk(Precision::F32, |case, w, x, _, out| {
        let nmse = reference::nmse(out, &reference::matmul(w, x));
        assert!(nmse <= 1e-11, "{case}: {nmse:e}");
    });
}

#[test]
fn quantising_activations_costs_little_accuracy() {
    let pool = pool(2);
    for ty in cases::types() {
        let case = Case {
            ty,
            rows: 64,
            cols: 1024,
            tokens: 8,
        };
        let bytes = blocks(case);
        let w = WeightRows::new(ty, case.rows, case.cols, &bytes).unwrap();
        let x = normal(case.tokens * case.cols, 3);
        for level in IsaLevel::supported() {
            let activations = prepared(level, &pool, &x, case, Precision::Int8);
            let out = product(level, &pool, w, &activations, case);
            let nmse = reference::nmse(&out, &reference::matmul(w, &x));
            assert!(nmse <= 2e-4, "{ty} {level}: {nmse:e}");
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let pools = [1, 2, 3, 5].map(pool);
    for ty in cases::types() {
        for tokens in [1, 3, 21] {
            let case = Case {
                ty,
                rows: 203,
                cols: 512,
                tokens,
            };
            let bytes = blocks(case);
            let w = WeightRows::new(ty, case.rows, case.cols, &bytes).unwrap();
            let x = normal(tokens * case.cols, 5);
            for level in IsaLevel::supported() {
                let [one, more @ ..] = &pools;
                let run = |pool: &ThreadPool| {
                    let activations = prepared(level, pool, &x, case, Precision::Int8);
                    product(level, pool, w, &activations, case)
                };
                let expected = run(one);
                for pool in more {
                    assert_eq!(run(pool), expected, "{case:?} {level} {}", pool.threads());
                }
            }
        }
    }
}

/// In orders other than by tokens, each of 1 to 20 tokens gets what it gets alone, to the bit.
#[test]
fn a_fixed_order_gives_a_token_what_it_gets_alone() {
    let pool = pool(2);
    for (order, ty) in [ProductOrder::Rows, ProductOrder::Panels]
        .into_iter()
        .flat_map(|order| cases::types().map(move |ty| (order, ty)))
    {
        pool.set_product_order(order);
        let case = |tokens| Case {
            ty,
            rows: 37,
            cols: 768,
            tokens,
        };
        let bytes = blocks(case(1));
        let w = WeightRows::new(ty, 37, 768, &bytes).unwrap();
        let x = normal(20 * 768, 13);
        for level in IsaLevel::supported() {
            let run = |x: &[f32]| {
                let case = case(x.len() / 768);
                let activations = prepared(level, &pool, x, case, Precision::Int8);
                product(level, &pool, w, &activations, case)
            };
            let alone: Vec<f32> = x.chunks(768).flat_map(run).collect();
            for tokens in 2..=20 {
                let together = run(&x[..tokens * 768]);
                assert_eq!(
                    together,
                    alone[..tokens * 37],
                    "{order:?} {:?} {level}",
                    case(tokens)
                );
            }
        }
    }
}

#[test]
fn several_weights_in_one_region_give_what_each_gives_alone() {
    let pool = pool(2);
    let types = [
        GgmlType::Q4_K,
        GgmlType::F16,
        GgmlType::Q6_K,
        GgmlType::Q8_0,
    ];
    let types = [types, types, types].concat();
    for tokens in [1, 6] {
        let x = normal(tokens * 512, 11);
        let cases: Vec<Case> = types
            .iter()
            .enumerate()
            .map(|(index, ty)| Case {
                ty: *ty,
                rows: 20 + 13 * index,
                cols: 512,
                tokens,
            })
            .collect();
        let bytes: Vec<Vec<u8>> = cases.iter().map(|case| blocks(*case)).collect();
        let ws: Vec<WeightRows<'_>> = cases
            .iter()
            .zip(&bytes)
            .map(|(case, bytes)| WeightRows::new(case.ty, case.rows, case.cols, bytes).unwrap())
            .collect();
        for level in IsaLevel::supported() {
            let activations = prepared(level, &pool, &x, cases[0], Precision::Int8);
            let mut outs: Vec<Vec<f32>> = cases
                .iter()
                .map(|case| vec![0.0; tokens * case.rows])
                .collect();
            let mut views: Vec<&mut [f32]> = outs.iter_mut().map(Vec::as_mut_slice).collect();
            matmul_many_at(level, &pool, &ws, &activations, &mut views).unwrap();
            for ((w, case), out) in ws.iter().zip(&cases).zip(&outs) {
                assert_eq!(out, &product(level, &pool, *w, &activations, *case));
            }
        }
    }
}

#[test]
fn a_stride_leaves_the_gap_alone() {
    let pool = pool(2);
    for tokens in [2, 9] {
        let case = Case {
            ty: GgmlType::Q4_0,
            rows: 21,
            cols: 64,
            tokens,
        };
        let bytes = blocks(case);
        let w = WeightRows::new(case.ty, case.rows, case.cols, &bytes).unwrap();
        let x = normal(tokens * case.cols, 2);
        for level in IsaLevel::supported() {
            let activations = prepared(level, &pool, &x, case, Precision::Int8);
            let dense = product(level, &pool, w, &activations, case);
            let mut out = vec![7.0; tokens * 30];
            matmul_at(level, &pool, w, &activations, &mut out, 30).unwrap();
            for (row, expected) in out.chunks(30).zip(dense.chunks(21)) {
                assert_eq!(&row[..21], expected);
                assert_eq!(row[21..], [7.0; 9]);
            }
        }
    }
}

#[test]
fn a_buffer_can_be_used_again_for_other_shapes() {
    let pool = pool(2);
    for level in IsaLevel::supported() {
        let mut buffer = Activations::with_capacity(40, 1024);
        for (tokens, cols) in [(40, 1024), (3, 100), (40, 100), (5, 32), (20, 1000)] {
            let x = normal(tokens * cols, 9);
            let forms = Forms::of(Precision::Int8);
            let shape = [tokens, cols];
            buffer.fill(level, &pool, &x, shape, forms).unwrap();
            let mut fresh = Activations::default();
            fresh.fill(level, &pool, &x, shape, forms).unwrap();
            for token in 0..tokens {
                assert_eq!(buffer.values(token), fresh.values(token));
                if buffer.operand(GgmlType::F32) == Ok(Operand::Floats) {
                    assert_eq!(buffer.floats(token), fresh.floats(token));
                }
                if buffer.operand(GgmlType::Q4_0) == Ok(Operand::Codes) {
                    assert_eq!(buffer.codes(token).codes, fresh.codes(token).codes);
                    assert_eq!(buffer.codes(token).scales, fresh.codes(token).scales);
                    assert_eq!(buffer.codes(token).sums32, fresh.codes(token).sums32);
                    assert_eq!(buffer.codes(token).sums16, fresh.codes(token).sums16);
                }
            }
        }
    }
}

#[test]
fn values_that_are_not_finite_stay_visible() {
    let pool = pool(1);
    let case = Case {
        ty: GgmlType::Q8_0,
        rows: 3,
        cols: 64,
        tokens: 1,
    };
    let bytes = blocks(case);
    let w = WeightRows::new(case.ty, case.rows, case.cols, &bytes).unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = normal(64, 1);
        x[40] = bad;
        for level in IsaLevel::supported() {
            let activations = prepared(level, &pool, &x, case, Precision::Int8);
            let out = product(level, &pool, w, &activations, case);
            assert!(
                out.iter().all(|value| !value.is_finite()),
                "{bad} {level}: {out:?}"
            );
        }
    }
}

#[test]
fn shapes_that_disagree_are_errors() {
    let pool = pool(1);
    let bytes = random_blocks(GgmlType::Q4_0, 8, 1);
    let w = WeightRows::new(GgmlType::Q4_0, 4, 64, &bytes).unwrap();
    let mut x = Activations::default();
    assert!(matches!(
        x.prepare(&pool, &[0.0; 63], 1, 64, Precision::Int8),
        Err(LinearError::InputLength { .. })
    ));
    x.prepare(&pool, &[1.0; 96], 1, 96, Precision::Int8)
        .unwrap();
    let mut out = [0.0; 16];
    assert!(matches!(
        matmul(&pool, w, &x, &mut out, 4),
        Err(LinearError::Columns { .. })
    ));
    x.prepare(&pool, &[1.0; 256], 4, 64, Precision::Int8)
        .unwrap();
    assert!(matmul(&pool, w, &x, &mut out, 4).is_ok());
    assert!(matches!(
        matmul(&pool, w, &x, &mut out, 3),
        Err(LinearError::Stride { .. })
    ));
    assert!(matches!(
        matmul(&pool, w, &x, &mut out, 5),
        Err(LinearError::OutputLength { .. })
    ));
    x.prepare_for(&pool, &[1.0; 64], 1, 64, Precision::Int8, &[GgmlType::F32])
        .unwrap();
    assert!(matches!(
        matmul(&pool, w, &x, &mut out, 4),
        Err(LinearError::NotPrepared { .. })
    ));
}

#[test]
fn weights_of_wrong_size_or_type_are_errors() {
    use GgmlType::{I32, Q4_K};
    assert!(matches!(
        WeightRows::new(Q4_K, 1, 255, &[]),
        Err(LinearError::PartialBlock { .. })
    ));
    assert!(matches!(
        WeightRows::new(Q4_K, 1, 256, &[0; 143]),
        Err(LinearError::WeightBytes { .. })
    ));
    assert!(matches!(
        WeightRows::new(I32, 1, 1, &[0; 4]),
        Err(LinearError::UnsupportedType { .. })
    ));
    assert!(WeightRows::new(Q4_K, usize::MAX, 256, &[]).is_err());
}
