//! Metadata: all value types, and typed access.

use ktx_gguf::{Array, Gguf, GgufError, GgufWriter, Metadata, Value};

use crate::raw::{Raw, U32};

const PYTHON: &[u8] = include_bytes!("../fixtures/metadata.gguf");

fn metadata(entries: &[(&str, Value)]) -> Metadata {
    let entries = entries
        .iter()
        .map(|(key, value)| ((*key).to_owned(), value.clone()))
        .collect();
    Metadata::from_entries("model.gguf", entries).unwrap()
}

#[test]
fn every_value_type_that_python_writes_is_read() {
    let model = Gguf::from_static(PYTHON, "metadata.gguf").unwrap();
    assert_eq!(model.version(), 3);
    let metadata = model.metadata();
    let expected: &[(&str, Value)] = &[
        ("general.architecture", "test".into()),
        ("general.alignment", 64_u32.into()),
        ("test.u8", 200_u8.into()),
        ("test.i8", (-100_i8).into()),
        ("test.u16", 60_000_u16.into()),
        ("test.i16", (-30_000_i16).into()),
        ("test.u32", 4_000_000_000_u32.into()),
        ("test.i32", (-2_000_000_000).into()),
        ("test.f32", 0.5_f32.into()),
        ("test.bool", true.into()),
        ("test.string", "Grüße, 世界".into()),
        ("test.u64", ((1_u64 << 63) + 1).into()),
        ("test.i64", (-(1_i64 << 62)).into()),
        ("test.f64", 0.1_f64.into()),
        ("test.array.u8", vec![0_u8, 1, 255].into()),
        ("test.array.i8", vec![-128_i8, 127].into()),
        ("test.array.u16", vec![65_535_u16].into()),
        ("test.array.i16", vec![-32_768_i16, 5].into()),
        ("test.array.u32", vec![7_u32, 8, 9].into()),
        ("test.array.i32", vec![-1, 0, 1].into()),
        ("test.array.f32", vec![1.5_f32, -2.25].into()),
        ("test.array.bool", vec![true, false, true].into()),
        (
            "test.array.string",
            vec!["a".to_owned(), String::new(), "ß".to_owned()].into(),
        ),
        ("test.array.u64", vec![u64::MAX].into()),
        ("test.array.i64", vec![i64::MIN].into()),
        ("test.array.f64", vec![1e300, -0.0].into()),
        (
            "test.array.nested",
            vec![Array::I32(vec![1, 2]), Array::I32(vec![3])].into(),
        ),
    ];
    for (key, value) in expected {
        assert_eq!(metadata.get(key), Some(value), "{key}");
    }
    assert_eq!(metadata.len(), expected.len());
    assert!(
        metadata
            .iter()
            .zip(expected)
            .take(2)
            .all(|((key, _), (expected, _))| key == *expected)
    );
}

#[test]
fn tensors_that_python_writes_are_read() {
    let model = Gguf::from_static(PYTHON, "metadata.gguf").unwrap();
    let tensor = model.tensor("f32.3d").unwrap();
    assert_eq!(tensor.shape(), [4, 3, 2]);
    assert_eq!(
        tensor.to_f32(),
        (0..24).map(|value| value as f32).collect::<Vec<_>>()
    );
    assert_eq!(model.tensor("i32").unwrap().to_f32(), [1.0, -2.0, 3.0]);
    assert_eq!(model.tensor("f64").unwrap().to_f32(), [0.1, 1e10]);
    assert_eq!(model.tensor("q8_0").unwrap().shape(), [64, 3]);
    assert!(model.tensors().all(|tensor| tensor.offset % 64 == 0));
    let names: Vec<_> = model.tensors().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["f32.3d", "f16", "i32", "f64", "q8_0"]);
}

#[test]
fn version_2_is_read() {
    let model = Raw::version(2, 0, 1).key("a", U32).u32(5).open().unwrap();
    assert_eq!(model.version(), 2);
    assert_eq!(model.metadata().required_u32("a").unwrap(), 5);
}

#[test]
fn any_integer_type_that_fits_is_accepted() {
    let metadata = metadata(&[
        ("u8", 7_u8.into()),
        ("i64", 8_i64.into()),
        ("negative", (-1_i32).into()),
        ("large", u64::MAX.into()),
        ("f32", 1.5_f32.into()),
        ("f64", 0.25_f64.into()),
        ("array", vec![1_u64, 2].into()),
        ("floats", vec![0.5_f64].into()),
        ("mixed", vec![-1_i8, 2].into()),
        ("flags", vec![true, false].into()),
    ]);
    assert_eq!(metadata.u32("u8").unwrap(), Some(7));
    assert_eq!(metadata.usize("i64").unwrap(), Some(8));
    assert_eq!(metadata.i64("negative").unwrap(), Some(-1));
    assert_eq!(metadata.u64("large").unwrap(), Some(u64::MAX));
    assert_eq!(metadata.f32("u8").unwrap(), Some(7.0));
    assert_eq!(metadata.f32("f64").unwrap(), Some(0.25));
    assert_eq!(metadata.f64("f32").unwrap(), Some(1.5));
    assert_eq!(metadata.i32s("array").unwrap(), Some(vec![1, 2]));
    assert_eq!(metadata.f32s("array").unwrap(), Some(vec![1.0, 2.0]));
    assert_eq!(metadata.f32s("floats").unwrap(), Some(vec![0.5]));
    assert_eq!(metadata.required_i32s("mixed").unwrap(), [-1, 2]);
    assert_eq!(metadata.required_bools("flags").unwrap(), [true, false]);
    assert!(metadata.u32("negative").is_err());
    assert!(metadata.i64("large").is_err());
    assert!(metadata.u32s("mixed").is_err());
    assert!(metadata.u64("f32").is_err());
    assert_eq!(metadata.u32("absent").unwrap(), None);
    assert_eq!(metadata.strings("absent").unwrap(), None);
}

#[test]
fn wrong_types_name_key_found_and_expected() {
    let metadata = metadata(&[
        ("llama.block_count", "two".into()),
        ("tokens", vec![1_u8].into()),
    ]);
    let text = |error: GgufError| error.to_string();
    assert_eq!(
        text(metadata.u32("llama.block_count").unwrap_err()),
        "model.gguf: the metadata key `llama.block_count` is string \"two\"; expected an integer from 0 to 4294967295"
    );
    assert_eq!(
        text(metadata.strings("tokens").unwrap_err()),
        "model.gguf: the metadata key `tokens` is array of u8 (1 elements); expected an array of strings"
    );
    assert_eq!(
        text(metadata.required_f32("rope").unwrap_err()),
        "model.gguf: the metadata key `rope` is missing"
    );
    assert!(metadata.required_str("tokens").is_err());
    assert!(metadata.bool("llama.block_count").is_err());
}

#[test]
fn writer_makes_the_same_bytes_as_python() {
    let model = Gguf::from_static(PYTHON, "metadata.gguf").unwrap();
    let mut writer = GgufWriter::new();
    for (key, value) in model.metadata().iter() {
        match key {
            "general.alignment" => _ = writer.alignment(64).unwrap(),
            _ => _ = writer.kv(key, value.clone()),
        }
    }
    for info in model.tensors() {
        let bytes = model.tensor(&info.name).unwrap().bytes().to_vec();
        writer
            .tensor(&info.name, info.ty, &info.shape, bytes)
            .unwrap();
    }
    assert!(writer.to_bytes() == PYTHON);
}

#[test]
fn every_seed_of_the_fuzz_target_is_a_good_file() {
    let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/open");
    let mut count = 0;
    for seed in std::fs::read_dir(seeds).unwrap() {
        let path = seed.unwrap().path();
        if let Err(error) = Gguf::open(&path) {
            panic!("{error}");
        }
        count += 1;
    }
    assert!(count >= 4);
}

#[test]
fn written_values_replace_earlier_ones() {
    let mut writer = GgufWriter::new();
    writer.kv("a", 1_u32).kv("b", "x").kv("a", 2_u32);
    let model = Gguf::from_vec(writer.to_bytes(), "memory").unwrap();
    assert_eq!(model.metadata().len(), 2);
    assert_eq!(model.metadata().required_u32("a").unwrap(), 2);
}
