use std::num::NonZeroUsize;

use half::f16;

use super::*;
use crate::kv::{KvType, PageId};
use crate::linear::ProductOrder;
use crate::testing::{Random, assert_close, pools};

/// A batch with random rows in shuffled pages, and the same rows widened for the reference.
pub(super) struct Fixture {
    pub(super) kv: LayerKv,
    pages: Vec<Vec<PageId>>,
    pub(super) lengths: Vec<(usize, usize)>,
    pub(super) k: Vec<Vec<f32>>,
    pub(super) v: Vec<Vec<f32>>,
}

/// What the cache holds of rows: rounded by the format's definition, or for blocks, whose rounding has tests of its
/// own, as it gives them back.
fn stored(kv: &LayerKv, pages: &[PageId], rows: [&mut [f32]; 2]) {
    let [k, v] = rows;
    match kv.kv_type() {
        KvType::F32 => {}
        KvType::F16 => {
            let round = |x: &mut f32| *x = f16::from_f32(*x).to_f32();
            k.iter_mut().for_each(round);
            v.iter_mut().for_each(round);
        }
        KvType::Q8_0 => {
            let place = |at: usize| (pages[at / PAGE_TOKENS], at % PAGE_TOKENS);
            for (at, row) in k.chunks_mut(kv.k_width()).enumerate() {
                kv.read_k(place(at).0, place(at).1, row);
            }
            for (at, row) in v.chunks_mut(kv.v_width().max(1)).enumerate() {
                kv.read_v(place(at).0, place(at).1, row);
            }
        }
    }
}

/// The types of a cache with heads of these widths.
pub(super) fn kv_types(widths: [usize; 2]) -> impl Iterator<Item = KvType> {
    let fits = move |kv_type: &KvType| widths.iter().all(|w| w.is_multiple_of(kv_type.block()));
    [KvType::F32, KvType::F16, KvType::Q8_0]
        .into_iter()
        .filter(fits)
}

impl Fixture {
    pub(super) fn new(kv_type: KvType, widths: (usize, usize), batch: &[(usize, usize)]) -> Self {
        let mut random = Random::new((widths.0 * 1000 + batch.len()) as u64);
        let count: usize = batch
            .iter()
            .map(|(p, t)| (p + t).div_ceil(PAGE_TOKENS))
            .sum();
        let mut kv = LayerKv::new(kv_type, widths.0, widths.1, count + 1).unwrap();
        let (mut pages, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
        let mut next = count as u32;
        for &(past, tokens) in batch {
            let len = past + tokens;
            let list: Vec<PageId> = (0..len.div_ceil(PAGE_TOKENS))
                .map(|_| {
                    next -= 1;
                    PageId(next)
                })
                .collect();
            let mut rows = (
                random.floats(len * widths.0, 1.5),
                random.floats(len * widths.1, 1.5),
            );
            let all = SequenceKv {
                pages: &list,
                past: 0,
                tokens: len,
            };
            kv.write_sequence(&all, &rows.0, &rows.1);
            stored(&kv, &list, [&mut rows.0, &mut rows.1]);
            pages.push(list);
            k.push(rows.0);
            v.push(rows.1);
        }
        Fixture {
            kv,
            pages,
            lengths: batch.to_vec(),
            k,
            v,
        }
    }

    pub(super) fn sequences(&self) -> Vec<SequenceKv<'_>> {
        self.pages
            .iter()
            .zip(&self.lengths)
            .map(|(pages, &(past, tokens))| SequenceKv {
                pages,
                past,
                tokens,
            })
            .collect()
    }

    pub(super) fn tokens(&self) -> usize {
        self.lengths.iter().map(|(_, tokens)| tokens).sum()
    }

    pub(super) fn expected(
        &self,
        shape: &AttentionShape,
        q: &[f32],
        sinks: Option<&[f32]>,
    ) -> Vec<f64> {
        let (kd, vd) = (shape.k_head_dim, shape.v_head_dim);
        let group = shape.heads / shape.kv_heads;
        let mut queries = q.chunks(kd);
        let mut out = Vec::new();
        for ((&(past, tokens), k), v) in self.lengths.iter().zip(&self.k).zip(&self.v) {
            for t in 0..tokens {
                for h in 0..shape.heads {
                    let column = |x: &[f32], dim: usize| -> Vec<Vec<f64>> {
                        let end = past + t + 1;
                        let start = shape.window.map_or(0, |w| end.saturating_sub(w.get()));
                        x.chunks(shape.kv_heads * dim)
                            .take(end)
                            .skip(start)
                            .map(|row| reference::widen(&row[h / group * dim..][..dim]))
                            .collect()
                    };
                    let q = reference::widen(queries.next().unwrap());
                    out.extend(reference::attend(
                        &q,
                        &column(k, kd),
                        &column(v, vd),
                        shape.scale,
                        sinks.map(|sinks| sinks[h]),
                    ));
                }
            }
        }
        out
    }
}

fn run_gqa(
    level: IsaLevel,
    pool: &ThreadPool,
    shape: &AttentionShape,
    fixture: &Fixture,
    q: &[f32],
) -> Vec<f32> {
    run_gqa_with(level, pool, shape, fixture, q, None)
}

fn run_gqa_with(
    level: IsaLevel,
    pool: &ThreadPool,
    shape: &AttentionShape,
    fixture: &Fixture,
    q: &[f32],
    sinks: Option<&[f32]>,
) -> Vec<f32> {
    let mut out = vec![f32::NAN; fixture.tokens() * shape.heads * shape.v_head_dim];
    let mut scratch = vec![f32::NAN; shape.scratch_floats(pool.threads())];
    let sequences = fixture.sequences();
    gqa_at(
        level,
        pool,
        shape,
        &fixture.kv,
        &sequences,
        &GqaQuery { rows: q, sinks },
        &mut out,
        &mut scratch,
    );
    out
}

pub(super) fn gqa_fixture(
    kv_type: KvType,
    shape: &AttentionShape,
    batch: &[(usize, usize)],
) -> (Fixture, Vec<f32>) {
    let widths = (
        shape.kv_heads * shape.k_head_dim,
        shape.kv_heads * shape.v_head_dim,
    );
    let fixture = Fixture::new(kv_type, widths, batch);
    let q = Random::new(77).floats(fixture.tokens() * shape.heads * shape.k_head_dim, 2.0);
    (fixture, q)
}

/// AMX's products leave out 2^-16 of each: 2e-11 was measured.
fn bound(level: IsaLevel) -> f64 {
    match level {
        IsaLevel::Amx => 2e-10,
        _ => 1e-11,
    }
}

fn check_gqa(pool: &ThreadPool, shape: &AttentionShape, batch: &[(usize, usize)]) {
    for kv_type in kv_types([shape.k_head_dim, shape.v_head_dim]) {
        let (fixture, q) = gqa_fixture(kv_type, shape, batch);
        let expected = fixture.expected(shape, &q, None);
        for level in IsaLevel::supported() {
            let out = run_gqa(level, pool, shape, &fixture, &q);
            let what = format!("{level} {kv_type:?} {shape:?} {batch:?}");
            assert_close(&out, &expected, bound(level), &what);
        }
    }
}

#[test]
fn gqa_agrees_with_f64_at_every_shape_and_batch() {
    let pool = &pools()[2];
    for shape in cases::shapes() {
        for batch in cases::BATCHES {
            check_gqa(pool, &shape, batch);
        }
    }
}

#[test]
fn gqa_agrees_with_f64_over_several_pieces() {
    let shapes = cases::shapes();
    for pool in [&pools()[0], &pools()[3]] {
        for batch in cases::LONG_BATCHES {
            for shape in [&shapes[0], &shapes[7]] {
                check_gqa(pool, shape, batch);
            }
        }
    }
}

pub(super) fn windowed(shape: &AttentionShape, window: usize) -> AttentionShape {
    AttentionShape {
        window: NonZeroUsize::new(window),
        ..*shape
    }
}

#[test]
fn a_window_shows_the_latest_positions_only() {
    let shapes = cases::shapes();
    for pool in [&pools()[0], &pools()[3]] {
        for &window in cases::WINDOWS {
            for batch in cases::BATCHES {
                check_gqa(pool, &windowed(&shapes[8], window), batch);
            }
            for batch in cases::LONG_BATCHES {
                check_gqa(pool, &windowed(&shapes[0], window), batch);
            }
        }
    }
}

#[test]
fn a_window_as_long_as_the_context_changes_no_bit() {
    for shape in [&cases::shapes()[0], &cases::shapes()[3]] {
        for batch in cases::BATCHES.iter().chain(cases::LONG_BATCHES) {
            let (fixture, q) = gqa_fixture(KvType::F16, shape, batch);
            let longest = batch.iter().map(|(past, tokens)| past + tokens).max();
            let shown = windowed(shape, longest.unwrap());
            for level in IsaLevel::supported() {
                let pool = &pools()[2];
                assert_eq!(
                    run_gqa(level, pool, &shown, &fixture, &q),
                    run_gqa(level, pool, shape, &fixture, &q)
                );
            }
        }
    }
}

/// NaN in every page that no query sees: reading one would show.
#[test]
fn pages_outside_of_the_window_are_not_read() {
    let shape = windowed(&cases::shapes()[3], 70);
    for (past, tokens) in [(700, 1), (690, 30), (1300, 3)] {
        let (mut fixture, q) = gqa_fixture(KvType::F32, &shape, &[(past, tokens)]);
        let before = run_gqa(cpu::level(), &pools()[1], &shape, &fixture, &q);
        for page in 0..(past + 1 - 70) / PAGE_TOKENS {
            let page = fixture.pages[0][page];
            for slot in 0..PAGE_TOKENS {
                let (k, v) = ([f32::NAN; 128], [f32::NAN; 128]);
                fixture.kv.write(page, slot, &k, &v);
            }
        }
        for pool in pools() {
            let after = run_gqa(cpu::level(), &pool, &shape, &fixture, &q);
            assert_eq!(after, before, "{past} {tokens}");
        }
    }
}

#[test]
fn sinks_take_their_share_of_the_softmax() {
    let shapes = cases::shapes();
    for (shape, window) in [(&shapes[0], usize::MAX), (&shapes[8], 3), (&shapes[0], 100)] {
        let shape = windowed(shape, window);
        for batch in cases::BATCHES.iter().chain(cases::LONG_BATCHES) {
            let (fixture, q) = gqa_fixture(KvType::F16, &shape, batch);
            for size in [1.0, 30.0] {
                let sinks = Random::new(9).floats(shape.heads, size);
                let expected = fixture.expected(&shape, &q, Some(&sinks));
                for level in IsaLevel::supported() {
                    let pool = &pools()[2];
                    let out = run_gqa_with(level, pool, &shape, &fixture, &q, Some(&sinks));
                    let what = format!("{level} {shape:?} {batch:?} {size}");
                    assert_close(&out, &expected, bound(level), &what);
                }
            }
        }
    }
}

#[test]
fn a_sink_far_below_the_scores_changes_nothing_and_one_far_above_leaves_nothing() {
    let shape = cases::shapes()[0];
    let (fixture, q) = gqa_fixture(KvType::F32, &shape, &[(90, 5), (0, 1)]);
    let pool = &pools()[1];
    let run = |sink: f32| {
        let sinks = vec![sink; shape.heads];
        run_gqa_with(cpu::level(), pool, &shape, &fixture, &q, Some(&sinks))
    };
    let plain = run_gqa(cpu::level(), pool, &shape, &fixture, &q);
    for sink in [-1e4, f32::MIN, f32::NEG_INFINITY] {
        assert_eq!(run(sink), plain, "{sink}");
    }
    for sink in [1e4, f32::MAX] {
        assert!(run(sink).iter().all(|x| *x == 0.0), "{sink}");
    }
}

/// An unrounded cache's reference for what an F16 cache computes.
#[test]
fn an_f16_cache_is_within_1e_6_of_unrounded_keys_and_values() {
    let shape = cases::shapes()[0];
    let (mut exact, q) = gqa_fixture(KvType::F32, &shape, &[(150, 20)]);
    let (rounded, _) = gqa_fixture(KvType::F16, &shape, &[(150, 20)]);
    let expected = exact.expected(&shape, &q, None);
    exact.kv = rounded.kv;
    let out = run_gqa(cpu::level(), &pools()[1], &shape, &exact, &q);
    assert_close(&out, &expected, 1e-6, "F16 cache");
}

fn run_mla(
    level: IsaLevel,
    pool: &ThreadPool,
    shape: &MlaShape,
    fixture: &Fixture,
    q: &[f32],
) -> Vec<f32> {
    let rows = fixture.tokens() * shape.heads;
    let width = shape.kv_lora + shape.rope;
    let latent: Vec<f32> = q
        .chunks(width)
        .flat_map(|row| row[..shape.kv_lora].to_vec())
        .collect();
    let query = MlaQuery {
        latent: &latent,
        rope: q,
        rope_stride: width,
        rope_offset: shape.kv_lora,
    };
    let mut out = vec![f32::NAN; rows * shape.kv_lora];
    let mut scratch = vec![f32::NAN; shape.scratch_floats(pool.threads())];
    let sequences = fixture.sequences();
    mla_at(
        level,
        pool,
        shape,
        &fixture.kv,
        &sequences,
        &query,
        &mut out,
        &mut scratch,
    );
    out
}

/// MLA seen as one KV head, with the values copied out of the keys.
pub(super) fn mla_expected(shape: &MlaShape, fixture: &mut Fixture, q: &[f32]) -> Vec<f64> {
    let width = shape.kv_lora + shape.rope;
    fixture.v = fixture
        .k
        .iter()
        .map(|k| {
            k.chunks(width)
                .flat_map(|row| row[..shape.kv_lora].to_vec())
                .collect()
        })
        .collect();
    let as_gqa = AttentionShape {
        heads: shape.heads,
        kv_heads: 1,
        k_head_dim: width,
        v_head_dim: shape.kv_lora,
        scale: shape.scale,
        window: None,
    };
    fixture.expected(&as_gqa, q, None)
}

#[test]
fn mla_agrees_with_f64_at_every_shape_and_batch() {
    let pool = &pools()[2];
    for shape in cases::mla_shapes() {
        let long: &[&[(usize, usize)]] = match shape.heads {
            16 => &[],
            _ => cases::LONG_BATCHES,
        };
        for batch in cases::BATCHES.iter().chain(long) {
            let width = shape.kv_lora + shape.rope;
            for kv_type in kv_types([shape.kv_lora, shape.rope]) {
                let mut fixture = Fixture::new(kv_type, (width, 0), batch);
                let q = Random::new(5).floats(fixture.tokens() * shape.heads * width, 1.0);
                let expected = mla_expected(&shape, &mut fixture, &q);
                for level in IsaLevel::supported() {
                    let out = run_mla(level, pool, &shape, &fixture, &q);
                    let what = format!("{level} {kv_type:?} {shape:?} {batch:?}");
                    assert_close(&out, &expected, bound(level), &what);
                }
            }
        }
    }
}

#[test]
fn dense_attention_equals_that_over_pages() {
    for shape in cases::shapes() {
        for &(past, tokens) in &[(0, 1), (0, 33), (70, 5), (600, 2)] {
            let (fixture, q) = gqa_fixture(KvType::F32, &shape, &[(past, tokens)]);
            for pool in pools() {
                for level in IsaLevel::supported() {
                    let paged = run_gqa(level, &pool, &shape, &fixture, &q);
                    let mut out = vec![f32::NAN; paged.len()];
                    let mut scratch = vec![f32::NAN; shape.scratch_floats(pool.threads())];
                    let (k, v) = (&fixture.k[0], &fixture.v[0]);
                    dense_at(level, &pool, &shape, past, &q, k, v, &mut out, &mut scratch);
                    assert_eq!(out, paged, "{level} {shape:?} {past} {tokens}");
                }
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    for window in [1, 100, 700] {
        let shape = windowed(&cases::shapes()[0], window);
        for batch in cases::LONG_BATCHES {
            for kv_type in kv_types([64, 64]) {
                let (fixture, q) = gqa_fixture(kv_type, &shape, batch);
                let expected = run_gqa(cpu::level(), &pools()[0], &shape, &fixture, &q);
                for pool in pools() {
                    let out = run_gqa(cpu::level(), &pool, &shape, &fixture, &q);
                    let what = format!("{window} {batch:?} {kv_type:?} {}", pool.threads());
                    assert_eq!(out, expected, "{what}");
                }
            }
        }
    }
    let mla = cases::mla_shapes()[0];
    for batch in [
        &[(1700, 1)][..],
        &[(2100, 2), (30, 1)],
        &[(3, 40)],
        &[(600, 1)],
    ] {
        let shape = cases::shapes()[0];
        let (fixture, q) = gqa_fixture(KvType::F16, &shape, batch);
        let latent = Fixture::new(KvType::F16, (576, 0), batch);
        let mla_q = Random::new(6).floats(latent.tokens() * mla.heads * 576, 1.0);
        for level in IsaLevel::supported() {
            let expected = run_gqa(level, &pools()[0], &shape, &fixture, &q);
            let mla_expected = run_mla(level, &pools()[0], &mla, &latent, &mla_q);
            for pool in pools() {
                let what = format!("{level} {batch:?} {} threads", pool.threads());
                assert_eq!(
                    run_gqa(level, &pool, &shape, &fixture, &q),
                    expected,
                    "{what}"
                );
                assert_eq!(
                    run_mla(level, &pool, &mla, &latent, &mla_q),
                    mla_expected,
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn a_prompt_in_one_call_equals_it_in_chunks_and_token_by_token() {
    for order in [ProductOrder::Rows, ProductOrder::Panels] {
        for window in [3, 70, 400, usize::MAX] {
            chunks_agree(&windowed(&cases::shapes()[0], window), 150, order);
        }
        chunks_agree(&windowed(&cases::shapes()[3], 600), 1200, order);
    }
}

fn chunks_agree(shape: &AttentionShape, total: usize, order: ProductOrder) {
    let (mut fixture, q) = gqa_fixture(KvType::F16, shape, &[(0, total)]);
    let pool = &pools()[2];
    pool.set_product_order(order);
    let whole = run_gqa(cpu::level(), pool, shape, &fixture, &q);
    let (q_row, out_row) = (
        shape.heads * shape.k_head_dim,
        shape.heads * shape.v_head_dim,
    );
    for chunk in [1, 7, 64] {
        for past in (0..total).step_by(chunk) {
            let tokens = chunk.min(total - past);
            fixture.lengths = vec![(past, tokens)];
            let q = &q[past * q_row..][..tokens * q_row];
            let out = run_gqa(cpu::level(), pool, shape, &fixture, q);
            assert_eq!(
                out,
                whole[past * out_row..][..tokens * out_row],
                "chunk {chunk}"
            );
        }
    }
}

#[test]
fn keys_of_later_positions_and_other_slots_change_nothing() {
    let shape = cases::shapes()[3];
    let (mut fixture, q) = gqa_fixture(KvType::F32, &shape, &[(70, 3)]);
    let before = run_gqa(cpu::level(), &pools()[1], &shape, &fixture, &q);
    let page = fixture.pages[0][1];
    for slot in 73 - PAGE_TOKENS..PAGE_TOKENS {
        fixture
            .kv
            .write(page, slot, &[f32::NAN; 128], &[f32::NAN; 128]);
    }
    assert_eq!(
        run_gqa(cpu::level(), &pools()[1], &shape, &fixture, &q),
        before
    );
}

#[test]
fn huge_scores_do_not_overflow() {
    let shape = AttentionShape {
        heads: 1,
        kv_heads: 1,
        k_head_dim: 8,
        v_head_dim: 8,
        scale: 1000.0,
        window: None,
    };
    let (fixture, q) = gqa_fixture(KvType::F32, &shape, &[(90, 2)]);
    let out = run_gqa(cpu::level(), &pools()[0], &shape, &fixture, &q);
    assert_close(
        &out,
        &fixture.expected(&shape, &q, None),
        1e-6,
        "huge scores",
    );
}

#[test]
fn rotated_parts_may_lie_inside_larger_heads() {
    let shape = cases::mla_shapes()[1];
    let fixture = Fixture::new(KvType::F32, (80, 0), &[(10, 2)]);
    let mut random = Random::new(4);
    let (latent, full) = (
        random.floats(2 * 5 * 64, 1.0),
        random.floats(2 * 5 * 40, 1.0),
    );
    let packed: Vec<f32> = full.chunks(40).flat_map(|h| h[24..].to_vec()).collect();
    let pool = &pools()[0];
    let run = |rope: &[f32], rope_stride, rope_offset| {
        let query = MlaQuery {
            latent: &latent,
            rope,
            rope_stride,
            rope_offset,
        };
        let mut out = vec![f32::NAN; latent.len()];
        let mut scratch = vec![0.0; shape.scratch_floats(1)];
        mla(
            pool,
            &shape,
            &fixture.kv,
            &fixture.sequences(),
            &query,
            &mut out,
            &mut scratch,
        );
        out
    };
    assert_eq!(run(&full, 40, 24), run(&packed, 16, 0));
}

#[test]
#[should_panic(expected = "has 1 pages for 65 positions")]
fn a_sequence_with_too_few_pages_is_refused() {
    let shape = cases::shapes()[0];
    let (mut fixture, q) = gqa_fixture(KvType::F32, &shape, &[(64, 1)]);
    fixture.pages[0].truncate(1);
    run_gqa(cpu::level(), &pools()[0], &shape, &fixture, &q);
}

#[test]
#[should_panic(expected = "of scratch")]
fn too_little_scratch_is_refused() {
    let shape = cases::shapes()[0];
    let (fixture, q) = gqa_fixture(KvType::F32, &shape, &[(0, 1)]);
    let mut out = vec![0.0; shape.heads * shape.v_head_dim];
    gqa(
        &pools()[1],
        &shape,
        &fixture.kv,
        &fixture.sequences(),
        &GqaQuery {
            rows: &q,
            sinks: None,
        },
        &mut out,
        &mut [0.0; 64],
    );
}
