//! Newtypes for everything the mesh counts. They cross crates and mailboxes;
//! on the wire they are the plain integers of the `.proto` files.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A transformer layer, counted from 0 over dense and MoE layers alike.
    LayerId(u32)
);
id!(
    /// A routed expert within its layer.
    ExpertId(u32)
);
id!(
    /// One (frame's rows, one node) exchange; unique within a router's life.
    Ticket(u64)
);
id!(
    /// The n-th time a ticket is sent. A reply to another attempt is discarded.
    Attempt(u32)
);
id!(
    /// A complete map expert → owners and version. Rises monotonically.
    Epoch(u64)
);
