//! The prefix cache: a radix tree whose edges are full pages of tokens.
//!
//! A node stands for the tokens on the way from its root, and holds the cache page of the last 64 of
//! them. Sequences that use a node use all nodes above it, so what nobody uses can be evicted from the
//! leaves upwards, the longest unused first. Sequences with other adapters have other roots: the same
//! tokens have other keys and values there.

use std::collections::{BTreeSet, HashMap};

use ktx_kernels::kv::{PAGE_TOKENS, PageId};
use ktx_ops::lora::ActiveAdapter;

use super::spill::PageKey;
use crate::tokenizer::TokenId;

/// A node's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct NodeId(usize);

/// Adapters and the bits of their factors.
type Root = Vec<(u32, u32)>;

struct Node {
    root: Root,
    parent: Option<NodeId>,
    block: Box<[TokenId]>,
    key: PageKey,
    page: PageId,
    children: HashMap<Box<[TokenId]>, NodeId>,
    users: usize,
    used_at: u64,
}

/// What became of a page that was offered.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Insertion {
    /// The tree has it now, and its giver uses it.
    New(NodeId),
    /// The tree had the same tokens already: the giver uses that node's page from now on.
    Known(NodeId, PageId),
}

/// A page that left the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Evicted {
    pub(super) page: PageId,
    /// What it holds.
    pub(super) key: PageKey,
    /// Whether it was computed without adapters.
    pub(super) is_plain: bool,
}

/// The tree.
#[derive(Default)]
pub(super) struct PrefixCache {
    nodes: Vec<Option<Node>>,
    free: Vec<usize>,
    roots: HashMap<Root, HashMap<Box<[TokenId]>, NodeId>>,
    /// Leaves that nobody uses, the longest unused first.
    evictable: BTreeSet<(u64, NodeId)>,
    unused: usize,
    clock: u64,
}

/// What distinguishes roots.
pub(super) fn root_of(adapters: &[ActiveAdapter]) -> Root {
    adapters
        .iter()
        .map(|a| (a.id.0, a.scale.to_bits()))
        .collect()
}

impl PrefixCache {
    /// Pages that nobody uses.
    pub(super) fn unused(&self) -> usize {
        self.unused
    }

    /// Full pages at the beginning of `tokens` that are there; the last token is never among them,
    /// since its logits are wanted.
    pub(super) fn matched(&self, adapters: &[ActiveAdapter], tokens: &[TokenId]) -> usize {
        self.path(adapters, tokens).len()
    }

    /// Takes the pages at the beginning of `tokens` into use.
    pub(super) fn acquire(
        &mut self,
        adapters: &[ActiveAdapter],
        tokens: &[TokenId],
    ) -> Vec<(NodeId, PageId)> {
        let path = self.path(adapters, tokens);
        path.into_iter()
            .map(|id| {
                self.take(id);
                (id, self.node(id).page)
            })
            .collect()
    }

    fn path(&self, adapters: &[ActiveAdapter], tokens: &[TokenId]) -> Vec<NodeId> {
        let reusable = &tokens[..tokens.len().saturating_sub(1)];
        let mut children = self.roots.get(&root_of(adapters));
        let mut path = Vec::new();
        for block in reusable.chunks_exact(PAGE_TOKENS) {
            let Some(id) = children.and_then(|c| c.get(block)) else {
                break;
            };
            path.push(*id);
            children = Some(&self.node(*id).children);
        }
        path
    }

    /// Offers the page of a full block behind `parent`, whose user the giver is.
    pub(super) fn insert(
        &mut self,
        adapters: &[ActiveAdapter],
        parent: Option<NodeId>,
        block: &[TokenId],
        page: PageId,
    ) -> Insertion {
        let root = root_of(adapters);
        let siblings = match parent {
            Some(parent) => Some(&self.node(parent).children),
            None => self.roots.get(&root),
        };
        if let Some(known) = siblings.and_then(|s| s.get(block)).copied() {
            self.take(known);
            return Insertion::Known(known, self.node(known).page);
        }
        let id = NodeId(self.free.pop().unwrap_or(self.nodes.len()));
        if id.0 == self.nodes.len() {
            self.nodes.push(None);
        }
        let key = self.key(adapters, parent).next(block);
        let block: Box<[TokenId]> = block.into();
        let siblings = match parent {
            Some(parent) => &mut self.node_mut(parent).children,
            None => self.roots.entry(root.clone()).or_default(),
        };
        siblings.insert(block.clone(), id);
        self.nodes[id.0] = Some(Node {
            root,
            parent,
            block,
            key,
            page,
            children: HashMap::new(),
            users: 1,
            used_at: self.clock,
        });
        Insertion::New(id)
    }

    /// The key of a node, or of what stands before all pages.
    pub(super) fn key(&self, adapters: &[ActiveAdapter], node: Option<NodeId>) -> PageKey {
        match node {
            Some(id) => self.node(id).key,
            None => PageKey::root(adapters),
        }
    }

    /// One user of a path less.
    pub(super) fn release(&mut self, path: &[NodeId]) {
        self.clock += 1;
        let clock = self.clock;
        for id in path.iter().rev() {
            let node = self.node_mut(*id);
            node.users -= 1;
            node.used_at = clock;
            if node.users == 0 {
                let is_leaf = node.children.is_empty();
                self.unused += 1;
                if is_leaf {
                    self.evictable.insert((clock, *id));
                }
            }
        }
    }

    /// Takes the page of the leaf that was not used for the longest time out of the tree.
    pub(super) fn evict(&mut self) -> Option<Evicted> {
        let (_, id) = self.evictable.pop_first()?;
        let node = self.nodes[id.0].take()?;
        self.free.push(id.0);
        self.unused -= 1;
        match node.parent {
            Some(parent) => {
                let above = self.node_mut(parent);
                above.children.remove(&node.block);
                if above.users == 0 && above.children.is_empty() {
                    let entry = (above.used_at, parent);
                    self.evictable.insert(entry);
                }
            }
            None => {
                if let Some(children) = self.roots.get_mut(&node.root) {
                    children.remove(&node.block);
                    if children.is_empty() {
                        self.roots.remove(&node.root);
                    }
                }
            }
        }
        Some(Evicted {
            page: node.page,
            key: node.key,
            is_plain: node.root.is_empty(),
        })
    }

    fn take(&mut self, id: NodeId) {
        let node = self.node_mut(id);
        node.users += 1;
        let entry = (node.used_at, id);
        if node.users == 1 {
            self.unused -= 1;
            self.evictable.remove(&entry);
        }
    }

    fn node(&self, id: NodeId) -> &Node {
        self.nodes[id.0]
            .as_ref()
            .expect("a node that is referred to is there")
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id.0]
            .as_mut()
            .expect("a node that is referred to is there")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(pages: &[u32]) -> Vec<TokenId> {
        let page = |p: u32| (0..PAGE_TOKENS as u32).map(move |i| TokenId(p * 100 + i));
        let pages: Vec<Vec<TokenId>> = pages.iter().map(|p| page(*p).collect()).collect();
        pages.concat()
    }

    /// Inserts all full pages of `tokens` with pages from `first` on; gives the path back.
    fn fill(cache: &mut PrefixCache, tokens: &[TokenId], first: u32) -> Vec<NodeId> {
        let mut path = Vec::new();
        for (i, block) in tokens.chunks_exact(PAGE_TOKENS).enumerate() {
            let page = PageId(first + i as u32);
            path.push(match cache.insert(&[], path.last().copied(), block, page) {
                Insertion::New(id) | Insertion::Known(id, _) => id,
            });
        }
        path
    }

    fn evict(cache: &mut PrefixCache) -> Option<PageId> {
        cache.evict().map(|evicted| evicted.page)
    }

    #[test]
    fn a_common_beginning_is_found_up_to_the_page_before_the_last_token() {
        let mut cache = PrefixCache::default();
        let path = fill(&mut cache, &tokens(&[1, 2, 3]), 0);
        cache.release(&path);
        assert_eq!(cache.matched(&[], &tokens(&[1, 2, 3])), 2);
        assert_eq!(cache.matched(&[], &tokens(&[1, 2, 3, 4])), 3);
        assert_eq!(cache.matched(&[], &tokens(&[1, 4])), 1);
        assert_eq!(cache.matched(&[], &tokens(&[2, 3])), 0);
        assert_eq!(cache.matched(&[], &[]), 0);
    }

    #[test]
    fn adapters_share_nothing() {
        let mut cache = PrefixCache::default();
        let path = fill(&mut cache, &tokens(&[1, 2]), 0);
        cache.release(&path);
        let adapter = ActiveAdapter {
            id: ktx_ops::lora::AdapterId(0),
            scale: 1.0,
        };
        assert_eq!(cache.matched(&[adapter], &tokens(&[1, 2, 3])), 0);
    }

    #[test]
    fn leaves_go_first_and_the_longest_unused_before_others() {
        let mut cache = PrefixCache::default();
        let long = fill(&mut cache, &tokens(&[1, 2]), 0);
        let other = fill(&mut cache, &tokens(&[1, 3]), 10);
        assert_eq!(evict(&mut cache), None, "all are in use");
        cache.release(&long);
        assert_eq!(cache.unused(), 1, "the first page is the other's too");
        cache.release(&other);
        assert_eq!(cache.unused(), 3);
        let order: Vec<u32> = std::iter::from_fn(|| evict(&mut cache))
            .map(|p| p.0)
            .collect();
        assert_eq!(order, [1, 11, 0]);
        assert_eq!(cache.unused(), 0);
        assert!(cache.roots.is_empty());
    }

    #[test]
    fn what_is_acquired_stays() {
        let mut cache = PrefixCache::default();
        let path = fill(&mut cache, &tokens(&[1, 2, 3]), 0);
        cache.release(&path);
        let used = cache.acquire(&[], &tokens(&[1, 2, 9]));
        assert_eq!(used.len(), 2);
        assert_eq!(evict(&mut cache), Some(PageId(2)));
        assert_eq!(evict(&mut cache), None);
        let path: Vec<NodeId> = used.into_iter().map(|(id, _)| id).collect();
        cache.release(&path);
        assert_eq!(evict(&mut cache), Some(PageId(1)));
    }

    #[test]
    fn a_page_that_is_known_is_not_kept_twice() {
        let mut cache = PrefixCache::default();
        let first = fill(&mut cache, &tokens(&[1]), 0);
        let again = cache.insert(&[], None, &tokens(&[1]), PageId(5));
        assert_eq!(again, Insertion::Known(first[0], PageId(0)));
        cache.release(&first);
        assert_eq!(evict(&mut cache), None, "the second user is still there");
    }
}
