//! The same cases as on the host, on a GPU. F32 caches are computed in single precision and held to the
//! host's bound; F16 caches on tensor cores round queries and weights to halves.

use super::cuda::{self, DeviceGqaQuery, DeviceMlaQuery, DeviceNorm, DeviceRotation, RotatedParts};
use super::tests::{Fixture, gqa_fixture, kv_types, mla_expected, windowed};
use super::{AttentionShape, MlaShape, cases};
use crate::cuda::{DeviceBuffer, Gpu, StepInputs, StepValues};
use crate::kv::{KvType, LayerKv, PAGE_TOKENS, PageId, SequenceKv};
use crate::norm;
use crate::rope::cuda::{DeviceRopeTable, rope};
use crate::rope::{RopeConfig, RopeHeads, RopeLayout, RopeTable};
use crate::testing::{GpuMatrix, Random, assert_close};
use crate::workspace::StepCapacity;

/// What rounding to halves costs.
const TENSOR_CORE_BOUND: f64 = 4e-7;
const BOUND: f64 = 1e-11;

/// A step and a cache on a GPU with a fixture's rows; pages as the fixture has them.
struct OnGpu {
    step: StepInputs,
    kv: LayerKv,
}

impl OnGpu {
    /// Writes the rows before the step as a step of their own, then those of the step.
    fn new(gpu: &Gpu, fixture: &Fixture, kv_type: KvType, widths: (usize, usize)) -> Self {
        let all: usize = fixture.sequences().iter().map(SequenceKv::len).sum();
        let pages = fixture
            .sequences()
            .iter()
            .map(|s| s.pages.len())
            .max()
            .unwrap_or(0);
        let capacity = StepCapacity {
            rows: all,
            sequences: fixture.lengths.len(),
            pages: pages + 3,
        };
        let mut step = StepInputs::new(gpu, capacity).unwrap();
        let count = fixture
            .sequences()
            .iter()
            .map(|s| s.pages.len())
            .sum::<usize>()
            + 1;
        let kv = LayerKv::on_gpu(gpu, kv_type, widths.0, widths.1, count).unwrap();
        // What was never written must not count, whatever it is.
        kv.device().unwrap().fill(0xff).unwrap();
        let whole: Vec<SequenceKv<'_>> = fixture
            .sequences()
            .iter()
            .map(|s| SequenceKv {
                past: 0,
                tokens: s.len(),
                ..*s
            })
            .collect();
        upload(gpu, &mut step, &whole);
        let rows = |x: &[Vec<f32>]| GpuMatrix::of(gpu, all, &x.concat());
        let (k, v) = (rows(&fixture.k), rows(&fixture.v));
        let values = (widths.1 > 0).then_some(v.matrix);
        cuda::append(gpu, &kv, step.view(), k.matrix, values).unwrap();
        gpu.synchronize().unwrap();
        upload(gpu, &mut step, &fixture.sequences());
        Self { step, kv }
    }
}

fn upload(gpu: &Gpu, step: &mut StepInputs, sequences: &[SequenceKv<'_>]) {
    let positions: Vec<u32> = sequences
        .iter()
        .flat_map(|s| (s.past..s.len()).map(|p| p as u32))
        .collect();
    step.upload(&StepValues {
        number: 1,
        ids: &positions,
        positions: &positions,
        sequences,
        outputs: &[],
    })
    .unwrap();
    gpu.synchronize().unwrap();
}

fn run_gqa(
    gpu: &Gpu,
    shape: &AttentionShape,
    fixture: &Fixture,
    kv_type: KvType,
    q: &[f32],
    sinks: Option<&[f32]>,
) -> Vec<f32> {
    let widths = (
        shape.kv_heads * shape.k_head_dim,
        shape.kv_heads * shape.v_head_dim,
    );
    let there = OnGpu::new(gpu, fixture, kv_type, widths);
    let rows = GpuMatrix::of(gpu, fixture.tokens(), q);
    let out = GpuMatrix::poisoned(gpu, fixture.tokens(), shape.heads * shape.v_head_dim);
    let scratch = GpuMatrix::poisoned(gpu, 1, shape.device_scratch_floats());
    let sinks = sinks.map(|sinks| DeviceBuffer::upload(gpu, sinks).unwrap());
    let query = DeviceGqaQuery {
        rows: rows.matrix,
        sinks: sinks.as_ref(),
    };
    let (step, sequences) = (there.step.view(), fixture.sequences());
    cuda::gqa(
        gpu,
        shape,
        &there.kv,
        step,
        &sequences,
        &query,
        out.matrix,
        scratch.matrix,
    )
    .unwrap();
    out.values()
}

fn check_gqa(gpu: &Gpu, shape: &AttentionShape, batch: &[(usize, usize)], sinks: Option<&[f32]>) {
    for kv_type in kv_types([shape.k_head_dim, shape.v_head_dim]) {
        let (fixture, q) = gqa_fixture(kv_type, shape, batch);
        let expected = fixture.expected(shape, &q, sinks);
        let out = run_gqa(gpu, shape, &fixture, kv_type, &q, sinks);
        let bound = match kv_type {
            KvType::F32 => BOUND,
            _ => TENSOR_CORE_BOUND,
        };
        let what = format!("{kv_type:?} {shape:?} {batch:?}");
        assert_close(&out, &expected, bound, &what);
    }
}

/// The host's shapes, and those of the tensor-core kernels that are not among them.
fn shapes() -> Vec<AttentionShape> {
    let mut shapes = cases::shapes();
    for (heads, kv_heads, dim) in [(32, 4, 128), (4, 2, 256), (64, 8, 64), (12, 1, 192)] {
        shapes.push(AttentionShape {
            heads,
            kv_heads,
            k_head_dim: dim,
            v_head_dim: if dim == 192 { 128 } else { dim },
            scale: (dim as f32).powf(-0.5),
            window: None,
        });
    }
    shapes
}

#[test]
fn gpu_gqa_agrees_with_f64_at_every_shape_and_batch() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for shape in shapes() {
        for batch in cases::BATCHES {
            check_gqa(&gpu, &shape, batch, None);
        }
    }
}

#[test]
fn gpu_gqa_agrees_with_f64_over_long_contexts() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let shapes = shapes();
    for batch in cases::LONG_BATCHES {
        for shape in [&shapes[0], &shapes[7], &shapes[9], &shapes[10]] {
            check_gqa(&gpu, shape, batch, None);
        }
    }
    let many: Vec<(usize, usize)> = (0..40).map(|i| (i * 37, 1 + i % 3)).collect();
    check_gqa(&gpu, &shapes[9], &many, None);
}

#[test]
fn gpu_windows_show_the_latest_positions_only() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let shapes = shapes();
    for &window in cases::WINDOWS {
        for batch in cases::BATCHES {
            check_gqa(&gpu, &windowed(&shapes[0], window), batch, None);
        }
        for batch in cases::LONG_BATCHES {
            check_gqa(&gpu, &windowed(&shapes[0], window), batch, None);
        }
    }
}

#[test]
fn gpu_sinks_take_their_share_of_the_softmax() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for shape in [&shapes()[0], &windowed(&shapes()[11], 128)] {
        let mut sinks = Random::new(5).floats(shape.heads, 4.0);
        (sinks[0], sinks[1]) = (-300.0, 40.0);
        for batch in cases::BATCHES.iter().chain(cases::LONG_BATCHES) {
            check_gqa(&gpu, shape, batch, Some(&sinks));
        }
    }
}

#[test]
fn gpu_mla_agrees_with_f64_at_every_shape_and_batch() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let mut shapes = cases::mla_shapes();
    shapes.push(MlaShape {
        heads: 128,
        ..shapes[0]
    });
    for shape in &shapes {
        for batch in cases::BATCHES.iter().chain(&cases::LONG_BATCHES[..2]) {
            for kv_type in kv_types([shape.kv_lora, shape.rope]) {
                check_mla(&gpu, shape, batch, kv_type);
            }
        }
    }
}

fn check_mla(gpu: &Gpu, shape: &MlaShape, batch: &[(usize, usize)], kv_type: KvType) {
    let width = shape.kv_lora + shape.rope;
    let mut fixture = Fixture::new(kv_type, (width, 0), batch);
    let tokens = fixture.tokens();
    let q = Random::new(5).floats(tokens * shape.heads * width, 1.0);
    let latent: Vec<f32> = q
        .chunks(width)
        .flat_map(|row| row[..shape.kv_lora].to_vec())
        .collect();
    let there = OnGpu::new(gpu, &fixture, kv_type, (width, 0));
    let expected = mla_expected(shape, &mut fixture, &q);
    let (latent, rope) = (
        GpuMatrix::of(gpu, tokens, &latent),
        GpuMatrix::of(gpu, tokens, &q),
    );
    let out = GpuMatrix::poisoned(gpu, tokens, shape.heads * shape.kv_lora);
    let scratch = GpuMatrix::poisoned(gpu, 1, shape.device_scratch_floats());
    let query = DeviceMlaQuery {
        latent: latent.matrix,
        rope: rope.matrix,
        rope_stride: width,
        rope_offset: shape.kv_lora,
    };
    let (step, sequences) = (there.step.view(), fixture.sequences());
    cuda::mla(
        gpu,
        shape,
        &there.kv,
        step,
        &sequences,
        &query,
        out.matrix,
        scratch.matrix,
    )
    .unwrap();
    let bound = match kv_type {
        KvType::F32 => BOUND,
        _ => TENSOR_CORE_BOUND,
    };
    assert_close(
        &out.values(),
        &expected,
        bound,
        &format!("{kv_type:?} {shape:?} {batch:?}"),
    );
}

/// Rows of the cache as the GPU has them, after an append across pages.
#[test]
fn gpu_append_rounds_as_the_host_does_and_touches_nothing_else() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for (kv_type, widths) in [
        (KvType::F16, (24, 10)),
        (KvType::F32, (7, 0)),
        (KvType::F16, (576, 0)),
        (KvType::Q8_0, (576, 0)),
        (KvType::Q8_0, (96, 1024)),
    ] {
        let fixture = Fixture::new(kv_type, widths, &[(60, 10), (0, 1), (64, 64)]);
        let there = OnGpu::new(&gpu, &fixture, kv_type, widths);
        let mut found = LayerKv::new(kv_type, widths.0, widths.1, there.kv.pages()).unwrap();
        let mut bytes = vec![0; found.page_bytes()];
        for page in (0..there.kv.pages() as u32).map(PageId) {
            there.kv.read_page(page, &mut bytes).unwrap();
            found.write_page(page, &bytes).unwrap();
        }
        let (mut row, mut expected) = ([0.0; 1024], [0.0; 1024]);
        for sequence in fixture.sequences() {
            for position in 0..sequence.pages.len() * PAGE_TOKENS {
                let (page, slot) = (
                    sequence.pages[position / PAGE_TOKENS],
                    position % PAGE_TOKENS,
                );
                let (row_k, expected_k) = (&mut row[..widths.0], &mut expected[..widths.0]);
                found.read_k(page, slot, row_k);
                if position >= sequence.len() {
                    let untouched = row_k.iter().all(|x| x.is_nan());
                    assert!(untouched, "position {position} was written");
                    continue;
                }
                fixture.kv.read_k(page, slot, expected_k);
                assert_eq!(row_k, expected_k, "{kv_type:?} key {position}");
                let (row_v, expected_v) = (&mut row[..widths.1], &mut expected[..widths.1]);
                found.read_v(page, slot, row_v);
                fixture.kv.read_v(page, slot, expected_v);
                assert_eq!(row_v, expected_v, "{kv_type:?} value {position}");
            }
        }
    }
}

/// Cache and queries, by one launch or by one for each step.
fn bytes_and_queries(kv: &LayerKv, q: &GpuMatrix) -> (Vec<u8>, Vec<f32>) {
    (
        kv.device().unwrap().read(0, kv.bytes()).unwrap(),
        q.values(),
    )
}

/// How many bytes differ: squares are added in another order, which moves few values by an ulp.
fn differing(a: &[u8], b: &[u8]) -> usize {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).filter(|(a, b)| a != b).count()
}

#[test]
fn gpu_inputs_of_grouped_attention_equal_norm_rotation_and_append() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let typed = |shape: AttentionShape| {
        kv_types([shape.k_head_dim, shape.v_head_dim]).map(move |kv_type| (shape, kv_type))
    };
    for (index, (shape, kv_type)) in shapes()
        .into_iter()
        .filter(|s| s.k_head_dim % 2 == 0)
        .flat_map(typed)
        .enumerate()
    {
        let layout = [RopeLayout::Half, RopeLayout::Interleaved][index / 2 % 2];
        let widths = (
            shape.kv_heads * shape.k_head_dim,
            shape.kv_heads * shape.v_head_dim,
        );
        let fixture = Fixture::new(kv_type, widths, &[(60, 7), (0, 1), (3, 2)]);
        let tokens = fixture.tokens();
        let mut random = Random::new(9);
        let mut rows = |width: usize| random.floats(tokens * width, 2.0);
        let values = [
            rows(shape.heads * shape.k_head_dim),
            rows(widths.0),
            rows(widths.1),
        ];
        let norms = [(); 2].map(|()| random.floats(shape.k_head_dim, 2.0));
        let norms = norms.map(|n| DeviceBuffer::upload(&gpu, &n).unwrap());
        let table = RopeTable::new(&RopeConfig::plain(shape.k_head_dim, 1e4), 100).unwrap();
        let table = DeviceRopeTable::upload(&gpu, &table, 100).unwrap();
        for with_norms in [true, false] {
            let apart = OnGpu::new(&gpu, &fixture, kv_type, widths);
            let step = apart.step.view();
            let [q, k, v] = values.each_ref().map(|x| GpuMatrix::of(&gpu, tokens, x));
            for (x, weight, heads) in [
                (&q, &norms[0], shape.heads),
                (&k, &norms[1], shape.kv_heads),
            ] {
                let places = norm::NormRows::heads(tokens, heads, shape.k_head_dim);
                if with_norms {
                    norm::cuda::rms_norm_in_place(&gpu, x.matrix, &places, weight, 1e-6).unwrap();
                }
                let span = RopeHeads::contiguous(heads, shape.k_head_dim, 0);
                rope(&gpu, &table, layout, &span, step.positions(), x.matrix).unwrap();
            }
            cuda::append(&gpu, &apart.kv, step, k.matrix, Some(v.matrix)).unwrap();
            let want = bytes_and_queries(&apart.kv, &q);

            let joined = OnGpu::new(&gpu, &fixture, kv_type, widths);
            let [q, k, v] = values.each_ref().map(|x| GpuMatrix::of(&gpu, tokens, x));
            let norms = norms
                .each_ref()
                .map(|weight| DeviceNorm { weight, eps: 1e-6 });
            cuda::gqa_inputs(
                &gpu,
                &shape,
                &joined.kv,
                joined.step.view(),
                [q.matrix, k.matrix, v.matrix],
                with_norms.then_some(norms),
                DeviceRotation {
                    table: &table,
                    layout,
                },
            )
            .unwrap();
            let got = bytes_and_queries(&joined.kv, &q);
            let expected: Vec<f64> = want.1.iter().map(|&x| x.into()).collect();
            assert_close(&got.1, &expected, 1e-13, &format!("{shape:?}"));
            let few = if with_norms { want.0.len() / 20 } else { 0 };
            assert!(differing(&got.0, &want.0) <= few, "{shape:?}");
        }
    }
}

#[test]
fn gpu_inputs_of_latent_attention_equal_norm_rotation_and_append() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let typed = |shape: MlaShape| {
        kv_types([shape.kv_lora, shape.rope]).map(move |kv_type| (shape, kv_type))
    };
    for (shape, kv_type) in cases::mla_shapes()
        .into_iter()
        .filter(|s| s.rope % 2 == 0 && s.rope > 0)
        .flat_map(typed)
    {
        let (width, layout) = (shape.kv_lora + shape.rope, RopeLayout::Interleaved);
        let fixture = Fixture::new(kv_type, (width, 0), &[(60, 7), (0, 1), (3, 2)]);
        let (tokens, nope) = (fixture.tokens(), 5);
        let stride = nope + shape.rope;
        let mut random = Random::new(10);
        let values = [shape.heads * stride, width].map(|width| random.floats(tokens * width, 2.0));
        let weight = DeviceBuffer::upload(&gpu, &random.floats(shape.kv_lora, 2.0)).unwrap();
        let table = RopeTable::new(&RopeConfig::plain(shape.rope, 1e4), 100).unwrap();
        let table = DeviceRopeTable::upload(&gpu, &table, 100).unwrap();

        let apart = OnGpu::new(&gpu, &fixture, kv_type, (width, 0));
        let positions = apart.step.view().positions();
        let [q, rows] = values.each_ref().map(|x| GpuMatrix::of(&gpu, tokens, x));
        let first = norm::NormRows {
            tokens,
            token_stride: width,
            rows: 1,
            row_stride: width,
            offset: 0,
        };
        norm::cuda::rms_norm_in_place(&gpu, rows.matrix, &first, &weight, 1e-6).unwrap();
        let shared = RopeHeads::contiguous(1, width, shape.kv_lora);
        rope(&gpu, &table, layout, &shared, positions, rows.matrix).unwrap();
        let heads = RopeHeads::contiguous(shape.heads, stride, nope);
        rope(&gpu, &table, layout, &heads, positions, q.matrix).unwrap();
        cuda::append(&gpu, &apart.kv, apart.step.view(), rows.matrix, None).unwrap();
        let want = bytes_and_queries(&apart.kv, &q);

        let joined = OnGpu::new(&gpu, &fixture, kv_type, (width, 0));
        let [q, rows] = values.each_ref().map(|x| GpuMatrix::of(&gpu, tokens, x));
        let parts = RotatedParts {
            stride,
            offset: nope,
        };
        let (rotation, step) = (
            DeviceRotation {
                table: &table,
                layout,
            },
            joined.step.view(),
        );
        let kv = &joined.kv;
        cuda::mla_inputs(
            &gpu,
            &shape,
            kv,
            step,
            q.matrix,
            parts,
            rows.matrix,
            DeviceNorm {
                weight: &weight,
                eps: 1e-6,
            },
            rotation,
        )
        .unwrap();
        let got = bytes_and_queries(&joined.kv, &q);
        assert_eq!(got.1, want.1, "{shape:?}");
        assert!(differing(&got.0, &want.0) <= want.0.len() / 20, "{shape:?}");
    }
}
