//! A placement as a rule file.
//!
//! The preset of the architecture says which operator each module gets. Its rules are kept, in their
//! order, and where a placement puts some of a rule's modules on a GPU, the same rule stands before it
//! once more for that GPU, with a look-ahead for those modules in front of its own pattern.

use std::collections::BTreeMap;
use std::fmt::Write;

use ktx_kernels::device::Device;
use ktx_models::ModelDescription;
use ktx_ops::Role;
use serde_json::{Map, Value};

use super::pattern::numbers;
use super::{PlacedStage, Placement, PlacementError};
use crate::plan::{Plan, PlanEntry, plan};
use crate::rules::{Rule, RuleSet, preset_for, presets};

/// The operator of streamed experts on a GPU.
const STREAMED_OPERATOR: &str = "KExpertsMarlin";
/// Operators of the host and those that take their place on a GPU.
const GPU_OPERATORS: [(&str, &str); 2] = [
    ("KLinearCPUInfer", "KLinearMarlin"),
    ("KExpertsCPU", "KExpertsMarlin"),
];
/// Arguments that say where a module runs.
const DEVICES: [&str; 3] = ["generate_device", "prefill_device", "device"];
/// Rules for any architecture that has no preset of its own.
const GENERAL_PRESET: &str = "llama";

/// A part of a stage, and where its result goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Target {
    device: Device,
    out: Device,
}

/// Parts of a layer that a rule takes modules of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum PartKind {
    Home,
    Ffn,
    Experts,
}

impl Placement {
    /// The placement as a rule file in KTransformers' format. The plan of these rules puts every module
    /// where [`Self::device_of`] says.
    ///
    /// # Errors
    /// [`PlacementError::Rule`] and [`PlacementError::Plan`] if the preset that it starts from is damaged.
    pub fn rules(&self, description: &ModelDescription) -> Result<String, PlacementError> {
        let preset = preset_for(&description.architecture)
            .or_else(|| presets().iter().find(|p| p.name == GENERAL_PRESET));
        let rules = match preset {
            Some(preset) => RuleSet::from_preset(preset)?,
            None => RuleSet::parse("[]", "no rules")?,
        };
        let plan = plan(&description.tree, &rules, &Device::CPU.to_string())?;
        let mut text = self.header(description);
        for (index, rule) in rules.rules().iter().enumerate() {
            let taken: Vec<&PlanEntry> = plan
                .entries()
                .iter()
                .filter(|e| e.rule.as_ref().is_some_and(|r| r.index == index))
                .collect();
            if !taken.is_empty() {
                self.rule(&mut text, rule, &taken, &plan);
            }
        }
        Ok(text)
    }

    fn header(&self, description: &ModelDescription) -> String {
        let name = description.name.as_deref().unwrap_or("a model");
        let mut text = format!(
            "# {name} ({}), placed automatically.\n#\n# The first rule that matches a module decides. Edit this file and use it with --rules.\n#\n",
            description.architecture
        );
        for line in self.to_string().lines() {
            let line = format!("# {line}");
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text
    }

    /// One rule of the preset, with copies for GPUs before it.
    fn rule(&self, text: &mut String, rule: &Rule, taken: &[&PlanEntry], plan: &Plan) {
        let mut targets: BTreeMap<Target, Vec<&PlanEntry>> = BTreeMap::new();
        for entry in taken {
            targets.entry(self.target(entry)).or_default().push(entry);
        }
        let host = Target {
            device: Device::CPU,
            out: Device::CPU,
        };
        let on_host = targets.remove(&host);
        let last = targets.len();
        for (i, (target, entries)) in targets.iter().enumerate() {
            // A rule whose modules all go to one place needs no look-ahead.
            let only = on_host.is_none() && i + 1 == last;
            let places = (!only).then(|| self.places(*target, entries, plan));
            write_rule(text, rule, entries, Some((*target, self)), places);
        }
        if let Some(entries) = on_host {
            write_rule(text, rule, &entries, None, None);
        }
    }

    fn target(&self, entry: &PlanEntry) -> Target {
        let device = self.device_of(&entry.path);
        let out = match entry.role {
            Role::Experts => self.home_of(&entry.path),
            _ => device,
        };
        Target { device, out }
    }

    /// Where the residual stream of the stage of a module is.
    fn home_of(&self, path: &str) -> Device {
        let within = |s: &&PlacedStage| {
            path.strip_prefix(s.path.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        self.stages
            .iter()
            .find(within)
            .map_or(Device::CPU, |s| s.home)
    }

    /// A pattern of the places that `entries` are in, and no other module of their rule.
    fn places(&self, target: Target, entries: &[&PlanEntry], plan: &Plan) -> String {
        let rule = entries[0].rule.as_ref().map(|r| r.index);
        let of_rule = |path: &str| {
            plan.entry(path)
                .is_some_and(|e| e.rule.as_ref().map(|r| r.index) == rule)
        };
        let mut shapes: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        let mut others: Vec<String> = Vec::new();
        for entry in entries {
            match self.layer_of(&entry.path) {
                None => others.push(format!("{}$", escaped(&entry.path))),
                Some((layer, stage)) => {
                    let parts = self.parts_on(stage, target, &of_rule);
                    let Some(shape) = shape(stage, layer, &parts) else {
                        continue;
                    };
                    let layers = shapes.entry(shape).or_default();
                    if layers.last() != Some(&layer) {
                        layers.push(layer);
                    }
                }
            }
        }
        let mut alternatives: Vec<String> = shapes
            .into_iter()
            .map(|(shape, layers)| shape.replace('#', &numbers(&layers)))
            .collect();
        alternatives.extend(others);
        match alternatives.as_slice() {
            [one] => one.clone(),
            many => format!("({})", many.join("|")),
        }
    }

    fn layer_of(&self, path: &str) -> Option<(usize, &PlacedStage)> {
        let rest = path.strip_prefix("model.layers.")?;
        let number = rest.split('.').next()?;
        let layer: usize = number.parse().ok()?;
        Some((layer, self.stages.get(layer + 1)?))
    }

    /// For each part that the rule takes modules of, whether these go to the target.
    fn parts_on(
        &self,
        stage: &PlacedStage,
        target: Target,
        of_rule: &impl Fn(&str) -> bool,
    ) -> BTreeMap<PartKind, bool> {
        let mut parts = BTreeMap::new();
        parts.insert(
            PartKind::Home,
            stage.home == target.device && target.out == target.device,
        );
        if let Some((device, _)) = &stage.ffn {
            parts.insert(
                PartKind::Ffn,
                *device == target.device && target.out == target.device,
            );
        }
        if let Some((device, path)) = &stage.experts
            && of_rule(path)
        {
            let there = *device == target.device && stage.home == target.out;
            parts.insert(PartKind::Experts, there);
        }
        parts
    }
}

/// The pattern of the parts of a layer that are there, with `#` for its number.
fn shape(stage: &PlacedStage, layer: usize, parts: &BTreeMap<PartKind, bool>) -> Option<String> {
    let layer_path = &stage.path;
    let below = |path: &str| {
        let rest = path.strip_prefix(layer_path.as_str()).unwrap_or(path);
        escaped(rest)
    };
    let ffn = || -> Vec<String> {
        let paths = stage.ffn.as_ref().map(|(_, paths)| paths.as_slice());
        paths.unwrap_or_default().iter().map(|p| below(p)).collect()
    };
    let experts = || -> Vec<String> { stage.experts.iter().map(|(_, path)| below(path)).collect() };
    let is = |kind| parts.get(&kind).copied();
    let number = format!(".{layer}");
    let base = escaped(layer_path.strip_suffix(&number)?);
    let base = format!(r"{base}\.#");
    let mut away = Vec::new();
    let mut there = Vec::new();
    for (kind, paths) in [(PartKind::Ffn, ffn()), (PartKind::Experts, experts())] {
        match is(kind) {
            Some(true) => there.extend(paths),
            Some(false) => away.extend(paths),
            None => {}
        }
    }
    let group = |paths: &[String]| match paths {
        [one] => one.clone(),
        many => format!("({})", many.join("|")),
    };
    Some(match is(PartKind::Home) {
        Some(true) if away.is_empty() => format!(r"{base}(\.|$)"),
        Some(true) => format!(r"{base}(?!{}(\.|$))(\.|$)", group(&away)),
        _ if there.is_empty() => return None,
        _ => format!(r"{base}{}(\.|$)", group(&there)),
    })
}

fn escaped(path: &str) -> String {
    path.replace('.', r"\.")
}

/// Writes a rule, for a GPU or as it is. `places` is what its modules' paths begin with.
fn write_rule(
    text: &mut String,
    rule: &Rule,
    entries: &[&PlanEntry],
    target: Option<(Target, &Placement)>,
    places: Option<String>,
) {
    let device = target.map_or(Device::CPU, |(target, _)| target.device);
    let own = rule.matches.as_ref().ok();
    let name = own
        .and_then(|m| m.name.as_ref()?.as_ref().ok())
        .map(|pattern| pattern.as_str().to_owned());
    let class = own.and_then(|m| m.class.as_ref()?.as_ref().ok());
    let _ = writeln!(text, "\n# On {device}: {} modules.", entries.len());
    let _ = writeln!(text, "- match:");
    if let Some(name) = joined_name(name, places) {
        let _ = writeln!(text, "    name: {}", quoted(&name));
    }
    if let Some(class) = class {
        let _ = writeln!(text, "    class: {}", class.path);
    }
    let class = entries[0].class.as_deref().unwrap_or("default");
    let _ = writeln!(text, "  replace:\n    class: {class}");
    let mut kwargs = entries[0]
        .kwargs
        .as_ref()
        .map(ktx_ops::Kwargs::to_json)
        .unwrap_or_default();
    if let Some((target, placement)) = target {
        move_to(&mut kwargs, target, entries[0].role);
        let waits_on_host = target.device.is_cpu() && !target.out.is_cpu();
        if placement.request.streams.is_some() && entries[0].role == Role::Experts && waits_on_host
        {
            kwargs.insert("prefill_device".to_owned(), target.out.to_string().into());
            kwargs.insert("prefill_op".to_owned(), STREAMED_OPERATOR.into());
        }
        if entries[0].role == Role::Model
            && let Some(map) = placement.transfer_map()
        {
            kwargs.insert("transfer_map".to_owned(), map);
        }
    }
    if !kwargs.is_empty() {
        let _ = writeln!(text, "    kwargs:");
        for (key, value) in &kwargs {
            let _ = writeln!(text, "      {key}: {}", scalar(value));
        }
    }
    if !rule.recursive {
        let _ = writeln!(text, "  recursive: False");
    }
}

/// Arguments for another device.
fn move_to(kwargs: &mut Map<String, Value>, target: Target, role: Role) {
    for (key, value) in kwargs.iter_mut() {
        if DEVICES.contains(&key.as_str()) {
            *value = target.device.to_string().into();
        } else if key == "out_device" {
            *value = target.out.to_string().into();
        } else if !target.device.is_cpu()
            && let Some((_, gpu)) = GPU_OPERATORS.iter().find(|(cpu, _)| value == cpu)
        {
            *value = (*gpu).into();
        }
    }
    if role == Role::Experts && target.device.is_cpu() && !target.out.is_cpu() {
        // Where the experts' result is wanted, whatever the preset says.
        kwargs.insert("out_device".to_owned(), target.out.to_string().into());
    }
}

impl Placement {
    /// The layers before which the residual stream moves to another device.
    fn transfer_map(&self) -> Option<Value> {
        let layers = self.stages.get(1..self.stages.len().saturating_sub(1))?;
        let moves: Map<String, Value> = layers
            .windows(2)
            .enumerate()
            .filter(|(_, pair)| pair[0].home != pair[1].home)
            .map(|(i, pair)| ((i + 1).to_string(), pair[1].home.to_string().into()))
            .collect();
        (!moves.is_empty()).then_some(Value::Object(moves))
    }
}

/// The rule's own pattern, for the modules in these places only.
fn joined_name(own: Option<String>, places: Option<String>) -> Option<String> {
    let Some(places) = places else {
        return own;
    };
    match own.as_deref() {
        None | Some("") => Some(format!("^{places}")),
        Some(own) => match own.strip_prefix('^') {
            Some(rest) if !has_alternatives(rest) => Some(format!("^(?={places}){rest}")),
            _ => Some(format!("^(?={places}).*(?:{own})")),
        },
    }
}

/// Whether `|` stands outside of all parentheses.
fn has_alternatives(pattern: &str) -> bool {
    let mut depth = 0_usize;
    pattern.chars().any(|c| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == '|' && depth == 0
    })
}

/// A value in YAML: JSON, but for keys of mappings, which are numbers of layers.
fn scalar(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let pairs: Vec<String> = map.iter().map(|(k, v)| format!("{k}: {v}")).collect();
            format!("{{{}}}", pairs.join(", "))
        }
        other => other.to_string(),
    }
}

/// A YAML scalar in single quotes.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
