//! An adapter on the modules of one model, and how its parts reach their operators.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::active::AdapterId;
use super::error::AdapterError;
use super::file::AdapterFile;
use super::low_rank::LowRank;
use crate::module::{KModule, Phase};
use crate::nearest::nearest;
use crate::spec::Spec;
use crate::tree::Module;

/// An adapter whose matrices fit the modules of a model.
#[derive(Debug)]
pub struct Adapter {
    file: String,
    parts: BTreeMap<String, Arc<LowRank>>,
}

impl Adapter {
    /// The file on this tree. Every matrix of the file has to have its module.
    ///
    /// # Errors
    /// [`AdapterError`] if the architecture differs, a module is not there, or a shape does not fit.
    pub fn on_tree(
        file: &AdapterFile,
        tree: &Module,
        architecture: &str,
    ) -> Result<Self, AdapterError> {
        if let Some(found) = file.architecture()
            && found != architecture
        {
            return Err(AdapterError::Architecture {
                file: file.name().to_owned(),
                found: found.to_owned(),
                expected: architecture.to_owned(),
            });
        }
        let mut parts = BTreeMap::new();
        let mut used: BTreeMap<String, usize> = BTreeMap::new();
        for module in tree.walk() {
            file.check_fused(module)?;
            if let Some((name, part)) = file.named_part(module)? {
                *used.entry(name).or_default() += 1;
                parts.insert(module.path.clone(), Arc::new(part));
            }
        }
        for (name, entry) in &file.entries {
            match used.get(name) {
                None => return Err(unknown(file, tree, name)),
                // A merged tensor has a matrix for each expert and no more.
                Some(modules) => {
                    let experts = entry.b.shape().get(2).copied().unwrap_or(1);
                    if experts > *modules {
                        return Err(AdapterError::Shape {
                            file: file.name().to_owned(),
                            tensor: entry.b.name().to_owned(),
                            module: name.clone(),
                            found: entry.b.shape().to_vec(),
                            expected: format!("{modules} experts"),
                        });
                    }
                }
            }
        }
        Ok(Self {
            file: file.name().to_owned(),
            parts,
        })
    }

    /// What messages call its file.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Paths of the modules that it adapts, in order.
    pub fn modules(&self) -> impl ExactSizeIterator<Item = &str> {
        self.parts.keys().map(String::as_str)
    }

    /// The part of the module at a path.
    pub fn part(&self, path: &str) -> Option<&Arc<LowRank>> {
        self.parts.get(path)
    }

    /// Bytes of its matrices.
    pub fn bytes(&self) -> u64 {
        self.parts.values().map(|p| p.bytes()).sum()
    }

    /// The smallest rank and the largest.
    pub fn ranks(&self) -> RangeInclusive<usize> {
        let ranks = || self.parts.values().map(|p| p.rank());
        ranks().min().unwrap_or(0)..=ranks().max().unwrap_or(0)
    }
}

fn unknown(file: &AdapterFile, tree: &Module, name: &str) -> AdapterError {
    let adaptable = tree
        .walk()
        .filter(|m| matches!(m.spec, Spec::Linear(_) | Spec::Gate(_) | Spec::Embedding(_)));
    let names: Vec<String> = adaptable.flat_map(|m| file.names(m)).collect();
    let near = nearest(name, names.iter().map(String::as_str))
        .map(|n| format!(" (the nearest that it has is `{n}`)"))
        .unwrap_or_default();
    let entry = &file.entries[name];
    AdapterError::UnknownModule {
        file: file.name().to_owned(),
        tensor: entry.a.name().to_owned(),
        near,
    }
}

/// An adapter on its way through the modules: each takes what is its own.
pub struct Attachment<'a> {
    id: AdapterId,
    adapter: &'a Adapter,
    taken: BTreeSet<String>,
}

impl Attachment<'_> {
    /// The adapter's number.
    pub fn id(&self) -> AdapterId {
        self.id
    }

    /// Takes the part of the module at a path, if the adapter has one. Two operators that stand for
    /// one module, such as those of the two phases, may both take it.
    pub fn take(&mut self, path: &str) -> Option<Arc<LowRank>> {
        let part = self.adapter.part(path)?;
        self.taken.insert(path.to_owned());
        Some(Arc::clone(part))
    }
}

/// Gives the parts of an adapter to the modules of a model, roots first.
///
/// # Errors
/// [`AdapterError::NotServed`] if a part was taken by none; then no module keeps any.
pub fn attach_all(
    roots: &mut [&mut dyn KModule],
    id: AdapterId,
    adapter: &Adapter,
) -> Result<(), AdapterError> {
    let mut attachment = Attachment {
        id,
        adapter,
        taken: BTreeSet::new(),
    };
    for root in roots.iter_mut() {
        attach(&mut **root, &mut attachment);
    }
    let Some(left) = adapter.modules().find(|m| !attachment.taken.contains(*m)) else {
        return Ok(());
    };
    let class = roots
        .iter()
        .find_map(|root| in_charge(&**root, left))
        .unwrap_or("none");
    for root in roots.iter_mut() {
        detach(&mut **root, id);
    }
    Err(AdapterError::NotServed {
        file: adapter.file.clone(),
        module: left.to_owned(),
        class: class.to_owned(),
    })
}

fn attach(module: &mut dyn KModule, attachment: &mut Attachment<'_>) {
    // Updates are added in main memory.
    let on_host = |phase| module.device(phase).is_cpu();
    if on_host(Phase::Prefill) && on_host(Phase::Generate) {
        module.attach(attachment);
    }
    for part in module.prompt_operators() {
        attach(part, attachment);
    }
    for part in module.children_mut() {
        attach(part, attachment);
    }
}

/// Takes an adapter from a module and all below it.
pub fn detach(module: &mut dyn KModule, id: AdapterId) {
    module.detach(id);
    for part in module.prompt_operators() {
        detach(part, id);
    }
    for part in module.children_mut() {
        detach(part, id);
    }
}

/// Class of the innermost operator that the module at `path` belongs to.
fn in_charge(module: &dyn KModule, path: &str) -> Option<&'static str> {
    let own = module.path();
    let above = path
        .strip_prefix(own)
        .is_some_and(|rest| rest.is_empty() || own.is_empty() || rest.starts_with('.'));
    if !above {
        return None;
    }
    let below = module
        .children()
        .into_iter()
        .find_map(|c| in_charge(c, path));
    below.or(Some(module.class_path()))
}

#[cfg(test)]
mod tests {
    use ktx_gguf::Tensor;
    use ktx_kernels::device::Device;

    use super::*;
    use crate::module::Phase;

    /// Stands for experts and ignores adapters.
    struct Deaf;

    impl KModule for Deaf {
        fn path(&self) -> &str {
            "model.layers.0.mlp.experts"
        }

        fn class_path(&self) -> &'static str {
            "mine.Deaf"
        }

        fn device(&self, _phase: Phase) -> Device {
            Device::CPU
        }
    }

    #[test]
    fn an_operator_that_ignores_adapters_makes_them_unusable() {
        let matrix = |name: &str| Tensor::from_f32(name, &[1, 1], vec![1.0]);
        let part = LowRank::new(matrix("a"), matrix("b"), 1.0);
        let path = "model.layers.0.mlp.experts.3.up_proj";
        let adapter = Adapter {
            file: "x.gguf".to_owned(),
            parts: BTreeMap::from([(path.to_owned(), Arc::new(part))]),
        };
        let error = attach_all(&mut [&mut Deaf], AdapterId(0), &adapter).unwrap_err();
        let said = error.to_string();
        assert!(
            said.contains(path) && said.contains("`mine.Deaf`"),
            "{said}"
        );
    }
}
