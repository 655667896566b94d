//! Hostile safetensors files: every error names the file, the tensor where there is one, and what does not hold, and
//! no memory is taken on the file's word.

use ktx_gguf::Safetensors;

use crate::allocation::largest_allocation;
use crate::safetensors::file;

fn refused_bytes(bytes: Vec<u8>, part: &str) {
    let size = bytes.len();
    let (result, largest) = largest_allocation(|| Safetensors::from_vec(bytes, "attack"));
    let error = result.expect_err("the file must be refused").to_string();
    assert!(
        error.starts_with("attack") && error.contains(part),
        "{error:?} does not say {part:?}"
    );
    assert!(
        largest <= 4096 + 16 * size,
        "an allocation of {largest} bytes for a file of {size}"
    );
}

fn refused(header: &str, data: usize, part: &str) {
    refused_bytes(file(header, data), part);
}

/// One tensor `w`.
fn one(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
}

#[test]
fn headers_that_are_longer_than_the_file_or_the_limit() {
    refused_bytes(Vec::new(), "only 0 bytes");
    refused_bytes(vec![0; 7], "only 7 bytes");
    refused_bytes(
        vec![0xff; 64],
        "18446744073709551615 bytes, and 100000000 are allowed",
    );
    refused_bytes(
        [&100_000_000_u64.to_le_bytes()[..], b"{}"].concat(),
        "and 2 are left",
    );
    refused_bytes(
        [&3_u64.to_le_bytes()[..], b"{}"].concat(),
        "3 bytes, and 2 are left",
    );
    refused_bytes(b"GGUF\x03\0\0\0\0\0\0\0".to_vec(), "it is a GGUF file");
}

#[test]
fn headers_that_are_no_tensors_in_json() {
    refused("", 0, "does not begin with `{`");
    refused(" {}", 0, "does not begin with `{`");
    refused("[]", 0, "does not begin with `{`");
    refused("{", 0, "does not parse");
    refused("{}{}", 0, "does not parse");
    refused(r#"{"w":1}"#, 0, "does not parse");
    refused(
        r#"{"w":{"dtype":"I8","shape":[1]}}"#,
        1,
        "missing field `data_offsets`",
    );
    refused(&one("I8", "[-1]", "[0,1]"), 1, "does not parse");
    refused(&one("I8", "[1.5]", "[0,1]"), 1, "does not parse");
    refused(
        &one("I8", "[18446744073709551616]", "[0,1]"),
        1,
        "does not parse",
    );
    refused(&one("I8", "[1]", "[0,1,2]"), 1, "does not parse");
    refused(r#"{"__metadata__":{"a":1}}"#, 0, "does not parse");
    refused_bytes(
        [&4_u64.to_le_bytes()[..], b"{\"\xff\""].concat(),
        "not valid UTF-8 after 2 bytes",
    );
}

#[test]
fn json_that_is_deep_or_long() {
    let deep = format!(r#"{{"w":{}"#, "[".repeat(1_000_000));
    refused(&deep, 0, "does not parse");
    let ignored = format!(
        r#"{{"w":{{"more":{}{},"dtype":"I8","shape":[1],"data_offsets":[0,2]}}}}"#,
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    refused(&ignored, 2, "");
    let many = format!("[{}1]", "1,".repeat(100_000));
    refused(
        &one("I8", &many, "[0,1]"),
        1,
        "has 100001 dimensions, and 8 are allowed",
    );
    refused(
        &format!(r#"{{"w":{{"dtype":"{}""#, "x".repeat(100_000)),
        1,
        "does not parse",
    );
    refused(
        &one(&"x".repeat(100_000), "[1]", "[0,1]"),
        1,
        "known are F64, F32",
    );
}

#[test]
fn names_that_are_there_twice_or_steer_the_terminal() {
    let tensor = r#"{"dtype":"I8","shape":[1],"data_offsets":[0,1]}"#;
    refused(
        &format!(r#"{{"w":{tensor},"w":{tensor}}}"#),
        1,
        "`w` is there twice",
    );
    refused(
        &format!(r#"{{"w":{tensor},"\u0077":{tensor}}}"#),
        1,
        "`w` is there twice",
    );
    refused(r#"{"__metadata__":{},"__metadata__":{}}"#, 0, "twice");
    let escape = r#"{"\u001b[31m":{"dtype":"I8","shape":[1],"data_offsets":[0,2]}}"#;
    refused(escape, 2, r"`\u{1b}[31m`");
    refused(&one("\\u001b[31m", "[1]", "[0,1]"), 1, r"`\u{1b}[31m`");
}

#[test]
fn offsets_outside_of_the_data_or_of_another_length() {
    refused(&one("I8", "[4]", "[0,4]"), 3, "`w` is at bytes 0 to 4 of 3");
    refused(&one("I8", "[4]", "[4,0]"), 4, "at bytes 4 to 0");
    refused(&one("I8", "[4]", "[0,18446744073709551615]"), 4, "of 4");
    refused(
        &one("I8", "[4]", "[18446744073709551612,18446744073709551615]"),
        4,
        "of 4",
    );
    refused(
        &one("F32", "[4]", "[0,4]"),
        4,
        "which is 16 bytes, and has 4",
    );
    refused(&one("I8", "[0]", "[0,4]"), 4, "which is 0 bytes, and has 4");
    refused(&one("I8", "[]", "[0,0]"), 0, "which is 1 bytes, and has 0");
}

#[test]
fn shapes_whose_product_overflows() {
    let huge = "[4294967296,4294967296]";
    refused(&one("I8", huge, "[0,0]"), 0, "more bytes than there are");
    refused(
        &one("I8", "[0,4294967296,4294967296]", "[0,0]"),
        0,
        "more bytes than there are",
    );
    refused(
        &one("F64", "[2305843009213693952]", "[0,0]"),
        0,
        "more bytes than there are",
    );
    refused(
        &one("I8", "[9223372036854775808]", "[0,0]"),
        0,
        "more bytes than there are",
    );
}

#[test]
fn holes_and_overlaps() {
    let two = |first: &str, second: &str| {
        format!(
            r#"{{"a":{{"dtype":"I8","shape":[4],"data_offsets":{first}}},"b":{{"dtype":"I8","shape":[4],"data_offsets":{second}}}}}"#
        )
    };
    refused(
        &two("[0,4]", "[3,7]"),
        7,
        "`b` overlaps the one before it: it begins at byte 3 and not at 4",
    );
    refused(&two("[0,4]", "[0,4]"), 4, "overlaps");
    refused(&two("[0,4]", "[5,9]"), 9, "`b` leaves a hole before it");
    refused(&two("[1,5]", "[5,9]"), 9, "`a` leaves a hole before it");
    refused(&two("[0,4]", "[4,8]"), 9, "end at byte 8 of 9");
    refused(&two("[0,4]", "[4,8]"), 7, "`b` is at bytes 4 to 8 of 7");
    refused("{}", 1, "end at byte 0 of 1");
    assert!(Safetensors::from_vec(file(&two("[4,8]", "[0,4]"), 8), "any order").is_ok());
    assert!(Safetensors::from_vec(file("{}  ", 0), "padded").is_ok());
}
