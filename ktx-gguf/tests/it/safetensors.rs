//! Safetensors files against what the Python package wrote (`tests/fixtures/make_safetensors.py`), and what holds for
//! all files.

use std::fs;
use std::path::{Path, PathBuf};

use ktx_gguf::fp8::e4m3_to_f32;
use ktx_gguf::safetensors::{Dtype, Safetensors};
use ktx_gguf::{GgmlType, Tensor};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use crate::allocation::largest_allocation;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

fn opened() -> Safetensors {
    Safetensors::open(fixture("safetensors.safetensors")).unwrap()
}

fn values(file: &Safetensors, name: &str) -> Vec<f32> {
    file.tensor(name).unwrap().unwrap().to_f32()
}

/// A file of the given header and as many bytes of data.
pub fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend((0..data).map(|n| n as u8));
    bytes
}

#[test]
fn every_type_is_read_as_the_python_package_wrote_it() {
    let file = opened();
    for &dtype in Dtype::ALL {
        let name = format!("one.{dtype}");
        let entry = file.entry(&name).unwrap();
        assert_eq!(
            (entry.dtype, &entry.shape[..]),
            (dtype, &[2, 3][..]),
            "{name}"
        );
        assert_eq!(entry.bytes as usize, 6 * dtype.bytes(), "{name}");
        if dtype.ggml_type().is_some_and(|ty| ty != GgmlType::F8_E4M3) {
            let tensor = file.tensor(&name).unwrap().unwrap();
            assert_eq!(tensor.shape(), [3, 2]);
            assert_eq!(tensor.to_f32(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "{name}");
        }
    }
    assert_eq!(file.tensor("scalar").unwrap().unwrap().to_f32(), [12.0]);
    assert_eq!(file.tensor("empty").unwrap().unwrap().to_f32(), [0.0; 0]);
    assert!(file.tensor("nothing").unwrap().is_none());
    assert_eq!(
        file.metadata(0).collect::<Vec<_>>(),
        [("format", "pt"), ("made by", "make_safetensors.py")]
    );
}

#[test]
fn every_code_of_an_8_bit_float_has_the_value_that_torch_gives_it() {
    let file = opened();
    let expected = values(&file, "codes.values");
    for (code, expected) in file
        .bytes(file.entry("codes").unwrap())
        .iter()
        .zip(expected)
    {
        let found = e4m3_to_f32(*code);
        let same = found.to_bits() == expected.to_bits();
        assert!(
            same || (found.is_nan() && expected.is_nan()),
            "{code:#04x}: {found}, {expected}"
        );
    }
}

#[test]
fn block_scaled_weights_have_the_values_that_torch_gives_them() {
    let file = opened();
    let tensor = file.tensor("fp8.weight").unwrap().unwrap();
    let expected = values(&file, "fp8.values");
    assert_eq!(
        (tensor.ty(), tensor.shape()),
        (GgmlType::F8_E4M3, &[150, 130][..])
    );
    assert_eq!(tensor.size(), 130 * 150 + 16);
    assert_eq!(tensor.to_f32(), expected);
    for (start, end) in [(0, 130), (1, 3), (127, 130), (128, 130), (129, 129)] {
        let part = tensor.rows_range(start, end).unwrap();
        assert_eq!(
            part.to_f32(),
            expected[start * 150..end * 150],
            "rows {start} to {end}"
        );
        assert_eq!(
            part.rows_range(0, end - start).unwrap().to_f32(),
            part.to_f32()
        );
    }
    assert_eq!(tensor.slice(129).unwrap().to_f32(), expected[129 * 150..]);
    assert!(tensor.reshape(&[130, 150]).is_none());
    let made = Tensor::from_fp8("made", &[2, 2], vec![0x38, 0x40, 0x7e, 0xb8], vec![2.0]).unwrap();
    assert_eq!(made.to_f32(), [2.0, 4.0, 896.0, -2.0]);
    assert!(Tensor::from_fp8("made", &[2, 2], vec![0; 4], vec![2.0; 2]).is_err());
    assert!(Tensor::from_fp8("made", &[2, 2, 1], vec![0; 4], vec![2.0]).is_err());
    assert!(Tensor::from_bytes("made", GgmlType::F8_E4M3, &[4], vec![0; 4]).is_err());
}

#[test]
fn shards_are_opened_by_their_index_or_their_directory() {
    for path in ["sharded", "sharded/model.safetensors.index.json"] {
        let set = Safetensors::open(fixture(path)).unwrap();
        assert_eq!(set.files().len(), 2, "{path}");
        assert_eq!(values(&set, "a"), [1.0; 6]);
        assert_eq!(values(&set, "c"), [2.5; 4]);
        assert_eq!(set.tensors().len(), 3);
    }
    let one = Safetensors::open(fixture("sharded/model-00002-of-00002.safetensors")).unwrap();
    assert_eq!(one.tensors().len(), 1);
}

#[test]
fn blocks_of_gguf_are_read_by_the_number_of_their_type() {
    let header = r#"{"a.weight":{"dtype":"U8","shape":[36],"data_offsets":[0,36]},"a.ggml_type":{"dtype":"I64","shape":[],"data_offsets":[36,44]}}"#;
    let mut bytes = file(header, 36);
    bytes.extend(u64::from(GgmlType::Q4_0.id()).to_le_bytes());
    let set = Safetensors::from_vec(bytes.clone(), "merged").unwrap();
    let tensor = set.ggml_tensor("a.weight", &[32, 2]).unwrap().unwrap();
    assert_eq!(
        (tensor.ty(), tensor.shape()),
        (GgmlType::Q4_0, &[32, 2][..])
    );
    assert!(set.ggml_tensor("b.weight", &[32, 2]).unwrap().is_none());
    let error = set
        .ggml_tensor("a.weight", &[32, 3])
        .unwrap_err()
        .to_string();
    assert!(error.contains("`a.weight` has 36 bytes"), "{error}");
    *bytes.last_mut().unwrap() = 9;
    let set = Safetensors::from_vec(bytes, "merged").unwrap();
    let error = set
        .ggml_tensor("a.weight", &[32, 2])
        .unwrap_err()
        .to_string();
    assert!(error.contains("not the number of a GGUF type"), "{error}");
}

#[test]
fn tensors_that_operators_cannot_read_say_why() {
    let scaled = |scales: &str| {
        format!(
            r#"{{"w":{{"dtype":"F8_E4M3","shape":[1,200],"data_offsets":[0,200]}},"w_scale_inv":{scales}}}"#
        )
    };
    for (header, data, part) in [
        (
            r#"{"w":{"dtype":"F8_E5M2","shape":[4],"data_offsets":[0,4]}}"#.to_owned(),
            4,
            "type F8_E5M2",
        ),
        (
            r#"{"w":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}"#.to_owned(),
            4,
            "has no block scales",
        ),
        (
            scaled(r#"{"dtype":"F16","shape":[1,2],"data_offsets":[200,204]}"#),
            204,
            "`w_scale_inv` is F16",
        ),
        (
            scaled(r#"{"dtype":"F32","shape":[2,1],"data_offsets":[200,208]}"#),
            208,
            "has the shape [2, 1]",
        ),
        (
            scaled(r#"{"dtype":"F32","shape":[1],"data_offsets":[200,204]}"#),
            204,
            "has the shape [1]",
        ),
    ] {
        let set = Safetensors::from_vec(file(&header, data), "odd").unwrap();
        let error = set.tensor("w").unwrap_err().to_string();
        assert!(
            error.starts_with("odd: tensor ") && error.contains(part),
            "{error}"
        );
    }
}

#[test]
fn files_that_do_not_make_a_set_are_refused() {
    let directory = std::env::temp_dir().join(format!("ktx-safetensors-{}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let refused = |path: &Path, part: &str| {
        let error = Safetensors::open(path).unwrap_err().to_string();
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    };
    refused(&directory, "no .safetensors file is in it");
    refused(&directory.join("none.safetensors"), "cannot open");
    let header = r#"{"w":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}"#;
    fs::write(directory.join("one.safetensors"), file(header, 4)).unwrap();
    fs::write(directory.join("two.safetensors"), file(header, 4)).unwrap();
    refused(&directory, "one.safetensors too");
    let index = directory.join("model.safetensors.index.json");
    for (text, part) in [
        (
            r#"{"weight_map":{"w":"../one.safetensors"}}"#,
            "`../one.safetensors`, which is not a plain name",
        ),
        (r#"{"weight_map":{"w":"/etc/passwd"}}"#, "not a plain name"),
        (r#"{"weight_map":{"w":"a\\..\\b"}}"#, "not a plain name"),
        (r#"{"weight_map":{"w":".."}}"#, "not a plain name"),
        (r#"{"weight_map":{"w":""}}"#, "not a plain name"),
        (
            r#"{"weight_map":{"w":"three.safetensors"}}"#,
            "names `three.safetensors`, which is not there",
        ),
        (
            r#"{"weight_map":{"v":"one.safetensors"}}"#,
            "tensor `v` is not in `one.safetensors`",
        ),
        (r#"{"weight_map":{"w":1}}"#, "no index"),
        ("{", "no index"),
    ] {
        fs::write(&index, text).unwrap();
        refused(&directory, part);
        refused(&index, part);
    }
    fs::write(&index, r#"{"weight_map":{"w":"two.safetensors"}}"#).unwrap();
    assert_eq!(Safetensors::open(&directory).unwrap().files().len(), 1);
    fs::write(directory.join("other.safetensors.index.json"), "{}").unwrap();
    refused(&directory, "2 indices");
    fs::remove_dir_all(&directory).unwrap();
}

/// A file as the format's definition has it, of tensors with types and shapes.
fn written(tensors: &[(String, Dtype, Vec<usize>)]) -> Vec<u8> {
    let (mut entries, mut end) = (Vec::new(), 0);
    for (name, dtype, shape) in tensors {
        let start = end;
        end += shape.iter().product::<usize>() * dtype.bytes();
        let name = serde_json::to_string(name).unwrap();
        entries.push(format!(
            r#"{name}:{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        ));
    }
    file(&format!("{{{}}}", entries.join(",")), end)
}

fn tensors() -> impl Strategy<Value = Vec<(String, Dtype, Vec<usize>)>> {
    let one = (
        (0..Dtype::ALL.len()).prop_map(|n| Dtype::ALL[n]),
        vec(0..5_usize, 0..4),
    );
    btree_map("\\PC{1,12}", one, 0..6).prop_map(|map| {
        map.into_iter()
            .map(|(name, (ty, shape))| (name, ty, shape))
            .collect()
    })
}

/// Uses everything that an open file offers.
fn use_all(set: &Safetensors) {
    for entry in set.tensors() {
        assert_eq!(set.bytes(entry).len() as u64, entry.bytes);
        if let Ok(Some(tensor)) = set.tensor(&entry.name) {
            assert_eq!(tensor.to_f32().len(), tensor.elements());
        }
        let _ = set.ggml_tensor(&entry.name, &[32, 1]);
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(tensors in tensors()) {
        let set = Safetensors::from_vec(written(&tensors), "written").unwrap();
        prop_assert_eq!(set.tensors().len(), tensors.len());
        for (name, dtype, shape) in &tensors {
            let entry = set.entry(name).unwrap();
            prop_assert_eq!((entry.dtype, &entry.shape), (*dtype, shape));
        }
        use_all(&set);
    }

    #[test]
    fn damage_never_does_worse_than_an_error(
        tensors in tensors(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = written(&tensors);
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let size = bytes.len();
        let (set, largest) = largest_allocation(|| Safetensors::from_vec(bytes.clone(), "damaged"));
        prop_assert!(largest <= 4096 + 32 * size, "an allocation of {} bytes for {}", largest, size);
        if let Ok(set) = set {
            use_all(&set);
        }
        bytes.truncate(cut.index(size));
        if let Ok(set) = Safetensors::from_vec(bytes, "cut") {
            use_all(&set);
        }
    }
}
