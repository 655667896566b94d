//! Opening files, and what the errors say.

use std::path::PathBuf;

use ktx_gguf::{GgmlType, Gguf, GgufError, GgufWriter};

use crate::raw::Raw;

/// A directory of its own for a test, empty.
pub fn scratch(test: &str) -> PathBuf {
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(test);
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir_all(&directory).unwrap();
    directory
}

fn error_of(bytes: &[u8]) -> String {
    Gguf::from_vec(bytes.to_vec(), "model.gguf")
        .unwrap_err()
        .to_string()
}

#[test]
fn opened_file_has_its_name_path_and_size() {
    let path = scratch("opened_file").join("tiny.gguf");
    let mut writer = GgufWriter::new();
    writer
        .tensor("t", GgmlType::F32, &[2], 1.5_f32.to_le_bytes().repeat(2))
        .unwrap();
    writer.write(&path).unwrap();
    let model = Gguf::open(&path).unwrap();
    assert_eq!(model.path(), Some(path.as_path()));
    assert_eq!(model.name(), path.display().to_string());
    assert_eq!(model.file_size(), std::fs::metadata(&path).unwrap().len());
    assert_eq!(model.parts(), 1);
    let tensor = model.clone().tensor("t").unwrap();
    drop(model);
    assert_eq!(tensor.to_f32(), [1.5, 1.5]);
}

#[test]
fn models_and_tensors_can_go_to_other_threads() {
    fn check<T: Send + Sync + Clone>() {}
    check::<Gguf>();
    check::<ktx_gguf::Tensor>();
}

#[test]
fn missing_file_is_named() {
    let path = scratch("missing_file").join("absent.gguf");
    let error = Gguf::open(&path).unwrap_err();
    assert!(matches!(error, GgufError::Open { .. }));
    let text = error.to_string();
    assert!(
        text.contains("absent.gguf") && text.contains("check the path"),
        "{text}"
    );
}

#[test]
fn directory_is_refused_and_a_model_in_it_is_named() {
    let directory = scratch("directory");
    let text = Gguf::open(&directory).unwrap_err().to_string();
    assert!(
        text.contains("is a directory; name a .gguf file (there is none in this directory)"),
        "{text}"
    );
    std::fs::write(directory.join("b.gguf"), "").unwrap();
    std::fs::write(directory.join("a.txt"), "").unwrap();
    let text = Gguf::open(&directory).unwrap_err().to_string();
    assert!(
        text.contains("is a directory; name the file itself") && text.ends_with("b.gguf"),
        "{text}"
    );
}

#[test]
fn empty_file_is_refused() {
    let path = scratch("empty_file").join("empty.gguf");
    std::fs::write(&path, "").unwrap();
    let text = Gguf::open(&path).unwrap_err().to_string();
    assert!(
        text.ends_with("empty.gguf is empty; download or convert the model again"),
        "{text}"
    );
    assert_eq!(
        error_of(b""),
        "model.gguf is empty; download or convert the model again"
    );
}

#[cfg(unix)]
#[test]
fn device_is_refused() {
    let text = Gguf::open("/dev/null").unwrap_err().to_string();
    assert_eq!(
        text,
        "/dev/null is not a regular file and cannot be mapped; copy it to a file first"
    );
}

#[test]
fn files_of_other_kinds_are_recognised() {
    let cases: &[(&[u8], &str)] = &[
        (
            b"Once upon a time\nthere was",
            "it is a text file; name the model's .gguf file",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "it is a Git LFS pointer; run `git lfs pull`",
        ),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (
            b"PK\x03\x04\x00\x00",
            "it is a zip archive or PyTorch checkpoint",
        ),
        (
            b"\x10\x02\0\0\0\0\0\0{\"__metadata__\"",
            "it looks like a safetensors file",
        ),
        (b"tjgg\x03\0\0\0", "a GGML format from before GGUF"),
        (
            b"\x7fELF\x02\x01",
            "it starts with the bytes [7f, 45, 4c, 46], not with `GGUF`",
        ),
        (b"GGU", "it is a text file"),
    ];
    for (bytes, expected) in cases {
        let text = error_of(bytes);
        assert!(
            text.starts_with("model.gguf is not a GGUF file: ") && text.contains(expected),
            "{text}"
        );
    }
}

#[test]
fn other_versions_are_refused_with_the_next_step() {
    let text = Raw::version(1, 0, 0).error();
    assert!(
        text.contains(
            "GGUF version 1 is not supported (2 and 3 are); convert the original model again"
        ),
        "{text}"
    );
    let text = Raw::version(4, 0, 0).error();
    assert!(
        text.contains("GGUF version 4 is not supported (2 and 3 are); update this program"),
        "{text}"
    );
    for version in [2_u32, 3] {
        let text = Raw::version(version.swap_bytes(), 0, 0).error();
        assert!(
            text.contains("big-endian GGUF is not supported; convert it with"),
            "{text}"
        );
    }
}

#[test]
fn header_that_ends_early_says_what_is_missing() {
    assert_eq!(
        error_of(b"GGUF\x03\0\0\0\x01\0"),
        "model.gguf: tensor_count at byte 8 needs 8 bytes, but only 2 are left; the file is damaged or not \
         downloaded completely"
    );
}

#[test]
fn unsupported_tensor_type_lists_the_supported_ones() {
    let text = Raw::new(1, 0)
        .tensor("blk.0.attn_q.weight", &[256], 40, 0)
        .data(32, 256)
        .error();
    assert!(
        text.contains(
            "tensor `blk.0.attn_q.weight` has type 40, which is not supported; supported are"
        ),
        "{text}"
    );
    assert!(
        GgmlType::ALL.iter().all(|ty| text.contains(ty.name())),
        "{text}"
    );
}
