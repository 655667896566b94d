//! The reference in docs/api.md is what `/openapi.json` says. After a change of the API,
//! `KTX_UPDATE_DOCS=1 cargo test -p ktx-server reference` writes it anew.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use super::Running;

const BEGIN: &str = "<!-- from /openapi.json -->\n";

/// The text of a summary or description on one line.
fn text(value: &Value) -> String {
    let text = value.as_str().unwrap_or_default();
    text.split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .replace('|', "\\|")
}

/// What a schema allows, in a word or a few.
fn kind(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str() {
        return name.rsplit('/').next().unwrap_or_default().to_owned();
    }
    for key in ["oneOf", "anyOf", "allOf"] {
        if let Some(all) = schema[key].as_array() {
            let kinds = all.iter().map(kind).filter(|kind| kind != "null");
            return kinds.collect::<Vec<_>>().join(" or ");
        }
    }
    let types: Vec<&str> = match &schema["type"] {
        Value::String(one) => vec![one],
        Value::Array(all) => all.iter().filter_map(Value::as_str).collect(),
        _ => return "any".to_owned(),
    };
    let types = types.into_iter().filter(|name| *name != "null");
    let types = types.map(|name| match name {
        "array" => format!("array of {}", kind(&schema["items"])),
        name => name.to_owned(),
    });
    types.collect::<Vec<_>>().join(" or ")
}

fn fields(reference: &mut String, schema: &Value) {
    let required = schema["required"].as_array();
    let is_required = |name: &str| required.is_some_and(|all| all.iter().any(|r| r == name));
    let Some(properties) = schema["properties"].as_object() else {
        return;
    };
    reference.push_str("\n| field | type | |\n|---|---|---|\n");
    for (name, field) in properties {
        let star = if is_required(name) { ", required" } else { "" };
        let (kind, about) = (kind(field), text(&field["description"]));
        let _ = writeln!(reference, "| `{name}` | {kind}{star} | {about} |");
    }
}

/// All routes with the fields of their requests, and the fields of the types that these name.
fn reference(document: &Value) -> String {
    let mut reference = String::new();
    let paths = document["paths"].as_object().expect("paths");
    for (path, methods) in paths {
        for (method, route) in methods.as_object().expect("methods") {
            let method = method.to_uppercase();
            let summary = text(&route["summary"]);
            let _ = writeln!(reference, "\n### `{method} {path}`\n\n{summary}");
            let body = &route["requestBody"]["content"]["application/json"]["schema"];
            if body.is_object() {
                let _ = writeln!(
                    reference,
                    "\nThe request is a [{0}](#{1}).",
                    kind(body),
                    kind(body).to_lowercase()
                );
            }
        }
    }
    let schemas = document["components"]["schemas"]
        .as_object()
        .expect("schemas");
    for (name, schema) in schemas {
        let about = text(&schema["description"]);
        let _ = writeln!(reference, "\n### {name}\n\n{about}");
        fields(&mut reference, schema);
    }
    reference
}

#[test]
fn the_reference_is_what_the_server_says_of_itself() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/api.md");
    let written = std::fs::read_to_string(&page).expect("docs/api.md is there");
    let (before, after) = written
        .split_once(BEGIN)
        .expect("docs/api.md has a reference");
    let wanted = reference(&Running::new().get("/openapi.json").ok());
    if std::env::var_os("KTX_UPDATE_DOCS").is_some() {
        std::fs::write(&page, format!("{before}{BEGIN}{wanted}")).expect("docs/api.md is written");
        return;
    }
    assert!(
        after == wanted,
        "docs/api.md is behind the API: KTX_UPDATE_DOCS=1 cargo test -p ktx-server reference"
    );
}
