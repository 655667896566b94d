//! The memory behind tensors: a mapped file, or bytes in memory.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::GgufError;

/// Bytes that tensors point into; shared by `Arc`.
pub(crate) enum Storage {
    Map(Mmap),
    Static(&'static [u8]),
    Bytes(Vec<u8>),
    F32(Vec<f32>),
}

impl Storage {
    /// Maps a regular file.
    pub fn map(path: &Path) -> Result<Self, GgufError> {
        let open_error = |source| GgufError::Open {
            path: path.to_owned(),
            source,
        };
        // Looked at before opening: opening a pipe would wait for a writer.
        let kind = std::fs::metadata(path).map_err(open_error)?;
        if kind.is_dir() {
            return Err(GgufError::Directory {
                path: path.to_owned(),
                hint: directory_hint(path),
            });
        }
        if !kind.is_file() {
            return Err(GgufError::NotAFile {
                path: path.to_owned(),
            });
        }
        if kind.len() == 0 {
            return Err(GgufError::Empty {
                file: path.display().to_string(),
            });
        }
        let file = File::open(path).map_err(open_error)?;
        // SAFETY: the map is read-only and private to this value, which keeps it alive for as long as anyone
        // holds a slice of it. What remains is the condition that every reader of mapped files has, stated in
        // `Gguf::open`'s documentation: nobody changes or truncates the file meanwhile.
        let map = unsafe { Mmap::map(&file) }.map_err(open_error)?;
        Ok(Storage::Map(map))
    }

    pub fn bytes(&self) -> &[u8] {
        match self {
            Storage::Map(map) => map,
            Storage::Static(bytes) => bytes,
            Storage::Bytes(bytes) => bytes,
            Storage::F32(values) => bytemuck::cast_slice(values),
        }
    }
}

/// Names a model in the directory, if there is one.
fn directory_hint(path: &Path) -> String {
    let mut models: Vec<_> = std::fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
        })
        .collect();
    models.sort();
    match models.first() {
        Some(model) => format!("name the file itself, for example {}", model.display()),
        None => "name a .gguf file (there is none in this directory)".to_owned(),
    }
}
