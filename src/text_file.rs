//! Texts from files, checked before anything is loaded.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::error::CliError;

/// Bytes of the largest text that is read.
const MAX_TEXT: u64 = 64 << 20;

/// The text of a file; `-` is standard input.
///
/// # Errors
/// If it cannot be read, is too large, or is not UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<String, CliError> {
    let unreadable = |source| CliError::Unreadable {
        path: path.to_owned(),
        source,
    };
    if path == Path::new("-") {
        return read_limited(io::stdin().lock(), PathBuf::from("standard input"));
    }
    let file = File::open(path).map_err(unreadable)?;
    if file.metadata().map_err(unreadable)?.is_dir() {
        return Err(unreadable(io::ErrorKind::IsADirectory.into()));
    }
    read_limited(file, path.to_owned())
}

fn read_limited(reader: impl Read, path: PathBuf) -> Result<String, CliError> {
    let mut bytes = Vec::new();
    if let Err(source) = reader.take(MAX_TEXT + 1).read_to_end(&mut bytes) {
        return Err(CliError::Unreadable { path, source });
    }
    if bytes.len() as u64 > MAX_TEXT {
        return Err(CliError::TooLarge {
            path,
            limit: MAX_TEXT,
        });
    }
    String::from_utf8(bytes).map_err(|e| CliError::NotUtf8 {
        path,
        offset: e.utf8_error().valid_up_to(),
    })
}
