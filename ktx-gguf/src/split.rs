//! Names of the parts of a split model: `model-00001-of-00003.gguf`.

use std::path::{Path, PathBuf};

/// A file name that follows the scheme.
pub(crate) struct SplitName {
    directory: PathBuf,
    prefix: String,
    /// Number of this part, from 1.
    pub number: usize,
    /// Number of parts.
    pub count: usize,
}

impl SplitName {
    /// Takes a path apart; `None` when it does not follow the scheme.
    pub fn parse(path: &Path) -> Option<Self> {
        let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = split_number(stem, "-of-")?;
        let (prefix, number) = split_number(rest, "-")?;
        if number == 0 || number > count {
            return None;
        }
        let directory = path.parent().unwrap_or(Path::new("")).to_owned();
        Some(Self {
            directory,
            prefix: prefix.to_owned(),
            number,
            count,
        })
    }

    /// The path of part `number`, from 1.
    pub fn part(&self, number: usize) -> PathBuf {
        self.directory
            .join(part_name(&self.prefix, number, self.count))
    }
}

/// The file name of part `number` (from 1) of `count`.
pub(crate) fn part_name(prefix: &str, number: usize, count: usize) -> String {
    format!("{prefix}-{number:05}-of-{count:05}.gguf")
}

/// Takes `separator` and five digits off the end.
fn split_number<'a>(text: &'a str, separator: &str) -> Option<(&'a str, usize)> {
    let (rest, digits) = text.rsplit_once(separator)?;
    if digits.len() != 5 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some((rest, digits.parse().ok()?))
}
