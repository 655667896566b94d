//! The devices that a plan names: reading them, requiring them, mapping them to the CPU.

use std::collections::BTreeSet;

use ktx_kernels::device::{Device, DeviceKind};
use ktx_ops::kwargs::Kwarg;
use ktx_ops::{Location, OperatorEntry, Placement, Registry, Role};
use serde_json::Value;

use super::{Plan, PlanEntry, PlanWarning};
use crate::rules::RuleRef;

/// Keyword arguments that hold one device.
pub(crate) const DEVICE_KWARGS: [&str; 4] =
    ["generate_device", "prefill_device", "device", "out_device"];
/// The keyword argument that holds a device for each of some layers.
pub(crate) const TRANSFER_MAP: &str = "transfer_map";
/// Keyword arguments that name inner operators.
pub(super) const INNER_OPERATORS: [&str; 3] = ["generate_op", "prefill_op", "op"];

/// Where operators go that name no device.
const CUDA: Device = Device::new(DeviceKind::Cuda, 0);

/// What is wrong with a plan's devices.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// A value is no device.
    #[error(
        "{}`{argument}` of module `{path}` is {value}, which is no device; devices are `cpu`, `cuda`, `cuda:1`",
        ktx_ops::kwargs::at(location)
    )]
    NoDevice {
        /// The module.
        path: String,
        /// The keyword argument.
        argument: String,
        /// Its value as JSON.
        value: String,
        /// Where it is written.
        location: Option<Location>,
    },
    /// A rule names a device that this machine lacks.
    #[error(
        "{location}: {rule} puts `{path}` on {device}, and this machine has no such device ({available}); \
         `--cpu` puts every module on the CPU"
    )]
    Missing {
        /// Where the device or else the rule is written.
        location: Location,
        /// The rule.
        rule: RuleRef,
        /// The first module that it puts there.
        path: String,
        /// The device.
        device: Device,
        /// The devices that there are, in words.
        available: String,
    },
    /// Modules that no rule matches go to a device that this machine lacks.
    #[error(
        "no rule matches `{path}`, so it goes to the default device {device}, and this machine has no such device \
         ({available}); `--device cpu` or a rule puts it elsewhere, `--cpu` puts every module on the CPU"
    )]
    MissingDefault {
        /// The first such module.
        path: String,
        /// The device.
        device: Device,
        /// The devices that there are, in words.
        available: String,
    },
}

impl Plan {
    /// Where an entry's module runs. What it does not say is what its operator defaults to: `cuda`,
    /// and for experts in the generate phase `cpu`.
    ///
    /// # Errors
    /// If a value is no device.
    pub fn placement(
        &self,
        entry: &PlanEntry,
        registry: &Registry,
    ) -> Result<Placement, DeviceError> {
        let operator = entry.class.as_deref().and_then(|class| registry.get(class));
        let experts =
            operator.map_or(entry.role, |o| o.role) == Role::Experts && !entry.is_default();
        // The model operators are told one device, which serves both phases.
        let unsaid = match entry.role {
            Role::Model => self.device(entry, "device")?.unwrap_or(self.unsaid()),
            _ => self.unsaid(),
        };
        Ok(Placement {
            prefill: self.device(entry, "prefill_device")?.unwrap_or(unsaid),
            generate: self
                .device(entry, "generate_device")?
                .unwrap_or(if experts { Device::CPU } else { unsaid }),
        })
    }

    /// Where the module at a path runs. A module without an entry, below a rule that says
    /// `recursive: False`, runs on `cuda`.
    ///
    /// # Errors
    /// If a value is no device.
    pub fn placement_at(&self, path: &str, registry: &Registry) -> Result<Placement, DeviceError> {
        match self.entry(path) {
            Some(entry) => self.placement(entry, registry),
            None => Ok(Placement::both(self.unsaid())),
        }
    }

    /// Where a module goes that names no device.
    fn unsaid(&self) -> Device {
        if self.on_cpu { Device::CPU } else { CUDA }
    }

    /// The device that a keyword argument names; none if it is absent or null.
    fn device(&self, entry: &PlanEntry, argument: &str) -> Result<Option<Device>, DeviceError> {
        match entry.kwarg(argument) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => parse(value)
                .map(Some)
                .ok_or_else(|| no_device(entry, argument, value)),
        }
    }

    /// Puts every module on the CPU: every device that a keyword argument names, and every device that
    /// an operator would default to. `cpu` with a number stays as it is. The plan notes it.
    pub fn map_devices_to_cpu(&mut self, registry: &Registry) {
        let mut mapped = 0;
        for entry in &mut self.entries {
            let (operator, is_default) = (
                entry.class.as_deref().and_then(|c| registry.get(c)),
                entry.is_default(),
            );
            let mut changed = false;
            if let Some(kwargs) = &mut entry.kwargs {
                let mut moved: Vec<Kwarg> = kwargs.iter().filter_map(on_cpu).collect();
                if !is_default {
                    moved.extend(
                        unsaid_devices(operator, kwargs, registry).map(|name| Kwarg {
                            name: name.to_owned(),
                            value: "cpu".into(),
                            location: None,
                        }),
                    );
                }
                changed = !moved.is_empty();
                moved.into_iter().for_each(|kwarg| kwargs.insert(kwarg));
            }
            mapped += usize::from(changed);
        }
        self.on_cpu = true;
        // On one device no layer has holes.
        self.warnings
            .retain(|warning| !matches!(warning, PlanWarning::LayerHole { .. }));
        self.notes.push(format!(
            "every device is mapped to the CPU: {mapped} of {} entries changed",
            self.entries.len()
        ));
    }

    /// Whether [`Plan::map_devices_to_cpu`] was called.
    pub fn is_mapped_to_cpu(&self) -> bool {
        self.on_cpu
    }
}

fn parse(value: &Value) -> Option<Device> {
    value.as_str()?.parse().ok()
}

pub(super) fn no_device(entry: &PlanEntry, argument: &str, value: &Value) -> DeviceError {
    DeviceError::NoDevice {
        path: entry.path.clone(),
        argument: argument.to_owned(),
        value: value.to_string(),
        location: entry
            .kwargs
            .as_ref()
            .and_then(|k| k.location(argument))
            .cloned(),
    }
}

/// The keyword argument with every other device replaced by the CPU; none if nothing changes.
fn on_cpu(kwarg: &Kwarg) -> Option<Kwarg> {
    let moves = |value: &Value| parse(value).is_some_and(|d| d.kind() != DeviceKind::Cpu);
    let value = match &kwarg.value {
        value if DEVICE_KWARGS.contains(&kwarg.name.as_str()) && moves(value) => "cpu".into(),
        Value::Object(map) if kwarg.name == TRANSFER_MAP && map.values().any(moves) => {
            let mapped = |v: &Value| if moves(v) { "cpu".into() } else { v.clone() };
            Value::Object(
                map.iter()
                    .map(|(layer, v)| (layer.clone(), mapped(v)))
                    .collect(),
            )
        }
        _ => return None,
    };
    Some(Kwarg {
        value,
        ..kwarg.clone()
    })
}

/// Arguments that are not given and would default to another device than the CPU.
fn unsaid_devices<'a>(
    operator: Option<&'static OperatorEntry>,
    kwargs: &ktx_ops::Kwargs,
    registry: &'a Registry,
) -> impl Iterator<Item = &'static str> + use<'a> {
    let given: Vec<bool> = DEVICE_KWARGS
        .iter()
        .map(|name| kwargs.get(name).is_some_and(|v| !v.is_null()))
        .collect();
    let takers: Vec<&OperatorEntry> = operator
        .into_iter()
        .chain(inner_operators(operator, kwargs, registry))
        .collect();
    DEVICE_KWARGS
        .into_iter()
        .zip(given)
        .filter_map(move |(name, given)| {
            let phase = matches!(name, "generate_device" | "prefill_device");
            let defaults = || {
                takers
                    .iter()
                    .filter_map(|op| op.kwargs.defaults().get(name).and_then(parse))
                    .collect::<Vec<_>>()
            };
            let elsewhere = phase || defaults().iter().any(|d| d.kind() != DeviceKind::Cpu);
            (!given && elsewhere).then_some(name)
        })
}

/// The inner operators that an open set of arguments names or defaults to.
pub(super) fn inner_operators(
    operator: Option<&'static OperatorEntry>,
    kwargs: &ktx_ops::Kwargs,
    registry: &Registry,
) -> Vec<&'static OperatorEntry> {
    let Some(operator) = operator.filter(|op| op.kwargs.is_open()) else {
        return Vec::new();
    };
    let defaults = operator.kwargs.defaults();
    let name = |argument: &str| {
        kwargs
            .get(argument)
            .or_else(|| defaults.get(argument))?
            .as_str()
            .map(str::to_owned)
    };
    INNER_OPERATORS
        .iter()
        .filter_map(|argument| registry.get(&name(argument)?))
        .collect()
}

/// Refuses a plan that names a device which is not there. The CPU always is.
///
/// Modules that keep their class and compute nothing of their own do not count.
///
/// # Errors
/// Names the first rule, in the file's order, that names a missing device.
pub fn require_devices(
    plan: &Plan,
    available: &[Device],
    registry: &Registry,
) -> Result<(), DeviceError> {
    let mut missing: Option<(usize, DeviceError)> = None;
    for entry in &plan.entries {
        let says_nothing = entry.role == Role::Model && !says_device(entry);
        if entry.is_default() && entry.role == Role::Container || says_nothing {
            continue;
        }
        let order = entry.rule.as_ref().map_or(usize::MAX, |rule| rule.index);
        if missing.as_ref().is_some_and(|(first, _)| *first <= order) {
            continue;
        }
        let wanted = devices(plan, entry, registry)?;
        let absent = wanted
            .into_iter()
            .find(|(d, _)| d.kind() != DeviceKind::Cpu && !available.contains(d));
        if let Some((device, argument)) = absent {
            missing = Some((order, missing_device(entry, device, argument, available)));
        }
    }
    missing.map_or(Ok(()), |(_, error)| Err(error))
}

/// Whether a keyword argument names a device. A model operator without one is where its layers are.
fn says_device(entry: &PlanEntry) -> bool {
    ["device", "generate_device", "prefill_device"]
        .iter()
        .any(|name| entry.kwarg(name).is_some_and(|value| !value.is_null()))
}

/// The devices that an entry needs, with the arguments that name them.
fn devices(
    plan: &Plan,
    entry: &PlanEntry,
    registry: &Registry,
) -> Result<Vec<(Device, &'static str)>, DeviceError> {
    let placement = plan.placement(entry, registry)?;
    let mut found = vec![
        (placement.generate, "generate_device"),
        (placement.prefill, "prefill_device"),
    ];
    for argument in ["device", "out_device"] {
        found.extend(plan.device(entry, argument)?.map(|d| (d, argument)));
    }
    if let Some(Value::Object(map)) = entry.kwarg(TRANSFER_MAP) {
        for value in map.values() {
            found.push((
                parse(value).ok_or_else(|| no_device(entry, TRANSFER_MAP, value))?,
                TRANSFER_MAP,
            ));
        }
    }
    Ok(found)
}

/// All devices that a plan names.
///
/// # Errors
/// If a value is no device.
pub(crate) fn named_devices(
    plan: &Plan,
    registry: &Registry,
) -> Result<BTreeSet<Device>, DeviceError> {
    let mut all = BTreeSet::new();
    for entry in &plan.entries {
        all.extend(
            devices(plan, entry, registry)?
                .into_iter()
                .map(|(device, _)| device),
        );
    }
    Ok(all)
}

fn missing_device(
    entry: &PlanEntry,
    device: Device,
    argument: &str,
    available: &[Device],
) -> DeviceError {
    let mut names: Vec<String> = vec![Device::CPU.to_string()];
    names.extend(
        available
            .iter()
            .filter(|d| d.kind() != DeviceKind::Cpu)
            .map(ToString::to_string),
    );
    let available = format!("there is: {}", names.join(", "));
    let path = if entry.path.is_empty() {
        "the root".to_owned()
    } else {
        entry.path.clone()
    };
    match &entry.rule {
        Some(rule) => DeviceError::Missing {
            location: entry
                .kwargs
                .as_ref()
                .and_then(|k| k.location(argument))
                .unwrap_or(&rule.location)
                .clone(),
            rule: rule.clone(),
            path,
            device,
            available,
        },
        None => DeviceError::MissingDefault {
            path,
            device,
            available,
        },
    }
}
