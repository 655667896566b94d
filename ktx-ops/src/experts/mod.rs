//! Routed experts: all of a layer as one operator, the switch between two phases, and the plain list.

mod adapted;
mod host;
mod hot;
mod list;
mod streamed;
mod switch;
mod uses;

pub use host::HostExperts;
pub(crate) use hot::{HotLayer, OpenHot};
pub use hot::{HotReport, HotSet, PartHere};
pub use list::ExpertList;
pub(crate) use streamed::streamed_weights;
pub use switch::KTransformersExperts;
pub use uses::ExpertUses;
