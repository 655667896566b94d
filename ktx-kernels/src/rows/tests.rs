use ktx_gguf::{GgmlType, dequantize_row, random_blocks};

use super::cuda::{Columns, EmbeddingTable, copy_columns, embeds, gather_rows};
use crate::cuda::{DeviceBuffer, Gpu};
use crate::testing::{GpuMatrix, Random};

#[test]
fn gpu_embedding_has_the_bits_of_the_reference_for_every_type() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let (rows, width) = (37, 768);
    let ids = [0u32, 36, 5, 5, 17, 37, u32::MAX];
    let on_gpu = DeviceBuffer::upload(&gpu, &ids).unwrap();
    let types = (0..=255).filter_map(GgmlType::from_id);
    let mut tried = 0;
    for ty in types.filter(|ty| embeds(*ty)) {
        let bytes = random_blocks(ty, rows * width / ty.block_len(), 7);
        let mut table = vec![0.0; rows * width];
        dequantize_row(ty, &bytes, &mut table).unwrap();
        let embedding = EmbeddingTable::upload(&gpu, ty, rows, width, &bytes)
            .unwrap()
            .unwrap();
        let out = GpuMatrix::poisoned(&gpu, ids.len(), width);
        embedding.forward(on_gpu.address(), out.matrix).unwrap();
        for (id, row) in ids.iter().zip(out.values().chunks(width)) {
            match table.chunks(width).nth(*id as usize) {
                Some(want) => assert!(row == want, "{ty:?} row {id}"),
                None => assert!(row.iter().all(|x| x.is_nan()), "{ty:?} row {id}"),
            }
        }
        tried += 1;
    }
    assert_eq!(tried, 16);
}

#[test]
fn gpu_rows_are_gathered_in_any_order() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for width in [1, 5, 64, 7168] {
        let x = Random::new(3).floats(9 * width, 1.0);
        let index = [8u32, 0, 0, 3];
        let (a, out) = (
            GpuMatrix::of(&gpu, 9, &x),
            GpuMatrix::poisoned(&gpu, 4, width),
        );
        let on_gpu = DeviceBuffer::upload(&gpu, &index).unwrap();
        gather_rows(&gpu, a.matrix, on_gpu.address(), out.matrix).unwrap();
        let want: Vec<f32> = index
            .iter()
            .flat_map(|i| x[*i as usize * width..][..width].to_vec())
            .collect();
        assert_eq!(out.values(), want);
    }
}

#[test]
fn gpu_columns_are_copied_and_the_rest_is_left() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let x = Random::new(4).floats(6 * 20, 1.0);
    let y = Random::new(5).floats(6 * 31, 1.0);
    let (a, b) = (GpuMatrix::of(&gpu, 6, &x), GpuMatrix::of(&gpu, 6, &y));
    let (from, to) = (
        Columns {
            matrix: a.matrix,
            first: 3,
        },
        Columns {
            matrix: b.matrix,
            first: 11,
        },
    );
    copy_columns(&gpu, from, to, 17).unwrap();
    let mut want = y;
    for (row, to) in want.chunks_mut(31).enumerate() {
        to[11..28].copy_from_slice(&x[row * 20 + 3..][..17]);
    }
    assert_eq!(b.values(), want);
}
