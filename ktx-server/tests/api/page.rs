//! The web page, and what it asks the server for.

use serde_json::Value;

use super::{Running, question, with};

/// Experts that a token of the built-in model chooses.
const TOP_K: u64 = 4;

#[test]
fn the_page_is_served_with_all_its_files_and_allows_nothing_else() {
    let server = Running::new();
    let page = server.get("/");
    assert_eq!(page.status, 200);
    assert_eq!(page.headers["content-type"], "text/html; charset=utf-8");
    let policy = &page.headers["content-security-policy"];
    assert!(policy.starts_with("default-src 'none';"), "{policy}");
    assert!(policy.contains("require-trusted-types-for 'script'"));
    assert!(!policy.contains("unsafe") && !policy.contains('*') && !policy.contains("http"));
    assert_eq!(page.headers["x-content-type-options"], "nosniff");
    assert_eq!(page.headers["referrer-policy"], "no-referrer");
    let files: Vec<&str> = page
        .body
        .split('"')
        .filter(|part| part.starts_with("web/"))
        .collect();
    assert!(files.contains(&"web/main.js"), "{files:?}");
    for file in files {
        let reply = server.get(&format!("/{file}"));
        assert_eq!(reply.status, 200, "{file}");
        let kind = match file.rsplit_once('.') {
            Some((_, "js")) => "text/javascript; charset=utf-8",
            Some((_, "css")) => "text/css; charset=utf-8",
            _ => "image/svg+xml",
        };
        assert_eq!(reply.headers["content-type"], kind, "{file}");
        assert_eq!(&reply.headers["content-security-policy"], policy);
    }
}

#[test]
fn a_file_that_the_browser_has_is_not_sent_again() {
    let server = Running::new();
    let first = server.get("/web/main.js");
    let tag = format!("If-None-Match: {}", first.headers["etag"]);
    let again = server.client.send("GET", "/web/main.js", &[&tag], b"");
    assert_eq!((again.status, again.body.as_str()), (304, ""));
    let other = server.client.send("GET", "/web/chat.js", &[&tag], b"");
    assert_eq!(other.status, 200);
}

#[test]
fn no_path_leads_out_of_the_pages_files() {
    let server = Running::new();
    for path in [
        "/web/",
        "/web/index.html",
        "/web/nothing.js",
        "/web/..%2fCargo.toml",
        "/web/%2e%2e/src/lib.rs",
        "/web//etc/passwd",
    ] {
        assert_eq!(server.get(path).status, 404, "{path}");
    }
}

#[test]
fn the_choices_of_experts_are_counted_token_by_token() {
    let server = Running::new();
    let sums = || -> Vec<u64> {
        let view = server.get("/api/ktx/experts").ok();
        let layers = view["layers"].as_array().expect("layers").iter();
        let counts = layers.map(|layer| layer["counts"].as_array().expect("counts"));
        counts
            .map(|all| all.iter().filter_map(Value::as_u64).sum())
            .collect()
    };
    let before = sums();
    assert!(!before.is_empty() && before.iter().all(|sum| *sum == 0));
    let fields = serde_json::json!({"max_tokens": 5, "ignore_eos": true});
    let answer = server.chat(with(question("Why?"), fields)).ok();
    let prompt = answer["usage"]["prompt_tokens"].as_u64().expect("a count");
    // What is generated last is not read again.
    let read = prompt + 5 - 1;
    assert_eq!(sums(), vec![read * TOP_K; before.len()]);
}

#[test]
fn the_plan_says_what_each_device_holds() {
    let server = Running::new();
    let plan = server.get("/api/ktx/plan").ok();
    let devices = plan["devices"].as_array().expect("devices");
    let modules = plan["modules"].as_array().expect("modules").iter();
    let weights: u64 = modules.filter_map(|m| m["bytes"].as_u64()).sum();
    assert_eq!(devices.len(), 1);
    assert_eq!(devices[0]["name"], "cpu");
    assert!(devices[0]["weights"].as_u64() >= Some(weights));
    assert!(devices[0]["cache"].as_u64() > Some(0));
}
