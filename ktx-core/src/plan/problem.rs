//! What [`check`](super::check) finds.

use ktx_ops::kwargs::did_you_mean;
use ktx_ops::{KwargError, Location, Role};

use super::DeviceError;
use crate::rules::RuleRef;

/// Something in a plan that the operators at hand cannot do, or do not heed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Problem {
    /// No operator has this class path.
    #[error(
        "{location}: no operator is registered as `{class}`{}; `ktx operators` lists all",
        did_you_mean(nearest)
    )]
    UnknownClass {
        /// Where it is written.
        location: Location,
        /// What is written.
        class: String,
        /// The registered name that looks most like it.
        nearest: Option<String>,
    },
    /// A rule replaces a module by no class at all.
    #[error("{location}: `class` of {rule} must be a class path or `default`, not {found}")]
    NoClass {
        /// Where it is written.
        location: Location,
        /// The rule.
        rule: RuleRef,
        /// What is written, as JSON.
        found: String,
    },
    /// A rule's keyword arguments are no mapping.
    #[error("{location}: `kwargs` of {rule} must be a mapping of names and values, not {found}")]
    NoKwargs {
        /// Where the rule is.
        location: Location,
        /// The rule.
        rule: RuleRef,
        /// What is written, as JSON.
        found: String,
    },
    /// An operator stands where one of another role belongs.
    #[error(
        "{location}: {rule} puts `{class}`, of role {role}, in the place of `{path}`, of role {wanted}{}; \
         change the class, or narrow the rule's `match`",
        more(modules)
    )]
    WrongRole {
        /// Where the class is written.
        location: Location,
        /// The rule.
        rule: RuleRef,
        /// The operator.
        class: String,
        /// Its role.
        role: Role,
        /// The first module.
        path: String,
        /// That module's role.
        wanted: Role,
        /// How many modules have the problem.
        modules: usize,
    },
    /// A keyword argument does not fit its operator.
    #[error(transparent)]
    Kwarg(#[from] KwargError),
    /// `generate_op` or `prefill_op` names no operator.
    #[error(
        "{location}: `{argument}` of `{class}` names `{name}`, which is no {role} operator{}",
        did_you_mean(nearest)
    )]
    UnknownInner {
        /// Where it is written, or else the class.
        location: Location,
        /// The argument.
        argument: String,
        /// The operator around it.
        class: String,
        /// What is written.
        name: String,
        /// The role that belongs there.
        role: Role,
        /// The name of that role that looks most like it.
        nearest: Option<String>,
    },
    /// An operator computes with other weights than the file's.
    #[error("{location}: `{class}` changes the weights' values: {how}")]
    Lossy {
        /// Where it is named.
        location: Location,
        /// The operator.
        class: String,
        /// How.
        how: String,
    },
    /// An operator needs what is not there.
    #[error("{location}: `{class}` needs {what}")]
    Needs {
        /// Where it is named.
        location: Location,
        /// The operator.
        class: String,
        /// What it needs.
        what: String,
    },
    /// An operator cannot work with a module's weights or sizes.
    #[error(
        "{location}: `{class}` cannot take the place of `{path}`{}: {reason}",
        more(modules)
    )]
    Unsuited {
        /// Where the operator is named.
        location: Location,
        /// The operator.
        class: String,
        /// The first module.
        path: String,
        /// Why not, and what would help.
        reason: String,
        /// How many modules have the problem.
        modules: usize,
    },
    /// A value is no device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A module with weights keeps its class, and nothing says where they go.
    #[error(
        "{location}: {rule} keeps `{path}` as it is and gives no `generate_device`, so its weights have no place{}; \
         add `generate_device` and `prefill_device` to `kwargs`",
        more(modules)
    )]
    NoPlace {
        /// Where the rule is.
        location: Location,
        /// The rule.
        rule: RuleRef,
        /// The first module.
        path: String,
        /// How many modules have the problem.
        modules: usize,
    },
    /// The root cannot be replaced.
    #[error(
        "{location}: {rule} matches the root, which is never replaced; narrow its `name`, as in `^model`"
    )]
    Root {
        /// Where the rule is.
        location: Location,
        /// The rule.
        rule: RuleRef,
    },
    /// A keyword argument is accepted and has no effect.
    #[error("{location}: `{name}` of `{class}` has no effect: {why}")]
    IgnoredKwarg {
        /// Where it is written.
        location: Location,
        /// The argument.
        name: String,
        /// The operator.
        class: String,
        /// Why.
        why: String,
    },
}

fn more(modules: &usize) -> String {
    match modules {
        0 | 1 => String::new(),
        2 => " (and one more module)".to_owned(),
        n => format!(" (and {} more modules)", n - 1),
    }
}
