//! Routed experts: all of a layer as one operator, the switch between two phases, and the plain list.

mod adapted;
mod host;
mod list;
mod streamed;
mod switch;
mod uses;

pub use host::HostExperts;
pub use list::ExpertList;
pub use switch::KTransformersExperts;
pub use uses::ExpertUses;
