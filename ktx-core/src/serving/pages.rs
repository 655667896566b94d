//! Where cache pages come from: the free ones first, then those of prefixes that nobody uses. What these
//! hold is kept elsewhere, if there is such a place.

use ktx_kernels::kv::PageId;

use super::prefix::{Evicted, PrefixCache};
use super::spill::Spill;
use crate::engine::Runtime;

/// Takes `count` pages, all or none.
pub(super) fn take(
    runtime: &mut Runtime,
    prefix: &mut PrefixCache,
    spill: Option<&mut Spill>,
    count: usize,
) -> Option<Vec<PageId>> {
    if available(runtime, prefix) < count {
        return None;
    }
    let mut spill = spill;
    let mut pages = Vec::with_capacity(count);
    while pages.len() < count {
        let free = runtime.take_page();
        let page = free.or_else(|| evict(runtime, prefix, spill.as_deref_mut()));
        let Some(page) = page else {
            runtime.give_pages(pages);
            return None;
        };
        pages.push(page);
    }
    Some(pages)
}

/// Takes a page from the tree, after a copy of what it holds.
pub(super) fn evict(
    runtime: &mut Runtime,
    prefix: &mut PrefixCache,
    spill: Option<&mut Spill>,
) -> Option<PageId> {
    let Evicted {
        page,
        key,
        is_plain,
    } = prefix.evict()?;
    if let Some(spill) = spill {
        match runtime.read_page(page) {
            Ok(bytes) => spill.put(key, bytes, is_plain),
            Err(error) => tracing::warn!("a cache page is not kept: {error}"),
        }
    }
    Some(page)
}

/// Pages that can be had.
pub(super) fn available(runtime: &Runtime, prefix: &PrefixCache) -> usize {
    runtime.free_pages() + prefix.unused()
}
