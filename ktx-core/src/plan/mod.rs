//! The plan: what stands in every module's place, made on the module tree alone.
//!
//! [`plan`] walks the tree, parents first. The first rule that matches a module decides its class and
//! keyword arguments; a module that no rule matches keeps its class (`default`) on the default device.
//! Below a rule that says `recursive: False` no module has an entry. The result can be printed as JSON
//! ([`Plan::to_json`]), checked against the operators at hand ([`check`]), and moved to the CPU
//! ([`Plan::map_devices_to_cpu`]).

mod check;
mod devices;
mod diff;
mod fix;
mod problem;
mod tree;
mod warning;

use std::collections::HashMap;

use ktx_ops::sizes::sizes_of;
use ktx_ops::{Kwargs, Location, Module, Registry, Role, WeightStore, try_registry};
use serde_json::{Map, Value, json};

use crate::rules::{
    ClassPath, ClassTable, Descent, NoClass, Odd, Rule, RuleError, RuleRef, RuleSet, TensorTypes,
};

pub use check::{CheckMode, CheckReport, check};
pub(crate) use devices::{DEVICE_KWARGS, TRANSFER_MAP, named_devices};
pub use devices::{DeviceError, require_devices};
pub use diff::{PlanChange, PlanSide, plan_diff};
pub use fix::fix;
pub use problem::Problem;
pub use tree::{TreeError, tree_from_json};
pub use warning::{Miss, PlanWarning};

/// Why there is no plan.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PlanError {
    /// A rule that a module reached is wrong.
    #[error("{source}{}", reached_by(path))]
    Rule {
        /// The module.
        path: String,
        /// What is wrong with the rule.
        source: Box<RuleError>,
    },
}

fn reached_by(path: &str) -> String {
    if path.is_empty() {
        String::new()
    } else {
        format!(" (reached by module `{path}`)")
    }
}

/// One module's part of a plan.
#[derive(Debug, Clone)]
pub struct PlanEntry {
    /// The module's path; empty for the root.
    pub path: String,
    /// The operator, or `default` for the module as it is; `None` where a rule says `class: null`.
    pub class: Option<String>,
    /// The weights' name as in Hugging Face: the path.
    pub key: String,
    /// The weights' name in a GGUF file.
    pub gguf_key: String,
    /// Keyword arguments; `None` where a rule says `kwargs: null`.
    pub kwargs: Option<Kwargs>,
    /// The rule that decided; `None` if no rule matches.
    pub rule: Option<RuleRef>,
    /// Where the rule names the class.
    pub class_location: Option<Location>,
    /// Whether the modules below have entries.
    pub recursive: bool,
    /// The module's role in the tree.
    pub role: Role,
    odd: Odd,
}

impl PlanEntry {
    /// Whether the module keeps its class.
    pub fn is_default(&self) -> bool {
        self.class.as_deref() == Some("default")
    }

    /// A keyword argument's value.
    pub fn kwarg(&self, name: &str) -> Option<&Value> {
        self.kwargs.as_ref()?.get(name)
    }

    fn class_json(&self) -> Value {
        self.odd
            .class
            .clone()
            .unwrap_or_else(|| self.class.clone().into())
    }

    fn kwargs_json(&self) -> Value {
        self.odd.kwargs.clone().unwrap_or_else(|| {
            self.kwargs
                .as_ref()
                .map_or(Value::Null, |k| Value::Object(k.to_json()))
        })
    }
}

/// Which name of the weights a plan's JSON gives as `key`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeyStyle {
    /// The module's path.
    Hf,
    /// The name in a GGUF file: `blk.0.attn_q`.
    #[default]
    Gguf,
}

/// What stands in every module's place.
#[derive(Debug, Clone)]
pub struct Plan {
    entries: Vec<PlanEntry>,
    index: HashMap<String, usize>,
    default_device: String,
    on_cpu: bool,
    /// What deserves a look, though the plan holds.
    pub warnings: Vec<PlanWarning>,
    /// What was changed after the rules were applied, in words.
    pub notes: Vec<String>,
}

impl Plan {
    /// All entries, parents before children, in definition order.
    pub fn entries(&self) -> &[PlanEntry] {
        &self.entries
    }

    /// The entry of the module at this path; `None` below a rule that says `recursive: False`.
    pub fn entry(&self, path: &str) -> Option<&PlanEntry> {
        self.index.get(path).map(|&i| &self.entries[i])
    }

    /// The device of modules that no rule matches.
    pub fn default_device(&self) -> &str {
        &self.default_device
    }

    /// `{path: {class, key, kwargs}}` in traversal order.
    pub fn to_json(&self, keys: KeyStyle) -> Value {
        let entry = |e: &PlanEntry| {
            let key = match keys {
                KeyStyle::Hf => &e.key,
                KeyStyle::Gguf => &e.gguf_key,
            };
            json!({ "class": e.class_json(), "key": key, "kwargs": e.kwargs_json() })
        };
        Value::Object(
            self.entries
                .iter()
                .map(|e| (e.path.clone(), entry(e)))
                .collect::<Map<_, _>>(),
        )
    }
}

/// Applies rules to a tree. `default_device` is where modules go that no rule matches: `cuda:0`.
///
/// # Errors
/// If a module reaches a rule that is wrong.
pub fn plan(tree: &Module, rules: &RuleSet, default_device: &str) -> Result<Plan, PlanError> {
    let registry = try_registry().ok();
    Planner::new(tree, rules, registry, None).run(default_device)
}

/// As [`plan`], for a model whose tensors are known: rules may ask for their types (`match.type`).
///
/// # Errors
/// If a module reaches a rule that is wrong.
pub fn plan_model(
    tree: &Module,
    rules: &RuleSet,
    default_device: &str,
    store: &dyn WeightStore,
) -> Result<Plan, PlanError> {
    let registry = try_registry().ok();
    Planner::new(tree, rules, registry, Some(store)).run(default_device)
}

/// One run over a tree.
struct Planner<'a> {
    tree: &'a Module,
    rules: &'a [Rule],
    /// Where tensors are; none for a tree of names.
    store: Option<&'a dyn WeightStore>,
    classes: ClassTable<'a>,
    descent: Descent<'a>,
    /// Proper path of each rule's class, looked up when it is first needed.
    resolved: Vec<Option<Result<String, RuleError>>>,
}

/// A condition of `match`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Criterion {
    Class,
    Name,
    Glob,
    Layers,
    Type,
}

impl Criterion {
    /// In the order in which they are tried: errors are those of the first that is reached.
    const ALL: [Self; 5] = [
        Self::Class,
        Self::Name,
        Self::Glob,
        Self::Layers,
        Self::Type,
    ];

    /// The key in `match`.
    fn key(self) -> &'static str {
        match self {
            Self::Class => "class",
            Self::Name => "name",
            Self::Glob => "glob",
            Self::Layers => "layers",
            Self::Type => "type",
        }
    }
}

/// Where the modules of a walk ended up.
#[derive(Default)]
struct Trace {
    /// How many modules each rule took.
    matched: Vec<usize>,
    /// What became of each module, in traversal order.
    fates: Vec<Fate>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Taken by this rule.
    Taken(usize),
    /// No rule matches.
    Free,
    /// Below a module that this rule took with `recursive: False`.
    Cut(usize),
}

impl<'a> Planner<'a> {
    fn new(
        tree: &'a Module,
        rules: &'a RuleSet,
        registry: Option<&'a Registry>,
        store: Option<&'a dyn WeightStore>,
    ) -> Self {
        let rules = rules.rules();
        Self {
            tree,
            rules,
            store,
            classes: ClassTable::new(tree, registry),
            descent: Descent::default(),
            resolved: vec![None; rules.len()],
        }
    }

    fn run(mut self, default_device: &str) -> Result<Plan, PlanError> {
        let mut trace = Trace {
            matched: vec![0; self.rules.len()],
            fates: Vec::new(),
        };
        let mut entries = Vec::new();
        let mut stack: Vec<(&Module, Option<usize>)> = vec![(self.tree, None)];
        while let Some((module, cut_by)) = stack.pop() {
            let (fate, below) = match cut_by {
                Some(rule) => (Fate::Cut(rule), Some(rule)),
                None => {
                    let taken = self.first_match(module)?;
                    let entry = self.entry(module, taken, default_device)?;
                    let below = taken.filter(|_| !entry.recursive);
                    entries.push(entry);
                    (taken.map_or(Fate::Free, Fate::Taken), below)
                }
            };
            if let Fate::Taken(rule) = fate {
                trace.matched[rule] += 1;
            }
            trace.fates.push(fate);
            stack.extend(module.children.iter().rev().map(|child| (child, below)));
        }
        let index = entries
            .iter()
            .enumerate()
            .map(|(i, e): (usize, &PlanEntry)| (e.path.clone(), i))
            .collect();
        let mut plan = Plan {
            entries,
            index,
            default_device: default_device.to_owned(),
            on_cpu: false,
            warnings: Vec::new(),
            notes: Vec::new(),
        };
        plan.warnings = self.warnings(&trace, &plan);
        Ok(plan)
    }

    /// The first rule that matches.
    fn first_match(&mut self, module: &'a Module) -> Result<Option<usize>, PlanError> {
        for index in 0..self.rules.len() {
            let reached = self.matches(index, module);
            if reached.map_err(|source| PlanError::Rule {
                path: module.path.clone(),
                source: Box::new(source),
            })? {
                return Ok(Some(index));
            }
        }
        Ok(None)
    }

    /// Whether a rule matches: its class first, then its name, then what the extensions bring.
    fn matches(&mut self, index: usize, module: &'a Module) -> Result<bool, RuleError> {
        for criterion in Criterion::ALL {
            if self.meets(index, criterion, module)? == Some(false) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether a module meets one of a rule's conditions; none if the rule has no such condition.
    fn meets(
        &mut self,
        index: usize,
        criterion: Criterion,
        module: &'a Module,
    ) -> Result<Option<bool>, RuleError> {
        fn ok<T>(found: &Option<Result<T, RuleError>>) -> Result<Option<&T>, RuleError> {
            found
                .as_ref()
                .map(|r| r.as_ref().map_err(Clone::clone))
                .transpose()
        }
        let criteria = self.rules[index].matches.as_ref().map_err(Clone::clone)?;
        let path = module.path.as_str();
        match criterion {
            Criterion::Class if criteria.class.is_none() => Ok(None),
            Criterion::Class => self.class_matches(index, module).map(Some),
            Criterion::Name => ok(&criteria.name)?.map(|name| name.is_in(path)).transpose(),
            Criterion::Glob => ok(&criteria.glob)?
                .map(|glob| glob.matches(path))
                .transpose(),
            Criterion::Layers => Ok(ok(&criteria.layers)?.map(|layers| layers.matches(path))),
            Criterion::Type => ok(&criteria.types)?
                .map(|types| self.has_types(types, module))
                .transpose(),
        }
    }

    /// Whether a module has weights, all of them of these types. Biases do not count.
    fn has_types(&self, wanted: &TensorTypes, module: &Module) -> Result<bool, RuleError> {
        let store = self.store.ok_or_else(|| RuleError::NoTensors {
            location: wanted.location.clone(),
        })?;
        // A tensor that is missing is reported when weights are looked for.
        let tensors = sizes_of(module, true, store).unwrap_or_default();
        let mut weights = tensors
            .iter()
            .filter(|tensor| !tensor.name.ends_with(".bias"))
            .peekable();
        Ok(weights.peek().is_some() && weights.all(|t| wanted.types.contains(&t.ty)))
    }

    fn class_matches(&mut self, index: usize, module: &'a Module) -> Result<bool, RuleError> {
        let criteria = self.rules[index].matches.as_ref().map_err(Clone::clone)?;
        let Some(class) = &criteria.class else {
            return Ok(true);
        };
        let class = class.as_ref().map_err(Clone::clone)?;
        let classes = &self.classes;
        let resolved = self.resolved[index].get_or_insert_with(|| resolve(classes, class));
        let proper = resolved.as_ref().map_err(|e| e.clone())?;
        Ok(self.descent.is_a(classes, &module.class, index, proper))
    }

    fn entry(
        &self,
        module: &Module,
        taken: Option<usize>,
        default_device: &str,
    ) -> Result<PlanEntry, PlanError> {
        let mut entry = PlanEntry {
            path: module.path.clone(),
            class: Some("default".to_owned()),
            key: module.path.clone(),
            gguf_key: module.key.clone(),
            kwargs: None,
            rule: None,
            class_location: None,
            recursive: true,
            role: module.role(),
            odd: Odd::default(),
        };
        let Some(rule) = taken.map(|index| &self.rules[index]) else {
            let mut kwargs = Kwargs::new();
            kwargs.set("generate_device", default_device);
            kwargs.set("prefill_device", default_device);
            entry.kwargs = Some(kwargs);
            return Ok(entry);
        };
        let wrong = |source: &RuleError| PlanError::Rule {
            path: module.path.clone(),
            source: Box::new(source.clone()),
        };
        let replace = rule.replace.as_ref().map_err(wrong)?;
        entry.class.clone_from(&replace.class);
        entry.kwargs.clone_from(&replace.kwargs);
        entry.rule = Some(rule.reference.clone());
        entry.class_location = Some(replace.class_location.clone());
        entry.recursive = rule.recursive;
        entry.odd = replace.odd.clone();
        Ok(entry)
    }
}

/// The proper path of the class that a rule names.
fn resolve(classes: &ClassTable<'_>, class: &ClassPath) -> Result<String, RuleError> {
    let location = class.location.clone();
    let nearest = || classes.nearest(&class.path);
    let Some((module, name)) = class.path.rsplit_once('.') else {
        return Err(RuleError::ClassWithoutModule {
            location,
            class: class.path.clone(),
            nearest: nearest(),
        });
    };
    classes
        .resolve(&class.path)
        .map(str::to_owned)
        .map_err(|missing| match missing {
            NoClass::Module => RuleError::UnknownModule {
                location,
                module: module.to_owned(),
                class: name.to_owned(),
                nearest: nearest(),
            },
            NoClass::Name => RuleError::UnknownClass {
                location,
                module: module.to_owned(),
                name: name.to_owned(),
                nearest: nearest(),
            },
        })
}
