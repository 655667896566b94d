//! What deserves a look in a plan that holds: rules without effect, and layers torn between devices.

use std::collections::BTreeMap;
use std::fmt;

use ktx_kernels::device::{Device, DeviceKind};
use ktx_ops::{Location, Module, Spec};

use super::{Criterion, Fate, Plan, Planner, Trace};
use crate::rules::{RuleError, RuleNote, RuleRef, layer_of};

/// Something in a plan that is probably not meant.
#[derive(Debug, Clone)]
pub enum PlanWarning {
    /// Something in a rule has no effect.
    Note(RuleNote),
    /// A rule matches no module of this tree.
    NeverMatches {
        /// The rule.
        rule: RuleRef,
        /// What stands in its way.
        miss: Miss,
    },
    /// Earlier rules take every module that a rule matches.
    Shadowed {
        /// The rule.
        rule: RuleRef,
        /// The rules that take its modules, or cut them off.
        by: Vec<RuleRef>,
        /// How many modules it would match.
        modules: usize,
    },
    /// A rule matches only modules below others that were taken with `recursive: False`.
    BelowCut {
        /// The rule.
        rule: RuleRef,
        /// The rules that cut them off.
        by: Vec<RuleRef>,
        /// How many modules it would match.
        modules: usize,
    },
    /// A rule is wrong, which has no effect as no module reaches it.
    NotReached {
        /// The rule.
        rule: RuleRef,
        /// What is wrong with it.
        error: RuleError,
    },
    /// Modules of a layer that no rule matches go to another device than the layer's other modules.
    LayerHole {
        /// The layer's path.
        layer: String,
        /// The first of the modules.
        first: String,
        /// How many there are.
        modules: usize,
        /// Where they go.
        device: Device,
        /// Where the layer's other modules go, or those of the layer before.
        others: Device,
    },
}

/// Why a rule matches nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Miss {
    /// Its name is in no path.
    Name,
    /// No module is of its class.
    Class {
        /// The class as written.
        class: String,
    },
    /// Its name is in the paths of some modules, none of which is of its class.
    Both {
        /// How many paths the name is in.
        named: usize,
        /// The first of them, with its class.
        example: (String, String),
        /// The class as written.
        class: String,
    },
    /// Its glob fits no path.
    Glob,
    /// The model has none of its layers.
    Layers {
        /// The model's last layer; none if it has none.
        last: Option<u32>,
    },
    /// No module has weights of its types only.
    Type,
    /// Modules meet each of its conditions, and none meets all.
    Together {
        /// The conditions, with how many modules meet each.
        counts: Vec<(&'static str, usize)>,
    },
}

impl PlanWarning {
    /// Where in the rule file it comes from.
    pub fn location(&self) -> Option<&Location> {
        match self {
            Self::Note(
                RuleNote::IgnoredKey { location, .. }
                | RuleNote::RecursiveText { location, .. }
                | RuleNote::EmptyReplace { location, .. },
            ) => Some(location),
            Self::NeverMatches { rule, .. }
            | Self::Shadowed { rule, .. }
            | Self::BelowCut { rule, .. }
            | Self::NotReached { rule, .. } => Some(&rule.location),
            Self::LayerHole { .. } => None,
        }
    }
}

impl fmt::Display for PlanWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |rule: &RuleRef| rule.number;
        match self {
            Self::Note(note) => note.fmt(f),
            Self::NeverMatches { rule, miss } => {
                write!(
                    f,
                    "{}: rule {} matches no module: {miss}",
                    rule.location,
                    number(rule)
                )
            }
            Self::Shadowed { rule, by, modules } => write!(
                f,
                "{}: rule {} has no effect: {} it matches {} already taken by {}",
                rule.location,
                number(rule),
                all(*modules),
                if *modules == 1 { "is" } else { "are" },
                list(by)
            ),
            Self::BelowCut { rule, by, modules } => write!(
                f,
                "{}: rule {} has no effect: {} it matches {} below a module that {} took with `recursive: False`",
                rule.location,
                number(rule),
                all(*modules),
                if *modules == 1 { "lies" } else { "lie" },
                list(by)
            ),
            Self::NotReached { rule, error } => {
                write!(
                    f,
                    "{error}; no module reaches rule {}, so nothing comes of it",
                    number(rule)
                )
            }
            Self::LayerHole {
                layer,
                first,
                modules,
                device,
                others,
            } => write!(
                f,
                "{layer}: no rule matches {modules} of its modules, `{first}` first; they go to {device}, its other modules to {others}"
            ),
        }
    }
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name => f.write_str("its name is found in no module's path"),
            Self::Class { class } => write!(f, "no module of this model is a `{class}`"),
            Self::Both {
                named,
                example: (path, found),
                class,
            } => write!(
                f,
                "its name is found in {named} path{}, and none of these modules is a `{class}` (`{path}` is a `{found}`)",
                if *named == 1 { "" } else { "s" }
            ),
            Self::Glob => f.write_str("its glob fits no module's path"),
            Self::Layers { last: Some(last) } => {
                write!(
                    f,
                    "the model has the layers 0 to {last}, and none of its own"
                )
            }
            Self::Layers { last: None } => f.write_str("the model has no layers"),
            Self::Type => f.write_str("no module has weights of its types, and of these only"),
            Self::Together { counts } => {
                let counts: Vec<String> = counts
                    .iter()
                    .map(|(key, count)| format!("`{key}` {count}"))
                    .collect();
                write!(
                    f,
                    "no module meets all of its conditions (by themselves: {})",
                    counts.join(", ")
                )
            }
        }
    }
}

fn all(modules: usize) -> String {
    if modules == 1 {
        "the one module".to_owned()
    } else {
        format!("all {modules} modules")
    }
}

/// `rule 1 (line 2), rule 3 (line 14) and 2 more`
fn list(rules: &[RuleRef]) -> String {
    let shown: Vec<String> = rules.iter().take(3).map(RuleRef::to_string).collect();
    let text = shown.join(", ");
    match rules.len().saturating_sub(3) {
        0 => text,
        more => format!("{text} and {more} more"),
    }
}

impl<'a> Planner<'a> {
    /// All warnings: rule by rule, then layer by layer.
    pub(super) fn warnings(&mut self, trace: &Trace, plan: &Plan) -> Vec<PlanWarning> {
        let mut warnings = Vec::new();
        for index in 0..self.rules.len() {
            warnings.extend(
                self.rules[index]
                    .notes
                    .iter()
                    .cloned()
                    .map(PlanWarning::Note),
            );
            if trace.matched[index] == 0 && !self.rules[index].is_preset {
                warnings.push(self.dead_rule(index, trace));
            }
        }
        warnings.extend(layer_holes(self.tree, plan));
        warnings
    }

    /// Why a rule took no module.
    fn dead_rule(&mut self, index: usize, trace: &Trace) -> PlanWarning {
        let rule = self.rules[index].reference.clone();
        let (mut takers, mut cutters, mut modules) = (Vec::new(), Vec::new(), 0);
        let mut tally = Tally::default();
        for (module, fate) in self.tree.walk().zip(&trace.fates) {
            let met = match self.conditions(index, module) {
                Ok(met) => met,
                Err(error) => return PlanWarning::NotReached { rule, error },
            };
            tally.count(&met, module);
            if met.iter().all(|(_, met)| *met) {
                modules += 1;
                match *fate {
                    Fate::Taken(by) if !takers.contains(&by) => takers.push(by),
                    Fate::Cut(by) if !cutters.contains(&by) => cutters.push(by),
                    _ => {}
                }
            }
        }
        let references = |rules: &[usize]| {
            rules
                .iter()
                .map(|&i| self.rules[i].reference.clone())
                .collect()
        };
        if modules == 0 {
            let miss = self.miss(index, tally);
            return PlanWarning::NeverMatches { rule, miss };
        }
        if takers.is_empty() {
            return PlanWarning::BelowCut {
                rule,
                by: references(&cutters),
                modules,
            };
        }
        takers.extend(cutters.into_iter().filter(|c| *c != index));
        takers.sort_unstable();
        takers.dedup();
        PlanWarning::Shadowed {
            rule,
            by: references(&takers),
            modules,
        }
    }

    /// Which of a rule's conditions a module meets.
    fn conditions(
        &mut self,
        index: usize,
        module: &'a Module,
    ) -> Result<Vec<(Criterion, bool)>, RuleError> {
        let mut met = Vec::new();
        for criterion in Criterion::ALL {
            if let Some(is_met) = self.meets(index, criterion, module)? {
                met.push((criterion, is_met));
            }
        }
        Ok(met)
    }

    /// Why no module meets all conditions.
    fn miss(&self, index: usize, tally: Tally) -> Miss {
        let criteria = self.rules[index].matches.as_ref().ok();
        let class = criteria
            .and_then(|m| m.class.as_ref()?.as_ref().ok())
            .map(|class| class.path.clone())
            .unwrap_or_default();
        match tally.alone.iter().find(|(_, count)| *count == 0) {
            Some((Criterion::Class, _)) => Miss::Class { class },
            Some((Criterion::Name, _)) => Miss::Name,
            Some((Criterion::Glob, _)) => Miss::Glob,
            Some((Criterion::Layers, _)) => Miss::Layers {
                last: self.tree.walk().filter_map(|m| layer_of(&m.path)).max(),
            },
            Some((Criterion::Type, _)) => Miss::Type,
            None => match (&tally.alone[..], tally.named) {
                (&[(Criterion::Class, _), (Criterion::Name, named)], Some(example)) => Miss::Both {
                    named,
                    example,
                    class,
                },
                (alone, _) => Miss::Together {
                    counts: alone.iter().map(|(c, n)| (c.key(), *n)).collect(),
                },
            },
        }
    }
}

/// How many modules meet each condition of a rule by itself.
#[derive(Default)]
struct Tally {
    alone: Vec<(Criterion, usize)>,
    /// The first module that has the name, with its class.
    named: Option<(String, String)>,
}

impl Tally {
    fn count(&mut self, met: &[(Criterion, bool)], module: &Module) {
        if self.alone.is_empty() {
            self.alone = met.iter().map(|(criterion, _)| (*criterion, 0)).collect();
        }
        for ((_, count), (criterion, is_met)) in self.alone.iter_mut().zip(met) {
            *count += usize::from(*is_met);
            if *is_met && *criterion == Criterion::Name && self.named.is_none() {
                self.named = Some((module.path.clone(), module.class.clone()));
            }
        }
    }
}

/// Whether a module has weights of its own.
pub(super) fn owns_weights(module: &Module) -> bool {
    match &module.spec {
        Spec::Linear(_) | Spec::Norm(_) | Spec::Embedding(_) | Spec::Gate(_) => true,
        Spec::Opaque => {
            let name = module.class.rsplit('.').next().unwrap_or_default();
            name.ends_with("Linear")
                || name.ends_with("Embedding") && !name.contains("Rotary")
                || name.ends_with("Norm")
                || name.ends_with("Gate")
        }
        _ => false,
    }
}

/// What is known of one layer's devices.
#[derive(Default)]
struct Layer {
    /// Accelerators that rules name, with how many modules they name them for.
    named: BTreeMap<Device, usize>,
    /// Modules with weights that no rule matches: how many, and the first.
    free: usize,
    first: String,
}

/// Layers whose unmatched modules go to another device than their other modules, or, if rules match
/// none of a layer's modules, than those of the layer before.
fn layer_holes(tree: &Module, plan: &Plan) -> Vec<PlanWarning> {
    let Ok(device) = plan.default_device.parse::<Device>() else {
        return Vec::new();
    };
    let mut layers: Vec<(&str, Layer)> = Vec::new();
    for module in tree.walk() {
        let (Some(path), Some(entry)) = (layer_path(&module.path), plan.entry(&module.path)) else {
            continue;
        };
        if layers.last().is_none_or(|(last, _)| *last != path) {
            layers.push((path, Layer::default()));
        }
        let Some((_, layer)) = layers.last_mut() else {
            continue;
        };
        if entry.rule.is_none() {
            if owns_weights(module) {
                layer.free += 1;
                if layer.first.is_empty() {
                    layer.first.clone_from(&module.path);
                }
            }
        } else if let Some(named) = entry
            .kwarg("generate_device")
            .and_then(|v| v.as_str()?.parse::<Device>().ok())
            && named.kind() != DeviceKind::Cpu
        {
            *layer.named.entry(named).or_default() += 1;
        }
    }
    let mut before = None;
    let mut holes = Vec::new();
    for (path, layer) in layers {
        let most = layer
            .named
            .iter()
            .max_by_key(|(_, count)| **count)
            .map(|(device, _)| *device);
        before = most.or(before);
        if let Some(others) = before.filter(|others| layer.free > 0 && *others != device) {
            let layer_path = path.to_owned();
            holes.push(PlanWarning::LayerHole {
                layer: layer_path,
                first: layer.first,
                modules: layer.free,
                device,
                others,
            });
        }
    }
    holes
}

/// `model.layers.3` of `model.layers.3.mlp.gate`; nothing of the layer itself.
fn layer_path(path: &str) -> Option<&str> {
    let start = path.find("layers.")? + "layers.".len();
    let digits = path[start..].find('.')?;
    let is_number = digits > 0
        && path[start..start + digits]
            .bytes()
            .all(|b| b.is_ascii_digit());
    is_number.then(|| &path[..start + digits])
}
