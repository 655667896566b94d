//! Opens any bytes as a model and uses everything that an open model offers.
//!
//! With a stable compiler, from the directory `ktx-gguf`:
//!
//! ```text
//! cargo install cargo-fuzz
//! mkdir -p fuzz/corpus/open
//! cargo fuzz run --sanitizer none open fuzz/corpus/open fuzz/seeds/open -- -max_len=65536
//! ```
//!
//! `fuzz/make_seeds.py` makes the seeds.
#![no_main]

use ktx_gguf::Gguf;
use libfuzzer_sys::fuzz_target;

/// Larger tensors are not converted: that would test memory bandwidth.
const MOST_ELEMENTS: usize = 1 << 14;

fuzz_target!(|bytes: &[u8]| {
    let Ok(model) = Gguf::from_vec(bytes.to_vec(), "fuzz") else {
        return;
    };
    for (key, value) in model.metadata().iter() {
        let metadata = model.metadata();
        assert!(metadata.get(key) == Some(value) || format!("{value:?}").contains("NaN"));
        let _ = (
            metadata.u32(key),
            metadata.f32(key),
            metadata.str(key),
            metadata.bool(key),
        );
        let _ = (
            metadata.strings(key),
            metadata.i32s(key),
            metadata.f32s(key),
            value.type_name(),
        );
    }
    for info in model.tensors() {
        let tensor = model
            .tensor(&info.name)
            .expect("every listed tensor is there");
        assert_eq!(tensor.bytes().len() as u64, info.bytes);
        assert!(info.offset + info.bytes <= model.file_size());
        if tensor.elements() <= MOST_ELEMENTS {
            assert_eq!(tensor.to_f32().len(), tensor.elements());
        }
        let last = *tensor.shape().last().expect("every tensor has a dimension");
        assert!(tensor.shape().len() == 1 || tensor.slice(last - 1).is_some());
        assert!(
            tensor
                .rows_range(tensor.rows() - 1, tensor.rows())
                .is_some()
        );
    }
});
