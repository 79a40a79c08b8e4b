//! What no single module can be tested for.

mod simulation;
