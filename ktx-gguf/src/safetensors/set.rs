//! Checkpoints of several files: by an index, or all of a directory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use super::Safetensors;
use crate::storage::Storage;
use crate::{GgufError, error::shown, limits};

const EXTENSION: &str = "safetensors";
const INDEX: &str = ".safetensors.index.json";

#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn wrong(file: &Path, reason: String, hint: &'static str) -> GgufError {
    GgufError::SafetensorsSet {
        file: file.display().to_string(),
        reason,
        hint,
    }
}

/// Opens the files of a directory: those of its index, or all.
pub(super) fn directory(directory: &Path) -> Result<Safetensors, GgufError> {
    let unreadable = |source| GgufError::Open {
        path: directory.to_owned(),
        source,
    };
    let (mut files, mut indices) = (Vec::new(), Vec::new());
    for found in std::fs::read_dir(directory).map_err(unreadable)? {
        let path = found.map_err(unreadable)?.path();
        let is_index = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().ends_with(INDEX));
        if is_index {
            indices.push(path);
        } else if path
            .extension()
            .is_some_and(|extension| extension == EXTENSION)
        {
            files.push(path);
        }
    }
    files.sort();
    indices.sort();
    match indices.as_slice() {
        [one] => return index(one),
        [first, ..] => {
            let reason = format!(
                "{} indices are in it, {} and others",
                indices.len(),
                first.display()
            );
            return Err(wrong(directory, reason, "name one of them"));
        }
        [] if files.is_empty() => {
            let reason = "no .safetensors file is in it".to_owned();
            return Err(wrong(
                directory,
                reason,
                "name the directory that holds them",
            ));
        }
        [] => {}
    }
    together(directory, &files)
}

/// Opens the files that an index names, and checks that every tensor is where it says.
pub(super) fn index(path: &Path) -> Result<Safetensors, GgufError> {
    let index = read(path)?;
    let directory = path.parent().unwrap_or(Path::new(""));
    let names: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
    let mut files = Vec::with_capacity(names.len());
    for name in &names {
        let file = Path::new(name);
        let mut parts = file.components();
        let plain = matches!(parts.next(), Some(Component::Normal(_))) && parts.next().is_none();
        // A backslash separates directories on one system and is part of a name on others.
        if !plain || name.contains(['\\', '/']) {
            let reason = format!(
                "it names the file `{}`, which is not a plain name",
                shown(name)
            );
            return Err(wrong(path, reason, "files have to lie beside their index"));
        }
        let file = directory.join(file);
        if !file.is_file() {
            let reason = format!("it names `{}`, which is not there", shown(name));
            return Err(wrong(
                path,
                reason,
                "download the missing file into the same directory",
            ));
        }
        files.push(file);
    }
    let set = together(path, &files)?;
    for (tensor, name) in &index.weight_map {
        let found = set
            .entry(tensor)
            .and_then(|entry| set.files().nth(entry.part));
        if found.is_none_or(|found| Path::new(found) != directory.join(name)) {
            let (tensor, name) = (shown(tensor), shown(name));
            let reason = format!("tensor `{tensor}` is not in `{name}`, where the index has it");
            return Err(wrong(
                path,
                reason,
                "download index and files again, of one version",
            ));
        }
    }
    Ok(set)
}

fn read(path: &Path) -> Result<Index, GgufError> {
    let unreadable = |source| GgufError::Open {
        path: path.to_owned(),
        source,
    };
    let size = std::fs::metadata(path).map_err(unreadable)?;
    if !size.is_file() || size.len() > limits::SAFETENSORS_INDEX_BYTES {
        let reason = format!(
            "an index is a file of at most {} bytes, and this has {}",
            limits::SAFETENSORS_INDEX_BYTES,
            size.len()
        );
        return Err(wrong(path, reason, "name the checkpoint's index"));
    }
    let text = std::fs::read(path).map_err(unreadable)?;
    serde_json::from_slice(&text).map_err(|error| {
        let reason = format!(
            "it is no index of safetensors files ({})",
            shown(&error.to_string())
        );
        wrong(
            path,
            reason,
            "download it again, or name the .safetensors file itself",
        )
    })
}

fn together(name: &Path, files: &[PathBuf]) -> Result<Safetensors, GgufError> {
    if files.len() > limits::SAFETENSORS_FILES {
        let reason = format!(
            "{} files, and {} are allowed",
            files.len(),
            limits::SAFETENSORS_FILES
        );
        return Err(wrong(name, reason, "name an index of fewer"));
    }
    let opened = files
        .iter()
        .map(|file| Ok((file.display().to_string(), Storage::map(file)?)))
        .collect::<Result<Vec<_>, GgufError>>()?;
    Safetensors::assemble(name.display().to_string(), opened)
}
