//! Views of tensors.

use ktx_gguf::{GgmlType, Gguf, GgufError, GgufWriter, Tensor, random_blocks};

fn counting(shape: &[usize]) -> Tensor {
    let elements: usize = shape.iter().product();
    Tensor::from_f32(
        "t",
        shape,
        (0..elements).map(|value| value as f32).collect(),
    )
}

#[test]
fn slice_is_one_entry_of_the_outermost_dimension() {
    let tensor = counting(&[4, 3, 2]);
    assert_eq!(
        (tensor.row_len(), tensor.rows(), tensor.elements()),
        (4, 6, 24)
    );
    let slice = tensor.slice(1).unwrap();
    assert_eq!(slice.shape(), [4, 3]);
    assert_eq!(
        slice.to_f32(),
        (12..24).map(|value| value as f32).collect::<Vec<_>>()
    );
    assert_eq!(slice.slice(2).unwrap().to_f32(), [20.0, 21.0, 22.0, 23.0]);
    assert!(tensor.slice(2).is_none());
    assert!(counting(&[4]).slice(0).is_none());
}

#[test]
fn rows_range_counts_rows_over_all_outer_dimensions() {
    let tensor = counting(&[4, 3, 2]);
    let rows = tensor.rows_range(2, 4).unwrap();
    assert_eq!(rows.shape(), [4, 2]);
    assert_eq!(
        rows.to_f32(),
        (8..16).map(|value| value as f32).collect::<Vec<_>>()
    );
    assert!(tensor.rows_range(3, 3).unwrap().bytes().is_empty());
    assert!(tensor.rows_range(4, 3).is_none());
    assert!(tensor.rows_range(0, 7).is_none());
}

#[test]
fn reshape_keeps_elements_and_whole_blocks() {
    let tensor = counting(&[4, 6]);
    assert_eq!(tensor.reshape(&[4, 2, 3]).unwrap().shape(), [4, 2, 3]);
    assert_eq!(tensor.reshape(&[24]).unwrap().to_f32(), tensor.to_f32());
    assert!(tensor.reshape(&[4, 5]).is_none());
    assert!(tensor.reshape(&[]).is_none());
    assert!(tensor.reshape(&[usize::MAX, usize::MAX]).is_none());
    let bytes = random_blocks(GgmlType::Q8_0, 6, 1);
    let tensor = Tensor::from_bytes("q", GgmlType::Q8_0, &[64, 3], bytes).unwrap();
    assert_eq!(tensor.reshape(&[32, 6]).unwrap().to_f32(), tensor.to_f32());
    assert!(tensor.reshape(&[16, 12]).is_none());
}

#[test]
fn quantized_rows_are_cut_at_blocks() {
    let bytes = random_blocks(GgmlType::Q4_K, 12, 5);
    let tensor =
        Tensor::from_bytes("experts", GgmlType::Q4_K, &[512, 2, 3], bytes.clone()).unwrap();
    let expert = tensor.slice(2).unwrap();
    assert_eq!(expert.name(), "experts");
    assert_eq!(expert.bytes(), &bytes[8 * 144..]);
    assert_eq!(expert.rows_range(1, 2).unwrap().bytes(), &bytes[10 * 144..]);
    assert_eq!(expert.to_f32(), tensor.to_f32()[2 * 1024..]);
}

#[test]
fn tensors_start_anywhere_in_memory() {
    let mut writer = GgufWriter::new();
    writer.alignment(1).unwrap();
    let values = [0.5_f32, -1.0, 2.0];
    writer.tensor("a", GgmlType::I8, &[1], vec![7]).unwrap();
    writer
        .tensor(
            "b",
            GgmlType::F32,
            &[3],
            bytemuck::cast_slice(&values).to_vec(),
        )
        .unwrap();
    let model = Gguf::from_vec(writer.to_bytes(), "memory").unwrap();
    let [a, b] = [
        model.tensor_info("a").unwrap(),
        model.tensor_info("b").unwrap(),
    ];
    assert_eq!(b.offset, a.offset + 1);
    assert_eq!(model.tensor("b").unwrap().to_f32(), values);
    assert!(model.tensor("c").is_none());
}

#[test]
fn bytes_that_do_not_fit_the_shape_are_refused() {
    let error = Tensor::from_bytes("w", GgmlType::Q8_0, &[32, 2], vec![0; 34]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "w: Q8_0 of shape [32, 2] takes 68 bytes, not 34"
    );
    let error = Tensor::from_bytes("w", GgmlType::Q8_0, &[33], vec![0; 34]).unwrap_err();
    assert!(matches!(error, GgufError::InvalidShape { .. }), "{error}");
    let error = Tensor::from_bytes("w", GgmlType::F32, &[usize::MAX, 2], vec![]).unwrap_err();
    assert!(error.to_string().contains("its size overflows"), "{error}");
    assert!(Tensor::from_bytes("w", GgmlType::F32, &[], vec![]).is_err());
}

#[test]
#[should_panic(expected = "w: shape [2, 2] does not hold 3 values")]
fn values_that_do_not_fit_the_shape_panic() {
    Tensor::from_f32("w", &[2, 2], vec![0.0; 3]);
}

#[test]
fn writer_refuses_what_readers_refuse() {
    let mut writer = GgufWriter::new();
    let f32 = GgmlType::F32;
    assert!(writer.tensor("a", f32, &[1], vec![0; 4]).is_ok());
    let text = |result: Result<&mut GgufWriter, GgufError>| result.unwrap_err().to_string();
    assert!(text(writer.tensor("a", f32, &[1], vec![0; 4])).contains("two tensors named `a`"));
    assert!(text(writer.tensor("", f32, &[1], vec![0; 4])).contains("name has 0 bytes"));
    assert!(text(writer.tensor("b", f32, &[0], vec![])).contains("a dimension is zero"));
    assert!(text(writer.tensor("b", f32, &[1; 5], vec![0; 4])).contains("at most four dimensions"));
    assert!(text(writer.tensor("b", f32, &[2], vec![0; 4])).contains("takes 8 bytes, not 4"));
    assert!(text(writer.alignment(48)).contains("the alignment 48 is not a power of two"));
    assert!(text(writer.alignment(0)).contains("the alignment 0"));
}
