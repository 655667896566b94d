//! What cargo knows of the workspace.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;

/// A package of the workspace, as `cargo metadata` describes it.
pub struct Package {
    json: Value,
}

impl Package {
    /// Its name.
    pub fn name(&self) -> &str {
        self.text("name").expect("every package has a name")
    }

    /// A field that is a text, if it is set.
    pub fn text(&self, field: &str) -> Option<&str> {
        self.json[field].as_str()
    }

    /// A field that is a list.
    pub fn list(&self, field: &str) -> &[Value] {
        self.json[field].as_array().map_or(&[], Vec::as_slice)
    }

    /// A file beside its manifest.
    pub fn file(&self, name: &str) -> PathBuf {
        let manifest = self
            .text("manifest_path")
            .expect("every package has a manifest");
        Path::new(manifest).with_file_name(name)
    }

    /// Names of the packages it depends on, each with the dependency as a whole.
    pub fn dependencies(&self) -> impl Iterator<Item = (&str, &Value)> {
        let dependencies = self.list("dependencies").iter();
        dependencies.filter_map(|d| Some((d["name"].as_str()?, d)))
    }
}

/// The root of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Cargo, the one that runs this test.
pub fn cargo() -> Command {
    Command::new(env!("CARGO"))
}

/// All packages of the workspace that are published; maintainers' tools are not.
pub fn packages() -> &'static [Package] {
    static PACKAGES: OnceLock<Vec<Package>> = OnceLock::new();
    PACKAGES.get_or_init(|| {
        let mut all = metadata(&["--no-deps"]);
        all.retain(|package| {
            package.json["publish"]
                .as_array()
                .is_none_or(|p| !p.is_empty())
        });
        all
    })
}

/// All packages that are built on this machine, dependencies of any depth included.
pub fn packages_and_dependencies() -> Vec<Package> {
    let output = Command::new("rustc")
        .arg("-vV")
        .output()
        .expect("rustc runs");
    let version = String::from_utf8(output.stdout).expect("rustc writes text");
    let host = version
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .expect("it names the host");
    metadata(&["--filter-platform", host])
}

fn metadata(arguments: &[&str]) -> Vec<Package> {
    let output = cargo()
        .args(["metadata", "--offline", "--format-version", "1"])
        .args(arguments)
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    let packages = metadata["packages"].as_array().expect("it lists packages");
    packages
        .iter()
        .map(|json| Package { json: json.clone() })
        .collect()
}
