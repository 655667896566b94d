//! Advice on the devices that rules name.

use std::collections::BTreeMap;

use ktx_kernels::device::Device;
use ktx_ops::Location;
use ktx_ops::nearest::nearest;
use serde_json::Value;

use super::{Advice, Rule, RuleSet};
use crate::plan::{DEVICE_KWARGS, TRANSFER_MAP};

/// Texts in a device's place that name none.
pub fn lint_device_names(rules: &RuleSet) -> Vec<Advice> {
    let wrong = rules
        .rules()
        .iter()
        .flat_map(devices)
        .filter(|(_, value)| device(value).is_none());
    wrong
        .map(|(location, value)| {
            let text = value.as_str().unwrap_or_default();
            let near = match text.strip_prefix("gpu") {
                Some(index) => format!("cuda{index}"),
                None => nearest(text, ["cpu", "cuda", "cuda:0", "cuda:1"])
                    .unwrap_or("cuda:0")
                    .to_owned(),
            };
            Advice {
                location,
                message: format!("{value} is no device"),
                fix: Some(format!("`{near}`; devices are `cpu`, `cuda`, `cuda:1`")),
            }
        })
        .collect()
}

/// Devices that rules name and a machine lacks, each once, with the first place. The CPU is always there.
pub fn lint_missing_devices(rules: &RuleSet, available: &[Device]) -> Vec<Advice> {
    let mut missing: BTreeMap<Device, (Location, usize)> = BTreeMap::new();
    for rule in rules.rules() {
        let mut named: Vec<(Device, Location)> = devices(rule)
            .into_iter()
            .filter_map(|(location, value)| Some((device(value)?, location)))
            .filter(|(device, _)| !device.is_cpu() && !available.contains(device))
            .collect();
        named.sort_by_key(|(device, _)| *device);
        named.dedup_by_key(|(device, _)| *device);
        for (device, location) in named {
            missing.entry(device).or_insert((location, 0)).1 += 1;
        }
    }
    missing
        .into_iter()
        .map(|(device, (location, rules))| Advice {
            location,
            message: format!(
                "this machine has no device {device}, which {rules} rule{}",
                if rules == 1 { " names" } else { "s name" }
            ),
            fix: Some("`cpu`, or use `--cpu`, which puts every module there".to_owned()),
        })
        .collect()
}

fn device(value: &Value) -> Option<Device> {
    value.as_str()?.parse().ok()
}

/// What a rule's keyword arguments have in devices' places, with where it is.
fn devices(rule: &Rule) -> Vec<(Location, &Value)> {
    let mut found = Vec::new();
    let kwargs = rule.replace.as_ref().ok().and_then(|r| r.kwargs.as_ref());
    for kwarg in kwargs.into_iter().flat_map(|k| k.iter()) {
        let location = kwarg.location.as_ref().unwrap_or(&rule.reference.location);
        match &kwarg.value {
            Value::Null => {}
            Value::Object(map) if kwarg.name == TRANSFER_MAP => {
                found.extend(map.values().map(|value| (location.clone(), value)));
            }
            value if DEVICE_KWARGS.contains(&kwarg.name.as_str()) => {
                found.push((location.clone(), value));
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_are_none_and_devices_that_are_missing_are_told_with_their_place() {
        let text = "- match: {name: a}\n  replace: {kwargs: {generate_device: gpu, prefill_device: cuda:1}}\n\
                    - match: {name: b}\n  replace: {kwargs: {transfer_map: {3: cuda:1, 4: cuda:1}, out_device: cpu}}\n\
                    - match: {name: c}\n  replace: {kwargs: {generate_device: cpu:1, prefill_device: null}}\n";
        let rules = RuleSet::parse(text, "r.yaml").unwrap();
        let told = |advice: Vec<Advice>| -> Vec<String> {
            advice.iter().map(ToString::to_string).collect()
        };
        let names = told(lint_device_names(&rules));
        assert_eq!(names.len(), 1, "{names:?}");
        assert!(names[0].starts_with("r.yaml:2:"), "{names:?}");
        assert!(
            names[0].contains("\"gpu\" is no device; write `cuda`"),
            "{names:?}"
        );
        let missing = told(lint_missing_devices(&rules, &[Device::CPU]));
        assert_eq!(missing.len(), 1, "{missing:?}");
        assert!(
            missing[0].contains("no device cuda:1, which 2 rules name"),
            "{missing:?}"
        );
    }
}
