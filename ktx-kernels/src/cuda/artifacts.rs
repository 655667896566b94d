//! The kernels as they were compiled ahead of time; which of them fits a GPU.

/// A source file's compiled forms.
struct Compiled {
    /// Path of the source without its ending: `linear/gemv`.
    module: &'static str,
    /// Machine code for one generation each: `(90, deflated cubin)`; ascending.
    cubins: &'static [(u32, &'static [u8])],
    /// Deflated PTX for compute capability 8.0, for GPUs that came later.
    ptx: &'static [u8],
}

include!("kernels/table.rs");

/// What the driver is to load for a GPU of this compute capability; PTX ends with a zero.
pub(super) fn image(module: &str, compute: (i32, i32)) -> Option<Vec<u8>> {
    let compiled = COMPILED.iter().find(|c| c.module == module)?;
    let inflate = |bytes| miniz_oxide::inflate::decompress_to_vec(bytes).ok();
    // Machine code runs on its own generation and on later ones of the same major number.
    let fits = |made: u32| {
        let (major, minor) = (made / 10, made % 10);
        i64::from(major) == i64::from(compute.0) && i64::from(minor) <= i64::from(compute.1)
    };
    match compiled.cubins.iter().rev().find(|(made, _)| fits(*made)) {
        Some((_, cubin)) => inflate(cubin),
        None => {
            let mut ptx = inflate(compiled.ptx)?;
            ptx.push(0);
            Some(ptx)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FNV-1a, as `xtask` computes it.
    fn hash(bytes: impl IntoIterator<Item = u8>) -> u64 {
        bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    }

    #[test]
    fn committed_kernels_were_compiled_from_the_committed_sources() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        for (path, made_from) in SOURCES {
            let text = std::fs::read(root.join(path)).unwrap();
            // Line ends differ where git rewrites them.
            let text = text.into_iter().filter(|b| *b != b'\r');
            assert_eq!(
                hash(text),
                *made_from,
                "{path} changed: run `cargo run -p xtask -- kernels`"
            );
        }
    }

    #[test]
    fn every_generation_has_machine_code_or_ptx() {
        for compiled in COMPILED {
            for compute in [
                (7, 0),
                (7, 5),
                (8, 0),
                (8, 6),
                (8, 7),
                (8, 9),
                (9, 0),
                (10, 0),
                (12, 0),
                (12, 1),
            ] {
                let image = image(compiled.module, compute).unwrap();
                assert_eq!(
                    &image[..4],
                    b"\x7fELF",
                    "{} for {compute:?}",
                    compiled.module
                );
            }
            let later = image(compiled.module, (13, 0)).unwrap();
            assert_eq!(later.last(), Some(&0));
            assert!(
                later.windows(8).any(|w| w == b".version"),
                "{}",
                compiled.module
            );
        }
    }

    #[test]
    fn unknown_modules_have_no_image() {
        assert_eq!(image("no/such", (9, 0)), None);
    }
}
