//! What changes from one plan of a tree to another.

use serde_json::{Map, Value};

use super::{Plan, PlanEntry};

/// One module that the two plans treat differently.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanChange {
    /// The module's path.
    pub path: String,
    /// What the first plan says of it; nothing if it has no entry there.
    pub before: Option<PlanSide>,
    /// What the second plan says of it.
    pub after: Option<PlanSide>,
}

/// What one plan says of a module.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanSide {
    /// The class, `default` if the module keeps its own.
    pub class: Option<String>,
    /// The keyword arguments.
    pub kwargs: Map<String, Value>,
}

impl PlanSide {
    fn of(entry: &PlanEntry) -> Self {
        let kwargs = entry
            .kwargs
            .as_ref()
            .map(|k| k.to_json())
            .unwrap_or_default();
        Self {
            class: entry.class.clone(),
            kwargs,
        }
    }

    /// The keyword arguments in which it differs from another side, as `name: value`.
    pub fn differing(&self, other: Option<&PlanSide>) -> Vec<String> {
        let theirs = |name: &String| other.and_then(|side| side.kwargs.get(name));
        self.kwargs
            .iter()
            .filter(|(name, value)| theirs(name) != Some(value))
            .map(|(name, value)| match value {
                Value::String(text) => format!("{name}: {text}"),
                value => format!("{name}: {value}"),
            })
            .collect()
    }
}

/// The modules that two plans of one tree treat differently, in the tree's order. Where the second has
/// entries that the first has not, they come last.
pub fn plan_diff(before: &Plan, after: &Plan) -> Vec<PlanChange> {
    let change = |path: &str| {
        let side = |plan: &Plan| plan.entry(path).map(PlanSide::of);
        let (before, after) = (side(before), side(after));
        (before != after).then(|| PlanChange {
            path: path.to_owned(),
            before,
            after,
        })
    };
    let first = before.entries().iter().map(|e| e.path.as_str());
    let only_second = after
        .entries()
        .iter()
        .map(|e| e.path.as_str())
        .filter(|path| before.entry(path).is_none());
    first.chain(only_second).filter_map(change).collect()
}

#[cfg(test)]
mod tests {
    use ktx_ops::{Module, Spec};

    use super::*;
    use crate::rules::RuleSet;

    fn planned(rules: &str) -> Plan {
        let mut tree = Module::root("Root", Spec::Opaque);
        tree.add("a", "A", Spec::Opaque).add("b", "B", Spec::Opaque);
        tree.add("c", "C", Spec::Opaque);
        super::super::plan(&tree, &RuleSet::parse(rules, "r.yaml").unwrap(), "cpu").unwrap()
    }

    #[test]
    fn only_modules_that_differ_are_told_with_what_differs() {
        let before =
            planned("- match: {name: '^c'}\n  replace: {class: X.Y, kwargs: {n: 1, m: x}}");
        let after = planned(
            "- match: {name: '^c'}\n  replace: {class: X.Y, kwargs: {n: 2, m: x}}\n\
             - match: {name: '^a$'}\n  replace: {class: default, kwargs: {generate_device: cpu, prefill_device: cpu}}\n  \
             recursive: False",
        );
        let changes = plan_diff(&before, &after);
        let paths: Vec<&str> = changes.iter().map(|c| c.path.as_str()).collect();
        assert_eq!(paths, ["a.b", "c"]);
        assert_eq!(changes[0].after, None);
        let (old, new) = (
            changes[1].before.as_ref().unwrap(),
            changes[1].after.as_ref().unwrap(),
        );
        assert_eq!(old.differing(Some(new)), ["n: 1"]);
        assert_eq!(new.differing(Some(old)), ["n: 2"]);
        assert_eq!(plan_diff(&before, &before), []);
    }
}
