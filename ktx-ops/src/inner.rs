//! Operators inside of operators: what the switches between phases share.

use crate::build::{BuildArgs, Children, OpError, Operator, Placement};
use crate::kwargs::KwargInfo;
use crate::module::Phase;
use crate::registry::{Needs, OperatorEntry, registry};

/// The operators of the two phases. One that is null is absent, and the other serves both; so does
/// one operator named for both.
pub(crate) fn of_phase<'a>(
    prefill: &'a Option<String>,
    generate: &'a Option<String>,
) -> (Option<&'a str>, Option<&'a str>) {
    match (prefill.as_deref(), generate.as_deref()) {
        (prefill, None) => (None, prefill),
        (prefill, generate) => (prefill, generate),
    }
}

/// Builds the operator that takes one phase of a module, with those of its arguments that it knows.
pub(crate) fn build_inner<T>(
    args: &BuildArgs<'_>,
    name: Option<&str>,
    phase: Phase,
    role: impl Fn(Operator) -> Option<T>,
) -> Result<Option<T>, OpError> {
    let placement = Placement::both(args.placement.device(phase));
    build_inner_at(args, name, placement, role)
}

/// The same for an operator that knows both phases' devices.
pub(crate) fn build_inner_at<T>(
    args: &BuildArgs<'_>,
    name: Option<&str>,
    placement: Placement,
    role: impl Fn(Operator) -> Option<T>,
) -> Result<Option<T>, OpError> {
    let Some(name) = name else { return Ok(None) };
    let entry = find(args, name)?;
    let kwargs = args.kwargs.filtered(|kwarg| knows(&entry.kwargs, kwarg));
    let mut inner = BuildArgs {
        module: args.module,
        kwargs: &kwargs,
        placement,
        location: args.location.clone(),
        children: Children::default(),
        store: args.store,
    };
    let built = (entry.build)(&mut inner)?;
    let found = built.role();
    role(built).map(Some).ok_or_else(|| {
        args.error(format!(
            "`{name}` is an operator of role {found}, and this place takes {}",
            args.module.role()
        ))
    })
}

fn find(args: &BuildArgs<'_>, name: &str) -> Result<&'static OperatorEntry, OpError> {
    let Some(entry) = registry().get(name) else {
        let near = registry()
            .nearest(name)
            .map(|n| format!(" (did you mean `{n}`?)"))
            .unwrap_or_default();
        return Err(args.error(format!("no operator is registered as `{name}`{near}")));
    };
    match entry.needs {
        Needs::Host => Ok(entry),
        Needs::Missing(what) => Err(args.error(format!("operator `{name}` needs {what}"))),
    }
}

/// Whether an operator has an argument of this name.
pub fn knows(info: &KwargInfo, name: &str) -> bool {
    info.docs().iter().any(|d| d.name == name)
}
