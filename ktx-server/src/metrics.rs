//! `/metrics`: what Prometheus reads, under the names that vLLM uses where the meaning is the same.

use std::fmt::Write;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use ktx_core::kernels::kv::PAGE_TOKENS;
use ktx_core::serving::{Histogram, MetricsSnapshot};

use crate::app::App;

/// Counters, gauges and histograms in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", tag = "server", responses((status = 200, body = String, content_type = "text/plain")))]
pub(crate) async fn metrics(State(app): State<App>) -> impl IntoResponse {
    let text = render(&app.scheduler().metrics(), &app.settings().model_name);
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}

/// Writes metrics of one model.
struct Page<'a> {
    text: String,
    model: &'a str,
}

impl Page<'_> {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a text does not fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.head(name, kind, help);
        let _ = writeln!(self.text, "{name}{{model_name=\"{}\"}} {value}", self.model);
    }

    /// The size of the cache; routers read its labels.
    fn cache(&mut self, pages: usize) {
        let name = "vllm:cache_config_info";
        self.head(name, "gauge", "Pages of the cache, and tokens of a page.");
        let _ = writeln!(
            self.text,
            "{name}{{block_size=\"{PAGE_TOKENS}\",num_gpu_blocks=\"{pages}\",model_name=\"{}\"}} 1",
            self.model
        );
    }

    fn tier(&mut self, name: &str, tier: &str, value: u64) {
        let _ = writeln!(
            self.text,
            "{name}{{tier=\"{tier}\",model_name=\"{}\"}} {value}",
            self.model
        );
    }

    fn histogram(&mut self, name: &str, help: &str, values: &Histogram) {
        self.head(name, "histogram", help);
        let model = self.model;
        for (bound, count) in values.buckets() {
            let _ = writeln!(
                self.text,
                "{name}_bucket{{le=\"{bound}\",model_name=\"{model}\"}} {count}"
            );
        }
        let (count, sum) = (values.count(), values.sum());
        let _ = writeln!(
            self.text,
            "{name}_bucket{{le=\"+Inf\",model_name=\"{model}\"}} {count}\n\
             {name}_sum{{model_name=\"{model}\"}} {sum}\n{name}_count{{model_name=\"{model}\"}} {count}"
        );
    }
}

fn render(metrics: &MetricsSnapshot, model: &str) -> String {
    let escaped = model
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n");
    let mut page = Page {
        text: String::new(),
        model: &escaped,
    };
    let gauges = [
        (
            "vllm:num_requests_running",
            "Requests that are worked on.",
            metrics.running as f64,
        ),
        (
            "vllm:num_requests_waiting",
            "Requests that wait for their turn.",
            metrics.waiting as f64,
        ),
        (
            "vllm:kv_cache_usage_perc",
            "Part of the cache that requests use; 1 is all of it.",
            usage(metrics),
        ),
    ];
    for (name, help, value) in gauges {
        page.one(name, "gauge", help, value);
    }
    page.cache(metrics.pages);
    let counters = [
        (
            "vllm:prompt_tokens_total",
            "Prompt tokens.",
            metrics.prompt_tokens,
        ),
        (
            "vllm:generation_tokens_total",
            "Tokens that were generated.",
            metrics.generated_tokens,
        ),
        (
            "vllm:prefix_cache_queries_total",
            "Prompt tokens that were looked up in the prefix cache.",
            metrics.prompt_tokens,
        ),
        (
            "vllm:prefix_cache_hits_total",
            "Prompt tokens that the prefix cache had.",
            metrics.cached_tokens,
        ),
        (
            "vllm:num_preemptions_total",
            "Requests that gave their cache pages up and were begun again.",
            metrics.preemptions,
        ),
        ("ktx:steps_total", "Forward calls.", metrics.steps),
        (
            "ktx:prefix_cache_forgotten_pages_total",
            "Pages that were forgotten because the disk was too slow for them.",
            metrics.spill.forgotten_pages,
        ),
        (
            "ktx:prefix_cache_rejected_files_total",
            "Files of the prefix cache that were damaged, unfinished, or of another model.",
            metrics.spill.rejected_files,
        ),
        (
            "ktx:requests_cancelled_total",
            "Requests whose clients went away.",
            metrics.cancelled,
        ),
        (
            "ktx:requests_failed_total",
            "Requests that failed in the engine.",
            metrics.failed,
        ),
    ];
    for (name, help, value) in counters {
        page.one(name, "counter", help, value as f64);
    }
    let name = "vllm:request_success_total";
    page.head(
        name,
        "counter",
        "Requests that were answered, by what ended them.",
    );
    for (reason, count) in [("stop", metrics.stopped), ("length", metrics.full_length)] {
        let _ = writeln!(
            page.text,
            "{name}{{finished_reason=\"{reason}\",model_name=\"{escaped}\"}} {count}"
        );
    }
    let name = "ktx:prefix_cache_returned_tokens_total";
    page.head(
        name,
        "counter",
        "Prompt tokens that came back from where the cache spills.",
    );
    let spill = &metrics.spill;
    for (tier, tokens) in [
        ("memory", spill.memory_tokens),
        ("directory", spill.directory_tokens),
    ] {
        page.tier(name, tier, tokens);
    }
    let name = "ktx:prefix_cache_spilled_bytes";
    page.head(name, "gauge", "Bytes of pages where the cache spills.");
    for (tier, bytes) in [
        ("memory", spill.memory_bytes),
        ("directory", spill.directory_bytes),
    ] {
        page.tier(name, tier, bytes);
    }
    let histograms = [
        (
            "vllm:time_to_first_token_seconds",
            "Time from a request to its first token.",
            &metrics.first_token_time,
        ),
        (
            "vllm:inter_token_latency_seconds",
            "Time from one token to the next.",
            &metrics.next_token_time,
        ),
        (
            "vllm:e2e_request_latency_seconds",
            "Time from a request to its end.",
            &metrics.request_time,
        ),
        (
            "vllm:request_queue_time_seconds",
            "Time that a request waited for its turn.",
            &metrics.queue_time,
        ),
    ];
    for (name, help, values) in histograms {
        page.histogram(name, help, values);
    }
    page.text
}

fn usage(metrics: &MetricsSnapshot) -> f64 {
    metrics.used_pages as f64 / metrics.pages.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_and_every_line_is_a_comment_or_a_value() {
        let counts = MetricsSnapshot {
            pages: 48,
            ..MetricsSnapshot::default()
        };
        let text = render(&counts, "a\"b");
        assert!(text.contains("block_size=\"64\",num_gpu_blocks=\"48\""));
        assert!(text.contains("vllm:num_requests_running{model_name=\"a\\\"b\"} 0\n"));
        for line in text.lines() {
            let value = line.rsplit(' ').next().unwrap_or_default();
            assert!(
                line.starts_with("# ") || value.parse::<f64>().is_ok(),
                "{line}"
            );
        }
    }
}
