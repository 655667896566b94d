//! A module tree read from a file of names and classes.

use std::collections::{BTreeMap, BTreeSet};

use ktx_ops::{Module, Spec};
use serde::de::{Deserializer, MapAccess, Visitor};

/// Modules may not nest deeper.
const MAX_DEPTH: usize = 64;

/// What is wrong with the text of a module tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// The text is no JSON object of texts.
    #[error("`{file}` is no module tree, a JSON object of module paths and class paths: {reason}")]
    NotAnObject {
        /// The file's name.
        file: String,
        /// What the reader stumbled over.
        reason: String,
    },
    /// The object is empty.
    #[error("`{file}` holds no module; a tree starts with its root, whose path is the empty text")]
    Empty {
        /// The file's name.
        file: String,
    },
    /// The first module is not the root.
    #[error(
        "`{file}` starts with the module `{path}`; a tree starts with its root, whose path is the empty text"
    )]
    NoRoot {
        /// The file's name.
        file: String,
        /// The first module's path.
        path: String,
    },
    /// A module comes before its parent, or has none.
    #[error(
        "`{file}`: module `{path}` comes without its parent `{parent}`, which must stand above it"
    )]
    Orphan {
        /// The file's name.
        file: String,
        /// The module.
        path: String,
        /// Its parent's path.
        parent: String,
    },
    /// Two modules have one path.
    #[error("`{file}`: module `{path}` is there twice")]
    Duplicate {
        /// The file's name.
        file: String,
        /// The module.
        path: String,
    },
    /// A path that no module can have.
    #[error("`{file}`: `{path}` is no module path: {reason}")]
    BadPath {
        /// The file's name.
        file: String,
        /// The path.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Reads a module tree, `{path: class path}` with parents before their children; `file_name` is for
/// messages. The modules are known by name and class only: [`Spec::Opaque`].
///
/// # Errors
/// If the text is no JSON object of texts, or the paths make no tree.
pub fn tree_from_json(text: &str, file_name: &str) -> Result<Module, TreeError> {
    let file = || file_name.to_owned();
    let rows = read_pairs(text).map_err(|e| TreeError::NotAnObject {
        file: file(),
        reason: e.to_string(),
    })?;
    let mut rows = rows.into_iter();
    let root = match rows.next() {
        None => return Err(TreeError::Empty { file: file() }),
        Some((path, class)) if path.is_empty() => Module::root(&class, Spec::Opaque),
        Some((path, _)) => return Err(TreeError::NoRoot { file: file(), path }),
    };
    let mut seen = BTreeSet::from([String::new()]);
    let mut children: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
    for (path, class) in rows {
        check_path(&path).map_err(|reason| TreeError::BadPath {
            file: file(),
            path: path.clone(),
            reason,
        })?;
        let (parent, name) = path.rsplit_once('.').unwrap_or(("", &path));
        if !seen.contains(parent) {
            let parent = parent.to_owned();
            return Err(TreeError::Orphan {
                file: file(),
                path,
                parent,
            });
        }
        if !seen.insert(path.clone()) {
            return Err(TreeError::Duplicate { file: file(), path });
        }
        children
            .entry(parent.to_owned())
            .or_default()
            .push((name.to_owned(), class));
    }
    let mut root = root;
    add_children(&mut root, &mut children);
    Ok(root)
}

/// Depth is limited by [`check_path`].
fn add_children(module: &mut Module, children: &mut BTreeMap<String, Vec<(String, String)>>) {
    for (name, class) in children.remove(&module.path).unwrap_or_default() {
        add_children(module.add(&name, &class, Spec::Opaque), children);
    }
}

fn check_path(path: &str) -> Result<(), String> {
    if path.is_empty() {
        return Err("the root comes first, and once".to_owned());
    }
    if path.split('.').any(str::is_empty) {
        return Err("a name between two dots is missing".to_owned());
    }
    if path.chars().any(char::is_control) {
        return Err("it holds a control character".to_owned());
    }
    if path.split('.').count() > MAX_DEPTH {
        return Err(format!("it is deeper than {MAX_DEPTH} modules"));
    }
    Ok(())
}

/// The pairs of a JSON object of texts, repeated keys included.
fn read_pairs(text: &str) -> serde_json::Result<Vec<(String, String)>> {
    struct Pairs;
    impl<'de> Visitor<'de> for Pairs {
        type Value = Vec<(String, String)>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object of module paths and class paths")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut pairs = Vec::new();
            while let Some(pair) = map.next_entry()? {
                pairs.push(pair);
            }
            Ok(pairs)
        }
    }
    let mut reader = serde_json::Deserializer::from_str(text);
    let pairs = reader.deserialize_map(Pairs)?;
    reader.end()?;
    Ok(pairs)
}
