//! Every package can be published.

use std::fs;
use std::path::Path;

use crate::metadata::{packages, packages_and_dependencies};

/// Licences that ask for no more than a notice.
const PERMISSIVE: [&str; 12] = [
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn every_package_has_licence_description_keywords_and_rust_version() {
    for package in packages() {
        let name = package.name();
        assert_eq!(package.text("license"), Some("Apache-2.0"), "{name}");
        assert!(
            package.text("description").is_some_and(|d| d.len() > 20),
            "{name} has no description"
        );
        assert!(
            package.text("rust_version").is_some(),
            "{name} states no rust-version"
        );
        for field in ["keywords", "categories"] {
            // The registry takes no more than five.
            assert!(
                (1..=5).contains(&package.list(field).len()),
                "{name}: {field}"
            );
        }
    }
}

#[test]
fn every_package_has_a_readme_with_an_example() {
    for package in packages() {
        let name = package.name();
        let readme = package
            .text("readme")
            .unwrap_or_else(|| panic!("{name} names no readme"));
        let text = read(&package.file(readme));
        assert!(text.starts_with("# "), "the readme of {name} has no title");
        assert!(text.contains("```"), "the readme of {name} has no example");
    }
}

#[test]
fn every_package_carries_the_licence_text() {
    for package in packages() {
        let text = read(&package.file("LICENSE"));
        assert!(
            text.contains("Apache License"),
            "{} has another licence",
            package.name()
        );
    }
}

/// The registry takes no dependency that is a path alone.
#[test]
fn dependencies_between_packages_have_versions() {
    for package in packages() {
        for (name, dependency) in package
            .dependencies()
            .filter(|(_, d)| d["path"].is_string())
        {
            assert_ne!(dependency["req"], "*", "{} on {name}", package.name());
        }
    }
}

#[test]
fn every_dependency_has_a_permissive_licence() {
    for package in packages_and_dependencies() {
        let licence = package.text("license").unwrap_or("none");
        let names = licence
            .split([' ', '/', '(', ')'])
            .filter(|word| !word.is_empty());
        for name in names.filter(|name| !matches!(*name, "AND" | "OR" | "WITH" | "LLVM-exception"))
        {
            assert!(
                PERMISSIVE.contains(&name),
                "{} is under {licence}",
                package.name()
            );
        }
    }
}
