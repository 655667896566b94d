//! The web page, embedded in the program: `/`, and the files of `web/` below `/web/`.

use std::hash::{DefaultHasher, Hash, Hasher};

use axum::extract::Path;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};

use crate::error::ApiError;

/// Nothing is loaded from elsewhere, nothing in the page itself is a script or a style, no text becomes
/// markup or code (trusted types), and no other page may frame this one.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";

const HEADERS: [(HeaderName, &str); 6] = [
    (CONTENT_SECURITY_POLICY, POLICY),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (REFERRER_POLICY, "no-referrer"),
    (CACHE_CONTROL, "no-cache"),
    (
        HeaderName::from_static("cross-origin-opener-policy"),
        "same-origin",
    ),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
];

const HTML: &str = "text/html; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const IMAGE: &str = "image/svg+xml";

/// Files by name, with their types.
macro_rules! files {
    ($($name:literal: $kind:expr),* $(,)?) => {
        &[$(($name, $kind, include_str!(concat!("../web/", $name)))),*]
    };
}

const INDEX: &str = include_str!("../web/index.html");

const FILES: &[(&str, &str, &str)] = files! {
    "answer.js": SCRIPT,
    "api.js": SCRIPT,
    "chat.css": STYLE,
    "chat.js": SCRIPT,
    "dom.js": SCRIPT,
    "experts.js": SCRIPT,
    "highlight.js": SCRIPT,
    "icon.svg": IMAGE,
    "inline.js": SCRIPT,
    "key.js": SCRIPT,
    "main.js": SCRIPT,
    "markdown.js": SCRIPT,
    "message.js": SCRIPT,
    "plan.css": STYLE,
    "plan.js": SCRIPT,
    "plan_table.js": SCRIPT,
    "plan_tree.js": SCRIPT,
    "settings.js": SCRIPT,
    "sidebar.js": SCRIPT,
    "store.js": SCRIPT,
    "style.css": STYLE,
    "theme.js": SCRIPT,
    "treemap.js": SCRIPT,
};

/// The page. It holds no secret, so it needs no key; what it asks the server for does.
pub(crate) async fn index(headers: HeaderMap) -> Response {
    answer(&headers, HTML, INDEX)
}

/// A file of the page: one of a list, whatever the path says.
pub(crate) async fn file(Path(name): Path<String>, headers: HeaderMap) -> Response {
    match FILES.iter().find(|(known, ..)| *known == name) {
        Some((_, kind, text)) => answer(&headers, kind, text),
        None => ApiError::not_found().into_response(),
    }
}

/// The file, or that the browser's copy is the present one: it asks each time, and another version of the
/// program has other files.
fn answer(headers: &HeaderMap, kind: &'static str, text: &'static str) -> Response {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let tag = format!("\"{:016x}\"", hasher.finish());
    let known = headers.get(IF_NONE_MATCH).and_then(|v| v.to_str().ok());
    let is_known = known.is_some_and(|known| known.split(',').any(|one| one.trim() == tag));
    match is_known {
        true => (StatusCode::NOT_MODIFIED, HEADERS, [(ETAG, tag)]).into_response(),
        false => (
            HEADERS,
            [(CONTENT_TYPE, kind.to_owned()), (ETAG, tag)],
            text,
        )
            .into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What stands between `before` and the next quotation mark, everywhere in a text.
    fn quoted<'a>(text: &'a str, before: &'a str) -> impl Iterator<Item = &'a str> {
        let parts = text.split(before).skip(1);
        parts.filter_map(|part| part.split_once('"').map(|(name, _)| name))
    }

    fn has(name: &str) -> bool {
        FILES.iter().any(|(known, ..)| *known == name)
    }

    #[test]
    fn all_that_the_page_loads_is_embedded() {
        for name in quoted(INDEX, "=\"web/") {
            assert!(has(name), "index.html: {name}");
        }
        for (file, _, text) in FILES.iter().filter(|(_, kind, _)| *kind == SCRIPT) {
            let imports = quoted(text, "from \"./").chain(quoted(text, "import(\"./"));
            for name in imports {
                assert!(has(name), "{file}: {name}");
            }
        }
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/web");
        for entry in std::fs::read_dir(folder).expect("the folder is there") {
            let name = entry.expect("it can be read").file_name();
            let name = name.to_string_lossy();
            assert!(name == "index.html" || has(&name), "{name} is not served");
        }
    }

    #[test]
    fn the_page_keeps_its_own_policy() {
        for forbidden in [" style=", " onclick=", "<style", "javascript:", "<script>"] {
            assert!(!INDEX.contains(forbidden), "{forbidden}");
        }
        for (file, _, text) in FILES {
            let markup = [
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
            ];
            for forbidden in markup {
                assert!(!text.contains(forbidden), "{file}: {forbidden}");
            }
        }
        let texts = FILES.iter().map(|(_, _, text)| *text).chain([INDEX]);
        for text in texts {
            let mut addresses = quoted(text, "\"http://").chain(quoted(text, "\"https://"));
            let foreign = addresses.find(|address| !address.starts_with("www.w3.org/"));
            assert_eq!(foreign, None);
        }
    }
}
