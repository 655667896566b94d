//! Split models.

use std::path::PathBuf;

use ktx_gguf::{GgmlType, Gguf, GgufError, GgufWriter, Value};

use crate::open::scratch;

/// Eight tensors of growing size.
fn writer() -> GgufWriter {
    let mut writer = GgufWriter::new();
    writer.kv("general.architecture", "test");
    for index in 1..=8_usize {
        let values = (index as f32).to_le_bytes().repeat(10 * index);
        writer
            .tensor(&format!("t{index}"), GgmlType::F32, &[10, index], values)
            .unwrap();
    }
    writer
}

fn split(test: &str, parts: usize) -> Vec<PathBuf> {
    writer()
        .write_split(scratch(test).join("model"), parts)
        .unwrap()
}

/// A part whose metadata states these split numbers.
fn part(no: u16, count: u16, tensors: i32) -> GgufWriter {
    let mut writer = GgufWriter::new();
    writer
        .kv("split.no", no)
        .kv("split.count", count)
        .kv("split.tensors.count", tensors);
    writer
        .tensor(&format!("t{no}"), GgmlType::F32, &[1], vec![0; 4])
        .unwrap()
        .clone()
}

/// Writes two parts and opens the first.
fn open_pair(test: &str, first: GgufWriter, second: GgufWriter) -> Result<Gguf, GgufError> {
    let directory = scratch(test);
    first
        .write(directory.join("m-00001-of-00002.gguf"))
        .unwrap();
    second
        .write(directory.join("m-00002-of-00002.gguf"))
        .unwrap();
    Gguf::open(directory.join("m-00001-of-00002.gguf"))
}

#[test]
fn any_part_opens_the_whole_model() {
    let paths = split("any_part", 3);
    assert_eq!(paths[2].file_name().unwrap(), "model-00003-of-00003.gguf");
    for path in &paths {
        let model = Gguf::open(path).unwrap();
        assert_eq!(model.parts(), 3);
        assert_eq!(model.path(), Some(paths[0].as_path()));
        assert_eq!(
            model
                .metadata()
                .required_str("general.architecture")
                .unwrap(),
            "test"
        );
        let names: Vec<_> = model.tensors().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["t1", "t2", "t3", "t4", "t5", "t6", "t7", "t8"]);
        assert!(model.tensors().is_sorted_by_key(|tensor| tensor.part));
        assert_eq!(model.tensor_info("t8").unwrap().part, 2);
        for index in 1..=8 {
            let tensor = model.tensor(&format!("t{index}")).unwrap();
            assert!(tensor.to_f32().iter().all(|&value| value == index as f32));
        }
        let size: u64 = paths
            .iter()
            .map(|path| std::fs::metadata(path).unwrap().len())
            .sum();
        assert_eq!(model.file_size(), size);
    }
}

#[test]
fn parts_have_about_the_same_size() {
    for parts in 1..=8 {
        let paths = split("same_size", parts);
        let model = Gguf::open(&paths[0]).unwrap();
        assert_eq!(model.tensors().len(), 8);
        assert_eq!(model.parts(), parts);
    }
    let paths = split("same_size", 2);
    let sizes: Vec<_> = paths
        .iter()
        .map(|path| std::fs::metadata(path).unwrap().len())
        .collect();
    assert!(sizes[0].abs_diff(sizes[1]) < 500, "{sizes:?}");
}

#[test]
fn missing_part_is_named() {
    let paths = split("missing_part", 3);
    std::fs::remove_file(&paths[1]).unwrap();
    for path in [&paths[0], &paths[2]] {
        let text = Gguf::open(path).unwrap_err().to_string();
        assert!(
            text.contains("model-00002-of-00003.gguf is missing (part 2 of 3)"),
            "{text}"
        );
    }
}

#[test]
fn renamed_part_is_refused_with_the_naming_scheme() {
    let paths = split("renamed_part", 3);
    let renamed = paths[0].with_file_name("renamed.gguf");
    std::fs::rename(&paths[0], &renamed).unwrap();
    let text = Gguf::open(&renamed).unwrap_err().to_string();
    assert!(
        text.contains("split into 3 files") && text.contains("-00001-of-00003.gguf"),
        "{text}"
    );
    assert!(text.contains("original names"), "{text}");
}

#[test]
fn part_in_memory_is_refused() {
    let text = Gguf::from_vec(part(0, 2, 2).to_bytes(), "memory")
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("split into 2 files") && text.contains("llama-gguf-split --merge"),
        "{text}"
    );
}

#[test]
fn parts_that_disagree_are_refused() {
    assert!(open_pair("agree", part(0, 2, 2), part(1, 2, 2)).is_ok());
    let cases = [
        (
            "count",
            part(0, 2, 2),
            part(1, 3, 2),
            "`split.count` is 3; expected 2",
        ),
        (
            "first_count",
            part(0, 3, 2),
            part(1, 2, 2),
            "`split.count` is 3; expected 2",
        ),
        (
            "single",
            part(0, 1, 1),
            part(1, 2, 2),
            "`split.count` is 1; expected 2",
        ),
        (
            "order",
            part(0, 2, 2),
            part(0, 2, 2),
            "`split.no` is 0; expected 1",
        ),
        (
            "first_no",
            part(1, 2, 2),
            part(1, 2, 2),
            "`split.no` is 1; expected 0",
        ),
        (
            "tensors",
            part(0, 2, 2),
            part(1, 2, 3),
            "`split.tensors.count` is 3; expected 2",
        ),
        (
            "too_few",
            part(0, 2, 3),
            part(1, 2, 3),
            "`split.tensors.count` is 3; expected 2, the tensors",
        ),
        (
            "no_keys",
            part(0, 2, 2),
            GgufWriter::new(),
            "`split.count` is missing; expected 2",
        ),
    ];
    for (test, first, second, expected) in cases {
        let error = open_pair(&format!("disagree_{test}"), first, second).unwrap_err();
        assert!(
            matches!(error, GgufError::SplitMismatch { .. }),
            "{test}: {error}"
        );
        assert!(error.to_string().contains(expected), "{test}: {error}");
    }
}

#[test]
fn merged_model_may_keep_stale_split_keys() {
    assert!(Gguf::from_vec(part(3, 0, 700).to_bytes(), "merged").is_ok());
    let error = Gguf::from_vec(part(0, 1, 700).to_bytes(), "single").unwrap_err();
    assert!(
        error
            .to_string()
            .contains("`split.tensors.count` is 700; expected 1, the tensors"),
        "{error}"
    );
}

#[test]
fn tensor_in_two_parts_is_refused() {
    let mut second = part(1, 2, 3);
    second
        .tensor("t0", GgmlType::F32, &[1], vec![0; 4])
        .unwrap();
    let error = open_pair("tensor_in_two_parts", part(0, 2, 3), second).unwrap_err();
    assert!(
        matches!(error, GgufError::DuplicateTensor { .. }),
        "{error}"
    );
    assert!(
        error.to_string().contains("`t0` is already used"),
        "{error}"
    );
}

#[test]
fn hostile_part_counts_are_refused() {
    let mut writer = part(0, 2, 1);
    writer.kv("split.count", u64::MAX);
    let text = Gguf::from_vec(writer.to_bytes(), "memory")
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("`split.count` is 18446744073709551615; expected at most 65535"),
        "{text}"
    );
    writer.kv("split.count", Value::String("2".into()));
    assert!(matches!(
        Gguf::from_vec(writer.to_bytes(), "memory"),
        Err(GgufError::WrongType { .. })
    ));
}

#[test]
fn more_parts_than_tensors_are_refused() {
    let prefix = scratch("more_parts").join("model");
    for parts in [0, 9] {
        let error = writer().write_split(&prefix, parts).unwrap_err();
        assert!(matches!(error, GgufError::InvalidWrite { .. }), "{error}");
    }
}
