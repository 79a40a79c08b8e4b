//! What a process needs to be a node of the mesh. Rooms:
//!
//! - [`transport`]: endpoints, listeners, channels; the one place that opens sockets
//! - [`tls`]: identities, handshakes, certificates that are replaced while running
//! - [`authz`]: which role may call which method
//! - [`link`]: the actor that keeps one data stream to one expert node
//! - [`membership`]: the list of nodes, which grows and shrinks
//! - [`registry`]: members and the controller's election, where etcd keeps them
//! - [`pump`]: the runtime that a computing thread drives itself
//! - [`near`]: Unix sockets between processes of one host that are known by host:port
//! - [`shared`]: rows and messages in memory that processes of one host share
//! - [`placement`]: which live node owns which expert, and the pure planner
//! - [`supervise`]: actors rebuilt from a factory when they stop or panic
//! - [`lifecycle`]: shutdown and readiness
//! - [`failpoint`]: panics on demand, in debug builds
//! - [`admin`]: `/metrics`, `/healthz`, `/readyz` of router and expert node
//! - [`metrics`], [`telemetry`]: Prometheus registry; logs and OpenTelemetry spans
//!
//! Nothing here knows the model's maths.

#![deny(unsafe_code)]

pub mod admin;
pub mod authz;
pub mod failpoint;
pub mod lifecycle;
pub mod link;
pub mod membership;
pub mod metrics;
pub mod near;
pub mod placement;
pub mod pump;
pub mod registry;
pub mod shared;
pub mod supervise;
pub mod telemetry;
pub mod tls;
pub mod transport;
