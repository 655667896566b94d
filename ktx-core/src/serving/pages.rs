//! Where cache pages come from: the free ones first, then those of prefixes that nobody uses.

use ktx_kernels::kv::PageId;

use super::prefix::PrefixCache;
use crate::engine::Runtime;

/// Takes `count` pages, all or none.
pub(super) fn take(
    runtime: &mut Runtime,
    prefix: &mut PrefixCache,
    count: usize,
) -> Option<Vec<PageId>> {
    if available(runtime, prefix) < count {
        return None;
    }
    let mut pages = Vec::with_capacity(count);
    while pages.len() < count {
        match runtime.take_page().or_else(|| prefix.evict()) {
            Some(page) => pages.push(page),
            None => {
                runtime.give_pages(pages);
                return None;
            }
        }
    }
    Some(pages)
}

/// Pages that can be had.
pub(super) fn available(runtime: &Runtime, prefix: &PrefixCache) -> usize {
    runtime.free_pages() + prefix.unused()
}
