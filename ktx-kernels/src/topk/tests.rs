use super::cuda::{Argmax, TopK};
use crate::cuda::{DeviceBuffer, Gpu};
use crate::testing::{GpuMatrix, Random};

/// Rows with ties, NaN, zeros of both signs and infinities.
fn rows(rows: usize, width: usize) -> Vec<f32> {
    let mut random = Random::new((rows + width) as u64);
    let mut x = random.floats(rows * width, 8.0);
    for (i, x) in x.iter_mut().enumerate() {
        match i % 97 {
            3 => *x = f32::NAN,
            5 => *x = f32::NEG_INFINITY,
            7 => *x = -0.0,
            8 => *x = 0.0,
            // Few values, so that many are equal.
            _ if i % 2 == 0 => *x = x.round(),
            _ => {}
        }
    }
    x
}

/// Columns in descending order of value, NaN last, the lower of equal ones first.
fn order(row: &[f32]) -> Vec<u32> {
    let rank = |x: f32| {
        if x.is_nan() {
            f64::NEG_INFINITY
        } else {
            f64::from(x).max(-1e300) + 0.0
        }
    };
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    order.sort_by(|a, b| {
        let (x, y) = (rank(row[*a as usize]), rank(row[*b as usize]));
        y.total_cmp(&x).then(a.cmp(b))
    });
    order
}

#[test]
fn gpu_argmax_is_the_first_of_the_largest() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let argmax = Argmax::new(&gpu, 5).unwrap();
    for width in [1, 2, 31, 257, 2048, 32_000, 151_936] {
        let x = rows(5, width);
        let a = GpuMatrix::of(&gpu, 5, &x);
        let ids = DeviceBuffer::upload(&gpu, &[u32::MAX; 5]).unwrap();
        argmax.forward(a.matrix, ids.address()).unwrap();
        let want: Vec<u32> = x.chunks(width).map(|row| order(row)[0]).collect();
        assert_eq!(ids.read::<u32>(0, 5).unwrap(), want, "width {width}");
    }
    let a = GpuMatrix::of(&gpu, 1, &[f32::NAN; 300]);
    let ids = DeviceBuffer::upload(&gpu, &[u32::MAX]).unwrap();
    argmax.forward(a.matrix, ids.address()).unwrap();
    assert_eq!(ids.read::<u32>(0, 1).unwrap(), [0]);
}

#[test]
fn gpu_top_k_is_in_descending_order() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for (width, k) in [
        (1, 1),
        (40, 40),
        (2048, 7),
        (2049, 1024),
        (32_000, 64),
        (151_936, 40),
        (151_936, 1024),
    ] {
        let x = rows(3, width);
        let a = GpuMatrix::of(&gpu, 3, &x);
        let top = TopK::new(&gpu, 3, width, k).unwrap();
        let [ids, values] = [(); 2].map(|()| GpuMatrix::poisoned(&gpu, 3, k));
        top.forward(a.matrix, ids.buffer.address(), values.buffer.address())
            .unwrap();
        let (ids, values) = (ids.bits(), values.values());
        for (r, row) in x.chunks(width).enumerate() {
            let (ids, values) = (&ids[r * k..][..k], &values[r * k..][..k]);
            assert_eq!(ids, &order(row)[..k], "{k} of {width}");
            for (id, value) in ids.iter().zip(values) {
                let want = row[*id as usize];
                assert!(
                    *value == want || value.is_nan() && want.is_nan(),
                    "{value} for {want}"
                );
            }
        }
    }
}
