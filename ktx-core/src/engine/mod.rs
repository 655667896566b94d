//! The engine: a model that is loaded, and what its sessions share.

mod adapters;
mod auto;
mod builder;
mod hot;
mod inputs;
#[cfg(test)]
mod mixed;
mod parts;
mod runtime;
mod settings;
mod steps;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use ktx_kernels::device::Device;
use ktx_kernels::workspace::Transfers;
use ktx_models::ModelDescription;
use ktx_ops::experts::ExpertUses;
use ktx_ops::experts::HotReport;
use ktx_ops::lora::{ActiveAdapter, AdapterId};
use ktx_ops::recording::StepTimes;

pub(crate) use adapters::AdapterSet;
pub use adapters::LoadedAdapter;
pub use auto::AutoPlacement;
pub use builder::{DeviceMapping, EngineBuilder, PlannedModel, available_devices};
pub use hot::HotMemory;
pub use inputs::Rules;
pub(crate) use parts::pages_for;
pub(crate) use runtime::Runtime;
pub use settings::{HostWeights, MemoryCheck, Settings};

use crate::chat::ChatTemplate;
use crate::error::EngineError;
use crate::grammar::TokenTrie;
use crate::inject::InjectReport;
use crate::plan::Plan;
use crate::session::Session;
use crate::tokenizer::Tokenizer;

/// A loaded model. Cheap to clone; sessions of one engine share weights, threads and cache pages.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) description: ModelDescription,
    pub(crate) plan: Plan,
    pub(crate) report: InjectReport,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Result<ChatTemplate, crate::chat::ChatError>,
    pub(crate) settings: Settings,
    pub(crate) runtime: Mutex<Runtime>,
    /// The counters of routed experts, beside the runtime: reading them waits for no step.
    pub(crate) expert_uses: Vec<(String, Arc<ExpertUses>)>,
    pub(crate) adapters: Mutex<AdapterSet>,
    /// What a new session begins with: the adapters that the engine was made with.
    pub(crate) default_adapters: Arc<[ActiveAdapter]>,
    /// The vocabulary as grammars read it, made when it is first needed.
    pub(crate) trie: OnceLock<TokenTrie>,
}

impl Engine {
    /// Loads a GGUF file with the preset of its architecture and default settings.
    ///
    /// # Errors
    /// [`EngineError`] if the file cannot be read, is not supported, or does not fit.
    pub fn open(model: impl AsRef<std::path::Path>) -> Result<Self, EngineError> {
        Self::builder().model(model).load()
    }

    /// Settings of a new engine.
    pub fn builder() -> EngineBuilder {
        EngineBuilder::default()
    }

    pub(crate) fn inner(&self) -> Arc<Inner> {
        Arc::clone(&self.inner)
    }

    /// A new conversation or text, with nothing in it.
    pub fn session(&self) -> Session {
        Session::new(Arc::clone(&self.inner))
    }

    /// What the model's file describes.
    pub fn description(&self) -> &ModelDescription {
        &self.inner.description
    }

    /// Which operator is where, and why.
    pub fn plan(&self) -> &Plan {
        &self.inner.plan
    }

    /// What was injected where.
    pub fn report(&self) -> &InjectReport {
        &self.inner.report
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.inner.tokenizer
    }

    /// The model's chat template, if it has one.
    ///
    /// # Errors
    /// Why it has none, or one that cannot be used.
    pub fn template(&self) -> Result<&ChatTemplate, &crate::chat::ChatError> {
        self.inner.template.as_ref()
    }

    /// How often each routed expert was chosen since the model was loaded, prompts included: by the
    /// experts' path, in the order of the layers. Operators that do not count, and those on a GPU, are
    /// not among them or stay at 0. Waits for no step.
    pub fn expert_uses(&self) -> Vec<(&str, Vec<u64>)> {
        let mut all: Vec<(&str, Vec<u64>)> = Vec::new();
        for (path, uses) in &self.inner.expert_uses {
            let uses = uses.read();
            match all.last_mut().filter(|(last, _)| last == path) {
                Some((_, sum)) => sum.iter_mut().zip(uses).for_each(|(sum, n)| *sum += n),
                None => all.push((path, uses)),
            }
        }
        all
    }

    /// What was copied between devices since it was loaded, by where from and where to.
    ///
    /// # Errors
    /// [`EngineError::Poisoned`] after a panic in a step.
    pub fn transfers(&self) -> Result<BTreeMap<(Device, Device), Transfers>, EngineError> {
        Ok(self.inner.runtime()?.transfers())
    }

    /// Where the time went of steps that a GPU and the CPU shared since the model was loaded: those that were
    /// recorded and ran.
    ///
    /// # Errors
    /// [`EngineError::Poisoned`] after a panic in a step.
    pub fn step_times(&self) -> Result<StepTimes, EngineError> {
        Ok(self.inner.runtime()?.step_times())
    }

    /// How the cache of the most used experts does; none without one.
    ///
    /// # Errors
    /// [`EngineError::Poisoned`] after a panic in a step.
    pub fn hot_experts(&self) -> Result<Option<HotReport>, EngineError> {
        Ok(self.inner.runtime()?.hot_report())
    }

    /// Loads an adapter beside those that are there: a GGUF file, or the directory of a PEFT adapter.
    /// The base stays as it is, and no session changes: each chooses with
    /// [`Session::set_adapters`](crate::Session::set_adapters). Waits for a step that is running.
    ///
    /// # Errors
    /// [`EngineError::Adapter`] if it cannot be read, or is not for this model.
    pub fn load_adapter(
        &self,
        path: impl AsRef<std::path::Path>,
    ) -> Result<LoadedAdapter, EngineError> {
        let mut adapters = self.inner.adapters()?;
        let loaded = adapters.read(path.as_ref(), 1.0, &self.inner.description)?;
        let attached = self
            .inner
            .runtime()
            .and_then(|mut runtime| runtime.attach(loaded.id(), loaded.adapter()));
        if let Err(error) = attached {
            adapters.remove(loaded.id());
            return Err(error);
        }
        Ok(loaded)
    }

    /// Forgets an adapter. A session that has it chosen can go on after it has chosen others.
    ///
    /// # Errors
    /// [`EngineError::NoAdapter`] if there is none of this number.
    pub fn unload_adapter(&self, id: AdapterId) -> Result<(), EngineError> {
        let mut adapters = self.inner.adapters()?;
        adapters.get(id)?;
        self.inner.runtime()?.detach(id);
        adapters.remove(id);
        Ok(())
    }

    /// All adapters, those that it was made with first.
    ///
    /// # Errors
    /// [`EngineError::Poisoned`] if an earlier call panicked.
    pub fn adapters(&self) -> Result<Vec<LoadedAdapter>, EngineError> {
        Ok(self.inner.adapters()?.all().to_vec())
    }

    /// The adapter of this name.
    ///
    /// # Errors
    /// [`EngineError::NoAdapter`], which lists those that there are.
    pub fn adapter(&self, name: &str) -> Result<LoadedAdapter, EngineError> {
        let adapters = self.inner.adapters()?;
        let found = adapters.all().iter().find(|a| a.name() == name);
        found.cloned().ok_or_else(|| adapters.missing(name))
    }

    /// The settings that it was made with, defaults filled in.
    pub fn settings(&self) -> &Settings {
        &self.inner.settings
    }
}

impl Inner {
    pub(crate) fn trie(&self) -> &TokenTrie {
        self.trie.get_or_init(|| TokenTrie::new(&self.tokenizer))
    }

    pub(crate) fn runtime(&self) -> Result<MutexGuard<'_, Runtime>, EngineError> {
        self.runtime.lock().map_err(|_| EngineError::Poisoned)
    }

    pub(crate) fn adapters(&self) -> Result<MutexGuard<'_, AdapterSet>, EngineError> {
        self.adapters.lock().map_err(|_| EngineError::Poisoned)
    }
}
