//! Advice on a rule file: what the format allows and its author hardly meant.

use std::collections::BTreeSet;
use std::fmt;

use ktx_ops::{Location, Role};

use super::{Rule, RuleSet, layer_of};
use crate::plan::Plan;

/// One piece of advice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advice {
    /// Where in the file.
    pub location: Location,
    /// What is odd.
    pub message: String,
    /// What to write instead, where that is known.
    pub fix: Option<String>,
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.location, self.message)?;
        match &self.fix {
            Some(fix) => write!(f, "; write {fix}"),
            None => Ok(()),
        }
    }
}

/// Advice that needs no model: name patterns with dots that match any character, variables that nothing uses.
pub fn lint(rules: &RuleSet) -> Vec<Advice> {
    let mut advice = dots(rules);
    advice.extend(unused_variables(rules));
    advice
}

fn unused_variables(rules: &RuleSet) -> impl Iterator<Item = Advice> {
    let unused = rules.variables().iter().filter(|v| !v.is_used);
    unused.map(|variable| Advice {
        location: variable.location.clone(),
        message: format!(
            "the variable `{0}` is used by no rule: it belongs into keyword arguments, as `${{{0}}}`",
            variable.name
        ),
        fix: None,
    })
}

fn dots(rules: &RuleSet) -> Vec<Advice> {
    let patterns = rules.rules().iter().filter_map(|rule| {
        let name = rule.matches.as_ref().ok()?.name.as_ref()?;
        name.as_ref().ok()
    });
    patterns
        .filter_map(|pattern| {
            let text = pattern.as_str();
            let escaped = with_escaped_dots(text)?;
            Some(Advice {
                location: pattern.location().clone(),
                message: format!(
                    "a dot in `{text}` stands between two names and matches any character"
                ),
                fix: Some(format!("'{escaped}'")),
            })
        })
        .collect()
}

/// Advice on a plan that these rules made: rules whose name pattern takes modules of several roles for
/// one operator, and layers that the model does not have.
pub fn lint_plan(rules: &RuleSet, plan: &Plan) -> Vec<Advice> {
    let mut advice = several_roles(rules, plan);
    advice.extend(layers_beyond(rules, plan));
    advice
}

/// Ranges that reach beyond the model's last layer, of rules that take modules all the same.
fn layers_beyond(rules: &RuleSet, plan: &Plan) -> Vec<Advice> {
    let paths = plan.entries().iter().map(|e| e.path.as_str());
    let Some(last) = paths.filter_map(layer_of).max() else {
        return Vec::new();
    };
    let beyond = |rule: &Rule| {
        let layers = rule.matches.as_ref().ok()?.layers.as_ref()?.as_ref().ok()?;
        let beyond = layers.beyond(last);
        (!beyond.is_empty()).then(|| Advice {
            location: rule.reference.location.clone(),
            message: format!(
                "the layers {} reach beyond the model's, 0 to {last}",
                beyond.join(",")
            ),
            fix: Some(format!(
                "`{}-` for all up to the last",
                beyond[0].split('-').next().unwrap_or("0")
            )),
        })
    };
    rules.rules().iter().filter_map(beyond).collect()
}

fn several_roles(rules: &RuleSet, plan: &Plan) -> Vec<Advice> {
    let mut advice = Vec::new();
    for rule in rules.rules() {
        let taken = plan.entries().iter().filter(|e| {
            !e.is_default()
                && e.rule
                    .as_ref()
                    .is_some_and(|r| r.index == rule.reference.index)
        });
        let roles: BTreeSet<Role> = taken.map(|e| e.role).collect();
        if roles.len() > 1 {
            let names: Vec<String> = roles.iter().map(Role::to_string).collect();
            advice.push(Advice {
                location: rule.reference.location.clone(),
                message: format!(
                    "one operator is put in the place of modules of {} roles: {}",
                    roles.len(),
                    names.join(", ")
                ),
                fix: Some("`match.class` beside the name, so that one role is left".to_owned()),
            });
        }
    }
    advice
}

/// The pattern with every dot escaped that stands between two name characters; none if there is no such dot.
fn with_escaped_dots(pattern: &str) -> Option<String> {
    let characters: Vec<char> = pattern.chars().collect();
    let name = |c: Option<&char>| c.is_some_and(|c| c.is_alphanumeric() || *c == '_');
    let mut escaped = String::with_capacity(pattern.len() + 4);
    let (mut in_class, mut found) = (false, false);
    let mut i = 0;
    while let Some(&c) = characters.get(i) {
        if c == '\\' {
            // The escaped character belongs to it.
            escaped.push(c);
            escaped.extend(characters.get(i + 1));
            i += 2;
            continue;
        }
        match c {
            '[' => in_class = true,
            ']' => in_class = false,
            _ => {}
        }
        let before = i.checked_sub(1).and_then(|b| characters.get(b));
        let escapes = before.is_some() && i >= 2 && characters[i - 2] == '\\';
        if c == '.' && !in_class && !escapes && name(before) && name(characters.get(i + 1)) {
            escaped.push('\\');
            found = true;
        }
        escaped.push(c);
        i += 1;
    }
    found.then_some(escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dots_between_names_are_escaped() {
        assert_eq!(
            with_escaped_dots("^model.embed_tokens").as_deref(),
            Some(r"^model\.embed_tokens")
        );
        for fine in [
            r"^model\.layers\..*\.mlp$",
            "a.*b",
            "[a.b]",
            "^lm_head$",
            r"\d.x",
            "",
        ] {
            assert_eq!(with_escaped_dots(fine), None, "{fine}");
        }
    }

    #[test]
    fn a_pattern_with_such_a_dot_is_told_with_its_place_and_what_to_write() {
        let text = "- match: {name: '^model.norm'}\n  replace: {class: default}\n";
        let rules = RuleSet::parse(text, "r.yaml").unwrap();
        let advice: Vec<String> = lint(&rules).iter().map(Advice::to_string).collect();
        assert_eq!(advice.len(), 1);
        assert!(advice[0].starts_with("r.yaml:1:"), "{}", advice[0]);
        assert!(
            advice[0].ends_with(r"write '^model\.norm'"),
            "{}",
            advice[0]
        );
    }

    #[test]
    fn a_rule_that_takes_several_roles_is_told() {
        use ktx_ops::spec::{EmbeddingSpec, NormSpec};
        use ktx_ops::{Module, Spec};

        let mut tree = Module::root("Root", Spec::Container);
        tree.add(
            "norm",
            "torch.nn.Module",
            Spec::Norm(NormSpec { size: 4, eps: 1e-6 }),
        );
        let embedding = EmbeddingSpec {
            vocab_size: 2,
            hidden_size: 4,
        };
        tree.add("embed", "torch.nn.Module", Spec::Embedding(embedding));
        let planned = |name: &str| {
            let text = format!("- match: {{name: '{name}'}}\n  replace: {{class: A.B}}\n");
            let rules = RuleSet::parse(&text, "r.yaml").unwrap();
            let plan = crate::plan::plan(&tree, &rules, "cpu").unwrap();
            lint_plan(&rules, &plan)
        };
        assert_eq!(planned("^norm$"), []);
        let advice = planned("norm|embed");
        assert!(
            advice[0].message.contains("2 roles: Norm, Embedding"),
            "{}",
            advice[0]
        );
    }
}
