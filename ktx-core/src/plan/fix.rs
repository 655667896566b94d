//! What to write instead, for what deserves a look in a plan.

use ktx_ops::{Module, try_registry};

use super::{Miss, PlanWarning};
use crate::rules::{ClassTable, Glob, NamePattern, Rule, RuleRef, RuleSet};

/// A change of the rules that would help, tried on the tree where it is about what a rule matches; none if
/// nothing simple would.
pub fn fix(warning: &PlanWarning, tree: &Module, rules: &RuleSet) -> Option<String> {
    match warning {
        PlanWarning::NeverMatches { rule, miss } => Trial::new(tree, rules, rule)?.fix(miss),
        PlanWarning::Shadowed { by, .. } => {
            let first = by.first()?;
            Some(format!("put it before {first}, or delete it"))
        }
        PlanWarning::BelowCut { by, .. } => {
            let first = by.first()?;
            Some(format!(
                "delete it, or take `recursive: False` from {first}"
            ))
        }
        PlanWarning::LayerHole { layer, others, .. } => {
            let pattern = layer.replace('.', r"\.");
            Some(format!(
                r"add a rule at the end, `name: '^{pattern}\.'`, that names {others}"
            ))
        }
        PlanWarning::NotReached { .. } | PlanWarning::Note(_) => None,
    }
}

/// Tries other conditions for one rule.
struct Trial<'a> {
    tree: &'a Module,
    rule: &'a Rule,
    classes: ClassTable<'a>,
}

impl<'a> Trial<'a> {
    fn new(tree: &'a Module, rules: &'a RuleSet, rule: &RuleRef) -> Option<Self> {
        Some(Self {
            tree,
            rule: rules.rules().get(rule.index)?,
            classes: ClassTable::new(tree, try_registry().ok()),
        })
    }

    fn fix(&self, miss: &Miss) -> Option<String> {
        match miss {
            Miss::Name | Miss::Both { .. } => self.other_name(),
            Miss::Class { class } => self.other_class(class),
            Miss::Glob => self.other_glob(),
            Miss::Layers { last: Some(last) } => {
                Some(format!("name layers between 0 and {last}, or `0-` for all"))
            }
            Miss::Layers { last: None } | Miss::Type | Miss::Together { .. } => None,
        }
    }

    fn pattern(&self) -> Option<&NamePattern> {
        let matches = self.rule.matches.as_ref().ok()?;
        matches.name.as_ref()?.as_ref().ok()
    }

    /// Whether a module is of the rule's class, if it names one.
    fn has_class(&self, module: &Module) -> bool {
        let matches = self.rule.matches.as_ref().ok();
        match matches.and_then(|m| m.class.as_ref()) {
            None => true,
            Some(class) => class
                .as_ref()
                .ok()
                .and_then(|c| self.classes.resolve(&c.path).ok())
                .is_some_and(|proper| self.classes.is_a(&module.class, proper)),
        }
    }

    /// A pattern near the rule's that takes modules of its class.
    fn other_name(&self) -> Option<String> {
        let pattern = self.pattern()?;
        let text = pattern.as_str();
        let mut candidates = Vec::new();
        if let Some(start) = text.strip_suffix('$').filter(|s| !s.ends_with('\\')) {
            candidates.push(format!(r"{start}\."));
            candidates.push(start.to_owned());
        }
        if let Some(rest) = text.strip_prefix('^') {
            candidates.push(rest.to_owned());
            candidates.push(rest.replace(r"blk\.", r"model\.layers\."));
        }
        candidates.push(text.replace(r"blk\.", r"model\.layers\."));
        candidates.iter().find_map(|candidate| {
            let pattern = NamePattern::new(candidate, pattern.location().clone()).ok()?;
            let fits = |m: &Module| self.has_class(m) && pattern.is_in(&m.path).unwrap_or(false);
            self.would_take(&format!("`'{candidate}'`"), fits)
        })
    }

    /// The class of the same last name that this tree has.
    fn other_class(&self, class: &str) -> Option<String> {
        let leaf = |path: &str| path.rsplit('.').next().map(str::to_owned);
        let namesake = self
            .tree
            .walk()
            .find(|m| leaf(&m.class) == leaf(class) && self.has_name(m))?;
        self.would_take(&format!("`{}`", namesake.class), |m| {
            m.class == namesake.class && self.has_name(m)
        })
    }

    fn has_name(&self, module: &Module) -> bool {
        self.pattern()
            .is_none_or(|p| p.is_in(&module.path).unwrap_or(false))
    }

    /// The glob at any depth, or with all that is below.
    fn other_glob(&self) -> Option<String> {
        let matches = self.rule.matches.as_ref().ok()?;
        let glob = matches.glob.as_ref()?.as_ref().ok()?;
        let text = glob.as_str();
        [
            format!("**.{text}"),
            format!("{text}.**"),
            format!("**.{text}.**"),
        ]
        .iter()
        .find_map(|candidate| {
            let glob = Glob::new(candidate, glob.location().clone()).ok()?;
            let fits = |m: &Module| self.has_class(m) && glob.matches(&m.path).unwrap_or(false);
            self.would_take(&format!("`'{candidate}'`"), fits)
        })
    }

    fn would_take(&self, what: &str, fits: impl Fn(&Module) -> bool) -> Option<String> {
        let count = self.tree.walk().filter(|m| fits(m)).count();
        match count {
            0 => None,
            1 => Some(format!("write {what}, which matches one module")),
            n => Some(format!("write {what}, which matches {n} modules")),
        }
    }
}

#[cfg(test)]
mod tests {
    use ktx_ops::Spec;

    use super::*;

    fn fixes(rules: &str) -> Vec<Option<String>> {
        let mut tree = Module::root("Root", Spec::Opaque);
        let model = tree.add("model", "M", Spec::Opaque);
        let layers = model.add("layers", "torch.nn.ModuleList", Spec::Opaque);
        for name in ["0", "1"] {
            let layer = layers.add(name, "a.Layer", Spec::Opaque);
            layer.add("gate", "b.Gate", Spec::Opaque);
            layer.add("proj", "torch.nn.Linear", Spec::Opaque);
        }
        let rules = RuleSet::parse(rules, "r.yaml").unwrap();
        let plan = super::super::plan(&tree, &rules, "cpu").unwrap();
        plan.warnings
            .iter()
            .map(|w| fix(w, &tree, &rules))
            .collect()
    }

    #[test]
    fn changes_that_would_take_modules_are_proposed() {
        for (rules, wanted) in [
            (
                r"- match: {name: '^model\.layers\.([01])$', class: torch.nn.Linear}",
                r"write `'^model\.layers\.([01])\.'`, which matches 2 modules",
            ),
            (
                r"- match: {name: '^layers\.1\.proj$'}",
                r"write `'layers\.1\.proj$'`, which matches one module",
            ),
            (
                r"- match: {name: '^blk\.1\.proj$'}",
                r"write `'model\.layers\.1\.proj$'`, which matches one module",
            ),
            (
                "- ktx: 1\n- match: {glob: proj}",
                "write `'**.proj'`, which matches 2 modules",
            ),
            (
                "- ktx: 1\n- match: {layers: 7-}",
                "name layers between 0 and 1, or `0-` for all",
            ),
        ] {
            let rules = format!("{rules}\n  replace: {{class: a.B}}\n");
            assert_eq!(fixes(&rules), [Some(wanted.to_owned())], "{rules}");
        }
    }

    #[test]
    fn a_shadowed_rule_belongs_before_the_one_that_shadows_it() {
        let rules = "- match: {name: proj}\n  replace: {class: a.B}\n- match: {name: '0.proj'}\n  replace: {class: a.B}\n";
        assert_eq!(
            fixes(rules),
            [Some(
                "put it before rule 1 (line 1), or delete it".to_owned()
            )]
        );
    }
}
