//! What holds for all files: what is written is read back, and damage never does worse than an error.

use ktx_gguf::{Array, GgmlType, Gguf, GgufWriter, Value, random_blocks};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use crate::allocation::largest_allocation;

fn array() -> impl Strategy<Value = Array> {
    let flat = prop_oneof![
        vec(any::<u8>(), 0..20).prop_map(Array::U8),
        vec(any::<i8>(), 0..20).prop_map(Array::I8),
        vec(any::<u16>(), 0..20).prop_map(Array::U16),
        vec(any::<i16>(), 0..20).prop_map(Array::I16),
        vec(any::<u32>(), 0..20).prop_map(Array::U32),
        vec(any::<i32>(), 0..20).prop_map(Array::I32),
        vec(any::<f32>(), 0..20).prop_map(Array::F32),
        vec(any::<bool>(), 0..20).prop_map(Array::Bool),
        vec(any::<String>(), 0..5).prop_map(Array::String),
        vec(any::<u64>(), 0..20).prop_map(Array::U64),
        vec(any::<i64>(), 0..20).prop_map(Array::I64),
        vec(any::<f64>(), 0..20).prop_map(Array::F64),
    ];
    flat.prop_recursive(3, 20, 4, |inner| vec(inner, 0..4).prop_map(Array::Array))
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<f32>().prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        any::<String>().prop_map(Value::String),
        array().prop_map(Value::Array),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<f64>().prop_map(Value::F64),
    ]
}

/// Type, blocks per row, and the other dimensions of a tensor.
fn tensor() -> impl Strategy<Value = (GgmlType, Vec<usize>)> {
    (0..GgmlType::ALL.len(), 1..4_usize, vec(1..4_usize, 0..4)).prop_map(
        |(ty, blocks, mut shape)| {
            let ty = GgmlType::ALL[ty];
            shape.insert(0, blocks * ty.block_len());
            (ty, shape)
        },
    )
}

prop_compose! {
    fn writer()(
        alignment in 0..8_u32,
        entries in btree_map("[a-z]{1,8}(\\.[a-z_]{1,8}){0,2}", value(), 0..8),
        tensors in btree_map("\\PC{1,20}", tensor(), 0..6),
        seed in any::<u64>(),
    ) -> (GgufWriter, Vec<(String, Value)>, Vec<(String, GgmlType, Vec<usize>, Vec<u8>)>) {
        let mut writer = GgufWriter::new();
        writer.alignment(1 << alignment).unwrap();
        for (key, value) in &entries {
            writer.kv(key, value.clone());
        }
        let mut written = Vec::new();
        for (name, (ty, shape)) in tensors {
            let blocks = shape.iter().product::<usize>() / ty.block_len();
            let bytes = random_blocks(ty, blocks, seed);
            writer.tensor(&name, ty, &shape, bytes.clone()).unwrap();
            written.push((name, ty, shape, bytes));
        }
        (writer, entries.into_iter().collect(), written)
    }
}

/// Uses everything that an open model offers.
fn use_all(model: &Gguf) {
    for info in model.tensors() {
        let tensor = model.tensor(&info.name).unwrap();
        assert_eq!(tensor.bytes().len() as u64, info.bytes);
        if tensor.elements() < 1 << 16 {
            assert_eq!(tensor.to_f32().len(), tensor.elements());
        }
        assert!(tensor.shape().len() < 2 || tensor.slice(0).is_some());
        assert!(tensor.rows_range(0, tensor.rows()).is_some());
    }
    for (key, value) in model.metadata().iter() {
        assert!(model.metadata().get(key).is_some());
        let _ = (
            value.type_name(),
            model.metadata().u32(key),
            model.metadata().f32s(key),
        );
    }
}

/// Floats that are NaN are not equal to themselves; their text is.
fn same(a: &Value, b: &Value) -> bool {
    a == b || format!("{a:?}") == format!("{b:?}")
}

/// Opening costs no more memory than a few times the file, whatever the file says.
fn open_within_memory(bytes: Vec<u8>) -> Option<Gguf> {
    let length = bytes.len();
    let (model, largest) = largest_allocation(|| Gguf::from_vec(bytes, "damaged").ok());
    assert!(
        largest <= 4096 + 16 * length,
        "an allocation of {largest} bytes for a file of {length}"
    );
    model
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn what_is_written_is_read_back((writer, entries, tensors) in writer()) {
        let model = Gguf::from_vec(writer.to_bytes(), "memory").unwrap();
        prop_assert_eq!(model.metadata().len(), entries.len() + 1);
        for ((key, value), (read_key, read)) in entries.iter().zip(model.metadata().iter().skip(1)) {
            prop_assert_eq!(key, read_key);
            prop_assert!(same(value, read), "{:?} {:?}", value, read);
        }
        prop_assert_eq!(model.tensors().len(), tensors.len());
        for (name, ty, shape, bytes) in &tensors {
            let tensor = model.tensor(name).unwrap();
            prop_assert_eq!(tensor.ty(), *ty);
            prop_assert_eq!(tensor.shape(), &shape[..]);
            prop_assert!(tensor.bytes() == bytes);
        }
        use_all(&model);
    }

    #[test]
    fn changed_bytes_never_panic(
        (writer, _, _) in writer(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = writer.to_bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(model) = open_within_memory(bytes) {
            use_all(&model);
        }
    }

    #[test]
    fn extreme_numbers_anywhere_never_panic(
        (writer, _, _) in writer(),
        at in any::<prop::sample::Index>(),
        number in prop_oneof![
            Just(u64::MAX), Just(1 << 63), Just(1 << 62), Just(1 << 32), Just(u64::from(u32::MAX)), Just(0), 0..300_u64,
        ],
        width in prop_oneof![Just(4_usize), Just(8)],
    ) {
        let mut bytes = writer.to_bytes();
        let at = at.index(bytes.len() - 8);
        bytes[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
        if let Some(model) = open_within_memory(bytes) {
            use_all(&model);
        }
    }

    #[test]
    fn cut_and_extended_files_never_panic(
        (writer, _, _) in writer(),
        length in any::<prop::sample::Index>(),
        tail in vec(any::<u8>(), 0..40),
    ) {
        let mut bytes = writer.to_bytes();
        bytes.truncate(length.index(bytes.len()));
        bytes.extend(tail);
        if let Some(model) = open_within_memory(bytes) {
            use_all(&model);
        }
    }

    #[test]
    fn random_bytes_after_a_good_start_never_panic(tail in vec(any::<u8>(), 0..400), version in 2..4_u8) {
        let bytes = [&b"GGUF"[..], &[version, 0, 0, 0], &tail].concat();
        if let Some(model) = open_within_memory(bytes) {
            use_all(&model);
        }
    }
}
