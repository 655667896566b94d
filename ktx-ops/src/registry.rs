//! The registry: every operator under its class path, collected from all linked crates.
//!
//! An operator registers itself where it is written, with [`register_operator!`](crate::register_operator);
//! nothing lists it. The table is sorted and checked once, at its first use.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::OnceLock;

use crate::build::{BuildArgs, OpError, Operator, WeightStore};
use crate::kwargs::{KwargError, KwargInfo, Kwargs};
use crate::nearest::nearest;
use crate::tree::{Module, Role};

/// What an operator needs beside its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Nothing but the host.
    Host,
    /// A device or file feature that this build cannot use: what, in words.
    Missing(&'static str),
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("nothing"),
            Self::Missing(what) => f.write_str(what),
        }
    }
}

/// Makes an operator without weights.
pub type BuildFn = fn(&mut BuildArgs<'_>) -> Result<Operator, OpError>;

/// Says why an operator cannot take the place of a module with these weights, in words that follow
/// "cannot take the place of `model.layers.0.mlp`:", and what would help.
pub type ValidateFn = fn(&Module, &dyn WeightStore) -> Result<(), String>;

/// One operator of the registry.
pub struct OperatorEntry {
    /// Its class path: `ktransformers.operators.linear.KTransformersLinear`.
    pub class: &'static str,
    /// Other names of the same operator.
    pub aliases: &'static [&'static str],
    /// What it is to its parent.
    pub role: Role,
    /// One line on what it does.
    pub summary: &'static str,
    /// Set for an operator that changes the weights' values: how.
    pub lossy: Option<&'static str>,
    /// Its keyword arguments.
    pub kwargs: KwargInfo,
    /// What it needs.
    pub needs: Needs,
    /// Looks at the module and its weights when a plan is checked, before anything is loaded; most
    /// operators take any module of their role.
    pub validate: Option<ValidateFn>,
    /// Makes one.
    pub build: BuildFn,
    /// The source file that registers it.
    pub file: &'static str,
    /// The line there.
    pub line: u32,
}

inventory::collect!(OperatorEntry);

/// Registers an operator under its class path.
///
/// ```
/// use ktx_ops::{BuildArgs, NoKwargs, OpError, Operator, register_operator};
///
/// fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
///     Err(args.error("an example that builds nothing"))
/// }
///
/// register_operator! {
///     class: "example.MyLinear",
///     aliases: ["MyLinear"],
///     role: Linear,
///     summary: "an example",
///     kwargs: NoKwargs,
///     build: build,
/// }
/// assert_eq!(ktx_ops::registry().get("MyLinear").unwrap().class, "example.MyLinear");
/// ```
#[macro_export]
macro_rules! register_operator {
    (@lossy) => { None };
    (@lossy $how:expr) => { Some($how) };
    (@needs) => { $crate::Needs::Host };
    (@needs $what:expr) => { $crate::Needs::Missing($what) };
    (@validate) => { None };
    (@validate $how:expr) => { Some($how) };
    (@kwargs open $set:ty) => { $crate::KwargInfo::open::<$set>() };
    (@kwargs $set:ty) => { $crate::KwargInfo::of::<$set>() };
    (
        class: $class:expr,
        aliases: $aliases:expr,
        role: $role:ident,
        summary: $summary:expr,
        $(lossy: $lossy:expr,)?
        $(needs: $needs:expr,)?
        kwargs: $($kwargs:ident)+,
        $(validate: $validate:expr,)?
        build: $build:expr $(,)?
    ) => {
        $crate::inventory::submit! {
            $crate::OperatorEntry {
                class: $class,
                aliases: &$aliases,
                role: $crate::Role::$role,
                summary: $summary,
                lossy: $crate::register_operator!(@lossy $($lossy)?),
                kwargs: $crate::register_operator!(@kwargs $($kwargs)+),
                needs: $crate::register_operator!(@needs $($needs)?),
                validate: $crate::register_operator!(@validate $($validate)?),
                build: $build,
                file: file!(),
                line: line!(),
            }
        }
    };
}

impl OperatorEntry {
    /// Checks names and types of keyword arguments; those of inner operators are checked there.
    pub fn check_kwargs(&self, kwargs: &Kwargs) -> Result<(), KwargError> {
        self.kwargs.check(self.class, kwargs)
    }
}

/// Two operators with one name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("two operators are registered as `{name}`: at {first} and at {second}; rename one")]
pub struct DuplicateOperator {
    /// The name.
    pub name: String,
    /// File and line of the one.
    pub first: String,
    /// File and line of the other.
    pub second: String,
}

/// All operators, by class path and alias.
pub struct Registry {
    by_name: BTreeMap<&'static str, &'static OperatorEntry>,
}

impl Registry {
    /// A table of these operators; a name that stands for two of them is an error.
    pub fn new(
        entries: impl IntoIterator<Item = &'static OperatorEntry>,
    ) -> Result<Self, DuplicateOperator> {
        let place = |e: &OperatorEntry| format!("{}:{}", e.file, e.line);
        let mut by_name: BTreeMap<&'static str, &'static OperatorEntry> = BTreeMap::new();
        for entry in entries {
            for name in std::iter::once(entry.class).chain(entry.aliases.iter().copied()) {
                if let Some(other) = by_name.insert(name, entry) {
                    let mut places = [place(other), place(entry)];
                    places.sort();
                    let [first, second] = places;
                    return Err(DuplicateOperator {
                        name: name.to_owned(),
                        first,
                        second,
                    });
                }
            }
        }
        Ok(Self { by_name })
    }

    /// The operator of this class path or alias.
    pub fn get(&self, name: &str) -> Option<&'static OperatorEntry> {
        self.by_name.get(name).copied()
    }

    /// All operators, sorted by class path.
    pub fn entries(&self) -> impl Iterator<Item = &'static OperatorEntry> {
        self.by_name
            .iter()
            .filter(|(name, e)| **name == e.class)
            .map(|(_, e)| *e)
    }

    /// The registered name that looks most like this one. A dotted path is compared as a whole
    /// first, then by its last part.
    pub fn nearest(&self, name: &str) -> Option<&'static str> {
        let leaf = |path: &'static str| path.rsplit('.').next().unwrap_or(path);
        nearest(name, self.by_name.keys().copied()).or_else(|| {
            let wanted = name.rsplit('.').next()?;
            let found = nearest(wanted, self.by_name.keys().map(|n| leaf(n)))?;
            self.by_name.keys().copied().find(|n| leaf(n) == found)
        })
    }
}

/// All operators that are linked into this program.
///
/// # Errors
/// If two of them have one name.
pub fn try_registry() -> Result<&'static Registry, DuplicateOperator> {
    static TABLE: OnceLock<Result<Registry, DuplicateOperator>> = OnceLock::new();
    TABLE
        .get_or_init(|| Registry::new(inventory::iter::<OperatorEntry>()))
        .as_ref()
        .map_err(Clone::clone)
}

/// All operators that are linked into this program.
///
/// # Panics
/// If two of them have one name; [`try_registry`] gives that as an error.
pub fn registry() -> &'static Registry {
    try_registry().unwrap_or_else(|e| panic!("{e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kwargs::NoKwargs;

    fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
        Err(args.error("builds nothing"))
    }

    const fn entry(
        class: &'static str,
        aliases: &'static [&'static str],
        line: u32,
    ) -> OperatorEntry {
        OperatorEntry {
            class,
            aliases,
            role: Role::Linear,
            summary: "for a test",
            lossy: None,
            kwargs: KwargInfo::of::<NoKwargs>(),
            needs: Needs::Host,
            validate: None,
            build,
            file: "test.rs",
            line,
        }
    }

    static FIRST: OperatorEntry = entry("a.First", &["First"], 1);
    static SECOND: OperatorEntry = entry("b.Second", &["First"], 2);

    #[test]
    fn two_operators_of_one_name_are_rejected_with_both_places() {
        let error = Registry::new([&FIRST, &SECOND])
            .err()
            .expect("both are called First");
        assert_eq!(error.name, "First");
        assert_eq!(
            (error.first.as_str(), error.second.as_str()),
            ("test.rs:1", "test.rs:2")
        );
    }

    #[test]
    fn a_name_and_its_aliases_are_one_entry_and_a_slip_finds_it() {
        let registry = Registry::new([&FIRST]).unwrap();
        assert!(std::ptr::eq(
            registry.get("First").unwrap(),
            registry.get("a.First").unwrap()
        ));
        assert_eq!(registry.entries().count(), 1);
        assert_eq!(registry.nearest("a.Frist"), Some("a.First"));
        assert_eq!(registry.nearest("other.place.Frist"), Some("First"));
        assert!(registry.get("Frist").is_none());
    }

    #[test]
    fn built_in_operators_have_names_of_their_own_and_say_what_they_do() {
        let entries: Vec<_> = registry().entries().collect();
        assert!(entries.windows(2).all(|pair| pair[0].class < pair[1].class));
        assert!(entries.iter().all(|entry| !entry.summary.is_empty()));
        for name in [
            "KTransformersLinear",
            "KExpertsCPU",
            "KMoECpu",
            "torch.nn.Linear",
        ] {
            assert!(registry().get(name).is_some(), "{name}");
        }
    }
}
