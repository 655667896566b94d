//! The memory behind tensors: a mapped file, or bytes in memory.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;

use crate::GgufError;
use crate::resident::OwnBytes;

/// Bytes that tensors point into; shared by `Arc`.
pub(crate) enum Storage {
    Map(Mmap),
    Static(&'static [u8]),
    Bytes(Vec<u8>),
    F32(Vec<f32>),
    Own(OwnBytes),
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

    /// Tells the system that these bytes are not needed in memory, if they can be read from a file again.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Storage::Map(map) = self {
            give_back(map, range);
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    pub fn bytes(&self) -> &[u8] {
        match self {
            Storage::Map(map) => map,
            Storage::Static(bytes) => bytes,
            Storage::Bytes(bytes) => bytes,
            Storage::F32(values) => bytemuck::cast_slice(values),
            Storage::Own(own) => own.bytes(),
        }
    }
}

/// Tells the system that this process does not need part of a map in memory any more. What is read of it all the same
/// comes from the file again.
#[cfg(unix)]
fn give_back(map: &Mmap, range: Range<usize>) {
    // SAFETY: the map is of a file and read-only: no page of it holds anything that the file does not.
    let done = unsafe {
        map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
    };
    // It is a hint: a system that refuses it keeps the pages.
    let _ = done;
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
