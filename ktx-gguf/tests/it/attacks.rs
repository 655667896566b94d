//! Hostile files. Each test puts one together in the manner of a published vulnerability of GGUF readers, or of a
//! weakness that such readers have had, and checks that the error names the field, its place and the limit, and
//! that no memory was taken on the file's word.

use ktx_gguf::{GgmlType, Gguf};

use crate::allocation::largest_allocation;
use crate::raw::{ARRAY, Raw, STRING, U32};

const F32: u32 = GgmlType::F32.id();
const U8: u32 = 0;
const U64: u32 = 10;

/// Opening must fail with a text that has all of `parts`, and without any large allocation.
fn refused(raw: Raw, parts: &[&str]) {
    let bytes = raw.0.len();
    let (result, largest) = largest_allocation(|| raw.open());
    let error = result.expect_err("the file must be refused").to_string();
    for part in parts {
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
    assert!(
        largest <= 4096 + 8 * bytes,
        "an allocation of {largest} bytes for a file of {bytes}"
    );
}

/// CVE-2024-21802: a tensor with more dimensions than the reader's fixed array holds overflows the heap.
#[test]
fn more_than_four_dimensions() {
    let shape = [1; 5];
    refused(
        Raw::new(1, 0).tensor("t", &shape, F32, 0).data(32, 4),
        &["raw.gguf: tensor_infos[0].n_dimensions at byte 33 is 5; expected 1 to 4"],
    );
    refused(
        Raw::new(1, 0).string("t").u32(u32::MAX).data(32, 64),
        &["tensor_infos[0].n_dimensions at byte 33 is 4294967295; expected 1 to 4"],
    );
}

/// CVE-2024-23605: the number of metadata entries times their size overflows, and too little memory is taken.
#[test]
fn metadata_count_that_overflows() {
    let place = "metadata_kv_count at byte 16 is";
    refused(
        Raw::new(0, u64::MAX),
        &[place, "18446744073709551615", "above the limit of 65536"],
    );
    refused(
        Raw::new(0, u64::MAX / 48 + 2),
        &[place, "above the limit of 65536"],
    );
    refused(
        Raw::new(0, 60_000),
        &["metadata_kv_count (60000 elements) at byte 16 needs 840000 bytes, but only 0"],
    );
}

/// As CVE-2024-23605, with the number of tensors (CVE-2024-21825, -21836, -23496 are its siblings for other fields).
#[test]
fn tensor_count_that_overflows() {
    refused(
        Raw::new(u64::MAX, 0),
        &["tensor_count at byte 8", "above the limit of 1048576"],
    );
    refused(
        Raw::new(u64::MAX / 376 + 2, 0),
        &["tensor_count at byte 8", "above the limit"],
    );
    refused(
        Raw::new(1 << 20, 0),
        &[
            "tensor_count (1048576 elements) at byte 8",
            "but only 8 are left",
        ],
    );
}

/// A count of tensors that fits the file only as long as no metadata has used up the bytes.
#[test]
fn tensor_count_that_metadata_ate() {
    let raw = Raw::new(3, 1)
        .key("padding", STRING)
        .string(&"x".repeat(200));
    refused(
        raw,
        &["tensor_count (3 elements) at byte 8 needs 99 bytes, but only 0 are left"],
    );
}

/// CVE-2024-21836: an array's count times its element size overflows.
#[test]
fn array_count_that_overflows() {
    for element in [U8, U64, STRING] {
        refused(
            Raw::new(0, 1)
                .key("a", ARRAY)
                .u32(element)
                .u64(u64::MAX)
                .data(32, 32),
            &[
                "metadata[0] `a` (count) at byte 41 is 18446744073709551615, above the limit of 16777216",
            ],
        );
    }
    refused(
        Raw::new(0, 1).key("a", ARRAY).u32(U64).u64(1 << 24),
        &[
            "metadata[0] `a` (count) (16777216 elements) at byte 41 needs 134217728 bytes, but only 0 are left",
        ],
    );
    let half_of_64_bits = (1 << 61) + 1;
    refused(
        Raw::new(0, 1).key("a", ARRAY).u32(U64).u64(half_of_64_bits),
        &["above the limit"],
    );
}

/// CVE-2024-23496: a string's length plus one (for the final zero) overflows to nothing.
#[test]
fn string_length_that_overflows() {
    refused(
        Raw::new(0, 1).u64(u64::MAX).data(32, 32),
        &["metadata[0].key (length) at byte 24 is 18446744073709551615, above the limit of 65535"],
    );
    refused(
        Raw::new(0, 1).key("a", STRING).u64(u64::MAX).data(32, 32),
        &[
            "metadata[0] `a` (length) at byte 37 is 18446744073709551615, above the limit of 67108864",
        ],
    );
    refused(
        Raw::new(1, 0).u64(u64::MAX).data(32, 32),
        &[
            "tensor_infos[0].name (length) at byte 24 is 18446744073709551615, above the limit of 1024",
        ],
    );
}

/// CVE-2025-49847: a token longer than a signed 32-bit length passes a comparison and is copied over the buffer.
#[test]
fn token_longer_than_31_bits() {
    for length in [1 << 31, (1 << 31) + 5, u64::from(u32::MAX), 1 << 32] {
        refused(
            Raw::new(0, 1)
                .key("tokenizer.ggml.tokens", ARRAY)
                .u32(STRING)
                .u64(1)
                .u64(length)
                .data(32, 64),
            &[
                "metadata[0] `tokenizer.ggml.tokens`[0] (length) at byte 69 is",
                "above the limit of 67108864",
            ],
        );
    }
    refused(
        Raw::new(0, 1)
            .key("tokenizer.ggml.tokens", ARRAY)
            .u32(STRING)
            .u64(1)
            .u64(1 << 25)
            .bytes(&[b'a'; 50]),
        &[
            "`tokenizer.ggml.tokens`[0] (length) (33554432 elements) at byte 69 needs 33554432 bytes, but only 50",
        ],
    );
}

/// CVE-2025-53630: the padded sizes of all tensors add up to more than 64 bits, and a small buffer is taken for
/// large reads.
#[test]
fn tensor_sizes_whose_sum_overflows() {
    let quarter = 1 << 60;
    let raw = (0..4).fold(Raw::new(4, 0), |raw, index: u64| {
        raw.tensor(
            &format!("t{index}"),
            &[quarter],
            F32,
            index.wrapping_mul(4 * quarter),
        )
    });
    refused(
        raw.data(32, 64),
        &[
            "tensor_infos[0].offset",
            "tensor `t0` ends at byte",
            "but the file ends at byte",
        ],
    );

    // The sum wraps around to a size that fits: the single tensor must be refused, not the sum.
    let raw = Raw::new(2, 0)
        .tensor("large", &[(1 << 61) - 8], F32, 32)
        .tensor("small", &[8], F32, 0);
    refused(
        raw.data(32, 64),
        &["tensor `large` ends at byte", "but the file ends at byte"],
    );
}

/// CVE-2026-27940 (a way around the fix of CVE-2025-53630): each size passes, the sum of data and bookkeeping wraps.
/// Here that is the offset plus the size plus where the data starts.
#[test]
fn offset_whose_end_overflows() {
    let last_aligned = u64::MAX - 31;
    refused(
        Raw::new(1, 0)
            .tensor("t", &[8], F32, last_aligned)
            .data(32, 64),
        &["tensor_infos[0].offset at byte 49: tensor `t` ends at byte 18446744073709551615"],
    );
    refused(
        Raw::new(1, 0)
            .tensor("t", &[8], F32, last_aligned - 64)
            .data(32, 64),
        &["tensor_infos[0].offset at byte 49: tensor `t` ends at byte 18446744073709551615"],
    );
}

/// CVE-2026-33298: dimensions whose product wraps around, so that an enormous tensor counts as a few megabytes.
#[test]
fn dimensions_whose_product_overflows() {
    for shape in [
        &[1 << 32, 1 << 32][..],
        &[1 << 62, 4],
        &[(1 << 32) + 1, 1 << 31, 2, 2],
        &[1 << 20, 1 << 20, 1 << 20, 1 << 20],
        &[1 << 63, 1],
        &[u64::MAX],
        &[1 << 62],
    ] {
        refused(
            Raw::new(1, 0).tensor("t", shape, F32, 0).data(32, 64),
            &["tensor_infos[0].dimensions"],
        );
    }
    // One block of Q4_K has 144 bytes for 256 elements: the element count fits, and so do the bytes.
    refused(
        Raw::new(1, 0)
            .tensor("t", &[1 << 40, 1 << 20], GgmlType::Q4_K.id(), 0)
            .data(32, 64),
        &["tensor `t` ends at byte 648518346341351520, but the file ends at byte 160"],
    );
}

/// A signed reader takes a dimension with its top bit set as negative and multiplies it away.
#[test]
fn dimensions_that_are_negative_or_zero() {
    refused(
        Raw::new(1, 0)
            .tensor("t", &[(-8_i64) as u64, 4], F32, 0)
            .data(32, 64),
        &["tensor_infos[0].dimensions[0] at byte 37 is 18446744073709551608; expected 1 to"],
    );
    refused(
        Raw::new(1, 0).tensor("t", &[8, 0], F32, 0).data(32, 64),
        &["tensor_infos[0].dimensions[1] at byte 45 is 0; expected 1 to"],
    );
    refused(
        Raw::new(1, 0).tensor("t", &[], F32, 0).data(32, 64),
        &["tensor_infos[0].n_dimensions at byte 33 is 0; expected 1 to 4"],
    );
}

/// A row that is not a whole number of blocks: its rounded-down size is too small for what the kernels read.
#[test]
fn row_that_is_not_whole_blocks() {
    refused(
        Raw::new(1, 0)
            .tensor("t", &[255, 256], GgmlType::Q4_K.id(), 0)
            .data(32, 64_000),
        &[
            "tensor_infos[0].dimensions[0] at byte 37 is 255 elements a row for tensor `t` of type Q4_K",
            "256",
        ],
    );
}

/// A file that is mostly a hole on the disk: small to send, but a header of any size to read.
#[test]
fn header_without_end_in_a_sparse_file() {
    let mut raw = Raw::new(0, 3);
    for (index, key) in ["a", "b", "c"].into_iter().enumerate() {
        raw = raw.key(key, STRING).u64(60 << 20);
        raw.0
            .resize((index + 1) * (60 << 20) + (index + 1) * 21 + 24, 0);
    }
    let text = raw.error();
    assert!(text.contains("end of metadata[2] `c` (length)"), "{text}");
    assert!(text.contains("above the limit of 134217728"), "{text}");
}

/// Nested arrays as deep as the file is long exhaust the stack of a recursive reader.
#[test]
fn arrays_nested_without_end() {
    let raw = (0..10_000).fold(Raw::new(0, 1).key("a", ARRAY), |raw, _| {
        raw.u32(ARRAY).u64(1)
    });
    refused(
        raw,
        &[
            "metadata[0] `a`[0][0][0][0] (depth of nested arrays) at byte 85 is 5, above the limit of 4",
        ],
    );
}

/// Alignments that divide by zero, or round every offset to nothing or to the end of the address space.
#[test]
fn alignments_that_are_no_alignments() {
    for alignment in [0, 3, 33, 1 << 21, 1 << 31, u32::MAX] {
        refused(
            Raw::new(0, 1).key("general.alignment", U32).u32(alignment),
            &[
                "metadata[0] `general.alignment` at byte 49 is u32",
                "expected a power of two up to 1048576",
            ],
        );
    }
    refused(
        Raw::new(0, 1).key("general.alignment", STRING).string("32"),
        &[
            "metadata[0] `general.alignment` at byte 49 is string",
            "expected a power of two",
        ],
    );
}

/// An offset between alignments reads the end of one tensor as the start of another.
#[test]
fn offset_that_is_not_aligned() {
    refused(
        Raw::new(1, 0).tensor("t", &[4], F32, 4).data(32, 64),
        &["tensor_infos[0].offset at byte 49 is 4; expected a multiple of the alignment, 32"],
    );
}

/// Two tensors over the same bytes: a loader that converts weights in place converts them twice.
#[test]
fn tensors_that_overlap() {
    let raw = Raw::new(3, 0)
        .tensor("a", &[8], F32, 64)
        .tensor("b", &[32], F32, 0)
        .tensor("c", &[8], F32, 128);
    refused(
        raw.data(32, 192),
        &[
            "tensor_infos[0].offset at byte 49: tensor `a` starts at byte",
            "inside tensor `b`, which ends at byte",
        ],
    );
    let raw = Raw::new(2, 0)
        .tensor("a", &[8], F32, 0)
        .tensor("b", &[8], F32, 0);
    refused(
        raw.data(32, 64),
        &["tensor `b` starts at byte 96, inside tensor `a`, which ends at byte 128"],
    );
}

/// A tensor that ends just after the file (its data shorter than the header says).
#[test]
fn tensor_that_is_cut_off() {
    let whole = || Raw::new(1, 0).tensor("t", &[16], F32, 0).data(32, 64);
    assert!(whole().open().is_ok());
    let mut cut = whole();
    cut.0.pop();
    refused(
        cut,
        &[
            "tensor `t` ends at byte 128, but the file ends at byte 127",
            "not downloaded completely",
        ],
    );
}

/// The second of two equal names wins in one reader, the first in another: what was checked is not what is used.
#[test]
fn names_that_are_used_twice() {
    refused(
        Raw::new(0, 2).key("a", U32).u32(1).key("a", U32).u32(2),
        &["metadata[1].key at byte 41: the key `a` is already used by entry 0"],
    );
    refused(
        Raw::new(2, 0)
            .tensor("t", &[8], F32, 0)
            .tensor("t", &[8], F32, 32)
            .data(32, 64),
        &["tensor_infos[1].name at byte 57: the tensor name `t` is already used by tensor 0"],
    );
}

/// Names that are long, or that command the terminal on which the error is shown.
#[test]
fn names_with_escape_sequences() {
    let name = format!("\u{1b}]0;pwned\u{7}{}", "x".repeat(900));
    let raw = Raw::new(1, 0).tensor(&name, &[8], 99, 0).data(32, 64);
    let text = raw.error();
    assert!(text.contains("tensor `\\u{1b}]0;pwned\\u{7}xxx"), "{text}");
    assert!(
        text.len() < 500 && !text.contains(char::is_control),
        "{text}"
    );
    let text = Raw::new(0, 1).key(&name, U32).error();
    assert!(text.contains("metadata[0] `\\u{1b}]0;pwned"), "{text}");
    assert!(
        text.len() < 500 && !text.contains(char::is_control),
        "{text}"
    );
}

/// Type numbers beyond the table of types read its size and conversion from elsewhere.
#[test]
fn types_that_do_not_exist() {
    refused(
        Raw::new(1, 0).tensor("t", &[8], 4, 0).data(32, 64),
        &[
            "tensor_infos[0].type at byte 45: tensor `t` has type 4, which is not supported; supported are F32, F16,",
        ],
    );
    refused(
        Raw::new(1, 0).tensor("t", &[8], u32::MAX, 0).data(32, 64),
        &["has type 4294967295", "MXFP4"],
    );
    refused(
        Raw::new(0, 1).key("a", 13).u32(0),
        &[
            "metadata[0] `a` (type) at byte 33 is value type 13; expected a type from 0 (u8) to 12 (f64)",
        ],
    );
    refused(
        Raw::new(0, 1).key("a", ARRAY).u32(99).u64(0),
        &["metadata[0] `a` (type) at byte 37 is value type 99"],
    );
}

/// Values that a language takes for granted and a file need not keep: booleans of 2, text that is not UTF-8.
#[test]
fn values_that_are_not_of_their_type() {
    refused(
        Raw::new(0, 1).key("a", 7).bytes(&[2]),
        &["metadata[0] `a` at byte 37 is a boolean of 2"],
    );
    refused(
        Raw::new(0, 1).key("a", STRING).u64(3).bytes(b"a\xff\xfe"),
        &["metadata[0] `a` at byte 37 is not valid UTF-8 after 1 bytes; expected text in UTF-8"],
    );
    refused(
        Raw::new(0, 1).key("", U32).u32(0).data(32, 32),
        &["metadata[0].key at byte 24 is empty"],
    );
    refused(
        Raw::new(1, 0).tensor("", &[8], F32, 0).data(32, 64),
        &["tensor_infos[0].name at byte 24 is empty"],
    );
}

/// Every prefix of a good file is refused, wherever the cut is.
#[test]
fn files_cut_anywhere() {
    let whole = include_bytes!("../fixtures/metadata.gguf");
    let model = Gguf::from_static(whole, "whole").unwrap();
    let needed = model
        .tensors()
        .map(|tensor| tensor.offset + tensor.bytes)
        .max()
        .unwrap() as usize;
    for length in 0..needed {
        assert!(
            Gguf::from_vec(whole[..length].to_vec(), "cut").is_err(),
            "cut to {length} bytes"
        );
    }
}
