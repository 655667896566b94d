//! The files of a model: a GGUF file, and the safetensors files that lie beside it in one directory.

use std::path::{Path, PathBuf};

use crate::error::EngineError;

/// What a path names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFiles {
    /// The GGUF file, of a split model the first part.
    pub gguf: PathBuf,
    /// The directory, if safetensors files are in it too.
    pub beside: Option<PathBuf>,
}

impl ModelFiles {
    /// The files at a path: a GGUF file, or a directory that holds one GGUF model and maybe safetensors files.
    ///
    /// # Errors
    /// [`EngineError::ModelDirectory`] if a directory holds no GGUF model, or several.
    pub fn at(path: &Path) -> Result<Self, EngineError> {
        if !path.is_dir() {
            return Ok(Self {
                gguf: path.to_owned(),
                beside: None,
            });
        }
        let unreadable = |source| EngineError::Io {
            path: path.to_owned(),
            source,
        };
        let (mut models, mut beside) = (Vec::new(), None);
        for file in std::fs::read_dir(path).map_err(unreadable)? {
            let file = file.map_err(unreadable)?.path();
            if has_extension(&file, "gguf") && is_first_part(&file) {
                models.push(file);
            } else if has_extension(&file, "safetensors") {
                beside = Some(path.to_owned());
            }
        }
        models.sort();
        let reason = match models.as_slice() {
            [model] => {
                return Ok(Self {
                    gguf: model.clone(),
                    beside,
                });
            }
            [] if beside.is_some() => {
                "safetensors files and no GGUF file in it; put one of the same model beside them: the metadata \
                 and the tokenizer are read from it"
                    .to_owned()
            }
            [] => "no GGUF file in it; name the model's file".to_owned(),
            [first, ..] => format!(
                "{} models in it; name one's file, such as {}",
                models.len(),
                first.display()
            ),
        };
        Err(EngineError::ModelDirectory {
            path: path.to_owned(),
            reason,
        })
    }
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension()
        .is_some_and(|e| e.eq_ignore_ascii_case(extension))
}

/// Of a split model, `name-00001-of-00003.gguf` stands for all parts.
fn is_first_part(path: &Path) -> bool {
    let stem = path
        .file_stem()
        .and_then(|s| s.to_str())
        .unwrap_or_default();
    let part = stem.rsplit_once("-of-").and_then(|(before, count)| {
        let number = before.rsplit_once('-')?.1;
        count.parse::<u32>().ok().and(number.parse::<u32>().ok())
    });
    part.is_none_or(|number| number == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_part_of_a_split_model_counts() {
        for (name, first) in [
            ("model.gguf", true),
            ("model-00001-of-00003.gguf", true),
            ("model-00002-of-00003.gguf", false),
            ("best-of-all.gguf", true),
        ] {
            assert_eq!(is_first_part(Path::new(name)), first, "{name}");
        }
    }
}
