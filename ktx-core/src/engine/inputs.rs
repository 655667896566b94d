//! Where a model and its rules come from.

use std::path::PathBuf;

use ktx_gguf::{Gguf, Safetensors};

use super::AutoPlacement;
use crate::error::EngineError;
use crate::model_files::ModelFiles;
use crate::rules::{RuleSet, RuleVariables, preset_for, presets};
use crate::weights::Weights;

/// Where rules come from.
#[derive(Debug, Clone, Default)]
pub enum Rules {
    /// The preset for the model's architecture.
    #[default]
    Preset,
    /// A preset by its name.
    Named(String),
    /// A file.
    File(PathBuf),
    /// A text, with a name for messages.
    Text {
        /// The rules.
        text: String,
        /// What messages call it.
        name: String,
    },
    /// None: operators are placed for the memory that there is, see [`crate::placement`].
    Auto(AutoPlacement),
}

pub(super) enum Source {
    File(PathBuf),
    Opened(Gguf),
}

/// The model's files, opened.
pub(super) fn open(
    source: Option<Source>,
    safetensors: &[PathBuf],
) -> Result<Weights, EngineError> {
    let mut beside: Vec<PathBuf> = safetensors.to_vec();
    let gguf = match source {
        Some(Source::Opened(gguf)) => gguf,
        Some(Source::File(path)) => {
            let files = ModelFiles::at(&path)?;
            // Named safetensors files are all that are wanted.
            beside.extend(files.beside.filter(|_| safetensors.is_empty()));
            Gguf::open(files.gguf)?
        }
        None => {
            return Err(EngineError::Setting {
                name: "model",
                value: 0,
                range: "name a model's file",
            });
        }
    };
    let beside: Result<Vec<_>, _> = beside.iter().map(Safetensors::open).collect();
    Weights::new(gguf, beside?)
}

pub(super) fn read_rules(
    rules: &Rules,
    variables: &RuleVariables,
    architecture: &str,
) -> Result<(RuleSet, String), EngineError> {
    let preset = |preset: &crate::rules::Preset| {
        let name = format!("preset {}", preset.name);
        RuleSet::from_preset_with(preset, variables)
            .map(|rules| (rules, name))
            .map_err(EngineError::from)
    };
    match rules {
        Rules::File(path) => Ok((
            RuleSet::from_path_with(path, variables)?,
            path.display().to_string(),
        )),
        Rules::Text { text, name } => {
            Ok((RuleSet::parse_with(text, name, variables)?, name.clone()))
        }
        Rules::Preset | Rules::Auto(_) => match preset_for(architecture) {
            Some(found) => preset(found),
            None => Ok((
                RuleSet::parse_with("[]", "no rules", variables)?,
                "no rules: every module keeps its default".to_owned(),
            )),
        },
        Rules::Named(name) => match presets().iter().find(|p| p.name == name) {
            Some(found) => preset(found),
            None => Err(EngineError::Preset {
                name: name.clone(),
                known: presets()
                    .iter()
                    .map(|p| p.name)
                    .collect::<Vec<_>>()
                    .join(", "),
            }),
        },
    }
}
