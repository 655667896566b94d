//! Crates depend downwards only.

use crate::metadata::packages;

/// All crates, lowest first.
const LAYERS: [&str; 7] = [
    "ktx-gguf",
    "ktx-kernels",
    "ktx-ops",
    "ktx-models",
    "ktx-core",
    "ktx-server",
    "ktx-cli",
];

fn layer(name: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| *layer == name)
}

#[test]
fn every_crate_of_the_workspace_has_a_layer() {
    let mut found: Vec<&str> = packages().iter().map(|p| p.name()).collect();
    found.sort_by_key(|name| layer(name));
    assert_eq!(found, LAYERS);
}

#[test]
fn no_crate_depends_on_one_of_a_higher_layer() {
    for package in packages() {
        let own = package.name();
        for (name, dependency) in package
            .dependencies()
            .filter(|(name, _)| layer(name).is_some())
        {
            assert!(
                layer(name) < layer(own),
                "{own} depends on {name}, which is above it: {dependency}"
            );
        }
    }
}

/// An operator in a crate that nothing references is dropped by the linker.
#[test]
fn core_references_every_crate_below_it() {
    let core = packages()
        .iter()
        .find(|p| p.name() == "ktx-core")
        .expect("it is a member");
    for lower in ["ktx-gguf", "ktx-kernels", "ktx-ops", "ktx-models"] {
        let is_normal = core
            .dependencies()
            .any(|(name, d)| name == lower && d["kind"].is_null());
        assert!(is_normal, "ktx-core does not depend on {lower}");
    }
}
