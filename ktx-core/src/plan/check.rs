//! Checking a plan against the registered operators, before any weight is read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use ktx_kernels::device::Device;
use ktx_ops::kwargs::{Kwarg, KwargDoc, PLACEMENT};
use ktx_ops::nearest::nearest;
use ktx_ops::{
    KwargError, Kwargs, Location, Module, Needs, OperatorEntry, Registry, Role, Spec, WeightStore,
};
use serde_json::Value;

use super::devices::{DEVICE_KWARGS, INNER_OPERATORS, TRANSFER_MAP, inner_operators, no_device};
use super::warning::owns_weights;
use super::{Plan, PlanEntry, Problem};
use crate::rules::RuleRef;

/// What a plan is made for.
#[derive(Clone, Copy)]
pub enum CheckMode<'a> {
    /// A model that is about to be loaded, with its weights: what cannot be done is an error.
    Model(&'a dyn WeightStore),
    /// A tree of names, maybe of a model that this program cannot run: all that is found is a warning.
    Tree,
}

/// All that a check found.
#[derive(Debug, Clone, Default)]
pub struct CheckReport {
    /// What must change before the model can be loaded.
    pub errors: Vec<Problem>,
    /// What deserves a look.
    pub warnings: Vec<Problem>,
}

impl CheckReport {
    /// Whether the plan can be carried out.
    pub fn is_ok(&self) -> bool {
        self.errors.is_empty()
    }
}

impl fmt::Display for CheckReport {
    /// One line for each error, then for each warning.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = self.errors.iter().map(|e| format!("error: {e}"));
        let lines: Vec<String> = lines
            .chain(self.warnings.iter().map(|w| format!("warning: {w}")))
            .collect();
        f.write_str(&lines.join("\n"))
    }
}

/// Checks that the operators at hand can do what a plan asks for. Finds all problems, not only the
/// first; a problem that a rule causes in many modules is reported once.
pub fn check(plan: &Plan, tree: &Module, registry: &Registry, mode: CheckMode<'_>) -> CheckReport {
    let mut checker = Checker {
        registry,
        store: match mode {
            CheckMode::Model(store) => Some(store),
            CheckMode::Tree => None,
        },
        report: CheckReport::default(),
        rules: BTreeSet::new(),
        repeated: BTreeMap::new(),
        unsuited: BTreeMap::new(),
    };
    for module in tree.walk() {
        if let Some(entry) = plan.entry(&module.path) {
            checker.module(module, entry);
        }
    }
    let mut report = checker.report;
    if matches!(mode, CheckMode::Tree) {
        let errors = std::mem::take(&mut report.errors);
        report.warnings.splice(0..0, errors);
    }
    report
}

struct Checker<'a> {
    registry: &'a Registry,
    /// The weights, where there are some.
    store: Option<&'a dyn WeightStore>,
    report: CheckReport,
    /// Rules that were looked at: what depends on the rule alone is checked once.
    rules: BTreeSet<usize>,
    /// Errors that count modules: rule and wanted role (none: no place) to index of the error.
    repeated: BTreeMap<(usize, Option<Role>), usize>,
    /// Rule and operator to index of the error that it cannot take some modules' places.
    unsuited: BTreeMap<(usize, &'static str), usize>,
}

impl Checker<'_> {
    fn module(&mut self, module: &Module, entry: &PlanEntry) {
        let (Some(rule), Some(location)) = (&entry.rule, &entry.class_location) else {
            return self.unmatched(entry);
        };
        let operator = entry
            .class
            .as_deref()
            .and_then(|class| self.registry.get(class));
        if self.rules.insert(rule.index) {
            self.rule(entry, rule, location, operator);
        }
        if entry.is_default() {
            if owns_weights(module) && entry.kwarg("generate_device").is_none_or(Value::is_null) {
                self.no_place(entry, rule);
            }
        } else if entry.path.is_empty() {
            let (location, rule) = (rule.location.clone(), rule.clone());
            self.report.warnings.push(Problem::Root { location, rule });
        } else if let Some(operator) = operator.filter(|op| op.role != module.role())
            && !matches!(module.spec, Spec::Opaque)
        {
            self.wrong_role(entry, rule, location, operator);
        } else if let Some(operator) = operator {
            self.validate(module, entry, rule, location, operator);
        }
    }

    /// Asks the operator, and the inner ones, whether they can take this module's place.
    fn validate(
        &mut self,
        module: &Module,
        entry: &PlanEntry,
        rule: &RuleRef,
        location: &Location,
        operator: &'static OperatorEntry,
    ) {
        let Some(store) = self.store else { return };
        let none = Kwargs::new();
        let kwargs = entry.kwargs.as_ref().unwrap_or(&none);
        let inner = inner_operators(Some(operator), kwargs, self.registry);
        let mut asked = BTreeSet::new();
        for candidate in std::iter::once(operator).chain(inner) {
            let Some(validate) = candidate.validate.filter(|_| asked.insert(candidate.class))
            else {
                continue;
            };
            if let Err(reason) = validate(module, store) {
                let location = named_at(kwargs, candidate, self.registry).unwrap_or(location);
                self.unsuited(entry, rule, location, candidate, reason);
            }
        }
    }

    fn unsuited(
        &mut self,
        entry: &PlanEntry,
        rule: &RuleRef,
        location: &Location,
        operator: &'static OperatorEntry,
        reason: String,
    ) {
        let key = (rule.index, operator.class);
        match self
            .unsuited
            .get(&key)
            .and_then(|&at| self.report.errors.get_mut(at))
        {
            Some(Problem::Unsuited { modules, .. }) => *modules += 1,
            _ => {
                self.unsuited.insert(key, self.report.errors.len());
                let (location, path) = (location.clone(), entry.path.clone());
                self.report.errors.push(Problem::Unsuited {
                    location,
                    class: operator.class.to_owned(),
                    path,
                    reason,
                    modules: 1,
                });
            }
        }
    }

    /// A module that no rule matches: its device is the same for all, and checked at the first.
    fn unmatched(&mut self, entry: &PlanEntry) {
        if self.rules.insert(usize::MAX) {
            self.devices(entry);
        }
    }

    fn no_place(&mut self, entry: &PlanEntry, rule: &RuleRef) {
        match self
            .repeated
            .get(&(rule.index, None))
            .and_then(|&at| self.report.errors.get_mut(at))
        {
            Some(Problem::NoPlace { modules, .. }) => *modules += 1,
            _ => {
                self.repeated
                    .insert((rule.index, None), self.report.errors.len());
                let (location, rule, path) =
                    (rule.location.clone(), rule.clone(), entry.path.clone());
                self.report.errors.push(Problem::NoPlace {
                    location,
                    rule,
                    path,
                    modules: 1,
                });
            }
        }
    }

    fn wrong_role(
        &mut self,
        entry: &PlanEntry,
        rule: &RuleRef,
        location: &Location,
        operator: &OperatorEntry,
    ) {
        let key = (rule.index, Some(entry.role));
        match self
            .repeated
            .get(&key)
            .and_then(|&at| self.report.errors.get_mut(at))
        {
            Some(Problem::WrongRole { modules, .. }) => *modules += 1,
            _ => {
                self.repeated.insert(key, self.report.errors.len());
                self.report.errors.push(Problem::WrongRole {
                    location: location.clone(),
                    rule: rule.clone(),
                    class: entry.class.clone().unwrap_or_default(),
                    role: operator.role,
                    path: entry.path.clone(),
                    wanted: entry.role,
                    modules: 1,
                });
            }
        }
    }

    /// What depends on the rule alone.
    fn rule(
        &mut self,
        entry: &PlanEntry,
        rule: &RuleRef,
        location: &Location,
        operator: Option<&'static OperatorEntry>,
    ) {
        let errors = self.report.errors.len();
        self.devices(entry);
        let devices_are_good = self.report.errors.len() == errors;
        let (rule, location) = (rule.clone(), location.clone());
        if entry.kwargs.is_none() {
            let (location, found) = (rule.location.clone(), entry.kwargs_json().to_string());
            self.report.errors.push(Problem::NoKwargs {
                location,
                rule: rule.clone(),
                found,
            });
        }
        match (entry.class.as_deref(), operator) {
            (None, _) => {
                let found = entry.class_json().to_string();
                self.report.errors.push(Problem::NoClass {
                    location,
                    rule,
                    found,
                });
            }
            (Some("default"), _) => self.default_kwargs(entry),
            (Some(class), None) => {
                let nearest = nearest(class, ["default"])
                    .or_else(|| self.registry.nearest(class))
                    .map(str::to_owned);
                self.report.errors.push(Problem::UnknownClass {
                    location,
                    class: class.to_owned(),
                    nearest,
                });
            }
            (Some(class), Some(operator)) => {
                self.needs(operator, class, &location);
                if let Some(kwargs) = &entry.kwargs {
                    self.kwargs(operator, class, kwargs, &location, devices_are_good);
                }
            }
        }
    }

    /// Every device that an entry names must be one.
    fn devices(&mut self, entry: &PlanEntry) {
        let is_device = |value: &Value| {
            value
                .as_str()
                .is_some_and(|text| text.parse::<Device>().is_ok())
        };
        for kwarg in entry.kwargs.iter().flat_map(Kwargs::iter) {
            let wrong = match &kwarg.value {
                Value::Null => None,
                value if DEVICE_KWARGS.contains(&kwarg.name.as_str()) => {
                    Some(value).filter(|v| !is_device(v))
                }
                Value::Object(map) if kwarg.name == TRANSFER_MAP => {
                    map.values().find(|v| !is_device(v))
                }
                _ => None,
            };
            if let Some(value) = wrong {
                self.report
                    .errors
                    .push(no_device(entry, &kwarg.name, value).into());
            }
        }
    }

    /// A module that keeps its class heeds its devices and nothing else.
    fn default_kwargs(&mut self, entry: &PlanEntry) {
        for kwarg in entry.kwargs.iter().flat_map(Kwargs::iter) {
            if !PLACEMENT.iter().any(|doc| doc.name == kwarg.name) {
                self.ignored(
                    kwarg,
                    "default",
                    "a module that keeps its class takes only devices",
                );
            }
        }
    }

    fn ignored(&mut self, kwarg: &Kwarg, class: &str, why: &str) {
        if let Some(location) = kwarg.location.clone() {
            let (name, class, why) = (kwarg.name.clone(), class.to_owned(), why.to_owned());
            self.report.warnings.push(Problem::IgnoredKwarg {
                location,
                name,
                class,
                why,
            });
        }
    }

    /// What an operator needs, and what it does to the weights.
    fn needs(&mut self, operator: &OperatorEntry, class: &str, location: &Location) {
        if let Some(how) = operator.lossy {
            let (location, class, how) = (location.clone(), class.to_owned(), how.to_owned());
            self.report.warnings.push(Problem::Lossy {
                location,
                class,
                how,
            });
        }
        if let Needs::Missing(what) = operator.needs {
            let (location, class, what) = (location.clone(), class.to_owned(), what.to_owned());
            self.report.errors.push(Problem::Needs {
                location,
                class,
                what,
            });
        }
    }

    /// Every argument must be one that the operator, or an inner operator of it, takes.
    fn kwargs(
        &mut self,
        operator: &'static OperatorEntry,
        class: &str,
        kwargs: &Kwargs,
        location: &Location,
        typed_devices: bool,
    ) {
        let all_known = self.inner_names(operator, class, kwargs, location);
        let inner = inner_operators(Some(operator), kwargs, self.registry);
        for kwarg in kwargs.iter() {
            if DEVICE_KWARGS.contains(&kwarg.name.as_str()) && !typed_devices {
                continue;
            }
            let takers: Vec<&OperatorEntry> = std::iter::once(operator)
                .chain(inner.iter().copied())
                .filter(|op| documented(op, &kwarg.name).is_some())
                .collect();
            let is_known = !takers.is_empty() || PLACEMENT.iter().any(|d| d.name == kwarg.name);
            if !is_known && all_known {
                self.report
                    .errors
                    .push(unknown(operator, &inner, class, kwarg).into());
            }
            let one = kwargs.filtered(|name| name == kwarg.name);
            let wrong = takers.iter().find_map(|op| op.check_kwargs(&one).err());
            let ignored = takers
                .iter()
                .filter_map(|op| documented(op, &kwarg.name)?.ignored)
                .next();
            match (wrong, ignored) {
                (Some(error), _) => self.report.errors.push(error.into()),
                (None, Some(why)) => self.ignored(kwarg, class, why),
                (None, None) => {}
            }
        }
    }

    /// Checks the names of inner operators (`generate_op`, `prefill_op`, `op`); false if one of them is not known.
    fn inner_names(
        &mut self,
        operator: &OperatorEntry,
        class: &str,
        kwargs: &Kwargs,
        location: &Location,
    ) -> bool {
        if !operator.kwargs.is_open() {
            return true;
        }
        let defaults = operator.kwargs.defaults();
        let mut all_known = true;
        let mut checked = Vec::new();
        for argument in INNER_OPERATORS {
            if documented(operator, argument).is_none() {
                continue;
            }
            let Some(name) = kwargs
                .get(argument)
                .or_else(|| defaults.get(argument))
                .and_then(Value::as_str)
            else {
                continue;
            };
            let location = kwargs.location(argument).unwrap_or(location).clone();
            if checked.contains(&name) {
                continue;
            }
            checked.push(name);
            match self
                .registry
                .get(name)
                .filter(|inner| inner.role == operator.role)
            {
                Some(inner) => self.needs(inner, name, &location),
                None => {
                    all_known = false;
                    self.report.errors.push(Problem::UnknownInner {
                        location,
                        argument: argument.to_owned(),
                        class: class.to_owned(),
                        name: name.to_owned(),
                        role: operator.role,
                        nearest: self.nearest_of_role(name, operator.role),
                    });
                }
            }
        }
        all_known
    }

    fn nearest_of_role(&self, name: &str, role: Role) -> Option<String> {
        let same_role = self.registry.entries().filter(|entry| entry.role == role);
        let names = same_role
            .flat_map(|entry| std::iter::once(entry.class).chain(entry.aliases.iter().copied()));
        nearest(name, names).map(str::to_owned)
    }
}

/// Where an argument names this operator as an inner one.
fn named_at<'k>(
    kwargs: &'k Kwargs,
    operator: &OperatorEntry,
    registry: &Registry,
) -> Option<&'k Location> {
    let names = |argument: &&str| {
        let name = kwargs.get(argument).and_then(Value::as_str);
        name.and_then(|name| registry.get(name))
            .is_some_and(|found| found.class == operator.class)
    };
    let argument = INNER_OPERATORS.iter().copied().find(names)?;
    kwargs.location(argument)
}

fn documented<'o>(operator: &'o OperatorEntry, name: &str) -> Option<&'o KwargDoc> {
    operator.kwargs.docs().iter().find(|doc| doc.name == name)
}

fn unknown(
    operator: &OperatorEntry,
    inner: &[&OperatorEntry],
    class: &str,
    kwarg: &Kwarg,
) -> KwargError {
    let mut known: Vec<&str> = PLACEMENT.iter().map(|doc| doc.name).collect();
    for operator in std::iter::once(operator).chain(inner.iter().copied()) {
        for doc in operator.kwargs.docs() {
            if !known.contains(&doc.name) {
                known.push(doc.name);
            }
        }
    }
    KwargError::Unknown {
        class: class.to_owned(),
        name: kwarg.name.clone(),
        nearest: nearest(&kwarg.name, known.iter().copied()).map(str::to_owned),
        known: known.join(", "),
        location: kwarg.location.clone(),
    }
}
