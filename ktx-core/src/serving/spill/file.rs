//! The file of one page: who it belongs to, a checksum, and its bytes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use super::key::{Fingerprint, PageKey};

const MAGIC: [u8; 8] = *b"ktxpage1";
/// The magic bytes, the fingerprint, the key, the checksum of what follows.
pub(super) const HEADER_BYTES: usize = MAGIC.len() + 3 * 32;

/// Why a file gives no page.
#[derive(Debug, thiserror::Error)]
pub(super) enum PageFileError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it is no page of this model, of these rules, or of this version")]
    Foreign,
    #[error("it has {found} bytes instead of {wanted}")]
    Length { found: u64, wanted: u64 },
    #[error("its checksum is wrong")]
    Checksum,
}

/// Writes a page. No data are forced to the disk: what a crash leaves half written has a wrong checksum.
pub(super) fn write(
    path: &Path,
    fingerprint: &Fingerprint,
    key: PageKey,
    bytes: &[u8],
) -> io::Result<()> {
    let mut file = create(path)?;
    file.write_all(&header(fingerprint, key, bytes))?;
    file.write_all(bytes)
}

/// Prompts can be guessed from pages: nobody else may read them.
fn create(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

fn header(fingerprint: &Fingerprint, key: PageKey, bytes: &[u8]) -> Vec<u8> {
    [
        &MAGIC[..],
        &fingerprint.0,
        &key.0,
        blake3::hash(bytes).as_bytes(),
    ]
    .concat()
}

/// Reads a page of this many bytes.
pub(super) fn read(
    path: &Path,
    fingerprint: &Fingerprint,
    key: PageKey,
    bytes: usize,
) -> Result<Vec<u8>, PageFileError> {
    let mut file = File::open(path)?;
    let (found, wanted) = (file.metadata()?.len(), (HEADER_BYTES + bytes) as u64);
    if found != wanted {
        return Err(PageFileError::Length { found, wanted });
    }
    let mut head = [0; HEADER_BYTES];
    file.read_exact(&mut head)?;
    let mut page = vec![0; bytes];
    file.read_exact(&mut page)?;
    let right = header(fingerprint, key, &page);
    if head[..HEADER_BYTES - 32] != right[..HEADER_BYTES - 32] {
        return Err(PageFileError::Foreign);
    }
    if head[HEADER_BYTES - 32..] != right[HEADER_BYTES - 32..] {
        return Err(PageFileError::Checksum);
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_of_the_same_model_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("page");
        let (own, other) = (Fingerprint([1; 32]), Fingerprint([2; 32]));
        let (key, page) = (PageKey([3; 32]), [5; 1000]);
        write(&path, &own, key, &page).unwrap();
        assert_eq!(read(&path, &own, key, 1000).unwrap(), page);
        let error = |fingerprint, key, bytes| read(&path, fingerprint, key, bytes).unwrap_err();
        assert!(matches!(error(&other, key, 1000), PageFileError::Foreign));
        let another = PageKey([4; 32]);
        assert!(matches!(error(&own, another, 1000), PageFileError::Foreign));
        assert!(matches!(
            error(&own, key, 999),
            PageFileError::Length { .. }
        ));
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, damaged).unwrap();
            assert!(read(&path, &own, key, 1000).is_err(), "byte {at}");
        }
        for length in [0, 7, HEADER_BYTES, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(matches!(
                error(&own, key, 1000),
                PageFileError::Length { .. }
            ));
        }
    }

    #[cfg(unix)]
    #[test]
    fn nobody_else_can_read_a_page() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("page");
        write(&path, &Fingerprint([0; 32]), PageKey([0; 32]), b"x").unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0);
    }
}
