//! Adapters of an engine: named, loaded once, chosen by each session.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ktx_models::ModelDescription;
use ktx_ops::lora::{ActiveAdapter, Adapter, AdapterFile, AdapterId};

use crate::error::EngineError;

/// An adapter that an engine holds. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LoadedAdapter {
    id: AdapterId,
    name: String,
    scale: f32,
    adapter: Arc<Adapter>,
}

impl LoadedAdapter {
    /// Its number in the engine.
    pub fn id(&self) -> AdapterId {
        self.id
    }

    /// Its name: that of its file or directory, made unlike all others of the engine.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The factor that it was loaded with.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Its matrices on the model's modules.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }
}

/// The adapters of an engine.
#[derive(Debug, Clone, Default)]
pub(crate) struct AdapterSet {
    all: Vec<LoadedAdapter>,
    next: u32,
}

impl AdapterSet {
    /// Reads an adapter and gives it a number and a name.
    pub(crate) fn read(
        &mut self,
        path: &Path,
        scale: f32,
        description: &ModelDescription,
    ) -> Result<LoadedAdapter, EngineError> {
        let file = AdapterFile::open(path)?;
        let adapter = Adapter::on_tree(&file, &description.tree, &description.architecture)?;
        let name = self.unlike_others(&name_of(path));
        check_scale(&name, scale)?;
        let loaded = LoadedAdapter {
            id: AdapterId(self.next),
            name,
            scale,
            adapter: Arc::new(adapter),
        };
        self.next += 1;
        self.all.push(loaded.clone());
        Ok(loaded)
    }

    /// Forgets an adapter.
    pub(crate) fn remove(&mut self, id: AdapterId) {
        self.all.retain(|a| a.id != id);
    }

    pub(crate) fn all(&self) -> &[LoadedAdapter] {
        &self.all
    }

    /// The adapter of this number.
    pub(crate) fn get(&self, id: AdapterId) -> Result<&LoadedAdapter, EngineError> {
        let found = self.all.iter().find(|a| a.id == id);
        found.ok_or_else(|| self.missing(&format!("number {}", id.0)))
    }

    /// All with the factors that they were loaded with.
    pub(crate) fn active(&self) -> Arc<[ActiveAdapter]> {
        let active = self.all.iter().filter(|a| a.scale != 0.0);
        active
            .map(|a| ActiveAdapter {
                id: a.id,
                scale: a.scale,
            })
            .collect()
    }

    /// These adapters with these factors, each once; those of factor 0 are left out.
    pub(crate) fn chosen(
        &self,
        wanted: &[(AdapterId, f32)],
    ) -> Result<Arc<[ActiveAdapter]>, EngineError> {
        let mut chosen: Vec<ActiveAdapter> = Vec::new();
        for (id, scale) in wanted {
            check_scale(&self.get(*id)?.name, *scale)?;
            match chosen.iter_mut().find(|a| a.id == *id) {
                Some(same) => same.scale += scale,
                None => chosen.push(ActiveAdapter {
                    id: *id,
                    scale: *scale,
                }),
            }
        }
        chosen.retain(|a| a.scale != 0.0);
        Ok(chosen.into())
    }

    /// The error of an adapter that is not here.
    pub(crate) fn missing(&self, name: &str) -> EngineError {
        let known: Vec<&str> = self.all.iter().map(|a| a.name.as_str()).collect();
        EngineError::NoAdapter {
            name: name.to_owned(),
            known: match known.is_empty() {
                true => "none is loaded".to_owned(),
                false => format!("there are: {}", known.join(", ")),
            },
        }
    }

    fn unlike_others(&self, name: &str) -> String {
        let numbered = (2..).map(|n| format!("{name}-{n}"));
        std::iter::once(name.to_owned())
            .chain(numbered)
            .find(|name| self.all.iter().all(|a| a.name != *name))
            .expect("one of endless names is free")
    }
}

fn check_scale(name: &str, scale: f32) -> Result<(), EngineError> {
    match scale.is_finite() {
        true => Ok(()),
        false => Err(EngineError::AdapterScale {
            name: name.to_owned(),
            scale,
        }),
    }
}

/// What an adapter is called: the name of its file without its extension, or of its directory.
fn name_of(path: &Path) -> String {
    let named: PathBuf = match path.is_dir() {
        // `.` has a name too.
        true => path.canonicalize().unwrap_or_else(|_| path.to_owned()),
        false => path.to_owned(),
    };
    let of_peft = named
        .file_name()
        .is_some_and(|n| n == "adapter_model.safetensors" || n == "adapter_config.json");
    let name = match (of_peft, named.parent().and_then(Path::file_name)) {
        (true, Some(directory)) => Some(directory),
        _ if path.is_dir() => named.file_name(),
        _ => named.file_stem(),
    };
    name.map_or_else(
        || "adapter".to_owned(),
        |n| n.to_string_lossy().into_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_are_called_as_their_files_are() {
        assert_eq!(name_of(Path::new("a/pirate.gguf")), "pirate");
        assert_eq!(
            name_of(Path::new("a/pirate/adapter_model.safetensors")),
            "pirate"
        );
        assert_eq!(
            name_of(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))),
            "src"
        );
    }
}
