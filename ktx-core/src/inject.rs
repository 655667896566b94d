//! Carrying out a plan: every module's operator is looked up, built, and put in its parent's place.

use std::collections::HashMap;

use ktx_ops::linear::KLinearLora;
use ktx_ops::lora::{Adapter, EmbeddingLora};
use ktx_ops::{
    BuildArgs, Children, Module, OpError, Operator, OperatorEntry, Placement, Role, Spec,
    WeightStore, default_class, registry,
};

use crate::plan::{Plan, PlanEntry};

/// One module that an operator was put into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InjectedModule {
    /// The module's path.
    pub path: String,
    /// Class path of its operator.
    pub class: &'static str,
    /// Where it runs.
    pub placement: Placement,
    /// Whether a rule chose it.
    pub by_rule: bool,
    /// Names of the adapters that the engine was made with and that adapt it: `KLinearLora` wraps it,
    /// or, where routed experts are one operator, it holds their parts itself.
    pub adapters: Vec<String>,
}

/// What was put where.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InjectReport {
    /// All modules with an operator, children before parents.
    pub modules: Vec<InjectedModule>,
}

impl InjectReport {
    /// Notes that an adapter adapts these modules. One that has no operator of its own is its parent's.
    pub(crate) fn note_adapter(&mut self, name: &str, adapter: &Adapter) {
        let at: HashMap<String, usize> = self
            .modules
            .iter()
            .enumerate()
            .map(|(i, m)| (m.path.clone(), i))
            .collect();
        for path in adapter.modules() {
            let ancestors = std::iter::successors(Some(path), |p| Some(p.rsplit_once('.')?.0));
            let Some(index) = ancestors.into_iter().find_map(|p| at.get(p)) else {
                continue;
            };
            let adapters = &mut self.modules[*index].adapters;
            if adapters.last().is_none_or(|last| last != name) {
                adapters.push(name.to_owned());
            }
        }
    }
}

/// Builds the operators of a tree as a plan says, without weights. The root, which no rule can
/// replace, comes back as its children's operators.
///
/// # Errors
/// [`OpError`] if an operator is unknown or cannot take a module's place.
pub fn inject(
    tree: &Module,
    plan: &Plan,
    store: &dyn WeightStore,
) -> Result<(Children, InjectReport), OpError> {
    let mut injector = Injector {
        plan,
        store,
        report: InjectReport::default(),
    };
    let children = injector.children(tree)?;
    Ok((children, injector.report))
}

/// Whether routed experts are one operator, so that the modules below it have none of their own.
pub(crate) fn is_whole(module: &Module, entry: Option<&PlanEntry>) -> bool {
    let replaced = entry.is_some_and(|e| !e.is_default());
    module.role() == Role::Experts && (replaced || module.children.is_empty())
}

struct Injector<'a> {
    plan: &'a Plan,
    store: &'a dyn WeightStore,
    report: InjectReport,
}

impl Injector<'_> {
    fn children(&mut self, module: &Module) -> Result<Children, OpError> {
        let mut children = Children::default();
        for child in &module.children {
            if let Some(operator) = self.module(child)? {
                children.push(&child.name, operator);
            }
        }
        Ok(children)
    }

    fn module(&mut self, module: &Module) -> Result<Option<Operator>, OpError> {
        let entry = self.plan.entry(&module.path);
        let children = match is_whole(module, entry) {
            true => Children::default(),
            false => self.children(module)?,
        };
        let Some(operator) = self.entry_of(module, entry)? else {
            let container = matches!(module.spec, Spec::Container) && !module.children.is_empty();
            return Ok(container.then_some(Operator::Container(children)));
        };
        let placement = self
            .plan
            .placement_at(&module.path, registry())
            .map_err(|e| unfit(module, entry, e.to_string()))?;
        let kwargs = entry
            .and_then(|e| e.kwargs.as_ref())
            .map(|k| k.filtered(|name| name != "generate_device" && name != "prefill_device"))
            .unwrap_or_default();
        let mut args = BuildArgs {
            module,
            kwargs: &kwargs,
            placement,
            location: entry
                .and_then(|e| e.rule.as_ref())
                .map(|r| r.location.clone()),
            children,
            store: self.store,
        };
        let built = (operator.build)(&mut args)?;
        if built.role() != module.role() {
            let (is, wanted) = (built.role(), module.role());
            return Err(unfit(
                module,
                entry,
                format!(
                    "`{}` has role {is}, the module has {wanted}",
                    operator.class
                ),
            ));
        }
        self.note(module, entry, &built, placement);
        Ok(Some(adaptable(built)))
    }

    /// The operator that a module gets; none for a container.
    fn entry_of(
        &self,
        module: &Module,
        entry: Option<&PlanEntry>,
    ) -> Result<Option<&'static OperatorEntry>, OpError> {
        let class = match entry.filter(|e| !e.is_default()) {
            None => match default_class(module) {
                None => return Ok(None),
                Some(class) => class,
            },
            Some(entry) => match entry.class.as_deref() {
                Some(class) => class,
                None => {
                    return Err(unfit(
                        module,
                        Some(entry),
                        "the rule's `class` is null".to_owned(),
                    ));
                }
            },
        };
        registry().get(class).map(Some).ok_or_else(|| {
            let near = registry()
                .nearest(class)
                .map(|n| format!(" (did you mean `{n}`?)"))
                .unwrap_or_default();
            unfit(
                module,
                entry,
                format!("no operator is registered as `{class}`{near}"),
            )
        })
    }

    fn note(
        &mut self,
        module: &Module,
        entry: Option<&PlanEntry>,
        built: &Operator,
        placement: Placement,
    ) {
        let Some(operator) = built.module() else {
            return;
        };
        let by_rule = entry.is_some_and(|e| !e.is_default());
        tracing::debug!(path = %module.path, class = operator.class_path(), by_rule, "injected");
        self.report.modules.push(InjectedModule {
            path: module.path.clone(),
            class: operator.class_path(),
            placement,
            by_rule,
            adapters: Vec::new(),
        });
    }
}

/// Operators that any adapter may adapt, with a place for its part.
fn adaptable(operator: Operator) -> Operator {
    match operator {
        Operator::Linear(op) => Operator::Linear(Box::new(KLinearLora::around(op))),
        Operator::Embedding(op) => Operator::Embedding(Box::new(EmbeddingLora::around(op))),
        other => other,
    }
}

fn unfit(module: &Module, entry: Option<&PlanEntry>, message: String) -> OpError {
    OpError::Unfit {
        path: module.path.clone(),
        message,
        location: entry
            .and_then(|e| e.rule.as_ref())
            .map(|r| r.location.clone()),
    }
}
