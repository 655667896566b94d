//! Opens any bytes as a safetensors file and uses everything that an open file offers. Run as `open`; the files of
//! `tests/fixtures` are the seeds:
//!
//! ```text
//! cargo fuzz run --sanitizer none safetensors fuzz/corpus/safetensors tests/fixtures/sharded -- -max_len=65536
//! ```
#![no_main]

use ktx_gguf::Safetensors;
use libfuzzer_sys::fuzz_target;

/// Larger tensors are not converted: that would test memory bandwidth.
const MOST_ELEMENTS: usize = 1 << 14;

fuzz_target!(|bytes: &[u8]| {
    let Ok(set) = Safetensors::from_vec(bytes.to_vec(), "fuzz") else {
        return;
    };
    assert!(set.metadata(0).count() <= bytes.len());
    for entry in set.tensors() {
        assert_eq!(set.bytes(entry).len() as u64, entry.bytes);
        assert!(
            set.entry(&entry.name)
                .is_some_and(|found| found.offset == entry.offset)
        );
        if let Ok(Some(tensor)) = set.tensor(&entry.name)
            && tensor.elements() <= MOST_ELEMENTS
        {
            assert_eq!(tensor.to_f32().len(), tensor.elements());
            assert!(tensor.rows_range(0, tensor.rows()).is_some());
        }
        let _ = set.ggml_tensor(&entry.name, &[256, 1]);
    }
});
