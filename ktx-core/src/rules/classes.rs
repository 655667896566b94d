//! Class paths that rules can match by, with their ancestors.
//!
//! A rule names a class by its Python path, and takes modules of its subclasses too. Which classes
//! there are, and what they descend from, is a table (`data/classes.json`, from KTransformers
//! v0.3.2; see `data/NOTICE`); the classes of the tree at hand and the registered operators come on
//! top of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::OnceLock;

use ktx_ops::nearest::nearest;
use ktx_ops::{Module, Registry};

const KNOWN: &str = include_str!("../../data/classes.json");
const LIBRARIES: &str = include_str!("../../data/libraries.json");
const BASE: &str = "torch.nn.Module";

/// Why a class path names no class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoClass {
    /// Nothing is known of the Python module.
    Module,
    /// The Python module is known, and it has no such class.
    Name,
}

/// Class paths with their chains: the class itself under its proper path, then its ancestors.
type Chains = BTreeMap<String, Vec<String>>;

/// The classes of a tree, and all that rules can name beside them.
pub(crate) struct ClassTable<'a> {
    registry: Option<&'a Registry>,
    /// Classes that only this tree has.
    extra: BTreeSet<&'a str>,
    /// Python modules of those classes, with the packages around them.
    extra_modules: BTreeSet<&'a str>,
}

struct Known {
    chains: Chains,
    modules: BTreeSet<String>,
}

fn known() -> &'static Known {
    static TABLE: OnceLock<Known> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut chains: Chains =
            serde_json::from_str(KNOWN).expect("the table is checked by a test");
        let libraries: Chains =
            serde_json::from_str(LIBRARIES).expect("the table is checked by a test");
        for (module, names) in &libraries {
            for name in names {
                // What `torch.nn.modules.linear` defines is known as `torch.nn.Linear`.
                let home = if module.starts_with("torch.nn.") {
                    "torch.nn"
                } else {
                    module
                };
                let proper = format!("{home}.{name}");
                let own = || vec![proper.clone(), BASE.to_owned()];
                let chain = chains.entry(proper.clone()).or_insert_with(own).clone();
                if home != module {
                    chains.insert(format!("{module}.{name}"), chain.clone());
                    chains.insert(format!("torch.nn.modules.{name}"), chain);
                }
            }
        }
        let modules = chains
            .keys()
            .flat_map(|path| packages(path))
            .map(str::to_owned)
            .collect();
        Known { chains, modules }
    })
}

/// `a.b.C` -> `a.b`, `a`
fn packages(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('.').map(|(at, _)| &path[..at])
}

impl<'a> ClassTable<'a> {
    pub(crate) fn new(tree: &'a Module, registry: Option<&'a Registry>) -> Self {
        let known = known();
        let extra: BTreeSet<&str> = tree
            .walk()
            .map(|m| m.class.as_str())
            .filter(|c| !known.chains.contains_key(*c))
            .collect();
        let operators = registry
            .into_iter()
            .flat_map(|r| r.entries())
            .map(|e| e.class);
        let extra_modules = extra
            .iter()
            .copied()
            .chain(operators)
            .flat_map(packages)
            .collect();
        Self {
            registry,
            extra,
            extra_modules,
        }
    }

    /// The proper path of the class that a rule names.
    pub(crate) fn resolve<'p>(&self, path: &'p str) -> Result<&'p str, NoClass>
    where
        'a: 'p,
    {
        if let Some(chain) = known().chains.get(path) {
            return Ok(chain.first().map_or(path, String::as_str));
        }
        if self.extra.contains(path) {
            return Ok(path);
        }
        if let Some(entry) = self.registry.and_then(|r| r.get(path)) {
            return Ok(entry.class);
        }
        let module = path.rsplit_once('.').map_or("", |(module, _)| module);
        let found = known().modules.contains(module) || self.extra_modules.contains(module);
        Err(if found {
            NoClass::Name
        } else {
            NoClass::Module
        })
    }

    /// Whether a module of class `class` is one of class `ancestor`, a proper path.
    pub(crate) fn is_a(&self, class: &str, ancestor: &str) -> bool {
        match known().chains.get(class) {
            Some(chain) => chain.iter().any(|c| c == ancestor),
            None => class == ancestor || ancestor == BASE,
        }
    }

    /// The known class path that looks most like this one: of the same name in another module, or
    /// of a similar name.
    pub(crate) fn nearest(&self, path: &str) -> Option<String> {
        let paths = || {
            known()
                .chains
                .keys()
                .map(String::as_str)
                .chain(self.extra.iter().copied())
        };
        let leaf = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
        let wanted = leaf(path);
        let same: Vec<&str> = paths().filter(|p| leaf(p) == wanted).collect();
        let found = nearest(path, same.iter().copied()).or_else(|| same.first().copied());
        found.or_else(|| nearest(path, paths())).map(str::to_owned)
    }
}

/// Remembers which classes descend from which.
#[derive(Default)]
pub(crate) struct Descent<'a> {
    answers: HashMap<(&'a str, usize), bool>,
}

impl<'a> Descent<'a> {
    /// As [`ClassTable::is_a`] for the class of rule `rule`.
    pub(crate) fn is_a(
        &mut self,
        table: &ClassTable<'_>,
        class: &'a str,
        rule: usize,
        ancestor: &str,
    ) -> bool {
        *self
            .answers
            .entry((class, rule))
            .or_insert_with(|| table.is_a(class, ancestor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ktx_ops::Spec;

    #[test]
    fn imported_names_stand_for_the_class_they_import() {
        let tree = Module::root("a.Root", Spec::Opaque);
        let table = ClassTable::new(&tree, None);
        assert_eq!(
            table.resolve("torch.nn.modules.linear.Linear"),
            Ok("torch.nn.Linear")
        );
        assert_eq!(
            table.resolve("torch.nn.LayerNorm"),
            Ok("torch.nn.LayerNorm")
        );
        assert_eq!(table.resolve("a.Root"), Ok("a.Root"));
        assert_eq!(table.resolve("a.Other"), Err(NoClass::Name));
        assert_eq!(table.resolve("b.Other"), Err(NoClass::Module));
        assert_eq!(table.resolve("torch.Other"), Err(NoClass::Name));
        assert_eq!(
            table.resolve("transformers.models.llama.modeling_llama.LlamaMLP"),
            Ok("transformers.models.llama.modeling_llama.LlamaMLP")
        );
        assert!(table.is_a("torch.nn.Linear", "torch.nn.Module"));
        assert!(!table.is_a("torch.nn.Linear", "torch.nn.Embedding"));
    }
}
